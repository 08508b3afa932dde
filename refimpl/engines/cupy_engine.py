"""The engine for NVIDIA GPUs: matrix products through cuBLAS, everything else by the kernels of ``cupy_kernels``.

cuBLAS is called through `_multiply`, not through ``cupy.matmul``: that copies transposed and strided stacks first and
cannot scale. Products of float16 are summed in float32; TF32 is never used. The fused ops hold a few rows of the map at
a time, at most `SCRATCH_BYTES`, in float32 where the arrays are float16. Ops are queued on the current stream and
return at once; `to_numpy`, `elapsed_s` and `synchronize` wait.

A hidden weight is not read, but a NaN or infinite value at a hidden key reaches the rows of its block (0 times NaN).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from refimpl.engines.chunked import chunked_linear_attention
from refimpl.engines.cupy_kernels import C_TYPES, SOURCE, WIDE, Grid, instances, row_threads, rows_by_columns
from refimpl.engines.numpy_engine import NumpyEngine, check_band, check_keys_mask
from refimpl.engines.protocol import Array
from refimpl.errors import MissingDependencyError, ShapeError, UnsupportedError
from refimpl.memo.mapping import check_rows

SCRATCH_BYTES = 64 << 20  # what a fused op holds of the map, about the second-level cache of a large GPU
BLOCK_ROWS = 128  # query rows that a block of the fused op has if they fit: enough to keep cuBLAS efficient
CAUSAL_ROWS = 256  # query rows per product of a materialised causal map: hidden keys beyond a block are skipped

Strides = tuple[int, ...]


class CupyEngine(NumpyEngine):
    """The op vocabulary on the current CUDA device; an op that is not here is the equation over CuPy arrays."""

    name = "cupy"

    def __init__(self) -> None:
        super().__init__(_require_cupy())
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Any] = {}

    # --- services -----------------------------------------------------------------------------------------------

    def to_numpy(self, array: Array) -> Array:
        return self.xp.asnumpy(array)

    def mark(self) -> Any:
        event = self.xp.cuda.Event()
        event.record()
        return event

    def elapsed_s(self, start: Any, stop: Any) -> float:
        stop.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, stop)) / 1e3

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""
        self.xp.cuda.Device().synchronize()

    def free_bytes(self) -> int:
        """Device memory that can still be allocated, CuPy's pool included."""
        free, _ = self.xp.cuda.runtime.memGetInfo()
        return int(free + self.xp.get_default_memory_pool().free_bytes())

    def device_name(self) -> str:
        """The GPU's name, such as "NVIDIA H100 80GB HBM3"."""
        name = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.Device().id)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    def split_heads(self, x: Array, heads: int) -> Array:
        batch, length, width = x.shape
        return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    def merge_heads(self, x: Array) -> Array:
        batch, heads, length, width = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    # --- linear maps --------------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        rows, (d_out, d_in) = math.prod(x.shape[:-1]), weight.shape
        if x.shape[-1] != d_in:
            raise ShapeError(f"x has shape {x.shape}; the weight {weight.shape} needs rows of {d_in}")
        out = self.xp.empty((*x.shape[:-1], d_out), x.dtype)
        if bias is not None:
            out[...] = self._operand(x, bias, (d_out,))  # the product is added to it
        self._multiply(
            x.reshape(rows, d_in), weight, out.reshape(rows, d_out), transposed=True, beta=float(bias is not None)
        )
        return out

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        y = self.linear(x, weight, bias)  # (..., sum of widths); the parts are views of it
        ends = itertools.accumulate(widths)
        return tuple(y[..., end - width : end] for end, width in zip(ends, widths, strict=True))

    def conv1d(self, x: Array, weight: Array, bias: Array, stride: int) -> Array:
        (batch, length, d_in), (d_out, kernel, _) = x.shape, weight.shape
        if weight.shape[2] != d_in:
            raise ShapeError(f"x has shape {x.shape}; the weight {weight.shape} needs rows of {weight.shape[2]}")
        steps = -(-length // stride)
        windows = self.xp.empty((batch, steps, kernel * d_in), x.dtype)
        x, _, _, row = self._rows(x)
        shape = rows_by_columns(batch * steps, kernel * d_in)
        self._launch("windows", x, shape, x, windows, batch * steps, d_in, row, length, steps, kernel, stride)
        return self.linear(windows, weight.reshape(d_out, kernel * d_in), bias)

    def depthwise_conv(self, x: Array, weight: Array, bias: Array) -> Array:
        kernel, width = weight.shape[0], x.shape[-1]
        operands = self._operand(x, weight, (kernel, width)), self._operand(x, bias, (width,))
        return self._by_rows("depthwise", x, operands, x.shape[1], kernel)

    def block_linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        blocks, d_out, d_in = weight.shape
        if x.shape[-1] != blocks * d_in:
            raise ShapeError(f"x has shape {x.shape}; the weight {weight.shape} needs rows of {blocks * d_in}")
        out = self.xp.empty((*x.shape[:-1], blocks * d_out), x.dtype)
        if bias is not None:
            out[...] = self._operand(x, bias, (blocks * d_out,))  # the products are added to it
        rows = math.prod(x.shape[:-1])
        parts = x.reshape(rows, blocks, d_in).transpose(1, 0, 2)  # (n, rows, q)
        products = out.reshape(rows, blocks, d_out).transpose(1, 0, 2)  # (n, rows, p)
        self._multiply(parts, weight, products, transposed=True, beta=float(bias is not None))
        return out

    # --- norms --------------------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self._norm("layer_norm", x, (weight, bias), eps)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self._norm("rms_norm", x, (weight,), eps)

    def batch_norm(self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
        operands = tuple(self._operand(x, y, x.shape[-1:]) for y in (mean, variance, weight, bias))
        return self._by_rows("batch_norm", x, operands, float(eps))

    def _norm(self, step: str, x: Array, operands: tuple[Array, ...], eps: float) -> Array:
        operands = tuple(self._operand(x, y, x.shape[-1:]) for y in operands)
        x, rows, width, stride = self._rows(x)
        out = self.xp.empty(x.shape, x.dtype)
        self._launch(step, x, ((rows,), (row_threads(width),)), x, *operands, out, width, stride, float(eps))
        return out

    # --- elementwise --------------------------------------------------------------------------------------------

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        if y.ndim == 0 or y.shape != x.shape[-y.ndim :]:
            y = self.xp.broadcast_to(y, x.shape)
        y = self._operand(x, y, y.shape)
        period = max(1, math.prod(y.shape[:-1]))
        return self._by_rows("add", x, (y,), period, float(scale))

    def gelu(self, x: Array) -> Array:
        return self._by_rows("activation", x, function="Gelu")

    def gelu_tanh(self, x: Array) -> Array:
        return self._by_rows("activation", x, function="GeluTanh")

    def silu(self, x: Array) -> Array:
        return self._by_rows("activation", x, function="Silu")

    def relu(self, x: Array) -> Array:
        return self._by_rows("activation", x, function="Relu")

    def glu(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        return self._gate(x[..., :half], x[..., half:], swish=False)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._gate(up, gate, swish=True)

    def _gate(self, value: Array, gate: Array, swish: bool) -> Array:
        if value.shape != gate.shape or value.dtype != gate.dtype:
            raise ShapeError(f"{value.shape} {value.dtype} does not go with {gate.shape} {gate.dtype}")
        value, rows, width, stride = self._rows(value)
        gate, _, _, gate_stride = self._rows(gate)
        out = self.xp.empty(value.shape, value.dtype)
        shape = rows_by_columns(rows, width)
        self._launch("gate", value, shape, value, gate, out, rows, width, stride, gate_stride, int(swish))
        return out

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        batch, heads, length, width = x.shape
        rows, half = batch * heads * length, width // 2
        cos, sin = self._operand(x, cos, (length, half)), self._operand(x, sin, (length, half))
        x = self._unit_columns(x)
        out = self.xp.empty(x.shape, x.dtype)
        sizes = rows, half, heads, length, *_element_strides(x)[:3], int(interleaved)
        self._launch("rotary", x, rows_by_columns(rows, half), x, cos, sin, out, *sizes)
        return out

    def concat(self, parts: tuple[Array, ...], axis: int) -> Array:
        return self.xp.concatenate(list(parts), axis=axis)

    def elu_plus_one(self, x: Array) -> Array:
        zero = x.dtype.type(0)
        return self.xp.exp(self.xp.minimum(x, zero)) + self.xp.maximum(x, zero)

    def append(self, store: Array, new: Array, start: int) -> Array:
        stop = start + new.shape[2]
        if start < 0 or stop > store.shape[2]:
            raise ShapeError(f"append: rows {start} to {stop - 1} of new {new.shape} are not in store {store.shape}")
        rows = store[:, :, start:stop]
        rows[...] = self._operand(store, new, rows.shape)
        return store[:, :, :stop]

    def erf(self, x: Array) -> Array:
        return import_module("cupyx.scipy.special").erf(x)

    # --- stored maps --------------------------------------------------------------------------------------------

    def max_pool(self, x: Array) -> Array:
        rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        tall = self.xp.maximum(x[:, 0:rows:2, :columns], x[:, 1:rows:2, :columns])  # (B, T // 2, d)
        return self.xp.maximum(tall[:, :, 0::2], tall[:, :, 1::2])

    def nearest(self, x: Array, points: Array) -> tuple[Array, Array]:
        if x.shape[1:] != points.shape[1:] or not len(points):
            raise ShapeError(
                f"nearest: x has shape {x.shape}, points {points.shape}; it takes (B, w) and (N, w), N > 0"
            )
        squared = self.xp.empty((len(x), len(points)), x.dtype)
        for b in range(len(x)):
            difference = points - x[b]  # (N, w)
            squared[b] = (difference * difference).sum(axis=-1)
        return self.xp.sqrt(squared.min(axis=1)), squared.argmin(axis=1)

    def search_graph(self, x: Array, index: Any) -> tuple[Array, Array]:
        distances, rows = index.search(self.to_numpy(x))
        return self.xp.asarray(distances), self.xp.asarray(rows)

    def fetch(self, records: Any, rows: tuple[int | None, ...], transfer: str) -> Array:
        out = self.xp.empty((len(rows), *records.layout.shape), records.layout.dtype)
        for b, row in enumerate(rows):
            if row is not None:
                out[b] = self.xp.asarray(records.array[row])  # either way it crosses the bus once
        return out

    def take_rows(self, x: Array, rows: tuple[int, ...]) -> Array:
        return self.xp.concatenate([x[b : b + 1] for b in rows]) if rows else x[:0]

    def scatter(self, store: Array, new: Array, rows: tuple[int, ...]) -> Array:
        check_rows("scatter", store, new, rows)
        for i, b in enumerate(rows):
            store[b] = new[i]
        return store

    # --- attention ----------------------------------------------------------------------------------------------
    # Stacks of products have the batch axes (B, Hkv, G), G = H / Hkv query heads on one key head.

    def scores(self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
        batch, heads, q_len, _ = q.shape
        groups, k_len = k.shape[1:3]
        stack = self.xp.empty((batch, groups, heads // groups, q_len, k_len), q.dtype)
        q, k = _grouped(q, groups), k[:, :, None]
        for rows, seen in query_blocks(q_len, k_len, CAUSAL_ROWS if causal else q_len, causal):
            products = stack[:, :, :, rows, :seen]
            self._multiply(q[:, :, :, rows], k[:, :, :, :seen], products, transposed=True, alpha=scale)
        s = stack.reshape(batch, heads, q_len, k_len)
        if causal or mask is not None:
            self._hide_keys(s, causal, mask)
        return s

    def add_relative(self, scores: Array, position: Array) -> Array:
        batch, heads, length, keys = scores.shape
        if position.shape != (batch, heads, length, 2 * length - 1) or length != keys:
            raise ShapeError(f"position scores {position.shape} do not go with scores {scores.shape}")
        out = self.xp.empty(scores.shape, scores.dtype)
        self._add_relative(scores, position, out)
        return out

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        out = self.xp.empty(scores.shape, scores.dtype)
        self._softmax(scores, out, *_visible(scores, causal), None)
        return out

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        batch, heads, q_len, k_len = weights.shape
        out, stack = self._heads_last(batch, heads, q_len, v)
        weights, v = _grouped(weights, v.shape[1]), v[:, :, None]
        if not causal:
            self._multiply(weights, v, stack)
            return out
        for rows, seen in query_blocks(q_len, k_len, CAUSAL_ROWS, causal):
            all_see = rows.start + 1 + k_len - q_len  # keys that every row of the block sees
            self._multiply(weights[:, :, :, rows, :all_see], v[:, :, :, :all_see], stack[:, :, :, rows])
            corner = self._strictly_lower(weights[:, :, :, rows, all_see:seen])
            self._multiply(corner, v[:, :, :, all_see:seen], stack[:, :, :, rows], beta=1.0)
        return out

    def attention(
        self, q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False,
        mask: Array | None = None,
    ) -> Array:  # fmt: skip
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        return self._fused(q, k, v, scale, causal, mask)

    def relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        return self._fused(q, k, v, scale, causal, mask, (q_position, p[None]))

    def local_attention(
        self, q: Array, k: Array, v: Array, window: int, scale: float, causal: bool = False, mask: Array | None = None
    ) -> Array:
        check_band("local_attention", q, k, window)
        return self._fused(q, k, v, scale, causal, mask, window=window)

    def local_relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, window: int, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        check_band("local_relative_attention", q, k, window)
        return self._fused(q, k, v, scale, causal, mask, (q_position, p[None]), window)

    def project_length(self, x: Array, weight: Array, mask: Array | None = None) -> Array:
        check_keys_mask("project_length", mask, x)
        x = x if mask is None else self._only_seen(x, mask)
        out = self.xp.empty((*x.shape[:2], len(weight), x.shape[3]), x.dtype)
        self._multiply(weight[None, None], x, out)
        return out

    def linear_attention(self, q: Array, k: Array, v: Array, causal: bool = False, mask: Array | None = None) -> Array:
        check_keys_mask("linear_attention", mask, k)
        k = k if mask is None else self._only_seen(k, mask)
        if causal:
            check_band("linear_attention", q, k, 0)
        wide = WIDE[_dtype(q)]  # sums over all keys leave the range of float16
        out = chunked_linear_attention(self.xp, q.astype(wide), k.astype(wide), v.astype(wide), causal)
        return out.astype(q.dtype, copy=False)

    # --- selection ----------------------------------------------------------------------------------------------

    def top(self, z: Array, n: int) -> Array:
        width = z.shape[-1]
        smallest = self.xp.partition(z, width - n, axis=-1)[..., width - n : width - n + 1]  # the n-th largest
        larger, tied = z > smallest, z == smallest
        wanted = n - larger.sum(-1, keepdims=True)  # of those that tie, the first
        chosen = larger | (tied & (self.xp.cumsum(tied, axis=-1) <= wanted))  # n in each row
        return self.xp.nonzero(chosen)[-1].reshape(*z.shape[:-1], n)

    def refine(self, z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Array:
        n, (width, depth) = ids.shape[-1], weight.shape
        if z.shape[-1] != width or g.shape[-1] != depth or not z.flags.c_contiguous:
            raise ShapeError(f"refine: z {z.shape} in row-major order and g {g.shape} do not go with {weight.shape}")
        rows = ids.size // n
        logits, chosen = z.reshape(rows, width), ids.reshape(rows, n)  # the first is a view
        inner = self.xp.ascontiguousarray(g).reshape(rows, 1, depth)
        size = max(1, SCRATCH_BYTES // (n * depth * z.dtype.itemsize))
        for first in range(0, rows, size):
            part = slice(first, min(first + size, rows))
            products = self.xp.empty((part.stop - first, 1, n), z.dtype)
            self._multiply(inner[part], weight[chosen[part]], products, transposed=True)
            here = self.xp.arange(first, part.stop)[:, None], chosen[part]
            logits[here] = products[:, 0] if replace else logits[here] + products[:, 0]
        return z

    # --- shared steps -------------------------------------------------------------------------------------------

    def _fused(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None,
        position: tuple[Array, Array] | None = None, window: int | None = None,
    ) -> Array:  # fmt: skip
        """Attention by blocks: scores of a few rows, their softmax, their product with the values.

        Within a band, a block of rows meets the keys that any of them sees; those that one row does not see are masked.
        """
        (batch, heads, q_len, _), (groups, k_len) = q.shape, k.shape[1:3]
        out, stack = self._heads_last(batch, heads, q_len, v)
        mask = None if mask is None else self.xp.broadcast_to(mask, (batch, heads, q_len, k_len))
        q, k, v = _grouped(q, groups), self._per_batch(k, batch), self._per_batch(v, batch)
        row_bytes = map_row_bytes(k_len, q.dtype.name, position is not None)
        for b, g, h in head_blocks(batch, groups, heads // groups, q_len, row_bytes):
            size = rows_that_fit((b.stop - b.start) * (h.stop - h.start), q_len, row_bytes)
            size = size if window is None else min(size, max(BLOCK_ROWS, window))
            for rows, seen in query_blocks(q_len, k_len, size, causal):
                keys = slice(0, seen) if window is None else band_of(rows, q_len, k_len, window, seen)
                s = self._wide_products(q[b, g, :, rows], k[b, g, :, keys], scale)  # (b, g, G, rows, keys)
                if position is not None:
                    q_position, p = (_grouped(x, groups) for x in position)
                    self._add_position(s, q_position[b, g, :, rows], p[:, g], scale, rows, keys.start)
                weights = s if s.dtype == q.dtype else self.xp.empty(s.shape, q.dtype)
                part = None if mask is None else mask[b, h, rows, keys]
                if window is not None:
                    part = self._near(rows, keys, k_len - q_len, window) & (True if part is None else part)
                first = rows.start + 1 + k_len - q_len - keys.start if causal else k_len  # keys that the first row sees
                self._softmax(_as_map(s), _as_map(weights), first, int(causal), part)
                self._multiply(weights, v[b, g, :, keys], stack[b, g, :, rows])
        return out

    def _near(self, rows: slice, keys: slice, shift: int, window: int) -> Array:
        """True where a key is at most `window` positions from its row: (1, 1, rows, keys)."""
        positions = self.xp.arange(rows.start + shift, rows.stop + shift)[:, None]
        return (abs(self.xp.arange(keys.start, keys.stop) - positions) <= window)[None, None]

    def _add_position(self, s: Array, q: Array, p: Array, scale: float, rows: slice, first: int) -> None:
        """Add ``scale q_i . p[T - 1 - i + j]`` to scores (b, g, G, rows, keys) of these rows and keys from `first`."""
        length, keys = (p.shape[3] + 1) // 2, s.shape[-1]
        start = length - rows.stop + first
        met = p[:, :, :, start : start + rows.stop - rows.start + keys - 1]  # (1, g, G, rows + keys - 1, D)
        shifted = self._wide_products(q, met, scale)  # (b, g, G, rows, rows + keys - 1)
        self._add_relative(_as_map(s), _as_map(shifted), s)

    def _wide_products(self, q: Array, k: Array, scale: float) -> Array:
        """``scale q kᵀ`` in the dtype that float16 is computed in."""
        s = self.xp.empty((*q.shape[:-1], k.shape[-2]), WIDE[_dtype(q)])
        self._multiply(q, k, s, transposed=True, alpha=scale)
        return s

    def _heads_last(self, batch: int, heads: int, rows: int, v: Array) -> tuple[Array, Array]:
        """Zeros (B, H, T, D) that lie in memory as (B, T, H, D), so that `merge_heads` need not copy; and the same
        memory as a stack (B, Hkv, G, T, D)."""
        groups, width = v.shape[1], v.shape[3]
        out = self.xp.zeros((batch, rows, heads, width), v.dtype)
        stack = out.reshape(batch, rows, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
        return out.transpose(0, 2, 1, 3), stack

    def _per_batch(self, x: Array, batch: int) -> Array:
        """Keys or values (B or 1, Hkv, T, D) as (B, Hkv, 1, T, D), without a copy."""
        return self.xp.broadcast_to(x, (batch, *x.shape[1:]))[:, :, None]

    # --- launches -----------------------------------------------------------------------------------------------

    def _hide_keys(self, s: Array, causal: bool, mask: Array | None) -> None:
        batch, heads, block, keys = s.shape
        rows = batch * heads * block
        pointer, *masked = self._mask(s, mask)
        sizes = rows, keys, heads, block, *_visible(s, causal), *masked
        self._launch("hide", s, rows_by_columns(rows, keys), s, pointer, *sizes)

    def _add_relative(self, scores: Array, position: Array, out: Array) -> None:
        scores, position = self._unit_columns(scores), self._unit_columns(position)
        batch, heads, block, keys = scores.shape
        rows = batch * heads * block
        strides = *_element_strides(scores)[:3], *_element_strides(position)[:3]
        shape = rows_by_columns(rows, keys)
        self._launch("relative", scores, shape, scores, position, out, rows, keys, heads, block, *strides)

    def _softmax(self, scores: Array, out: Array, seen: int, step: int, mask: Array | None) -> None:
        scores = self._unit_columns(scores)
        batch, heads, block, keys = scores.shape
        pointer, *masked = self._mask(scores, mask)
        shape = (batch * heads * block,), (row_threads(keys),)
        sizes = keys, heads, block, seen, step, *_element_strides(scores)[:3], *masked
        self._launch("softmax", out, shape, scores, out, pointer, *sizes, source=scores)

    def _strictly_lower(self, weights: Array) -> Array:
        """A contiguous copy in which row i keeps its first i columns; zeros elsewhere."""
        kept = self.xp.arange(weights.shape[-1]) < self.xp.arange(weights.shape[-2])[:, None]
        return self.xp.where(kept, weights, weights.dtype.type(0))

    def _mask(self, scores: Array, mask: Array | None) -> tuple[Any, ...]:
        """A kernel's mask arguments: its array, 1 and its strides; any array, 0 and zeros where there is none."""
        if mask is None:
            return scores, 0, 0, 0, 0, 0
        mask = self.xp.broadcast_to(mask if mask.dtype == bool else mask != 0, scores.shape)
        return mask, 1, *_element_strides(mask)

    def _rows(self, x: Array) -> tuple[Array, int, int, int]:
        """x, the number and width of its rows, and the elements between them; a copy where these vary."""
        width, stride = x.shape[-1], row_stride(x.shape, _element_strides(x))
        if stride is None:
            x, stride = self.xp.ascontiguousarray(x), width
        return x, math.prod(x.shape[:-1]), width, stride

    def _by_rows(
        self, step: str, x: Array, operands: tuple[Array, ...] = (), *scalars: float, function: str = ""
    ) -> Array:
        """A kernel over (rows, width) of x, into a new array."""
        x, rows, width, stride = self._rows(x)
        out = self.xp.empty(x.shape, x.dtype)
        shape = rows_by_columns(rows, width)
        self._launch(step, x, shape, x, *operands, out, rows, width, stride, *scalars, function=function)
        return out

    def _operand(self, x: Array, y: Array, shape: tuple[int, ...]) -> Array:
        """y as a kernel reads it beside x: of this shape, of x's dtype, contiguous."""
        if y.shape != shape or y.dtype != x.dtype:
            raise ShapeError(f"an operand is {y.shape} {y.dtype}; x {x.shape} {x.dtype} needs {shape} {x.dtype}")
        return self.xp.ascontiguousarray(y)

    def _unit_columns(self, x: Array) -> Array:
        """x with its last axis contiguous and its rows apart; a copy where they are not."""
        *_, rows, columns = x.shape
        row, column = _element_strides(x)[-2:]
        even = (column == 1 or columns == 1) and (row >= columns or rows == 1)
        return x if even else self.xp.ascontiguousarray(x)

    def _launch(
        self, step: str, x: Array, shape: tuple[Grid, Grid], *arguments: Any, function: str = "",
        source: Array | None = None,
    ) -> None:  # fmt: skip
        """Run the kernel of this step for the dtype of x; `source`, where its input has another dtype."""
        if 0 in shape[0] or x.size == 0:
            return
        types = ([C_TYPES[source.dtype.name]] if source is not None else []) + [C_TYPES[_dtype(x)]]
        types += [function] if function else []
        kernel = self._kernel(x.dtype.name, f"kernel_{step}<{', '.join(types)}>")
        kernel(*shape, tuple(kernel_argument(argument) for argument in arguments))

    def _kernel(self, dtype: str, expression: str) -> Any:
        if (dtype, expression) not in self._kernels:
            if dtype not in self._modules:
                options, names = ("--std=c++17",), instances(dtype)
                self._modules[dtype] = self.xp.RawModule(code=SOURCE, options=options, name_expressions=names)
            self._kernels[dtype, expression] = self._modules[dtype].get_function(expression)
        return self._kernels[dtype, expression]

    def _multiply(
        self, a: Array, b: Array, out: Array, *, transposed: bool = False, alpha: float = 1.0, beta: float = 0.0
    ) -> None:
        """``out = alpha a b + beta out``, or ``a bᵀ`` where `transposed`, by cuBLAS.

        a (*batch, M, K), b (*batch, K, N) or (*batch, N, K), out (*batch, M, N); batch axes of length 1 broadcast. Any
        strides of out, as long as its rows are contiguous. Rows of C are columns to cuBLAS: it is asked for ``bᵀ aᵀ``.
        """
        (rows, inner), columns = a.shape[-2:], out.shape[-1]
        other = (columns, inner) if transposed else (inner, columns)
        if b.shape[-2:] != other or out.shape[-2] != rows or a.dtype != b.dtype:
            raise ShapeError(f"no product of {a.shape} {a.dtype} and {b.shape} {b.dtype} into {out.shape}")
        if out.size == 0:
            return
        if inner == 0:
            if beta == 0.0:
                out[...] = 0
            return
        a, b = self._unit_columns(a), self._unit_columns(b)
        runtime, cublas = self.xp.cuda.runtime, self.xp.cuda.cublas
        kinds = {"float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
        kind, out_kind = kinds[_dtype(a)], kinds[out.dtype.name]
        compute = cublas.CUBLAS_COMPUTE_64F if a.dtype == np.float64 else cublas.CUBLAS_COMPUTE_32F
        factors = np.asarray([alpha, beta], WIDE[a.dtype.name])
        one, zero = factors.ctypes.data, factors.ctypes.data + factors.itemsize
        turn = cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N
        shape, strides = out.shape[:-2], [_batch_strides(x, out.shape[:-2]) for x in (a, b, out)]
        leads = [leading_dimension(x.shape, _element_strides(x)) for x in (a, b, out)]
        handle = self.xp.cuda.device.get_cublas_handle()
        for count, steps, offsets in product_calls(shape, strides):
            at = [x.data.ptr + offset * x.dtype.itemsize for x, offset in zip((a, b, out), offsets, strict=True)]
            cublas.gemmStridedBatchedEx(
                handle, turn, cublas.CUBLAS_OP_N, columns, rows, inner,
                one, at[1], kind, leads[1], steps[1], at[0], kind, leads[0], steps[0],
                zero, at[2], out_kind, leads[2], steps[2], count, compute, cublas.CUBLAS_GEMM_DEFAULT,
            )  # fmt: skip


def _require_cupy() -> Any:
    """CuPy, with a device and the libraries that the engine calls; else MissingDependencyError, one line."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "CuPy is not installed: pip install 'effref[gpu]' (CUDA 12) or cupy-cuda13x (CUDA 13), and an NVIDIA GPU "
            "with its driver is needed"
        ) from error
    except ImportError as error:
        raise MissingDependencyError(f"CuPy cannot be loaded: {_one_line(error)}") from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError, a class that CuPy does not export
        raise MissingDependencyError(f"CuPy finds no NVIDIA GPU: {_one_line(error)}") from error
    if devices == 0:
        raise MissingDependencyError("CuPy finds no NVIDIA GPU: the driver lists no device")
    try:
        cupy.cuda.cublas, cupy.cuda.nvrtc  # noqa: B018 - loaded at first use
    except ImportError as error:
        raise MissingDependencyError(
            f"CuPy cannot load cuBLAS or NVRTC; install the CUDA toolkit, or cupy-cuda12x[ctk]: {_one_line(error)}"
        ) from error
    return cupy


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- shapes, strides and blocks: pure, so that they are tested without a GPU ------------------------------------------


def _dtype(x: Array) -> str:
    name = str(x.dtype.name)
    if name not in C_TYPES:
        raise UnsupportedError(f"the CuPy engine computes in {', '.join(C_TYPES)}; the array is {name}")
    return name


def kernel_argument(value: Any) -> Any:
    """Whole numbers as 64-bit integers, others as doubles: what every kernel declares; arrays as they are."""
    if isinstance(value, (bool, int)):
        return np.int64(value)
    return np.float64(value) if isinstance(value, float) else value


def _element_strides(x: Array) -> Strides:
    return tuple(stride // x.dtype.itemsize for stride in x.strides)


def _batch_strides(x: Array, batch: tuple[int, ...]) -> Strides:
    """Strides of the batch axes; 0 where x has length 1 and is repeated."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape[: len(batch)], _element_strides(x), strict=False))


def row_stride(shape: tuple[int, ...], strides: Strides) -> int | None:
    """Elements from one row (last axis) to the next where that is one number and rows are contiguous, else None."""
    width = shape[-1]
    if width > 1 and strides[-1] != 1:
        return None
    apart = [(n, s) for n, s in zip(shape[:-1], strides[:-1], strict=True) if n != 1]
    for (_, outer), (n, inner) in itertools.pairwise(apart):
        if outer != n * inner:
            return None
    return apart[-1][1] if apart else width


def leading_dimension(shape: tuple[int, ...], strides: Strides) -> int:
    """What cuBLAS calls ld: elements between rows, at least their width."""
    rows, columns = shape[-2:]
    return max(columns, 1) if rows == 1 else strides[-2]


def product_calls(
    batch: tuple[int, ...], strides: list[Strides], most: int = 65_535
) -> Iterator[tuple[int, Strides, Strides]]:
    """Cut a stack of products into calls of evenly spaced ones.

    Parameters
    ----------
    batch : the batch axes
    strides : per operand its strides over them
    most : products in one call

    Yields
    ------
    count, steps, offsets : products in the call; per operand the elements between them, and before the first
    """
    axes = _merged([(n, steps) for n, *steps in zip(batch, *strides, strict=True) if n != 1])
    if not axes:
        axes = [(1, [0] * len(strides))]
    longest = max(range(len(axes)), key=lambda axis: axes[axis][0])
    count, steps = axes.pop(longest)
    for index in itertools.product(*(range(n) for n, _ in axes)):
        start = [sum(i * s[operand] for i, (_, s) in zip(index, axes, strict=True)) for operand in range(len(strides))]
        for first in range(0, count, most):
            offsets = tuple(o + first * step for o, step in zip(start, steps, strict=True))
            yield min(most, count - first), tuple(steps), offsets


def _merged(axes: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Neighbouring axes that every operand walks through evenly become one."""
    merged: list[tuple[int, list[int]]] = []
    for n, steps in axes:
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * n, steps)
        else:
            merged.append((n, steps))
    return merged


def query_blocks(q_len: int, k_len: int, size: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of at most `size` query rows that see a key, and the keys that their last row sees."""
    first = max(0, q_len - k_len) if causal else 0
    for start in range(first, q_len, max(size, 1)):
        stop = min(start + size, q_len)
        yield slice(start, stop), stop + k_len - q_len if causal else k_len


def band_of(rows: slice, q_len: int, k_len: int, window: int, seen: int) -> slice:
    """Of the first `seen` keys those that any of these rows sees within its band."""
    shift = k_len - q_len
    return slice(max(0, rows.start + shift - window), min(seen, rows.stop + shift + window))


def map_row_bytes(k_len: int, dtype: str, relative: bool) -> int:
    """Bytes that a fused op holds per row of a map: scores, weights where they are narrower, position scores."""
    wide, narrow = np.dtype(WIDE[dtype]).itemsize, np.dtype(dtype).itemsize
    return k_len * (wide * (3 if relative else 1) + (narrow if narrow != wide else 0))


def head_blocks(
    batch: int, groups: int, per_group: int, q_len: int, row_bytes: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Batches, key heads and query heads that a fused op takes together: as many as fit with `BLOCK_ROWS` rows each."""
    heads = SCRATCH_BYTES // max(1, row_bytes * min(q_len, BLOCK_ROWS))  # that fit
    g = min(groups, max(1, heads // per_group))
    b = max(1, heads // (groups * per_group)) if g == groups else 1
    for first in range(0, batch, b):
        for group in range(0, groups, g):
            stop = min(group + g, groups)
            yield slice(first, min(first + b, batch)), slice(group, stop), slice(group * per_group, stop * per_group)


def rows_that_fit(maps: int, q_len: int, row_bytes: int) -> int:
    """Query rows of this many maps that `SCRATCH_BYTES` hold; at least 1."""
    return max(1, min(q_len, SCRATCH_BYTES // max(1, maps * row_bytes)))


def _visible(scores: Array, causal: bool) -> tuple[int, int]:
    """Keys that the first row sees, and how many more each further row."""
    q_len, k_len = scores.shape[2:]
    return (1 + k_len - q_len, 1) if causal else (k_len, 0)


def _grouped(x: Array, groups: int) -> Array:
    """(B, H, T, D) as (B, Hkv, G, T, D)."""
    batch, heads, length, width = x.shape
    return x.reshape(batch, groups, heads // groups, length, width)


def _as_map(stack: Array) -> Array:
    """(b, g, G, rows, keys), contiguous, as (b, g G, rows, keys)."""
    batch, groups, per_group, rows, keys = stack.shape
    return stack.reshape(batch, groups * per_group, rows, keys)
