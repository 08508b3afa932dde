"""Shapes, strides, blocks and launch shapes: pure functions, so that they are tested without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.engines.protocol import Array

THREADS = 256  # at most, per block of a kernel that walks along rows
SCRATCH_BYTES = 64 << 20  # what a fused op holds of the map, about the second-level cache of a large GPU
BLOCK_ROWS = 128  # query rows that a block of the fused op has if they fit: enough to keep cuBLAS efficient
WARP = 32  # threads
PACK_BYTES = 16  # the most that a thread reads with one instruction
BLOCKS = 528  # that long rows are shared by: 4 for each of the 132 multiprocessors of an H100
CAUSAL_ROWS = 256  # query rows per product of a materialised causal map: hidden keys beyond a block are skipped

C_TYPES = {"float16": "__half", "float32": "float", "float64": "double"}
WIDE = {"float16": "float32", "float32": "float32", "float64": "float64"}  # dtype -> Wide<dtype> of the kernels

Strides = tuple[int, ...]
Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """How many blocks, of how many threads, with how much shared memory beside what a kernel declares itself."""

    grid: Grid
    block: Grid
    shared_bytes: int = 0


# --- launch shapes --------------------------------------------------------------------------------------------------


def row_threads(width: int) -> int:
    """Threads of a block that owns one row: a power of two from one warp to `THREADS`, no more than the row needs."""
    return min(THREADS, max(32, 1 << (max(width, 1) - 1).bit_length()))


def block_per_row(rows: int, width: int) -> Launch:
    """For a kernel whose block owns one row."""
    return Launch((rows,), (row_threads(width),))


def rows_by_columns(rows: int, width: int) -> Launch:
    """For an elementwise kernel: narrow rows share a block."""
    across = row_threads(width)
    down = THREADS // across
    return Launch((-(-rows // down),), (across, down))


# --- strides --------------------------------------------------------------------------------------------------------


def element_strides(x: Array) -> Strides:
    """Strides in elements."""
    return tuple(stride // x.dtype.itemsize for stride in x.strides)


def batch_strides(x: Array, axes: int) -> Strides:
    """Strides of the first `axes` axes; 0 where x has length 1 and is repeated."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape[:axes], element_strides(x)[:axes], strict=True))


def head_strides(*arrays: Array) -> Strides:
    """Of each array (B or 1, H, T, D) the strides of batch (0 where it is 1), head and row."""
    return tuple(stride for x in arrays for stride in (*batch_strides(x, 1), *element_strides(x)[1:3]))


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


# --- blocks of maps -------------------------------------------------------------------------------------------------


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


def visible(scores: Array, causal: bool) -> tuple[int, int]:
    """Keys that the first row sees, and how many more each further row."""
    q_len, k_len = scores.shape[2:]
    return (1 + k_len - q_len, 1) if causal else (k_len, 0)


def grouped(x: Array, groups: int) -> Array:
    """(B, H, T, D) as (B, Hkv, G, T, D)."""
    batch, heads, length, width = x.shape
    return x.reshape(batch, groups, heads // groups, length, width)


def as_map(stack: Array) -> Array:
    """(b, g, G, rows, keys), contiguous, as (b, g G, rows, keys)."""
    batch, groups, per_group, rows, keys = stack.shape
    return stack.reshape(batch, groups * per_group, rows, keys)
