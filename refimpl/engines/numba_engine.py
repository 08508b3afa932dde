"""The fast CPU engine: BLAS for matrix products, compiled parallel kernels for everything that memory bounds.

Arrays are NumPy's, float32 or float64. Methods check sizes and dtypes, take the memory layout apart and call
a kernel; the loops are in ``numba_kernels``. Results come from a caching allocator, and heads (B, H, T, D)
may lie in memory as (B, T, H, D).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.engines.buffers import Buffers
from refimpl.engines.chunked import chunked_linear_attention
from refimpl.engines.numba_kernels import (
    check,
    convolution,
    elementwise,
    few_rows,
    filtered,
    filtered_map,
    layout,
    rows,
    selection,
    threads,
)
from refimpl.engines.numba_kernels.attention import fused_attention, fused_relative_attention
from refimpl.engines.numpy_engine import check_keys_mask
from refimpl.engines.recorded_step import StepRecorder
from refimpl.errors import ShapeError
from refimpl.memo.mapping import check_rows, gather

Array = Any
NEAREST_BLOCK = 1024  # points compared with a query at a time


class NumbaEngine:
    """The op vocabulary of ``refimpl.engines.protocol`` on the processor's cores."""

    name = "numba"

    def __init__(self) -> None:
        self.buffers = Buffers()

    # --- services -------------------------------------------------------------------------------------------

    def asarray(self, host: Array) -> Array:
        array = np.ascontiguousarray(host)
        return array if array.flags.aligned else array.copy()

    def to_numpy(self, array: Array) -> Array:
        return array

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_s(self, start: float, stop: float) -> float:
        return stop - start

    @property
    def threads(self) -> int:
        """Threads of the kernels."""
        return threads.count()

    def set_threads(self, n: int) -> None:
        """Use `n` threads, in the kernels and in BLAS alike."""
        threads.set_count(n)

    def warm_up(self, announce: Callable[[str], None]) -> None:
        """Call ``announce(message)`` once, if a kernel is not in Numba's disk cache and must be compiled."""
        threads.on_first_compilation(announce)

    def step_recorder(self, position: int, tables: Sequence[Array]) -> StepRecorder:
        """What writes a decoding step down instead of running it; its parameters are `StepRecorder`'s."""
        return StepRecorder(position, tables)

    def split_heads(self, x: Array, heads: int) -> Array:
        batch, length, width = x.shape
        return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    def merge_heads(self, x: Array) -> Array:
        batch, heads, length, width = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    # --- linear maps ----------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[1:]
        fits = fits and (bias is None or bias.shape == weight.shape[:1])
        if not (fits and bias is None and x.dtype is weight.dtype in check.DTYPES):  # else there is nothing to refuse
            expected = "x (..., d_in), weight (d_out, d_in), bias (d_out,)"
            check.expect("linear", expected, fits, x=x, weight=weight, bias=bias)
        d_out, d_in = weight.shape
        y = self._empty((*x.shape[:-1], d_out), x)  # (..., d_out)
        n_rows = math.prod(x.shape[:-1])
        flat_x, flat_y = x.reshape(n_rows, d_in), y.reshape(n_rows, d_out)
        if n_rows <= layout.FEW_ROWS and layout.readable(weight) is weight:
            bias = few_rows.NO_BIAS[x.itemsize] if bias is None else layout.readable(bias)
            parts = layout.count(-(-d_out // few_rows.UNIT), weight.size)
            few_rows.kernel_linear(layout.readable(flat_x), weight, bias, flat_y, parts)
            return y
        np.matmul(flat_x, weight.T, out=flat_y)
        if bias is not None:
            self._add_bias(flat_y, bias)
        return y

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        if sum(widths) != len(weight):
            message = f"project: weight {weight.shape} has rows for {len(weight)} columns; widths are {widths}"
            raise ShapeError(message)
        y = self.linear(x, weight, bias)  # (..., sum of widths)
        return layout.columns(y, widths)

    def conv1d(self, x: Array, weight: Array, bias: Array, stride: int) -> Array:
        fits = x.ndim == weight.ndim == 3 and x.shape[2] == weight.shape[2] and bias.shape == weight.shape[:1]
        expected = "x (B, T, d_in), weight (d_out, kernel, d_in), bias (d_out,)"
        check.expect("conv1d", expected, fits, x=x, weight=weight, bias=bias)
        (batch, length, _), (d_out, kernel, d_in) = x.shape, weight.shape
        windows = self._empty((batch, -(-length // stride), kernel, d_in), x)
        layout.windows(x, kernel, stride, windows)
        taps = np.ascontiguousarray(weight).reshape(d_out, kernel * d_in)
        return self.linear(windows.reshape(*windows.shape[:2], kernel * d_in), taps, bias)

    def depthwise_conv(self, x: Array, weight: Array, bias: Array) -> Array:
        fits = x.ndim == 3 and weight.ndim == 2 and weight.shape[1:] == bias.shape == x.shape[2:]
        expected = "x (B, T, d), weight (kernel, d), bias (d,)"
        check.expect("depthwise_conv", expected, fits, x=x, weight=weight, bias=bias)
        (batch, length, channels), kernel = x.shape, len(weight)
        out = self._empty(x.shape, x)
        width = convolution.padded_width(channels, x.itemsize)
        padded = np.zeros((kernel + 1, width), x.dtype)
        padded[:kernel, :channels], padded[kernel, :channels] = weight, bias
        tiles = batch * -(-length // convolution.TILE)
        flat, strides = layout.flat(x)
        convolution.kernel_depthwise_conv(
            flat, strides[:2], padded[:kernel].reshape(-1), padded[kernel], kernel, out.reshape(-1),
            length, width, channels, tiles, layout.count(tiles, out.size),
        )  # fmt: skip
        return out

    def block_linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        blocks, d_out, d_in = weight.shape if weight.ndim == 3 else (0, 0, 0)
        fits = weight.ndim == 3 and x.shape[-1:] == (blocks * d_in,)
        fits = fits and (bias is None or bias.shape == (blocks * d_out,))
        expected = "x (..., n q), weight (n, p, q), bias (n p,)"
        check.expect("block_linear", expected, fits, x=x, weight=weight, bias=bias)
        y = self._empty((*x.shape[:-1], blocks * d_out), x)
        n_rows = math.prod(x.shape[:-1])
        flat_x, flat_y = x.reshape(n_rows, blocks * d_in), y.reshape(n_rows, blocks * d_out)
        parts = [flat_x[:, c * d_in : (c + 1) * d_in] for c in range(blocks)]
        if n_rows <= layout.FEW_ROWS:  # `linear` reads weights once
            np.concatenate([self.linear(part, block) for part, block in zip(parts, weight, strict=True)], 1, out=flat_y)
        else:
            for c, part in enumerate(parts):
                np.matmul(part, weight[c].T, out=flat_y[:, c * d_out : (c + 1) * d_out])
        if bias is not None:
            self._add_bias(flat_y, bias)
        return y

    def embedding(self, table: Array, ids: Array) -> Array:
        check.expect("embedding", "table (V, d)", table.ndim == 2, table=table)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            message = f"embedding: table {table.shape} has no rows for ids from {ids.min()} to {ids.max()}"
            raise ShapeError(message)
        out = self._empty((*ids.shape, table.shape[1]), table)
        np.take(table, ids, axis=0, out=out, mode="clip")  # "clip" writes to out without a copy
        return out

    # --- norms ----------------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        check.per_channel("layer_norm", x, weight=weight, bias=bias)
        return self._by_rows(rows.kernel_layer_norm, x, layout.vector(weight), layout.vector(bias), float(eps))

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        check.per_channel("rms_norm", x, weight=weight)
        return self._by_rows(rows.kernel_rms_norm, x, layout.vector(weight), float(eps))

    def batch_norm(self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
        check.per_channel("batch_norm", x, mean=mean, variance=variance, weight=weight, bias=bias)
        scale = weight / np.sqrt(variance + x.dtype.type(eps))  # (d,)
        return self._by_rows(rows.kernel_batch_norm, x, *map(layout.vector, (mean, scale, bias)))

    # --- elementwise ----------------------------------------------------------------------------------------

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        check.same_dtype("add", x=x, y=y)
        if x.shape == y.shape and x.size <= layout.COPIED_ELEMENTS and scale == 1:
            return np.add(x, y, out=self._empty(x.shape, x))  # the same sums, sooner than a kernel could be called
        y = layout.trailing(x, y)
        out = self._empty(x.shape, x)
        if out.size:
            whole = x.size == y.size
            width = layout.chunked(x, y) if whole else y.shape[-1]
            n_rows = -(-x.size // width)
            elementwise.kernel_add(
                *layout.as_rows(x, width), *layout.as_rows(y, width), n_rows if whole else y.size // width,
                float(scale), out.reshape(-1), width, n_rows, layout.count(n_rows, x.size),
            )  # fmt: skip
        return out

    def gelu(self, x: Array) -> Array:
        return self._activation("gelu", elementwise.GELU, x)

    def gelu_tanh(self, x: Array) -> Array:
        return self._activation("gelu_tanh", elementwise.GELU_TANH, x)

    def silu(self, x: Array) -> Array:
        return self._activation("silu", elementwise.SILU, x)

    def relu(self, x: Array) -> Array:
        return self._activation("relu", elementwise.RELU, x)

    def glu(self, x: Array) -> Array:
        check.expect("glu", "x (..., 2 d)", x.ndim >= 1 and x.shape[-1] % 2 == 0, x=x)
        half = x.shape[-1] // 2
        return self._gate(False, x[..., :half], x[..., half:])

    def elu_plus_one(self, x: Array) -> Array:
        check.expect("elu_plus_one", "x (..., d)", x.ndim >= 1, x=x)
        zero = x.dtype.type(0)
        out = np.minimum(x, zero, out=self._empty(x.shape, x))
        np.exp(out, out=out)
        return np.add(out, np.maximum(x, zero), out=out)

    def swiglu(self, gate: Array, up: Array) -> Array:
        check.expect("swiglu", "gate and up of one shape", gate.shape == up.shape, gate=gate, up=up)
        return self._gate(True, up, gate)

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        fits = x.ndim == 4 and x.shape[3] % 2 == 0 and cos.shape == sin.shape == (x.shape[2], x.shape[3] // 2)
        check.expect("rotary", "x (B, H, T, D), cos and sin (T, D / 2)", fits, x=x, cos=cos, sin=sin)
        out = self._empty(x.shape, x)
        if out.size:
            n_rows = math.prod(x.shape[:3])
            flat, strides = layout.flat(x)
            elementwise.kernel_rotary(
                flat, strides[:3], layout.vector(cos), layout.vector(sin), bool(interleaved),
                out.reshape(-1), x.shape[1], x.shape[2], n_rows, layout.count(n_rows, x.size),
            )  # fmt: skip
        return out

    def concat(self, parts: tuple[Array, ...], axis: int) -> Array:
        check.same_dtype("concat", **{f"part {i}": part for i, part in enumerate(parts)})
        axis %= parts[0].ndim
        others = [(part.shape[:axis], part.shape[axis + 1 :]) for part in parts]
        if any(other != others[0] for other in others):
            message = f"concat: parts may differ along axis {axis} only; got {[part.shape for part in parts]}"
            raise ShapeError(message)
        length = sum(part.shape[axis] for part in parts)
        out = self._empty((*others[0][0], length, *others[0][1]), parts[0])
        return np.concatenate(parts, axis=axis, out=out)

    def append(self, store: Array, new: Array, start: int) -> Array:
        fits = store.ndim == new.ndim == 4 and store.shape[:2] == new.shape[:2] and store.shape[3] == new.shape[3]
        stop = start + new.shape[2] if fits else 0
        fits = fits and start >= 0 and stop <= store.shape[2]
        expected = f"store (B, Hkv, S, D), new (B, Hkv, T, D), {start} + T <= S"
        check.expect("append", expected, fits, store=store, new=new)
        store[:, :, start:stop] = new
        return store[:, :, :stop]

    # --- stored maps ----------------------------------------------------------------------------------------

    def max_pool(self, x: Array) -> Array:
        check.expect("max_pool", "x (B, T, d)", x.ndim == 3, x=x)
        rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        upper, lower = x[:, 0:rows:2, :columns], x[:, 1:rows:2, :columns]
        tall = np.maximum(upper, lower, out=self._empty(upper.shape, x))  # (B, T // 2, d)
        return np.maximum(tall[:, :, 0::2], tall[:, :, 1::2], out=self._empty((*upper.shape[:2], columns // 2), x))

    def nearest(self, x: Array, points: Array) -> tuple[Array, Array]:
        fits = x.ndim == points.ndim == 2 and x.shape[1] == points.shape[1] and len(points) > 0
        check.expect("nearest", "x (B, w), points (N, w), N > 0", fits, x=x, points=points)
        distances, found = np.full(len(x), np.inf, x.dtype), np.zeros(len(x), np.int64)
        for start in range(0, len(points), NEAREST_BLOCK):  # so that differences stay in the cache
            block = points[start : start + NEAREST_BLOCK]
            for b, query in enumerate(x):
                difference = block - query  # (n, w)
                squared = np.einsum("nw,nw->n", difference, difference)
                row = int(squared.argmin())
                distance = np.sqrt(squared[row])
                if distance < distances[b]:
                    distances[b], found[b] = distance, start + row
        return distances, found

    def search_graph(self, x: Array, index: Any) -> tuple[Array, Array]:
        distances, rows = index.search(x)
        return distances, rows

    def fetch(self, records: Any, rows: tuple[int | None, ...], transfer: str) -> Array:
        layout = records.layout
        out = self.buffers.empty((len(rows), *layout.shape), layout.dtype) if transfer == "copy" else None
        return gather(records, rows, transfer, out)

    def take_rows(self, x: Array, rows: tuple[int, ...]) -> Array:
        out = self._empty((len(rows), *x.shape[1:]), x)
        for i, b in enumerate(rows):
            out[i] = x[b]
        return out

    def scatter(self, store: Array, new: Array, rows: tuple[int, ...]) -> Array:
        check_rows("scatter", store, new, rows)
        for i, b in enumerate(rows):
            store[b] = new[i]
        return store

    # --- attention ------------------------------------------------------------------------------------------

    def scores(self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
        check.heads("scores", q, k)
        check.mask("scores", mask, q, k)
        q_len, k_len = q.shape[2], k.shape[2]
        s = self._empty((*q.shape[:3], k_len), q)  # (B, H, Tq, Tk)
        if s.size == 0:
            return s
        n_rows = math.prod(s.shape[:3])
        parts = layout.count(n_rows, s.size)
        if layout.few_queries(q, k):
            self._few_scores(q, k, scale, s)
        else:
            scaled = np.multiply(q, q.dtype.type(scale), out=self._heads(q, q.shape[3]))
            keys = k.swapaxes(2, 3)  # (B, Hkv, D, Tk)
            for first, last, seen in layout.query_blocks(q_len, k_len, causal):
                layout.grouped_product(scaled[:, :, first:last], keys[..., :seen], s[:, :, first:last, :seen])
        if causal and q_len > 1:
            rows.kernel_hide_future(s.reshape(-1), k_len, q_len, n_rows, parts)
        if mask is not None:
            flat, strides = layout.flat(layout.whole_rows(mask, s.shape))
            rows.kernel_hide_masked(s.reshape(-1), flat, strides[:3], q.shape[1], q_len, k_len, n_rows, parts)
        return s

    def add_relative(self, scores: Array, position: Array) -> Array:
        length = scores.shape[-1]
        fits = scores.ndim == 4 and scores.shape[2] == length
        fits = fits and position.shape == (*scores.shape[:3], max(2 * length - 1, 0))
        expected = "scores (B, H, T, T), position (B, H, T, 2T - 1)"
        check.expect("add_relative", expected, fits, scores=scores, position=position)
        out = self._empty(scores.shape, scores)
        if out.size:
            n_rows = out.size // length
            s, shifted = layout.vector(scores), layout.vector(position)
            parts = layout.count(n_rows, out.size)
            rows.kernel_add_relative(s, shifted, out.reshape(-1), length, n_rows, parts)
        return out

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        check.expect("softmax", "scores (B, H, Tq, Tk)", scores.ndim == 4, scores=scores)
        out = self._empty(scores.shape, scores)
        if out.size:
            q_len, k_len = scores.shape[2:]
            n_rows = out.size // k_len
            s, stride = layout.as_rows(scores, k_len)
            parts = layout.count(n_rows, out.size)
            if n_rows <= layout.FEW_ROWS and k_len >= layout.LONG_ROW and not (causal and q_len > 1):
                parts = layout.count(n_rows * -(-k_len // rows.RANGE), out.size)
                rows.kernel_softmax_of_long_rows(s, stride, out.reshape(-1), k_len, n_rows, parts)
                return out
            rows.kernel_softmax(s, stride, out.reshape(-1), k_len, q_len, bool(causal), n_rows, parts)
        return out

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        fits = check.divides(weights, v) and weights.shape[3] == v.shape[2] and len(weights) == len(v)
        expected = "weights (B, H, Tq, Tk), v (B, Hkv, Tk, D), H a multiple of Hkv"
        check.expect("weighted_sum", expected, fits, weights=weights, v=v)
        out = self._heads(weights, v.shape[3])  # (B, H, Tq, D)
        causal = causal and weights.shape[2] > 1  # one query sees all keys
        if not causal and layout.few_queries(weights, v):
            p, v = np.ascontiguousarray(weights), layout.readable(v)
            ranges = layout.key_ranges(v.shape[0] * v.shape[1], v.shape[2], few_rows.KEYS)
            parts = layout.count(v.shape[0] * v.shape[1] * ranges, v.size)
            few_rows.kernel_weighted_sum(p, v, out, ranges, parts)
            return out
        if not causal:
            layout.grouped_product(weights, v, out)
            return out
        # In a block a hidden value meets the weight 0; where it is not finite, only blocks of one row are right.
        block = layout.QUERY_BLOCK if np.isfinite(v).all() else 1
        blocks = layout.query_blocks(weights.shape[2], weights.shape[3], causal, block)
        out[:, :, : blocks[0][0] if blocks else None] = 0
        for first, last, seen in blocks:
            self._causal_sum(weights[:, :, first:last, :seen], v[:, :, :seen], out[:, :, first:last])
        return out

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        scale: float | None = None,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        return self._attention("attention", q, k, v, scale, causal, mask)

    def relative_attention(
        self,
        q: Array,
        q_position: Array,
        k: Array,
        v: Array,
        p: Array,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        return self._relative_attention("relative_attention", q, q_position, k, v, p, scale, causal, mask)

    def local_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        window: int,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        check.band("local_attention", q, k, window)
        return self._attention("local_attention", q, k, v, scale, causal, mask, window)

    def local_relative_attention(
        self,
        q: Array,
        q_position: Array,
        k: Array,
        v: Array,
        p: Array,
        window: int,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        check.band("local_relative_attention", q, k, window)
        return self._relative_attention("local_relative_attention", q, q_position, k, v, p, scale, causal, mask, window)

    def project_length(self, x: Array, weight: Array, mask: Array | None = None) -> Array:
        fits = x.ndim == 4 and weight.ndim == 2 and weight.shape[1] == x.shape[2]
        check.expect("project_length", "x (B, H, T, D), weight (k, T)", fits, x=x, weight=weight)
        check_keys_mask("project_length", mask, x)
        if mask is not None:
            x = np.where(mask.swapaxes(2, 3), x, x.dtype.type(0))
        out = self._empty((*x.shape[:2], len(weight), x.shape[3]), x)
        return np.matmul(weight, x, out=out)

    def linear_attention(self, q: Array, k: Array, v: Array, causal: bool = False, mask: Array | None = None) -> Array:
        check.heads("linear_attention", q, k, v)
        check_keys_mask("linear_attention", mask, k)
        if causal:
            check.band("linear_attention", q, k, 0)
        k, v = layout.batched(k, q), layout.batched(v, q)
        if mask is not None:
            k = np.where(mask.swapaxes(2, 3), k, k.dtype.type(0))
        return chunked_linear_attention(np, q, k, v, causal, self._heads(q, v.shape[3]))

    def quantize(self, x: Array) -> tuple[Array, Array]:
        check.expect("quantize", "x (B, H, T, D)", x.ndim == 4, x=x)
        codes = self.buffers.empty(x.shape, np.int8)
        sigmas = np.ones((*x.shape[:2], 1, 1), x.dtype)
        if x.size:
            parts = layout.count(x.shape[0] * x.shape[1], x.size)
            tiny = np.finfo(x.dtype).smallest_normal
            filtered.kernel_quantize(layout.readable(x), codes.reshape(-1), sigmas, tiny, parts)
        return codes, sigmas

    def filtered_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        q_codes: Array,
        k_codes: Array,
        q_scale: Array,
        k_scale: Array,
        thresholds: Array,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
        nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:
        check.heads("filtered_attention", q, k, v)
        check.mask("filtered_attention", mask, q, k)
        check.codes("filtered_attention", q_codes, q_scale, q)
        check.codes("filtered_attention", k_codes, k_scale, k)
        check.filter("filtered_attention", thresholds, q.shape[1], scale, nibble, stage2)
        out, counts = self._heads(q, v.shape[3]), np.zeros(math.prod(q.shape[:3]), np.int64)
        if out.size and k.shape[2]:
            steps, margins = filtered.steps_and_margins(q_scale, k_scale, thresholds, scale)
            k, v, k_codes = (layout.batched(x, q) for x in (k, v, k_codes))
            v, k_codes = layout.readable(v), layout.readable(k_codes)
            k = layout.readable(k) if stage2 == "float" else k
            if q.shape[2] > layout.FEW_ROWS:
                parts, k_read = layout.count(layout.MOST_PARTS, v.size), stage2 == "float"
                v = filtered.dense_rows(v, parts, self.buffers.empty)
                k = filtered.dense_rows(k, parts, self.buffers.empty) if k_read else k
            q, q_codes = layout.readable(q), layout.readable(q_codes)
            elements = counts.size * k.shape[2]
            panels, rows = filtered.packed(
                k_codes, nibble == "round", layout.count(layout.MOST_PARTS, k.size), self.buffers.empty
            )
            seen = np.broadcast_to(np.ones((1, 1, 1, 1), bool) if mask is None else mask, (*q.shape[:3], k.shape[2]))
            items = math.prod(q.shape[:2]) * -(-q.shape[2] // filtered.ROWS)
            filtered.kernel_filtered(
                q, k, v, q_codes, panels, rows, steps, margins, nibble == "round", stage2 == "float", float(scale),
                bool(causal), mask is not None, seen, out, counts, layout.count(items, elements),
            )  # fmt: skip
        else:
            out[...] = 0
        return out, counts.reshape(q.shape[:3]).sum(axis=2)

    def filtered_map(
        self,
        q: Array,
        k: Array,
        q_codes: Array,
        k_codes: Array,
        q_scale: Array,
        k_scale: Array,
        thresholds: Array,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
        nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:
        check.heads("filtered_map", q, k)
        check.mask("filtered_map", mask, q, k)
        check.codes("filtered_map", q_codes, q_scale, q)
        check.codes("filtered_map", k_codes, k_scale, k)
        check.filter("filtered_map", thresholds, q.shape[1], scale, nibble, stage2)
        shape = (*q.shape[:3], k.shape[2])
        out, counts = self._empty(shape, q), np.zeros(math.prod(q.shape[:3]), np.int64)
        if out.size:
            steps, margins = filtered.steps_and_margins(q_scale, k_scale, thresholds, scale)
            k, k_codes = (layout.readable(layout.batched(x, q)) for x in (k, k_codes))
            q, q_codes = layout.readable(q), layout.readable(q_codes)
            parts = layout.count(layout.MOST_PARTS, k.size)
            panels, rows = filtered.packed(k_codes, nibble == "round", parts, self.buffers.empty)
            seen = np.broadcast_to(np.ones((1, 1, 1, 1), bool) if mask is None else mask, shape)
            items = math.prod(q.shape[:2]) * -(-q.shape[2] // filtered.ROWS)
            filtered_map.kernel_filtered_map(
                q, k, q_codes, panels, rows, steps, margins, nibble == "round", stage2 == "float", float(scale),
                bool(causal), mask is not None, seen, out, counts, layout.count(items, out.size),
            )  # fmt: skip
        return out, counts.reshape(q.shape[:3]).sum(axis=2)

    # --- selection ------------------------------------------------------------------------------------------

    def top(self, z: Array, n: int) -> Array:
        width = z.shape[-1] if z.ndim else 0
        check.expect("top", f"z (..., V) with V >= {n} >= 1", 1 <= n <= width, z=z)
        n_rows = z.size // width
        ids = self.buffers.empty((*z.shape[:-1], n), np.int64)
        flat_z, flat_ids = np.ascontiguousarray(z).reshape(n_rows, width), ids.reshape(n_rows, n)
        group = max(1, layout.GROUP_ELEMENTS // width)  # rows for which notes are held at a time
        for first in range(0, n_rows, group):
            part = flat_z[first : first + group]
            selection.kernel_top(part, n, flat_ids[first : first + group], layout.count(part.size, part.size))
        return ids

    def refine(self, z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Array:
        fits = weight.ndim == 2 and z.shape[-1:] == weight.shape[:1] and g.shape[-1:] == weight.shape[1:]
        fits = fits and z.shape[:-1] == ids.shape[:-1] == g.shape[:-1] and weight.shape[1] > 0
        fits = fits and ids.dtype == np.int64
        expected = f"z (..., V), ids (..., n) like {ids.shape}, in int64, weight (V, K), g (..., K)"
        check.expect("refine", expected, fits, z=z, weight=weight, g=g)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
            message = f"refine: weight {weight.shape} has no rows for ids from {ids.min()} to {ids.max()}"
            raise ShapeError(message)
        if ids.size:
            n_rows, n = ids.size // ids.shape[-1], ids.shape[-1]
            flat_z = z.reshape(n_rows, len(weight))
            flat_g = layout.readable(g.reshape(n_rows, weight.shape[1]))
            parts = layout.count(ids.size, ids.size * weight.shape[1])
            selection.kernel_refine(flat_z, ids.reshape(n_rows, n), layout.readable(weight), flat_g, replace, parts)
            if not np.may_share_memory(flat_z, z):
                z[...] = flat_z.reshape(z.shape)
        return z

    # --- shared steps ---------------------------------------------------------------------------------------

    def _empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return self.buffers.empty(shape, like.dtype)

    def _heads(self, q: Array, width: int) -> Array:
        """An array (B, H, Tq, width) that lies in memory as (B, Tq, H, width): merging its heads is free."""
        batch, heads, length, _ = q.shape
        return self._empty((batch, length, heads, width), q).transpose(0, 2, 1, 3)

    def _attention(
        self, op: str, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None,
        window: int | None = None,
    ) -> Array:  # fmt: skip
        check.heads(op, q, k, v)
        check.mask(op, mask, q, k)
        k, v = layout.batched(k, q), layout.batched(v, q)
        return fused_attention(q, k, v, scale, causal, mask, self._heads(q, v.shape[3]), window)

    def _relative_attention(
        self, op: str, q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float, causal: bool,
        mask: Array | None, window: int | None = None,
    ) -> Array:  # fmt: skip
        check.heads(op, q, k, v)
        check.mask(op, mask, q, k)
        fits = q_position.shape == q.shape and k.shape[2] == q.shape[2]
        fits = fits and p.shape == (q.shape[1], max(2 * q.shape[2] - 1, 0), q.shape[3])
        expected = "q and q_position (B, H, T, D), k (B or 1, Hkv, T, D), p (H, 2T - 1, D)"
        check.expect(op, expected, fits, q=q, q_position=q_position, k=k, p=p)
        k, v = layout.batched(k, q), layout.batched(v, q)
        out = self._heads(q, v.shape[3])
        return fused_relative_attention(q, q_position, k, v, p, scale, causal, mask, out, window)

    def _few_scores(self, q: Array, k: Array, scale: float, s: Array) -> None:
        """Set the scores of few queries: keys pass once."""
        k = layout.readable(layout.batched(k, q))
        scaled = np.multiply(q, q.dtype.type(scale), out=np.empty(q.shape, q.dtype))
        ranges = layout.key_ranges(k.shape[0] * k.shape[1], k.shape[2], few_rows.KEYS)
        parts = layout.count(k.shape[0] * k.shape[1] * ranges, k.size)
        few_rows.kernel_scores(scaled, k, s, ranges, parts)

    def _causal_sum(self, weights: Array, v: Array, out: Array) -> None:
        """One block of causal sums: weights (B, H, m, n) whose last m columns are a triangle, v (B, Hkv, n, D)."""
        whole = weights.shape[3] - weights.shape[2]
        triangle = np.tril(weights[..., whole:])  # (B, H, m, m)
        layout.grouped_product(triangle, v[:, :, whole:], out)
        if whole:
            rest = np.empty(out.shape, out.dtype)
            layout.grouped_product(weights[..., :whole], v[:, :, :whole], rest)
            out += rest

    def _add_bias(self, y: Array, bias: Array) -> None:
        """Add the bias (d,) to y (rows, d), in place."""
        parts = layout.count(len(y), y.size)
        if parts > 1:
            elementwise.kernel_bias(y.reshape(-1), layout.vector(bias), len(y), parts)
        else:
            y += bias  # the same sums, without compiling a kernel for small arrays

    def _by_rows(self, kernel: Callable[..., None], x: Array, *operands: Any) -> Array:
        """Run a kernel that needs whole rows: x (..., d) -> (..., d)."""
        out = self._empty(x.shape, x)
        if out.size:
            n_rows = x.size // x.shape[-1]
            parts = layout.count(n_rows, x.size)
            kernel(*layout.as_rows(x, x.shape[-1]), *operands, out.reshape(-1), n_rows, parts)
        return out

    def _activation(self, op: str, kind: int, x: Array) -> Array:
        check.expect(op, "x (..., d)", x.ndim >= 1, x=x)
        out = self._empty(x.shape, x)
        if out.size:
            width = layout.chunked(x)
            n_rows = -(-x.size // width)
            parts = layout.count(n_rows, x.size)
            elementwise.kernel_activation(kind, *layout.as_rows(x, width), out.reshape(-1), width, n_rows, parts)
        return out

    def _gate(self, smooth: bool, a: Array, b: Array) -> Array:
        """``a sigmoid(b)``, or ``a b sigmoid(b)`` if `smooth`."""
        out = self._empty(a.shape, a)
        if out.size:
            width = layout.chunked(a, b)
            n_rows = -(-a.size // width)
            parts = layout.count(n_rows, a.size)
            x, y = layout.as_rows(a, width), layout.as_rows(b, width)
            elementwise.kernel_gate(smooth, *x, *y, out.reshape(-1), width, n_rows, parts)
        return out
