"""Exact attention without the map: fused ("flash") kernels for the CPU.

One work item is a block of queries of one head. It walks over the keys, `_KEY_BLOCK` at a time, and keeps for
each query the running maximum m of its scores, the running sum l of ``exp(s - m)`` and the output o before
division (online softmax, [1]_ algorithm 3):

    S  = K Q^T                              scores, keys down, queries across     dot_tile
    m' = max(m, max S),  P = exp(S - m')    weights;  l' = l e^(m - m') + sum P   online_softmax
    o' = o e^(m - m') + V^T P               values                                rescale_add_tile

and ``o / l`` at the end. The T x T map never exists: a thread owns a few blocks that fit its caches
(FlashAttention [2]_). All is transposed, queries along the vector: maxima, sums and rescaling need no work
across lanes, and K and V enter as single numbers, from rows copied to where the caches hold them. Queries and
outputs lie in panels; see `vector`.

.. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
.. [2] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022,
   arXiv:2205.14135.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba import carray, cfunc, njit, types

from . import few_rows, layout
from .vector import (
    TILE,
    dot_tile,
    fetch_add,
    hide_square,
    offset,
    online_softmax,
    panel_lanes,
    pointer,
    rescale_add_tile,
    run_on_threads,
    skew_add,
    transpose_in,
    transpose_out,
)

Array = npt.NDArray[Any]

_KEY_BLOCK = 128  # keys per step, a multiple of a tile's rows; a panel's weights stay in the nearest cache
_PANELS = 8  # panels of queries per work item: every copied block of keys and values is used that often
_ITEMS_PER_THREAD = 4  # at least, where there are enough queries, so that threads finish together
_SMALL_CALL_FLOPS = 2_000_000  # less is done in the calling thread, sooner than others wake up
_CACHE_LINE = 64  # bytes
_NO_MASK = np.ones((1, 1, 1, 1), np.bool_)

_ROWS = TILE.rows  # of a register tile: fixed by the instruction set, a constant in compiled code
_part = njit(error_model="numpy")  # the parts of a kernel are compiled into it

Pointer = Any  # inside kernels: a C pointer to numbers of the arrays' type


class Operand(NamedTuple):
    """Where a (B, H, T, D) array lies: its address and the elements between batches, heads, rows, columns."""

    address: int
    batch: int
    head: int
    row: int
    column: int


class Sizes(NamedTuple):
    """The sizes of one call, how it is cut into work items, and what is hidden or added."""

    B: int
    Hq: int
    G: int  # query heads that share a head of keys and values
    Tq: int
    Tk: int
    D: int
    Dv: int
    Dv_padded: int  # Dv rounded up to whole register tiles
    lanes: int  # queries in a panel
    vector: int  # numbers in a vector
    panels: int  # panels in a work item
    blocks: int  # work items in a head
    causal: int
    masked: int
    relative: int
    window: int  # a query sees keys at most so many positions away; Tq + Tk for no such limit


class Scratch(NamedTuple):
    """One thread's scratch memory: the elements before each part, in the order of the parts."""

    scores: int  # (_KEY_BLOCK, lanes)
    keys: int  # (_KEY_BLOCK, D)
    values: int  # (_KEY_BLOCK, Dv_padded)
    queries: int  # panels x (D, lanes)
    outputs: int  # panels x (Dv_padded, lanes)
    state: int  # panels x (3, lanes): see online_softmax
    position_queries: int  # panels x (D, lanes)
    position_scores: int  # (_KEY_BLOCK + lanes, lanes), whole tiles
    positions: int  # (_KEY_BLOCK + lanes, D), whole tiles
    end: int


class Call(NamedTuple):
    """All that a kernel needs to know; `sign` has the type of every array but the mask."""

    q: Operand
    q_position: Operand
    k: Operand
    v: Operand
    p: Operand
    mask: Operand
    out: Operand
    sizes: Sizes
    place: Scratch
    scratch: int  # address of the first thread's scratch memory
    next_item: int  # address of an int64
    sign: float  # of the scale
    log2_scale: float  # |scale| / ln 2: softmax is computed with powers of two


# ------------------------------------------------------------------------------------------------------------
# The parts of a work item. A pointer named panel, scores or outputs is to rows of `lanes` numbers.
# ------------------------------------------------------------------------------------------------------------


@_part
def _row(like: Any, x: Operand, b: int, h: int, i: int) -> Pointer:
    """Point at row i of head h of batch b, as a pointer to numbers of the type of `like`."""
    return offset(pointer(x.address, like), b * x.batch + h * x.head + i * x.row)


@_part
def _fill(target: Pointer, count: int, value: float) -> None:
    """Set `count` numbers."""
    for i in range(count):
        target[i] = value


@_part
def _round_up(n: int, step: int) -> int:
    return (n + step - 1) // step * step


@_part
def _copy_rows(
    target: Pointer,
    width: int,
    rows: int,
    source: Pointer,
    row_stride: int,
    first: int,
    last: int,
    columns: int,
) -> None:
    """Copy rows first, first + 1, ... to a dense (rows, width) block.

    Zero stands for rows before 0, rows from `last` on, and numbers past `columns`.
    """
    for j in range(rows):
        row = offset(target, j * width)
        from_row = offset(source, (first + j) * row_stride)
        used = columns if 0 <= first + j < last else 0
        for d in range(used):
            row[d] = from_row[d]
        _fill(offset(row, used), width - used, 0)


@_part
def _pack_queries(panel: Pointer, x: Operand, b: int, h: int, first: int, sign: float, sizes: Sizes) -> None:
    """Transpose a panel's query rows to (D, lanes), times `sign`; lanes past the last query are zero."""
    rows, count = _row(sign, x, b, h, first), min(sizes.lanes, sizes.Tq - first)
    D, lanes, vector, stride = sizes.D, sizes.lanes, sizes.vector, x.row
    for lane in range(0, lanes, vector):
        squares = D - D % vector if lane + vector <= count else 0
        for d in range(0, squares, vector):
            transpose_in(offset(panel, d * lanes + lane), offset(rows, lane * stride + d), stride, sign)
        for d in range(squares, D):
            for i in range(lane, lane + vector):
                panel[d * lanes + i] = sign * rows[i * stride + d] if i < count else 0


@_part
def _unpack_outputs(panel: Pointer, state: Pointer, b: int, h: int, first: int, call: Call) -> None:
    """Write ``o / l`` from (Dv, lanes) to a panel's output rows; zeros where l = 0, as no key was seen."""
    x, sizes = call.out, call.sizes
    rows, count = _row(call.sign, x, b, h, first), min(sizes.lanes, sizes.Tq - first)
    Dv, lanes, vector, stride = sizes.Dv, sizes.lanes, sizes.vector, x.row
    sums, inverse = offset(state, lanes), offset(state, 2 * lanes)
    for i in range(lanes):
        inverse[i] = 1 / sums[i]
    for lane in range(0, count, vector):
        squares = Dv - Dv % vector if lane + vector <= count else 0
        for d in range(0, squares, vector):
            square = offset(rows, lane * stride + d)
            transpose_out(square, stride, offset(panel, d * lanes + lane), offset(inverse, lane))
        for i in range(lane, min(lane + vector, count)):
            for d in range(squares, Dv):
                rows[i * stride + d] = panel[d * lanes + i] * inverse[i]
            if sums[i] == 0:
                _fill(offset(rows, i * stride), Dv, 0)


@_part
def _hide_future(scores: Pointer, first_query: int, first_key: int, keys: int, sizes: Sizes) -> None:
    """Hide from query i every key j > i + Tk - Tq."""
    for j in range(keys):
        blind = first_key + j - (sizes.Tk - sizes.Tq) - first_query
        if blind > 0:
            _fill(offset(scores, j * sizes.lanes), min(blind, sizes.lanes), -np.inf)


@_part
def _hide_far(scores: Pointer, first_query: int, first_key: int, keys: int, sizes: Sizes) -> None:
    """Hide from query i, at p = i + Tk - Tq, every key j < p - window and every j > p + window."""
    lanes, first_position = sizes.lanes, first_query + sizes.Tk - sizes.Tq
    for j in range(keys):
        row, from_first = offset(scores, j * lanes), first_key + j - first_position
        before, behind = from_first - sizes.window, from_first + sizes.window + 1
        if before > 0:  # these queries lie too far before the key
            _fill(row, min(before, lanes), -np.inf)
        if behind < lanes:
            _fill(offset(row, max(behind, 0)), lanes - max(behind, 0), -np.inf)


@_part
def _hide_masked(scores: Pointer, b: int, h: int, first_query: int, first_key: int, keys: int, call: Call) -> None:
    """Hide the keys where the mask is False. A mask that is the same for all queries is read once per key."""
    mask, sizes = call.mask, call.sizes
    lanes, vector = sizes.lanes, sizes.vector
    seen = offset(_row(np.uint8(0), mask, b, h, first_query), first_key * mask.column)
    queries = min(lanes, sizes.Tq - first_query)
    if mask.row == 0:
        for j in range(keys):
            if not seen[j * mask.column]:
                _fill(offset(scores, j * lanes), queries, -np.inf)
        return
    squares = keys - keys % vector if mask.column == 1 else 0
    for lane in range(0, queries, vector):
        done = squares if lane + vector <= queries else 0
        for j in range(0, done, vector):
            hide_square(offset(scores, j * lanes + lane), offset(seen, lane * mask.row + j), mask.row)
        for j in range(done, keys):
            for i in range(lane, min(lane + vector, queries)):
                if not seen[i * mask.row + j * mask.column]:
                    scores[j * lanes + i] = -np.inf


@_part
def _score_rows(scores: Pointer, keys: Pointer, rows: int, panel: Pointer, sizes: Sizes) -> None:
    """Set ``scores = keys @ panel`` for (rows, D) keys, a tile at a time; `rows` fills whole tiles."""
    for j in range(0, rows, _ROWS):
        dot_tile(offset(scores, j * sizes.lanes), offset(keys, j * sizes.D), panel, sizes.D, sizes.D)


@_part
def _add_position_scores(
    scores: Pointer,
    panel: Pointer,
    h: int,
    first_query: int,
    first_key: int,
    keys: int,
    call: Call,
    space: Pointer,
) -> None:
    """Add ``q_position[i] . p[Tq - 1 - i + j]``: products with all rows of p that are met here, skewed."""
    sizes, place = call.sizes, call.place
    window = keys + sizes.lanes - 1
    rows, first_row = _round_up(window, _ROWS), sizes.Tq - first_query + first_key - sizes.lanes
    positions, products = offset(space, place.positions), offset(space, place.position_scores)
    table = _row(call.sign, call.p, 0, h, 0)
    _copy_rows(positions, sizes.D, rows, table, call.p.row, first_row, 2 * sizes.Tq - 1, sizes.D)
    _score_rows(products, positions, rows, panel, sizes)
    skew_add(scores, keys, products)


@_part
def _add_values(outputs: Pointer, state: Pointer, values: Pointer, keys: int, weights: Pointer, sizes: Sizes) -> None:
    """Set ``outputs = factor * outputs + values.T @ weights`` for (keys, Dv_padded) values, tile by tile."""
    factor = offset(state, 2 * sizes.lanes)
    for d in range(0, sizes.Dv_padded, _ROWS):
        rescale_add_tile(offset(outputs, d * sizes.lanes), factor, offset(values, d), weights, keys, sizes.Dv_padded)


@_part
def _attend_keys(
    n: int, b: int, h: int, first_query: int, first_key: int, skipped: int, keys: int, call: Call, space: Pointer
) -> None:
    """Let panel n of a work item see `keys` keys and values in scratch memory, of which the first is `first_key`.

    Those before it are skipped.
    """
    sizes, place = call.sizes, call.place
    scores, packed = offset(space, place.scores), n * sizes.D * sizes.lanes
    state = offset(space, place.state + n * 3 * sizes.lanes)
    panel = offset(space, place.queries + packed)
    _score_rows(scores, offset(space, place.keys + skipped * sizes.D), _round_up(keys, _ROWS), panel, sizes)
    if sizes.relative:
        panel = offset(space, place.position_queries + packed)
        _add_position_scores(scores, panel, h, first_query, first_key, keys, call, space)
    if sizes.causal:
        _hide_future(scores, first_query, first_key, keys, sizes)
    if sizes.window < sizes.Tk:
        _hide_far(scores, first_query, first_key, keys, sizes)
    if sizes.masked:
        _hide_masked(scores, b, h, first_query, first_key, keys, call)
    online_softmax(scores, keys, call.log2_scale, state)
    outputs = offset(space, place.outputs + n * sizes.Dv_padded * sizes.lanes)
    _add_values(outputs, state, offset(space, place.values + skipped * sizes.Dv_padded), keys, scores, sizes)


@_part
def _start_panel(n: int, b: int, h: int, first: int, call: Call, space: Pointer) -> None:
    """Pack the queries of panel n of a work item and set its state to nothing seen."""
    sizes, place = call.sizes, call.place
    packed = n * sizes.D * sizes.lanes
    _pack_queries(offset(space, place.queries + packed), call.q, b, h, first, call.sign, sizes)
    if sizes.relative:
        panel = offset(space, place.position_queries + packed)
        _pack_queries(panel, call.q_position, b, h, first, call.sign, sizes)
    state = offset(space, place.state + n * 3 * sizes.lanes)
    _fill(state, sizes.lanes, -np.inf)
    _fill(offset(state, sizes.lanes), 2 * sizes.lanes, 0)
    panel_size = sizes.Dv_padded * sizes.lanes
    _fill(offset(space, place.outputs + n * panel_size), panel_size, 0)


@_part
def _finish_panel(n: int, b: int, h: int, first: int, call: Call, space: Pointer) -> None:
    """Write the output rows of panel n of a work item."""
    sizes, place = call.sizes, call.place
    outputs = offset(space, place.outputs + n * sizes.Dv_padded * sizes.lanes)
    state = offset(space, place.state + n * 3 * sizes.lanes)
    _unpack_outputs(outputs, state, b, h, first, call)


@_part
def _keys_seen(end: int, sizes: Sizes) -> int:
    """Count the keys up to the last one that the queries before query `end` see."""
    ahead = 0 if sizes.causal else sizes.window
    return max(0, min(sizes.Tk, end + sizes.Tk - sizes.Tq + ahead))


@_part
def _keys_before(first: int, sizes: Sizes) -> int:
    """Count the keys before the first one that query `first` and those behind it see; whole register tiles."""
    before = max(0, first + sizes.Tk - sizes.Tq - sizes.window)
    return before // _ROWS * _ROWS


@_part
def _attend_item(item: int, call: Call, space: Pointer) -> None:
    """Compute the output rows of one work item: a block of queries of one head.

    The last queries of a head come first: under a causal mask they are the longest work.
    """
    sizes, place = call.sizes, call.place
    head, block = item // sizes.blocks, sizes.blocks - 1 - item % sizes.blocks
    b, h = head // sizes.Hq, head % sizes.Hq
    start = block * sizes.panels * sizes.lanes
    end = min(sizes.Tq, start + sizes.panels * sizes.lanes)
    for n, first in enumerate(range(start, end, sizes.lanes)):
        _start_panel(n, b, h, first, call, space)
    k, v = _row(call.sign, call.k, b, h // sizes.G, 0), _row(call.sign, call.v, b, h // sizes.G, 0)
    Tk = _keys_seen(end, sizes)
    for j in range(_keys_before(start, sizes), Tk, _KEY_BLOCK):
        keys = min(_KEY_BLOCK, Tk - j)
        _copy_rows(offset(space, place.keys), sizes.D, _round_up(keys, _ROWS), k, call.k.row, j, Tk, sizes.D)
        _copy_rows(offset(space, place.values), sizes.Dv_padded, keys, v, call.v.row, j, Tk, sizes.Dv)
        for n, first in enumerate(range(start, end, sizes.lanes)):
            seen = min(keys, _keys_seen(min(first + sizes.lanes, end), sizes) - j)
            skipped = max(0, _keys_before(first, sizes) - j)
            if seen > skipped:
                _attend_keys(n, b, h, first, j + skipped, skipped, seen - skipped, call, space)
    for n, first in enumerate(range(start, end, sizes.lanes)):
        _finish_panel(n, b, h, first, call, space)


def _kernel_attention(thread: int, record: Any) -> None:
    """Take work items until none is left; `record` points at a `Call`."""
    call = carray(record, 1)[0]
    sizes = call.sizes
    space = offset(pointer(call.scratch, call.sign), thread * call.place.end)
    item = fetch_add(call.next_item)
    while item < sizes.B * sizes.Hq * sizes.blocks:
        _attend_item(item, call, space)
        item = fetch_add(call.next_item)


# ------------------------------------------------------------------------------------------------------------
# The Python side: sizes, scratch memory, addresses.
# ------------------------------------------------------------------------------------------------------------


def _integers(fields: tuple[str, ...]) -> np.dtype[np.void]:
    return np.dtype([(name, np.intp) for name in fields])


@functools.cache
def _call_dtype(number: np.dtype[Any]) -> np.dtype[np.void]:
    """Return the record form of `Call` for arrays of type `number`, in which it reaches the threads."""
    kinds: dict[str, Any] = dict.fromkeys(Call._fields, _integers(Operand._fields))
    kinds.update(sizes=_integers(Sizes._fields), place=_integers(Scratch._fields))
    kinds.update(scratch=np.intp, next_item=np.intp, sign=number, log2_scale=number)
    return np.dtype(list(kinds.items()), align=True)


class Kernel(NamedTuple):
    """A compiled kernel: its address, and a way to run it in the calling thread with the lock released."""

    code: Any  # keeps the compiled code alive
    address: int
    call: Callable[[int, int], None]


@functools.cache
def _compiled(number: np.dtype[Any]) -> Kernel:
    """Compile the kernel for arrays of type `number`, or load it from Numba's disk cache."""
    record = types.CPointer(numba.from_dtype(_call_dtype(number)))
    code = cfunc(types.void(types.intp, record), cache=True, error_model="numpy")(_kernel_attention)
    call = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t, ctypes.c_ssize_t)(code.address)
    return Kernel(code, code.address, call)


def _plan(q: Array, v: Array, threads: int, causal: bool, masked: bool, relative: bool, window: int | None) -> Sizes:
    """Cut the queries of a head into work items: long ones to reuse keys, but several for each thread."""
    (B, Hq, Tq, D), (_, Hkv, Tk, Dv) = q.shape, v.shape
    lanes = panel_lanes(q.itemsize)
    head_panels = -(-Tq // lanes)
    blocks = max(-(-head_panels // _PANELS), min(head_panels, -(-_ITEMS_PER_THREAD * threads // (B * Hq))))
    panels = -(-head_panels // blocks)
    return Sizes(
        B=B,
        Hq=Hq,
        G=Hq // Hkv,
        Tq=Tq,
        Tk=Tk,
        D=D,
        Dv=Dv,
        Dv_padded=-(-Dv // _ROWS) * _ROWS,
        lanes=lanes,
        vector=lanes // TILE.vectors,
        panels=panels,
        blocks=-(-head_panels // panels),
        causal=causal,
        masked=masked,
        relative=relative,
        window=Tq + Tk if window is None else min(window, Tq + Tk),
    )


def _layout(sizes: Sizes) -> Scratch:
    """Lay out one thread's scratch memory, each part on a cache line."""
    lanes, window = sizes.lanes, (_KEY_BLOCK + sizes.lanes + _ROWS) * sizes.relative
    parts = (
        _KEY_BLOCK * lanes,
        _KEY_BLOCK * sizes.D,
        _KEY_BLOCK * sizes.Dv_padded,
        sizes.panels * sizes.D * lanes,
        sizes.panels * sizes.Dv_padded * lanes,
        sizes.panels * 3 * lanes,
        sizes.panels * sizes.D * lanes * sizes.relative,
        window * lanes,
        window * sizes.D,
    )
    return Scratch(0, *itertools.accumulate(-(-part // _CACHE_LINE) * _CACHE_LINE for part in parts))


def _readable(x: Array) -> Array:
    """Return `x`, copied only if its last axis is not contiguous or a stride is not in whole elements."""
    contiguous = x.strides[-1] == x.itemsize or x.shape[-1] <= 1
    return x if contiguous and not any(stride % x.itemsize for stride in x.strides) else x.copy(order="C")


def _operand(x: Array | None) -> Operand:
    if x is None:
        return Operand(0, 0, 0, 0, 0)
    return Operand(x.ctypes.data, *(stride // x.itemsize for stride in x.strides))


def _attend(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool,
    mask: Array | None,
    out: Array,
    q_position: Array | None = None,
    p: Array | None = None,
    window: int | None = None,
) -> None:
    """Describe a call and run the kernel on it; `q_position` and `p` are given together or not at all."""
    B, Hq, Tq, _ = q.shape
    if out.size == 0:
        return
    seen = k.shape[2] if window is None else min(k.shape[2], 2 * window + 1)
    work = 2 * out.size // v.shape[3] * seen * (k.shape[3] + v.shape[3])
    threads = numba.get_num_threads() if work > _SMALL_CALL_FLOPS else 1
    sizes = _plan(q, v, threads, causal, mask is not None, p is not None, window)
    place = _layout(sizes)
    scratch = np.empty(threads * place.end + _CACHE_LINE, q.dtype)
    next_item = np.zeros(1, np.int64)
    q, k, v = _readable(q), _readable(k), _readable(v)
    if q_position is not None and p is not None:
        q_position, p = _readable(q_position), _readable(p)[None]  # p: (1, H, 2 * Tq - 1, D)
    if mask is not None:
        mask = np.broadcast_to(mask, (B, Hq, Tq, k.shape[2]))
    call = Call(
        q=_operand(q),
        q_position=_operand(q_position),
        k=_operand(k),
        v=_operand(v),
        p=_operand(p),
        mask=_operand(mask),
        out=_operand(out),
        sizes=sizes,
        place=place,
        scratch=-(-scratch.ctypes.data // _CACHE_LINE) * _CACHE_LINE,
        next_item=next_item.ctypes.data,
        sign=math.copysign(1.0, scale) if scale else 0.0,
        log2_scale=abs(scale) / math.log(2) if scale else 1.0,
    )
    record = np.array([call], _call_dtype(q.dtype))
    kernel = _compiled(q.dtype)
    if threads == 1:
        kernel.call(0, record.ctypes.data)
    else:
        run_on_threads(threads, kernel.address, record.ctypes.data)


def _attend_few_queries(
    q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None, out: Array
) -> None:
    """Decode: keys and values pass once, see `few_rows`."""
    if out.size == 0:
        return
    k, v = layout.readable(k), layout.readable(v)
    hides = mask is not None or (causal and q.shape[2] > 1)
    seen = np.broadcast_to(_NO_MASK if mask is None else mask, (*q.shape[:3], k.shape[2])) if hides else _NO_MASK
    ranges = layout.key_ranges(k.shape[0] * k.shape[1], k.shape[2], few_rows.KEYS)
    parts = layout.count(k.shape[0] * k.shape[1] * ranges, k.size + v.size)
    scaled = np.multiply(q, q.dtype.type(scale), out=np.empty(q.shape, q.dtype))
    few_rows.kernel_attention(scaled, k, v, hides, causal, seen, out, ranges, parts)


def _new_output(q: Array, v: Array) -> Array:
    B, Hq, Tq, _ = q.shape
    return np.empty((B, Tq, Hq, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)  # (B, Hq, Tq, Dv)


def fused_attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool = False,
    mask: Array | None = None,
    out: Array | None = None,
    window: int | None = None,
) -> Array:
    """Attend exactly, ``softmax(scale * q k^T) v``, without ever holding the map.

    Parameters
    ----------
    q : array, shape (B, Hq, Tq, D), float32 or float64
        Queries. Like all inputs, any strides; copied only if the last axis is not contiguous. Never modified.
    k : array, shape (B, Hkv, Tk, D), dtype of `q`
        Keys. ``Hkv`` divides ``Hq``; query head h uses head ``h // (Hq // Hkv)``.
    v : array, shape (B, Hkv, Tk, Dv), dtype of `q`
        Values.
    scale : float
        Multiplies the scores.
    causal : bool, default False
        Query ``i`` sees keys ``j <= i + (Tk - Tq)``. Keys that no query of a block sees cost nothing.
    mask : bool array, broadcastable to (B, Hq, Tq, Tk), optional
        True where a query may attend to a key.
    out : array, shape (B, Hq, Tq, Dv), dtype of `q`, optional
        Where to write the result; its last axis is contiguous. By default a view of a new (B, Tq, Hq, Dv)
        array.
    window : int, optional
        Query ``i`` sees keys at most so many positions from ``i + (Tk - Tq)``; Tq <= Tk. Blocks of keys that no
        query of a panel sees cost nothing.

    Returns
    -------
    out : array, shape (B, Hq, Tq, Dv), dtype of `q`
        A row that sees no key is zero.

    Notes
    -----
    Accumulates in the type of the inputs, on ``numba.get_num_threads()`` threads, each with scratch memory
    that does not grow with the lengths; the result does not depend on their number. NaN reaches the rows that
    see it. The values of hidden keys may be multiplied by zero, so they must be finite.
    Cost: ``2 * B * Hq * Tq * Tk * (D + Dv)`` matrix FLOPs, about half if causal.

    Examples
    --------
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> fused_attention(x, x, x, scale=0.5).shape
    (1, 2, 3, 4)
    """
    out = _new_output(q, v) if out is None else out
    if window is not None:
        first = max(0, k.shape[2] - q.shape[2] - window)  # no query sees a key before it
        k, v = k[:, :, first:], v[:, :, first:]
        mask = mask if mask is None or mask.shape[3] == 1 else mask[..., first:]
    if not layout.few_queries(q, k):
        _attend(q, k, v, scale, causal, mask, out, window=window)
        return out
    if window is not None and q.shape[2] > 1:
        mask = _band(q.shape[2], k.shape[2], window) & (True if mask is None else mask)
    _attend_few_queries(q, k, v, scale, causal, mask, out)
    return out


def _band(q_len: int, k_len: int, window: int) -> Array:
    """True where a key is at most `window` positions away: (1, 1, Tq, Tk)."""
    away = np.arange(k_len) - np.arange(k_len - q_len, k_len)[:, None]  # (Tq, Tk)
    return (np.abs(away) <= window)[None, None]


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
    window: int | None = None,
) -> Array:
    """Attend exactly with relative positions, as Transformer-XL and Conformer do, without ever holding a map.

    The scores are ``scale * (q_content[i] . k[j] + q_position[i] . p[T - 1 - i + j])`` [1]_. The position
    products are computed for one panel of queries and one block of keys at a time, over the window of p that
    these meet, and shifted while added.

    Parameters
    ----------
    q_content, q_position : array, shape (B, H, T, D), float32 or float64
        Queries, each with its learned bias added.
    k : array, shape (B, Hkv, T, D), dtype of `q_content`
        Keys; as many as queries.
    v : array, shape (B, Hkv, T, Dv), dtype of `q_content`
        Values.
    p : array, shape (H, 2 * T - 1, D), dtype of `q_content`
        Projected positions, from distance ``T - 1`` (key first) to ``1 - T``; shared by the batch.
    scale, causal, mask, out, window
        As for `fused_attention`.

    Returns
    -------
    out : array, shape (B, H, T, Dv), dtype of `q_content`
        A row that sees no key is zero.

    Notes
    -----
    Cost: the FLOPs of `fused_attention` plus ``2 * B * H * T * T * D`` for the position products, of which
    about a third more are computed because the windows of neighbouring blocks overlap.

    References
    ----------
    .. [1] Z. Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", 2019,
       arXiv:1901.02860, appendix B.

    Examples
    --------
    >>> x, p = np.ones((1, 2, 3, 4)), np.ones((2, 5, 4))
    >>> fused_relative_attention(x, x, x, x, p, scale=0.5).shape
    (1, 2, 3, 4)
    """
    out = _new_output(q_content, v) if out is None else out
    _attend(q_content, k, v, scale, causal, mask, out, q_position, p, window)
    return out
