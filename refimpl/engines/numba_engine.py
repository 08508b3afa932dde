"""The fast CPU engine: BLAS for matrix products, compiled parallel kernels for everything that memory bounds.

Arrays are NumPy's, float32 or float64. Methods check sizes and dtypes, take apart the memory layout and call a kernel; the
loops are in ``numba_kernels``. Results come from a caching allocator and may be laid out with heads and time swapped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.engines.buffers import Buffers
from refimpl.engines.numba_kernels import convolution, elementwise, rows, threads
from refimpl.engines.numba_kernels.attention import fused_attention, fused_relative_attention
from refimpl.errors import ShapeError, UnsupportedError

Array = Any

DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}
CHUNK = 4096  # elements in a "row" of a contiguous array that an elementwise kernel walks over
SERIAL_ELEMENTS = 2**15  # below this, waking a second thread (some 10 us) costs more than it saves
MOST_PARTS = 64  # pieces that a kernel is cut into for its threads
QUERY_BLOCK = 256  # query rows per product under a causal mask; keys beyond the last row's are left out


class NumbaEngine:
    """The op vocabulary of ``refimpl.engines.protocol`` on the processor's cores."""

    name = "numba"

    def __init__(self) -> None:
        self.buffers = Buffers()

    # --- services -----------------------------------------------------------------------------------------------

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
        """Threads of the kernels and of BLAS."""
        return threads.count()

    def set_threads(self, n: int) -> None:
        """Use `n` threads, in the kernels and in BLAS alike."""
        threads.set_count(n)

    def warm_up(self, announce: Callable[[str], None]) -> None:
        """Call ``announce(message)`` once, when a kernel is not in Numba's disk cache and has to be compiled."""
        threads.on_first_compilation(announce)

    # --- linear maps --------------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        _same_dtype("linear", x=x, weight=weight, bias=bias)
        _require(
            weight.ndim == 2 and x.ndim >= 1 and x.shape[-1] == weight.shape[1],
            "linear", "x (..., d_in), weight (d_out, d_in)", x=x, weight=weight,
        )  # fmt: skip
        _require(bias is None or bias.shape == weight.shape[:1], "linear", "bias (d_out,)", weight=weight, bias=bias)
        y = self._empty((*x.shape[:-1], weight.shape[0]), x)
        np.matmul(x.reshape(-1, x.shape[-1]), weight.T, out=y.reshape(-1, weight.shape[0]))
        return y if bias is None else self._add_bias(y, bias)

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        if sum(widths) != weight.shape[0]:
            message = f"project: widths {widths} add up to {sum(widths)}; weight {weight.shape} has {weight.shape[0]} rows"
            raise ShapeError(message)
        y = self.linear(x, weight, bias)  # (..., sum of widths)
        stops = np.cumsum(widths).tolist()
        return tuple(y[..., stop - width : stop] for width, stop in zip(widths, stops, strict=True))

    def conv1d(self, x: Array, weight: Array, bias: Array, stride: int) -> Array:
        _same_dtype("conv1d", x=x, weight=weight, bias=bias)
        _require(
            x.ndim == 3 and weight.ndim == 3 and x.shape[2] == weight.shape[2] and bias.shape == weight.shape[:1],
            "conv1d", "x (B, T, d_in), weight (d_out, kernel, d_in), bias (d_out,)", x=x, weight=weight, bias=bias,
        )  # fmt: skip
        d_out, kernel, d_in = weight.shape
        windows = self._windows(x, kernel, stride)  # (B, ceil(T / stride), kernel, d_in)
        flat = windows.reshape(*windows.shape[:2], kernel * d_in)
        return self.linear(flat, np.ascontiguousarray(weight).reshape(d_out, kernel * d_in), bias)

    def depthwise_conv(self, x: Array, weight: Array, bias: Array) -> Array:
        _same_dtype("depthwise_conv", x=x, weight=weight, bias=bias)
        _require(
            x.ndim == 3 and weight.ndim == 2 and weight.shape[1:] == bias.shape == x.shape[2:],
            "depthwise_conv", "x (B, T, d), weight (kernel, d), bias (d,)", x=x, weight=weight, bias=bias,
        )  # fmt: skip
        (batch, length, channels), kernel = x.shape, weight.shape[0]
        out = self._empty(x.shape, x)
        lanes = convolution.VECTOR_BYTES // x.itemsize
        width = -(-channels // lanes) * lanes
        padded = np.zeros((kernel + 1, width), x.dtype)
        padded[:kernel, :channels], padded[kernel, :channels] = weight, bias
        tiles = batch * -(-length // convolution.TILE)
        flat, strides = _flat(x)
        convolution.kernel_depthwise_conv(
            flat, strides[:2], padded[:kernel].reshape(-1), padded[kernel], kernel, out.reshape(-1),
            length, width, channels, tiles, min(tiles, MOST_PARTS),
        )  # fmt: skip
        return out

    def embedding(self, table: Array, ids: Array) -> Array:
        _same_dtype("embedding", table=table)
        _require(table.ndim == 2, "embedding", "table (V, d)", table=table)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
            message = f"embedding: ids from {ids.min()} to {ids.max()}; table {table.shape} has rows 0 to {len(table) - 1}"
            raise ShapeError(message)
        out = self._empty((*ids.shape, table.shape[1]), table)
        np.take(table, ids, axis=0, out=out, mode="clip")  # "clip" writes to out without a copy
        return out

    # --- norms --------------------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        _per_channel("layer_norm", x, weight=weight, bias=bias)
        return self._by_rows(rows.kernel_layer_norm, x, _vector(weight), _vector(bias), float(eps))

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        _per_channel("rms_norm", x, weight=weight)
        return self._by_rows(rows.kernel_rms_norm, x, _vector(weight), float(eps))

    def batch_norm(
        self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float
    ) -> Array:
        _per_channel("batch_norm", x, mean=mean, variance=variance, weight=weight, bias=bias)
        scale = weight / np.sqrt(variance + x.dtype.type(eps))  # (d,)
        return self._by_rows(rows.kernel_batch_norm, x, _vector(mean), _vector(scale), _vector(bias))

    # --- elementwise --------------------------------------------------------------------------------------------

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        _same_dtype("add", x=x, y=y)
        y = _trailing(x, y)
        out = self._empty(x.shape, x)
        if out.size == 0:
            return out
        width = y.shape[-1] if y.ndim else 1
        same = y.size == x.size and x.flags.c_contiguous and y.flags.c_contiguous
        if same:
            a, a_stride, b, b_stride, width = *_as_rows(x, CHUNK), *_as_rows(y, CHUNK), CHUNK
        else:
            a, a_stride, b, b_stride = *_as_rows(x, width), *_as_rows(y, width)
        n_rows = -(-x.size // width)
        period = n_rows if same else y.size // width
        elementwise.kernel_add(
            a, a_stride, b, b_stride, period, float(scale), out.reshape(-1), width, n_rows, _parts(n_rows, x.size)
        )
        return out

    def gelu(self, x: Array) -> Array:
        return self._activation(elementwise.GELU, "gelu", x)

    def gelu_tanh(self, x: Array) -> Array:
        return self._activation(elementwise.GELU_TANH, "gelu_tanh", x)

    def silu(self, x: Array) -> Array:
        return self._activation(elementwise.SILU, "silu", x)

    def relu(self, x: Array) -> Array:
        return self._activation(elementwise.RELU, "relu", x)

    def glu(self, x: Array) -> Array:
        _same_dtype("glu", x=x)
        _require(x.ndim >= 1 and x.shape[-1] % 2 == 0, "glu", "x (..., 2 d)", x=x)
        half = x.shape[-1] // 2
        return self._gate(False, x[..., :half], x[..., half:])

    def swiglu(self, gate: Array, up: Array) -> Array:
        _same_dtype("swiglu", gate=gate, up=up)
        _require(gate.shape == up.shape, "swiglu", "gate and up of one shape", gate=gate, up=up)
        return self._gate(True, up, gate)

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        _same_dtype("rotary", x=x, cos=cos, sin=sin)
        _require(
            x.ndim == 4 and x.shape[3] % 2 == 0 and cos.shape == sin.shape == (x.shape[2], x.shape[3] // 2),
            "rotary", "x (B, H, T, D), cos and sin (T, D / 2)", x=x, cos=cos, sin=sin,
        )  # fmt: skip
        out = self._empty(x.shape, x)
        n_rows = math.prod(x.shape[:3])
        if out.size:
            flat, strides = _flat(x)
            elementwise.kernel_rotary(
                flat, strides[:3], _vector(cos.reshape(-1)), _vector(sin.reshape(-1)), bool(interleaved),
                out.reshape(-1), x.shape[1], x.shape[2], n_rows, _parts(n_rows, x.size),
            )  # fmt: skip
        return out

    def concat(self, parts: tuple[Array, ...], axis: int) -> Array:
        _same_dtype("concat", **{f"part {i}": part for i, part in enumerate(parts)})
        axis = axis % parts[0].ndim
        others = [(part.ndim, part.shape[:axis], part.shape[axis + 1 :]) for part in parts]
        if any(other != others[0] for other in others):
            message = f"concat: parts {[part.shape for part in parts]} may differ along axis {axis} only"
            raise ShapeError(message)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return np.concatenate(parts, axis=axis, out=self._empty(tuple(shape), parts[0]))

    # --- attention ----------------------------------------------------------------------------------------------

    def scores(
        self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None
    ) -> Array:
        _same_dtype("scores", q=q, k=k)
        _check_heads("scores", q, k)
        _check_mask("scores", q, k, mask)
        (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
        s = self._empty((batch, heads, q_len, k_len), q)
        if s.size == 0:
            return s
        scaled = np.multiply(q, q.dtype.type(scale), out=self._like_heads(q))
        keys = k.swapaxes(2, 3)  # (B, Hkv, D, Tk)
        for first, last, seen in _query_blocks(q_len, k_len, causal):
            _grouped_product(scaled[:, :, first:last], keys[..., :seen], s[:, :, first:last, :seen])
        n_rows, parts = batch * heads * q_len, _parts(batch * heads * q_len, s.size)
        if causal:
            rows.kernel_hide_future(s.reshape(-1), k_len, q_len, n_rows, parts)
        if mask is not None:
            flat, strides = _flat(_whole_rows(mask, s.shape))
            rows.kernel_hide_masked(s.reshape(-1), flat, strides[:3], heads, q_len, k_len, n_rows, parts)
        return s

    def add_relative(self, scores: Array, position: Array) -> Array:
        _same_dtype("add_relative", scores=scores, position=position)
        length = scores.shape[-1]
        _require(
            scores.ndim == 4 and scores.shape[2] == length
            and position.shape == (*scores.shape[:3], max(2 * length - 1, 0)),
            "add_relative", "scores (B, H, T, T), position (B, H, T, 2T - 1)", scores=scores, position=position,
        )  # fmt: skip
        out = self._empty(scores.shape, scores)
        n_rows = math.prod(scores.shape[:3])
        if out.size:
            rows.kernel_add_relative(
                _vector(scores.reshape(-1)), _vector(position.reshape(-1)), out.reshape(-1),
                length, n_rows, _parts(n_rows, out.size),
            )  # fmt: skip
        return out

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        _same_dtype("softmax", scores=scores)
        _require(scores.ndim == 4, "softmax", "scores (B, H, Tq, Tk)", scores=scores)
        out = self._empty(scores.shape, scores)
        q_len, k_len = scores.shape[2:]
        n_rows = math.prod(scores.shape[:3])
        if out.size:
            x, stride = _as_rows(scores, k_len)
            rows.kernel_softmax(
                x, stride, out.reshape(-1), k_len, q_len, bool(causal), n_rows, _parts(n_rows, out.size)
            )
        return out

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        _same_dtype("weighted_sum", weights=weights, v=v)
        _require(
            weights.ndim == v.ndim == 4 and weights.shape[3] == v.shape[2] and weights.shape[0] == v.shape[0]
            and _groups(weights, v),
            "weighted_sum", "weights (B, H, Tq, Tk), v (B, Hkv, Tk, D), H a multiple of Hkv", weights=weights, v=v,
        )  # fmt: skip
        (batch, heads, q_len, k_len), width = weights.shape, v.shape[3]
        out = self._empty((batch, q_len, heads, width), v).transpose(0, 2, 1, 3)  # (B, H, Tq, D)
        # A hidden value meets the weight 0; where it is not finite, only products without it are right.
        block = QUERY_BLOCK if not causal or np.isfinite(v).all() else 1
        covered = 0
        for first, last, seen in _query_blocks(q_len, k_len, causal, block):
            out[:, :, covered:first] = 0
            _grouped_product(weights[:, :, first:last, :seen], v[:, :, :seen], out[:, :, first:last])
            covered = last
        out[:, :, covered:] = 0
        return out

    def attention(
        self, q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False,
        mask: Array | None = None,
    ) -> Array:  # fmt: skip
        _same_dtype("attention", q=q, k=k, v=v)
        _check_heads("attention", q, k)
        _check_values("attention", k, v)
        _check_mask("attention", q, k, mask)
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        return fused_attention(q, k, v, scale, causal, mask, self._attended(q, v))

    def relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        _same_dtype("relative_attention", q=q, q_position=q_position, k=k, v=v, p=p)
        _check_heads("relative_attention", q, k)
        _check_values("relative_attention", k, v)
        _check_mask("relative_attention", q, k, mask)
        _require(
            q_position.shape == q.shape and k.shape[2] == q.shape[2]
            and p.shape == (q.shape[1], max(2 * q.shape[2] - 1, 0), q.shape[3]),
            "relative_attention", "q and q_position (B, H, T, D), k (B, Hkv, T, D), p (H, 2T - 1, D)",
            q=q, q_position=q_position, k=k, p=p,
        )  # fmt: skip
        return fused_relative_attention(q, q_position, k, v, p, scale, causal, mask, self._attended(q, v))

    # --- shared steps -------------------------------------------------------------------------------------------

    def _empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return self.buffers.empty(shape, like.dtype)

    def _like_heads(self, q: Array) -> Array:
        """An array (B, H, T, D) that is laid out as (B, T, H, D), like the heads of a projection."""
        batch, heads, length, width = q.shape
        return self._empty((batch, length, heads, width), q).transpose(0, 2, 1, 3)

    def _attended(self, q: Array, v: Array) -> Array:
        batch, heads, length, _ = q.shape
        return self._empty((batch, length, heads, v.shape[3]), q).transpose(0, 2, 1, 3)  # (B, H, T, D)

    def _add_bias(self, y: Array, bias: Array) -> Array:
        """Add the bias to rows of y, in place."""
        n_rows = y.size // max(y.shape[-1], 1)
        parts = _parts(n_rows, y.size)
        if parts > 1:
            elementwise.kernel_bias(y.reshape(-1), _vector(bias), n_rows, parts)
        else:
            y += bias
        return y

    def _windows(self, x: Array, kernel: int, stride: int) -> Array:
        """The inputs of each output of a strided convolution: (B, ceil(T / stride), kernel, d_in), zero outside."""
        batch, length, width = x.shape
        outputs, before = -(-length // stride), (kernel - 1) // 2
        windows = self._empty((batch, outputs, kernel, width), x)
        for tap in range(kernel):
            first = max(0, -(-(before - tap) // stride))  # the first output whose tap lies at t >= 0
            last = max(first, min(outputs, (length - 1 + before - tap) // stride + 1))
            start = first * stride + tap - before
            windows[:, :first, tap] = 0
            windows[:, first:last, tap] = x[:, start : start + (last - first) * stride : stride]
            windows[:, last:, tap] = 0
        return windows

    def _by_rows(self, kernel: Callable[..., None], x: Array, *operands: Any) -> Array:
        """Run a kernel that needs whole rows: x (..., d) -> (..., d)."""
        out = self._empty(x.shape, x)
        if out.size:
            width = x.shape[-1]
            flat, stride = _as_rows(x, width)
            n_rows = x.size // width
            kernel(flat, stride, *operands, out.reshape(-1), n_rows, _parts(n_rows, x.size))
        return out

    def _activation(self, kind: int, op: str, x: Array) -> Array:
        _same_dtype(op, x=x)
        out = self._empty(x.shape, x)
        if out.size:
            width = CHUNK if x.flags.c_contiguous else x.shape[-1]
            flat, stride = _as_rows(x, width)
            n_rows = -(-x.size // width)
            elementwise.kernel_activation(
                kind, flat, stride, out.reshape(-1), width, n_rows, _parts(n_rows, x.size)
            )
        return out

    def _gate(self, smooth: bool, a: Array, b: Array) -> Array:
        out = self._empty(a.shape, a)
        if out.size:
            width = CHUNK if a.flags.c_contiguous and b.flags.c_contiguous else a.shape[-1]
            x, x_stride, y, y_stride = *_as_rows(a, width), *_as_rows(b, width)
            n_rows = -(-a.size // width)
            elementwise.kernel_gate(
                smooth, x, x_stride, y, y_stride, out.reshape(-1), width, n_rows, _parts(n_rows, a.size)
            )
        return out


# --- memory layouts -------------------------------------------------------------------------------------------------


class _Span:
    """The memory that an array walks over, as NumPy's array interface: one axis, writeable, without a copy.

    Kernels never write to their inputs; the flag only keeps Numba from compiling each of them once more for read-only arrays.
    """

    def __init__(self, array: Array, length: int) -> None:
        self.owner = array
        self.__array_interface__ = {
            "version": 3,
            "shape": (length,),
            "typestr": array.dtype.str,
            "data": (array.__array_interface__["data"][0], False),
        }


def _flat(x: Array) -> tuple[Array, tuple[int, ...]]:
    """A one-dimensional view of the memory of x and the stride of each axis, in elements; copies odd layouts."""
    ordinary = x.flags.aligned and all(s >= 0 and s % x.itemsize == 0 for s in x.strides)
    if not ordinary or (x.shape[-1] > 1 and x.strides[-1] != x.itemsize):
        x = np.array(x, order="C")
    strides = tuple(s // x.itemsize for s in x.strides)
    if x.flags.carray:  # contiguous, aligned and writeable
        return x.reshape(-1), strides
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if x.size else 0
    return np.asarray(_Span(x, length)), strides


def _as_rows(x: Array, width: int) -> tuple[Array, int]:
    """A flat view of x and the distance between its rows of `width` elements."""
    if x.flags.carray:
        return x.reshape(-1), width
    if x.flags.c_contiguous:
        return _flat(x)[0], width
    flat, strides = _flat(x.reshape(-1, width))  # a view wherever rows are evenly spaced
    return flat, strides[0]


def _vector(x: Array) -> Array:
    """A contiguous one-dimensional array as kernels take it."""
    return x if x.flags.carray else _flat(np.ascontiguousarray(x))[0]


def _parts(n_rows: int, elements: int) -> int:
    """How many pieces a kernel is cut into; a function of sizes alone, so that results do not depend on threads."""
    return 1 if elements < SERIAL_ELEMENTS else min(n_rows, MOST_PARTS)


def _trailing(x: Array, y: Array) -> Array:
    """y as its last axes that x has too: a residual, a table or a vector; any other broadcast is written out."""
    while y.ndim > 1 and y.shape[0] == 1 and x.shape[: x.ndim - y.ndim + 1] != (1,) * (x.ndim - y.ndim + 1):
        y = y[0]
    if y.ndim <= x.ndim and x.shape[x.ndim - y.ndim :] == y.shape and y.ndim:
        return y
    try:
        return np.ascontiguousarray(np.broadcast_to(y, x.shape))
    except ValueError:
        message = f"add: y {y.shape} does not broadcast to x {x.shape}"
        raise ShapeError(message) from None


def _whole_rows(mask: Array, shape: tuple[int, ...]) -> Array:
    """The mask with whole rows of keys in memory and stride 0 along axes that it repeats."""
    mask = np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:-1], shape[-1])))
    return np.broadcast_to(mask, shape)


# --- products -------------------------------------------------------------------------------------------------------


def _query_blocks(
    q_len: int, k_len: int, causal: bool, block: int = QUERY_BLOCK
) -> list[tuple[int, int, int]]:
    """Ranges of query rows with the number of keys that the last of them sees; rows that see none are left out."""
    if not causal:
        return [(0, q_len, k_len)]
    hidden = min(max(q_len - k_len, 0), q_len)
    edges = [*range(hidden, q_len, block), q_len]
    return [(a, b, b + k_len - q_len) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]


def _grouped_product(a: Array, b: Array, out: Array) -> None:
    """``out = a @ b`` per head; a (B, H, m, n), b (B or 1, Hkv, n, p), and query head h meets head h // (H / Hkv)."""
    (batch, heads, m, n), groups = a.shape, b.shape[1]
    if groups == heads:
        np.matmul(a, b, out=out)
        return
    for g in range(groups):
        part = slice(g * (heads // groups), (g + 1) * (heads // groups))
        np.matmul(a[:, part], b[:, g : g + 1], out=out[:, part])


# --- the door -------------------------------------------------------------------------------------------------------


def _sizes(arrays: dict[str, Array]) -> str:
    return ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items() if array is not None)


def _require(holds: bool, op: str, expected: str, **arrays: Array) -> None:
    if not holds:
        message = f"{op}: expected {expected}; got {_sizes(arrays)}"
        raise ShapeError(message)


def _same_dtype(op: str, **arrays: Array | None) -> None:
    given = {name: array for name, array in arrays.items() if array is not None}
    kinds = {array.dtype for array in given.values()}
    if len(kinds) == 1 and kinds <= DTYPES:
        return
    if len(kinds) > 1:
        listed = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in given.items())
        message = f"{op}: arrays must have one dtype; got {listed}"
        raise ShapeError(message)
    message = (
        f"{op}: the numba engine takes float32 and float64, not {kinds.pop()}; "
        "float16 runs on the engines 'cupy' (GPU) and 'numpy' (slow)"
    )
    raise UnsupportedError(message)


def _per_channel(op: str, x: Array, **vectors: Array) -> None:
    _same_dtype(op, x=x, **vectors)
    fits = x.ndim >= 1 and all(vector.shape == x.shape[-1:] for vector in vectors.values())
    _require(fits, op, f"x (..., d), {', '.join(vectors)} (d,)", x=x, **vectors)


def _groups(a: Array, b: Array) -> bool:
    return b.shape[1] > 0 and a.shape[1] % b.shape[1] == 0 if a.shape[1] else True


def _check_heads(op: str, q: Array, k: Array) -> None:
    fits = q.ndim == k.ndim == 4 and q.shape[3] == k.shape[3] and k.shape[0] in (1, q.shape[0]) and _groups(q, k)
    _require(fits, op, "q (B, H, Tq, D), k (B, Hkv, Tk, D), H a multiple of Hkv", q=q, k=k)


def _check_values(op: str, k: Array, v: Array) -> None:
    _require(v.ndim == 4 and v.shape[:3] == k.shape[:3], op, "k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv)", k=k, v=v)


def _check_mask(op: str, q: Array, k: Array, mask: Array | None) -> None:
    if mask is None:
        return
    full = (*q.shape[:3], k.shape[2])
    fits = mask.dtype == np.bool_ and mask.ndim == 4 and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
    _require(fits, op, f"a bool mask that broadcasts to (B, H, Tq, Tk) = {full}", q=q, k=k, mask=mask)
