"""Exact attention without the map: fused ("flash") kernels for the CPU.

One work item is a block of queries of one head. It walks over the keys, `_KEY_BLOCK` at a time, and keeps for each query the
running maximum m of its scores, the running sum l of ``exp(s - m)`` and the unnormalised output o (online softmax [1]_):

    S  = K Q^T                            scores, keys down, queries across      dot_tile
    m' = max(m, max S);  P = exp(S - m')  weights;  l' = l e^(m - m') + sum P    online_softmax
    o' = o e^(m - m') + V^T P             values                                 rescale_add_tile

and ``o / l`` at the end. The T x T map never exists: a thread owns a few blocks that fit its caches (FlashAttention [2]_).
Everything is transposed, queries along the vector, so that maxima, sums and rescaling need no work across lanes, and K and V
enter as single numbers, read once from rows copied to where the cache can hold them. Queries are packed in *panels*, see `vector`.

.. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867, algorithm 3.
.. [2] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, prange

from .vector import (
    TILE,
    dot_tile,
    fetch_add,
    offset,
    online_softmax,
    panel_lanes,
    pointer,
    rescale_add_tile,
    skew_add,
    transpose_in,
    transpose_out,
)

_KEY_BLOCK = 128  # keys per step; their weights for one panel of queries stay in the first-level cache
_PANELS = 4  # panels of queries per work item: every copied block of keys and values is used that often
_ALIGNMENT = 64  # bytes of a cache line

_ROWS = TILE.rows  # a compile-time constant of the kernels, fixed by the host's instruction set


class Operand(NamedTuple):
    """Where a (B, H, T, D) array lies: its address and the elements between its batches, heads, rows and columns."""

    address: int
    batch: int
    head: int
    row: int
    column: int


class Sizes(NamedTuple):
    """The sizes of one call, and how it is cut into work items."""

    B: int
    Hq: int
    G: int  # query heads that share a head of keys and values
    Tq: int
    Tk: int
    D: int
    Dv: int
    lanes: int  # queries in a panel
    vector: int  # numbers in a vector
    panels: int  # panels in a work item
    items: int
    threads: int


class Workspace(NamedTuple):
    """Elements that the parts of one thread's scratch memory take, in the order in which they lie there."""

    queries: int  # panels, each (D, lanes)
    outputs: int  # panels, each (Dv rounded up, lanes)
    state: int  # panels, each (4, lanes)
    scores: int  # (_KEY_BLOCK, lanes)
    keys: int  # (_KEY_BLOCK, D)
    values: int  # (_KEY_BLOCK, Dv rounded up)
    position_queries: int  # panels, each (D, lanes)
    position_scores: int  # (_KEY_BLOCK + lanes, lanes)
    positions: int  # (_KEY_BLOCK + lanes, D)


# --------------------------------------------------------------------------------------------------------------------------
# Parts of a work item. Pointers come from `vector`; `panel` is (rows, lanes).
# --------------------------------------------------------------------------------------------------------------------------


@njit
def _row(like, x, b, h, i):
    """Point at row i of head h of batch b."""
    return offset(pointer(x.address, like), b * x.batch + h * x.head + i * x.row)


@njit
def _fill(target, count, value):
    """Set `count` numbers."""
    for i in range(count):
        target[i] = value


@njit
def _copy_rows(target, width, source, row_stride, first, last, rows, columns):
    """Copy rows first..last-1 to a dense (rows, width) block; rows before 0, after last and columns past `columns` are zero."""
    for j in range(rows):
        row = offset(target, j * width)
        used = columns if 0 <= first + j < last else 0
        from_row = offset(source, (first + j) * row_stride)
        for d in range(used):
            row[d] = from_row[d]
        for d in range(used, width):
            row[d] = 0


@njit
def _pack_queries(panel, source, row_stride, count, sign, sizes):
    """Transpose `count` query rows to a panel (D, lanes), times `sign`; the lanes past them are zero."""
    for lane in range(0, sizes.lanes, sizes.vector):
        done = 0
        if lane + sizes.vector <= count:
            done = sizes.D - sizes.D % sizes.vector
            for d in range(0, done, sizes.vector):
                from_square = offset(source, lane * row_stride + d)
                transpose_in(offset(panel, d * sizes.lanes + lane), from_square, row_stride, sign)
        for d in range(done, sizes.D):
            for i in range(lane, lane + sizes.vector):
                panel[d * sizes.lanes + i] = sign * source[i * row_stride + d] if i < count else 0


@njit
def _unpack_outputs(target, row_stride, count, panel, state, sizes):
    """Write ``o / l`` of a panel (Dv, lanes) to `count` output rows; a row whose weights sum to zero saw no key."""
    sums = offset(state, 2 * sizes.lanes)
    inverse = offset(state, 3 * sizes.lanes)
    for i in range(sizes.lanes):
        inverse[i] = 1 / sums[i]
    for lane in range(0, count, sizes.vector):
        done = 0
        if lane + sizes.vector <= count:
            done = sizes.Dv - sizes.Dv % sizes.vector
            for d in range(0, done, sizes.vector):
                square = offset(target, lane * row_stride + d)
                transpose_out(square, row_stride, offset(panel, d * sizes.lanes + lane), offset(inverse, lane))
        for i in range(lane, min(lane + sizes.vector, count)):
            for d in range(done, sizes.Dv):
                target[i * row_stride + d] = panel[d * sizes.lanes + i] * inverse[i]
    for i in range(count):
        if sums[i] == 0:
            _fill(offset(target, i * row_stride), sizes.Dv, 0)


@njit
def _hide_future(scores, first_query, first_key, keys, sizes, hidden):
    """Hide from query i every key j > i + Tk - Tq."""
    for j in range(keys):
        lanes_before = first_key + j - (sizes.Tk - sizes.Tq) - first_query
        if lanes_before > 0:
            _fill(offset(scores, j * sizes.lanes), min(lanes_before, sizes.lanes), hidden)


@njit
def _hide_masked(scores, mask, b, h, first_query, queries, first_key, keys, lanes, hidden):
    """Hide the keys where the mask is False. A mask that is the same for all queries is read once per key."""
    seen = offset(_row(np.uint8(0), mask, b, h, first_query), first_key * mask.column)
    for j in range(keys):
        row = offset(scores, j * lanes)
        if mask.row == 0:
            if not seen[j * mask.column]:
                _fill(row, queries, hidden)
        else:
            for i in range(queries):
                if not seen[i * mask.row + j * mask.column]:
                    row[i] = hidden


@njit
def _score_rows(scores, keys, rows, panel, sizes):
    """Set the panel scores = keys @ panel for a block of (rows, D) keys, `_ROWS` at a time."""
    for j in range(0, rows, _ROWS):
        dot_tile(offset(scores, j * sizes.lanes), offset(keys, j * sizes.D), panel, sizes.D, sizes.D)


@njit
def _add_position_scores(scores, keys, first_query, first_key, panel, p, table, positions, sizes):
    """Add q_position[i] . p[Tq - 1 - i + j]: products with the window of rows that these queries and keys meet, then skewed."""
    rows = keys + sizes.lanes - 1
    first = sizes.Tq - first_query + first_key - sizes.lanes
    _copy_rows(positions, sizes.D, p, p_stride, first, 2 * sizes.Tq - 1, _round_up(rows, _ROWS), sizes.D)
