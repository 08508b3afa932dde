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

import itertools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
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

_ITEMS_PER_THREAD = 4  # at least, where there are enough queries, so that threads finish together

Array = npt.NDArray[Any]
_inner = njit(error_model="numpy")  # for parts of a kernel; they are compiled into it
_ROWS = TILE.rows  # a compile-time constant of the kernels, fixed by the host's instruction set


class Operand(NamedTuple):
    """Where a (B, H, T, D) array lies: its address and the elements between its batches, heads, rows and columns."""

    address: int
    batch: int
    head: int
    row: int
    column: int


class Sizes(NamedTuple):
    """The sizes of one call, how it is cut into work items, and what is to be hidden or added."""

    B: int
    Hq: int
    G: int  # query heads that share one head of keys and values
    Tq: int
    Tk: int
    D: int
    Dv: int
    Dv_padded: int  # Dv rounded up to whole register tiles
    lanes: int  # queries in a panel
    vector: int  # numbers in a vector
    panels: int  # panels in a work item
    blocks: int  # work items in a head
    causal: bool
    masked: bool
    relative: bool


class Workspace(NamedTuple):
    """One thread's scratch memory: the elements before each part, in the order in which they lie there."""

    scores: int  # (_KEY_BLOCK, lanes)
    keys: int  # (_KEY_BLOCK, D)
    values: int  # (_KEY_BLOCK, Dv_padded)
    queries: int  # panels x (D, lanes)
    outputs: int  # panels x (Dv_padded, lanes)
    state: int  # panels x (4, lanes): maximum, shift, sum, factor; see online_softmax
    position_queries: int  # panels x (D, lanes)
    position_scores: int  # (_KEY_BLOCK + lanes, lanes)
    positions: int  # (_KEY_BLOCK + lanes, D)
    end: int


# --------------------------------------------------------------------------------------------------------------------------
# Parts of a work item. A pointer named `panel`, `scores` or `outputs` is to rows of `lanes` numbers.
# --------------------------------------------------------------------------------------------------------------------------


@_inner
def _row(like, x, b, h, i):
    """Point at row i of head h of batch b."""
    return offset(pointer(x.address, like), b * x.batch + h * x.head + i * x.row)


@_inner
def _fill(target, count, value):
    """Set `count` numbers."""
    for i in range(count):
        target[i] = value


@_inner
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


@_inner
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


@_inner
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


@_inner
def _hide_future(scores, first_query, first_key, keys, sizes):
    """Hide from query i every key j > i + Tk - Tq."""
    for j in range(keys):
        lanes_before = first_key + j - (sizes.Tk - sizes.Tq) - first_query
        if lanes_before > 0:
            _fill(offset(scores, j * sizes.lanes), min(lanes_before, sizes.lanes), -np.inf)


@_inner
def _hide_masked(scores, mask, b, h, first_query, queries, first_key, keys, lanes):
    """Hide the keys where the mask is False. A mask that is the same for all queries is read once per key."""
    seen = offset(_row(np.uint8(0), mask, b, h, first_query), first_key * mask.column)
    for j in range(keys):
        row = offset(scores, j * lanes)
        if mask.row == 0:
            if not seen[j * mask.column]:
                _fill(row, queries, -np.inf)
        else:
            for i in range(queries):
                if not seen[i * mask.row + j * mask.column]:
                    row[i] = -np.inf


@_inner
def _score_rows(scores, keys, rows, panel, sizes):
    """Set scores = keys @ panel for (rows, D) keys, a register tile at a time; rows is a multiple of the tile's."""
    for j in range(0, rows, _ROWS):
        dot_tile(offset(scores, j * sizes.lanes), offset(keys, j * sizes.D), panel, sizes.D, sizes.D)


@_inner
def _add_position_scores(scores, panel, first_query, first_key, keys, p, p_row, rows, products, sizes):
    """Add q_position[i] . p[Tq - 1 - i + j]: products with the window of p that this panel and these keys meet, skewed."""
    window = keys + sizes.lanes - 1
    window_padded = _ROWS * ((window + _ROWS - 1) // _ROWS)
    first = sizes.Tq - first_query + first_key - sizes.lanes
    _copy_rows(rows, sizes.D, p, p_row, first, 2 * sizes.Tq - 1, window_padded, sizes.D)
    _score_rows(products, rows, window_padded, panel, sizes)
    skew_add(scores, keys, products)


@_inner
def _add_values(outputs, state, values, keys, weights, sizes):
    """Set outputs = factor * outputs + values.T @ weights for (keys, Dv_padded) values, a register tile at a time."""
    factor = offset(state, 3 * sizes.lanes)
    for d in range(0, sizes.Dv_padded, _ROWS):
        rescale_add_tile(offset(outputs, d * sizes.lanes), factor, offset(values, d), weights, keys, sizes.Dv_padded)


@_inner
def _start_panels(first, n_panels, b, h, q, q_position, sign, space, place, sizes):
    """Pack the queries of a work item and set its sums to nothing seen."""
    for n in range(n_panels):
        query = first + n * sizes.lanes
        count = min(sizes.lanes, sizes.Tq - query)
        packed = n * sizes.D * sizes.lanes
        _pack_queries(offset(space, place.queries + packed), _row(sign, q, b, h, query), q.row, count, sign, sizes)
        if sizes.relative:
            source = _row(sign, q_position, b, h, query)
            panel = offset(space, place.position_queries + packed)
            _pack_queries(panel, source, q_position.row, count, sign, sizes)
        state = offset(space, place.state + n * 4 * sizes.lanes)
        _fill(state, 2 * sizes.lanes, -np.inf)
        _fill(offset(state, 2 * sizes.lanes), 2 * sizes.lanes, 0)
    _fill(offset(space, place.outputs), n_panels * sizes.Dv_padded * sizes.lanes, 0)


@_inner
def _attend_keys(n, first_query, first_key, keys, b, h, mask, p, log2_scale, space, place, sizes):
    """Let panel n of a work item see the block of keys and values that was copied to scratch memory."""
    scores = offset(space, place.scores)
    state = offset(space, place.state + n * 4 * sizes.lanes)
    packed = n * sizes.D * sizes.lanes
    rows = _ROWS * ((keys + _ROWS - 1) // _ROWS)
    _score_rows(scores, offset(space, place.keys), rows, offset(space, place.queries + packed), sizes)
    if sizes.relative:
        panel = offset(space, place.position_queries + packed)
        window, products = offset(space, place.positions), offset(space, place.position_scores)
        table = _row(log2_scale, p, 0, h, 0)
        _add_position_scores(scores, panel, first_query, first_key, keys, table, p.row, window, products, sizes)
    if sizes.causal:
        _hide_future(scores, first_query, first_key, keys, sizes)
    if sizes.masked:
        count = min(sizes.lanes, sizes.Tq - first_query)
        _hide_masked(scores, mask, b, h, first_query, count, first_key, keys, sizes.lanes)
    online_softmax(scores, keys, log2_scale, state)
    outputs = offset(space, place.outputs + n * sizes.Dv_padded * sizes.lanes)
    _add_values(outputs, state, offset(space, place.values), keys, scores, sizes)


@_inner
def _keys_seen(last_query, sizes):
    """Count the keys that a query sees, which under a causal mask are all that the queries before it see."""
    return max(0, min(sizes.Tk, last_query + sizes.Tk - sizes.Tq + 1)) if sizes.causal else sizes.Tk


@_inner
def _attend_item(item, q, q_position, k, v, p, mask, out, sign, log2_scale, space, place, sizes):
    """Compute the output rows of one work item: a block of queries of one head. Longest causal rows come first."""
    head, block = item // sizes.blocks, item % sizes.blocks
    b, h = head // sizes.Hq, head % sizes.Hq
    first = (sizes.blocks - 1 - block) * sizes.panels * sizes.lanes
    end = min(sizes.Tq, first + sizes.panels * sizes.lanes)
    n_panels = (end - first + sizes.lanes - 1) // sizes.lanes
    _start_panels(first, n_panels, b, h, q, q_position, sign, space, place, sizes)
    key_rows, value_rows = _row(sign, k, b, h // sizes.G, 0), _row(sign, v, b, h // sizes.G, 0)
    keys_end = _keys_seen(end - 1, sizes)
    for j in range(0, keys_end, _KEY_BLOCK):
        keys = min(_KEY_BLOCK, keys_end - j)
        _copy_rows(offset(space, place.keys), sizes.D, key_rows, k.row, j, keys_end, _KEY_BLOCK, sizes.D)
        _copy_rows(offset(space, place.values), sizes.Dv_padded, value_rows, v.row, j, keys_end, keys, sizes.Dv)
        for n in range(n_panels):
            query = first + n * sizes.lanes
            seen = min(keys, _keys_seen(min(query + sizes.lanes, end) - 1, sizes) - j)
            if seen > 0:
                _attend_keys(n, query, j, seen, b, h, mask, p, log2_scale, space, place, sizes)
    for n in range(n_panels):
        query = first + n * sizes.lanes
        outputs = offset(space, place.outputs + n * sizes.Dv_padded * sizes.lanes)
        state = offset(space, place.state + n * 4 * sizes.lanes)
        _unpack_outputs(_row(sign, out, b, h, query), out.row, min(sizes.lanes, end - query), outputs, state, sizes)


@_inner
def _attend_items(thread, counter, q, q_position, k, v, p, mask, out, sign, log2_scale, scratch, place, sizes):
    """Take work items until none is left."""
    space = offset(pointer(scratch, sign), thread * place.end)
    item = fetch_add(counter)
    while item < sizes.B * sizes.Hq * sizes.blocks:
        _attend_item(item, q, q_position, k, v, p, mask, out, sign, log2_scale, space, place, sizes)
        item = fetch_add(counter)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _kernel_attention(threads, counter, q, q_position, k, v, p, mask, out, sign, log2_scale, scratch, place, sizes):
    """Run all work items. The type of `sign` is the type of every array but the mask."""
    for thread in prange(threads):
        _attend_items(np.intp(thread), counter, q, q_position, k, v, p, mask, out, sign, log2_scale, scratch, place, sizes)


# --------------------------------------------------------------------------------------------------------------------------
# The Python side: sizes, scratch memory, addresses.
# --------------------------------------------------------------------------------------------------------------------------


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _plan(q: Array, k: Array, v: Array, threads: int, causal: bool, masked: bool, relative: bool) -> Sizes:
    """Cut the queries of a head into work items: long ones to reuse keys, but several for each thread."""
    B, Hq, Tq, D = q.shape
    Dv = v.shape[3]
    lanes = panel_lanes(q.itemsize)
    head_panels = -(-Tq // lanes)
    blocks = max(-(-head_panels // _PANELS), min(head_panels, -(-_ITEMS_PER_THREAD * threads // (B * Hq))))
    panels = -(-head_panels // blocks)
    return Sizes(
        B=B,
        Hq=Hq,
        G=Hq // k.shape[1],
        Tq=Tq,
        Tk=k.shape[2],
        D=D,
        Dv=Dv,
        Dv_padded=_round_up(Dv, TILE.rows),
        lanes=lanes,
        vector=lanes // TILE.vectors,
        panels=panels,
        blocks=-(-head_panels // panels),
        causal=causal,
        masked=masked,
        relative=relative,
    )


def _workspace(sizes: Sizes) -> Workspace:
    """Lay out one thread's scratch memory, each part on a cache line."""
    lanes, position_rows = sizes.lanes, (_KEY_BLOCK + sizes.lanes) * sizes.relative
    parts = (
        _KEY_BLOCK * lanes,
        _KEY_BLOCK * sizes.D,
        _KEY_BLOCK * sizes.Dv_padded,
        sizes.panels * sizes.D * lanes,
        sizes.panels * sizes.Dv_padded * lanes,
        sizes.panels * 4 * lanes,
        sizes.panels * sizes.D * lanes * sizes.relative,
        position_rows * lanes,
        position_rows * sizes.D,
    )
    return Workspace(0, *itertools.accumulate(_round_up(part, _ALIGNMENT) for part in parts))


def _readable(x: Array) -> Array:
    """Return `x`, copied only if its last axis is not contiguous or its strides are not whole elements."""
    whole = all(stride % x.itemsize == 0 for stride in x.strides)
    return x if whole and (x.strides[3] == x.itemsize or x.shape[3] <= 1) else x.copy(order="C")


def _operand(x: Array) -> Operand:
    return Operand(x.ctypes.data, *(stride // x.itemsize for stride in x.strides))


def _attend(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool,
    mask: Array | None,
    out: Array | None,
    q_position: Array | None = None,
    p: Array | None = None,
) -> Array:
    """Prepare a call of the kernel; `q_position` and `p` are given together or not at all."""
    B, Hq, Tq, _ = q.shape
    if out is None:
        out = np.empty((B, Tq, Hq, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)  # (B, Hq, Tq, Dv)
    if out.size == 0:
        return out
    threads = numba.get_num_threads()
    sizes = _plan(q, k, v, threads, causal, mask is not None, p is not None)
    place = _workspace(sizes)
    scratch = np.empty(threads * place.end + _ALIGNMENT, q.dtype)
    counter = np.zeros(1, np.int64)
    q, k, v = _readable(q), _readable(k), _readable(v)
    q_position = q if q_position is None else _readable(q_position)
    p = q if p is None else _readable(p[None])  # (1, H, 2 * Tq - 1, D)
    mask = np.empty((1, 1, 1, 1), bool) if mask is None else np.broadcast_to(mask, (B, Hq, Tq, k.shape[2]))
    number = q.dtype.type
    _kernel_attention(
        threads,
        counter.ctypes.data,
        *map(_operand, (q, q_position, k, v, p, mask, out)),
        number(math.copysign(1.0, scale) if scale else 0.0),
        number(abs(scale) / math.log(2) if scale else 1.0),
        _round_up(scratch.ctypes.data, _ALIGNMENT),
        place,
        sizes,
    )
    return out


def fused_attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool = False,
    mask: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Attend exactly, ``softmax(scale * q k^T) v``, without ever holding the map."""
    return _attend(q, k, v, scale, causal, mask, out)


def fused_relative_attention(
    q_content: Array,
    q_position: Array,
    k: Array,
    v: Array,
    p: Array,
    scale: float,
    causal: bool = False,
    mask: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Attend exactly with relative positions."""
    return _attend(q_content, k, v, scale, causal, mask, out, q_position, p)
