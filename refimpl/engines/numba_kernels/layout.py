"""How arrays lie in memory: as kernels take them (flat, with strides), as BLAS does (a matrix per head)."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from refimpl.errors import ShapeError

Array = Any

CHUNK = 4096  # elements in a "row" of a contiguous array that an elementwise kernel walks over
COPIED_ELEMENTS = 2**13  # up to so many, copying a view takes less than describing its memory (some 10 us)
SERIAL_ELEMENTS = 2**16  # below this, waking a second thread (some 15 us) costs more than it saves
MOST_PARTS = 64  # pieces that a kernel is cut into for its threads
LONG_ROW = 2**16  # logits from which on a row is shared out among threads
GROUP_ELEMENTS = 2**22  # of rows that are selected from at a time
FEW_ROWS = 8  # up to so many rows a product takes the time of reading its large operand, by kernels of its own
QUERY_BLOCK = 256  # query rows per product under a causal mask; keys beyond the last row's are left out


class _Span:
    """The memory that an array walks over, as NumPy's array interface: one axis, writeable, without a copy.

    Kernels never write to their inputs; without the flag, Numba would compile them once more for read-only
    ones.
    """

    def __init__(self, array: Array, length: int) -> None:
        self.owner = array
        self.__array_interface__ = {
            "version": 3,
            "shape": (length,),
            "typestr": array.dtype.str,
            "data": (array.__array_interface__["data"][0], False),
        }


def readable(x: Array) -> Array:
    """x, copied only if its last axis has gaps or it is not aligned."""
    return x if x.flags.aligned and (x.strides[-1] == x.itemsize or x.shape[-1] <= 1) else np.array(x, order="C")


def flat(x: Array) -> tuple[Array, tuple[int, ...]]:
    """A one-dimensional view of the memory of x, and its strides in elements; odd or small layouts are copied."""
    if not x.flags.carray:  # contiguous, aligned and writeable
        ordinary = x.flags.aligned and min(x.strides, default=0) >= 0
        if not ordinary or x.size < COPIED_ELEMENTS or (x.shape[-1] > 1 and x.strides[-1] != x.itemsize):
            x = np.array(x, order="C")
    strides = tuple([s // x.itemsize for s in x.strides])
    if x.flags.carray:
        return x.reshape(-1), strides
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if x.size else 0
    return np.asarray(_Span(x, length)), strides


def as_rows(x: Array, width: int) -> tuple[Array, int]:
    """A flat view of x and the distance between its rows of `width` elements."""
    if x.flags.carray:
        return x.reshape(-1), width
    if x.flags.c_contiguous:
        return flat(x)[0], width
    memory, strides = flat(x.reshape(-1, width))  # a view wherever rows are evenly spaced
    return memory, strides[0]


def vector(x: Array) -> Array:
    """All elements of x as one contiguous axis."""
    return x.reshape(-1) if x.flags.carray else flat(np.ascontiguousarray(x).reshape(-1))[0]


def chunked(*arrays: Array) -> int:
    """Width of the rows that an elementwise kernel walks over: chunks of memory where there are no gaps."""
    return CHUNK if all(x.flags.c_contiguous for x in arrays) else arrays[0].shape[-1]


def count(rows: int, elements: int) -> int:
    """How many parts a kernel is cut into: by sizes alone, so that results do not depend on threads."""
    return 1 if elements < SERIAL_ELEMENTS else min(rows, MOST_PARTS)


def trailing(x: Array, y: Array) -> Array:
    """y as the last axes of x: a residual, a table or a vector. Any other broadcast is written out."""
    if y.shape == x.shape:
        return y
    while y.ndim > 1 and y.shape[0] == 1:
        y = y[0]
    if y.ndim and x.shape[x.ndim - y.ndim :] == y.shape:
        return y
    try:
        return np.ascontiguousarray(np.broadcast_to(y, x.shape))
    except ValueError:
        message = f"add: y {y.shape} does not broadcast to x {x.shape}"
        raise ShapeError(message) from None


def batched(keys: Array, q: Array) -> Array:
    """Keys or values (B or 1, Hkv, Tk, D) as (B, Hkv, Tk, D), without a copy."""
    return keys if len(keys) == len(q) else np.broadcast_to(keys, (len(q), *keys.shape[1:]))


def whole_rows(mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask with whole rows of keys in memory and stride 0 along the axes that it repeats."""
    rows = np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:-1], shape[-1])))
    return np.broadcast_to(rows, shape)


def query_blocks(q_len: int, k_len: int, causal: bool, block: int = QUERY_BLOCK) -> list[tuple[int, int, int]]:
    """Ranges of query rows and how many keys the last row sees; rows that see none are left out."""
    if not causal:
        return [(0, q_len, k_len)]
    hidden = min(max(q_len - k_len, 0), q_len)
    edges = [*range(hidden, q_len, block), q_len]
    return [(first, last, last + k_len - q_len) for first, last in pairwise(edges)]


def grouped_product(a: Array, b: Array, out: Array) -> None:
    """``out = a @ b`` per head: a (B, H, m, n), b (B or 1, Hkv, n, p); H / Hkv heads of a share one of b."""
    shared = a.shape[1] // b.shape[1]
    if shared == 1:
        np.matmul(a, b, out=out)
        return
    for g in range(b.shape[1]):
        group = slice(g * shared, (g + 1) * shared)
        np.matmul(a[:, group], b[:, g : g + 1], out=out[:, group])


def windows(x: Array, kernel: int, stride: int, out: Array) -> None:
    """Copy the inputs of each convolved output: x (B, T, d) -> out (B, ceil(T / stride), kernel, d)."""
    length, outputs, before = x.shape[1], out.shape[1], (kernel - 1) // 2
    for tap in range(kernel):
        first = max(0, -(-(before - tap) // stride))  # the first output whose tap lies at t >= 0
        last = max(first, min(outputs, (length - 1 + before - tap) // stride + 1))
        start = first * stride + tap - before
        out[:, :first, tap] = 0
        out[:, first:last, tap] = x[:, start : start + (last - first) * stride : stride]
        out[:, last:, tap] = 0


def columns(y: Array, widths: tuple[int, ...]) -> tuple[Array, ...]:
    """The columns of y (..., sum of widths) in consecutive parts."""
    stops = accumulate(widths)
    return tuple([y[..., stop - width : stop] for width, stop in zip(widths, stops, strict=True)])


def few_queries(q: Array, k: Array) -> bool:
    """Whether the rows of q (B, H, Tq, D) that share a head of keys (B, Hkv, Tk, D) are few."""
    return bool(q.shape[1] * q.shape[2] <= FEW_ROWS * k.shape[1])


def key_ranges(heads: int, length: int, keys: int) -> int:
    """Into how many ranges the keys of a head are cut: of about `keys` keys, unless all heads make too many parts."""
    return max(1, min(-(-length // keys), -(-MOST_PARTS // max(1, heads))))
