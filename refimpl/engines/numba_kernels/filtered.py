"""Filtered attention: estimates of four bits for all keys, the rest of the work for the keys that they keep.

One work item is a block of `ROWS` queries of one head. Their estimates stay in the nearer caches, the map never exists:

    c  = K^h q^h                        `PANEL` keys down, the lanes of vectors; `QUERIES` queries       estimate_tile
    n  = {j : c_j >= max c - margin}    places of kept keys, in order                                  keep_from
    s  = step (q . k_n)                 the whole product of the codes, or of the floating-point rows  dot_chosen_*
    o  = sum_n softmax(s)_n v_n                                                                        add_chosen_rows

Bytes with sign meet bytes without: upper nibbles of keys have 8 added and codes 128. In an estimate this adds the same
number to all keys of a query, so that no difference changes; from the whole product it is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from .codes import (
    LANES,
    LINE,
    PANEL,
    QUERIES,
    WORD,
    add_chosen_rows,
    dot_chosen_codes,
    dot_chosen_rows,
    estimate_tile,
    fill,
    keep_from,
    largest,
    largest_size,
    pack_square,
    soften,
)
from .few_rows import MASK
from .parallel import STEP, any_strides, read, share, write
from .polynomials import full_width, maximum, span
from .vector import offset, pointer

Array = Any

ROWS = 16  # queries of a work item: keys pass through the nearest cache once for so many
VALUES = 256  # keys whose values stay in the nearest cache until all queries of an item have met them

CODES = types.Array(types.int8, 4, "A", readonly=True)
BYTES = types.Array(types.uint8, 1, "C")
FLOATS = types.Array(types.float64, 2, "C")
INTS = types.Array(types.int32, 2, "C")
COUNTS = types.Array(types.int64, 1, "C")

_HIDDEN = np.int32(-(2**31))
_WIDEST = 2**30  # a margin that keeps all, as estimates are far smaller


@njit(**STEP)
def _row(x, b, h, t):
    """Point at row t of a head of x (B, H, T, D)."""
    places = b * x.strides[0] + h * x.strides[1] + t * x.strides[2]
    return offset(pointer(x.ctypes.data, x.dtype.type(0)), places // x.itemsize)


@njit(**STEP)
def _first(x):
    """Point at the first number of an array."""
    return pointer(x.ctypes.data, x.dtype.type(0))


# --- quantisation -----------------------------------------------------------------------------------------------------


@njit(**STEP)
def _largest(x, b, h):
    """The largest absolute value of a head; NaN if there is one."""
    found = x.dtype.type(0)
    for t in range(x.shape[2]):
        found = maximum(found, largest_size(_row(x, b, h, t), x.shape[3]))
    return found


@njit(**STEP)
def _round_rows(x, b, h, sigma, codes):
    """Set codes (T * D,) of a head to ``round(x / sigma)``."""
    full_width()
    width = x.shape[3]
    for t in range(x.shape[2]):
        row, out = _row(x, b, h, t), span(codes, t * width, width)
        for d in range(width):
            out[d] = np.int8(np.int32(np.rint(row[d] / sigma)))


@njit(**STEP)
def _quantize_heads(x, codes, sigmas, tiny, first, last):
    H, size = x.shape[1], x.shape[2] * x.shape[3]
    for head in range(first, last):
        b, h = head // H, head % H
        sigma = _largest(x, b, h) / x.dtype.type(127)
        if sigma < tiny:
            sigma = x.dtype.type(1)
        sigmas[b, h, 0, 0] = sigma
        if np.isfinite(sigma):
            _round_rows(x, b, h, sigma, span(codes, head * size, size))
        else:
            span(codes, head * size, size)[:] = 0


@any_strides(read(4), types.Array(types.int8, 1, "C"), write(4), lambda number: number, types.intp)
def kernel_quantize(x, codes, sigmas, tiny, parts):
    """Set codes (B * H * T * D,) and sigmas (B, H, 1, 1) of x (B, H, T, D)."""
    share(_quantize_heads, (x, codes, sigmas, tiny), x.shape[0] * x.shape[1], parts)


# --- keys as the products take them -----------------------------------------------------------------------------------


@njit(**STEP)
def upper_nibble(code, nearest):
    """``code >> 4``, or the nearest, ``min((code + 8) >> 4, 7)``."""
    return min((code + 8) >> 4, 7) if nearest else code >> 4


@njit(**STEP)
def _pack_panels(k_codes, nearest, panels, rows, first, last):
    """Fill the panels of nibbles (panel, word, block, lane, byte) and the rows of codes of some panels of keys."""
    full_width()
    H, Tk, D = k_codes.shape[1:]
    per_head, words, width = (Tk + PANEL - 1) // PANEL, (D + WORD - 1) // WORD, (D + LINE - 1) // LINE * LINE
    for item in range(first, last):
        head, start = item // per_head, item % per_head * PANEL
        b, h, keys = head // H, head % H, min(PANEL, Tk - start)
        for t in range(keys):
            row, line = _row(k_codes, b, h, start + t), span(rows, (item * PANEL + t) * width, width)
            for d in range(D):
                line[d] = np.uint8(np.int32(row[d]) + 128)
            line[D:] = 0
        span(rows, (item * PANEL + keys) * width, (PANEL - keys) * width)[:] = 0
        for t in range(0, PANEL, LANES):
            for word in range(0, words, LANES):
                square = offset(_first(rows), (item * PANEL + t) * width + word * WORD)
                target = offset(_first(panels), (item * words + word) * PANEL * WORD + t * WORD)
                pack_square(target, square, width, min(words - word, LANES), nearest)


@any_strides(CODES, types.boolean, BYTES, BYTES, types.intp, types.intp)
def _kernel_pack(k_codes, nearest, panels, rows, items, parts):
    share(_pack_panels, (k_codes, nearest, panels, rows), items, parts)


def packed(
    k_codes: Array, nearest: bool, parts: int, empty: Callable[[tuple[int, ...], Any], Array]
) -> tuple[Array, Array]:
    """The panels of upper nibbles and the rows of codes of k_codes (B, Hkv, Tk, D), without sign.

    Both have room for a multiple of `PANEL` keys.
    """
    B, H, Tk, D = k_codes.shape
    items = B * H * -(-Tk // PANEL)
    panels = empty((items * -(-D // WORD) * PANEL * WORD,), np.uint8)
    rows = empty((items * PANEL * -(-D // LINE) * LINE,), np.uint8)
    _kernel_pack(k_codes, nearest, panels, rows, items, min(items, parts))
    return panels, rows


@njit(**STEP)
def _copy_rows(x, out, first, last):
    """Copy the rows of x (B, H, T, D) at some places t of all batches to out (B * H * T * D,)."""
    full_width()
    (H, T), width = x.shape[1:3], x.shape[3]
    for item in range(first, last):
        b, t = item // T, item % T
        for h in range(H):  # in which order rows lie that are apart
            row, copy = _row(x, b, h, t), span(out, ((b * H + h) * T + t) * width, width)
            for d in range(width):
                copy[d] = row[d]


@any_strides(read(4), write(1), types.intp)
def _kernel_copy(x, out, parts):
    share(_copy_rows, (x, out), x.shape[0] * x.shape[2], parts)


def dense_rows(x: Array, parts: int, empty: Callable[[tuple[int, ...], Any], Array]) -> Array:
    """x (B, H, T, D), copied if its rows are apart: worth it where they meet many queries.

    Rows of heads that lie side by side in memory, a power of two apart, fall into few sets of a cache; and vectors that
    do not start on a cache line take two of them.
    """
    if x.flags.c_contiguous and x.ctypes.data % LINE == 0:
        return x
    copy = empty(x.shape, x.dtype)
    _kernel_copy(x, copy.reshape(-1), parts)
    return copy


def steps_and_margins(q_scale: Array, k_scale: Array, thresholds: Array, scale: float) -> tuple[Array, Array]:
    """``scale sigma_q sigma_k`` of each head (B, H) in float64, and by how much estimates may lie below the largest."""
    group = q_scale.shape[1] // k_scale.shape[1]
    sigma_k = np.repeat(k_scale, group, axis=1)
    steps = (scale * q_scale.astype(np.float64) * sigma_k.astype(np.float64))[:, :, 0, 0]
    with np.errstate(invalid="ignore"):  # in a head that is not finite
        margins = np.floor(thresholds / (256.0 * steps))
    return steps, np.where(margins < _WIDEST, margins, _WIDEST).astype(np.int32)


# --- attention --------------------------------------------------------------------------------------------------------


@njit(**STEP)
def _estimate(estimates, stride, queries, panels, n_panels, words, rows):
    """Set the estimates of up to `ROWS` queries for the keys of so many panels."""
    for panel in range(n_panels):
        keys = offset(panels, panel * words * PANEL * WORD)
        for r in range(0, rows, QUERIES):
            out = offset(estimates, r * stride + panel * PANEL)
            estimate_tile(out, stride, offset(queries, r * words * WORD), words * WORD, keys, words)


@njit(**STEP)
def _hide(estimates, mask, b, h, i):
    for j in range(estimates.size):
        if not mask[b, h, i, j]:
            estimates[j] = _HIDDEN


@njit(**STEP)
def _kept(estimates, margin, indices, ends):
    """Write the places of kept keys, and the last one again up to a whole vector; return how many they are.

    ends : how many of them lie before the end of each piece of `VALUES` keys.
    """
    fill(offset(_first(estimates), estimates.size), _HIDDEN)
    most, places, count = largest(_first(estimates), _whole(estimates.size)), _first(indices), 0
    least = np.int32(most - margin)
    for piece in range(ends.size):
        start, stop = piece * VALUES, min((piece + 1) * VALUES, estimates.size)
        if most != _HIDDEN and start < stop:
            count += keep_from(offset(places, count), _first(estimates), start, stop, least)
        ends[piece] = count
    if count:
        fill(offset(places, count), indices[count - 1])
    return count


@njit(**STEP)
def _whole(count):
    """The next multiple of a vector."""
    return (count + LANES - 1) // LANES * LANES


@njit(**STEP)
def _add_values(out, weights, indices, stride, ends, rows, values, value_stride, Dv):
    """Add weighted values to out (ROWS * Dv,), `VALUES` keys at a time, which the rows of an item meet in turn."""
    pieces = ends.size // ROWS
    for piece in range(pieces):
        for r in range(rows):
            first = ends[r * pieces + piece - 1] if piece else 0
            count, start = ends[r * pieces + piece] - first, r * stride + first
            if count:
                add_chosen_rows(
                    offset(_first(out), r * Dv), offset(_first(weights), start), offset(_first(indices), start),
                    count, values, value_stride, Dv,
                )  # fmt: skip


@njit(**STEP)
def _set_nibbles(nibbles, row, nearest):
    """Set the upper nibbles of a row of codes."""
    full_width()
    if nearest:
        for d in range(nibbles.size):
            nibbles[d] = upper_nibble(np.int32(row[d]), True)
    else:
        for d in range(nibbles.size):
            nibbles[d] = row[d] >> 4


@njit(**STEP)
def _set_codes(codes, row):
    """Copy a row of codes; return what their products with keys that had 128 added have too much."""
    full_width()
    total = np.int32(0)
    for d in range(codes.size):
        codes[d] = row[d]
        total += np.int32(row[d])
    return np.int32(np.int32(128) * total)


@njit(**STEP)
def _score_codes(logits, indices, count, q_codes, b, h, i, codes, of_keys, lines, step):
    """Set the logits of kept keys to ``step (q . k of the codes)``."""
    bias = _set_codes(span(codes, 0, q_codes.shape[3]), _row(q_codes, b, h, i))
    dot_chosen_codes(logits, indices, count, _first(codes), of_keys, lines, bias, step)


@njit(**STEP)
def _score_rows(logits, indices, count, q, b, h, i, scaled, k, g, scale):
    """Set the logits of kept keys to ``scale q . k``."""
    row = _row(q, b, h, i)
    for d in range(q.shape[3]):
        scaled[d] = row[d] * scale
    dot_chosen_rows(logits, indices, count, _first(scaled), _row(k, b, g, 0), k.strides[2] // k.itemsize, q.shape[3])


@njit(**STEP)
def _weigh_kept(
    estimates, margin, masked, mask, q, k, q_codes, b, h, i, codes, scaled, of_keys, lines, exact, scale, step, weights,
    indices, ends,
):  # fmt: skip
    """Set places and weights of the keys that a query keeps; return how many they are, and the sum of the weights."""
    if masked:
        _hide(estimates, mask, b, h, i)
    kept = _kept(estimates, margin, indices, ends)
    logits, places, whole = _first(weights), _first(indices), _whole(kept)
    if exact:
        _score_rows(logits, places, whole, q, b, h, i, scaled, k, h // (q.shape[1] // k.shape[1]), scale)
    else:
        _score_codes(logits, places, whole, q_codes, b, h, i, codes, of_keys, lines, step)
    fill(offset(logits, kept), q.dtype.type(-np.inf))
    return kept, soften(logits, whole)


@njit(**STEP)
def _filter_items(
    q, k, v, q_codes, panels, code_rows, steps, margins, nearest, exact, scale, causal, masked, mask, out, counts,
    first, last,
):  # fmt: skip
    (H, Tq, D), (Hkv, Tk), Dv, zero = q.shape[1:], k.shape[1:3], v.shape[3], q.dtype.type(0)
    blocks, n_panels = (Tq + ROWS - 1) // ROWS, (Tk + PANEL - 1) // PANEL
    words, lines, stride = (D + WORD - 1) // WORD, (D + LINE - 1) // LINE, n_panels * PANEL + LANES
    estimates, indices = np.empty(ROWS * stride, np.int32), np.empty(ROWS * stride, np.int32)
    nibbles, codes = np.zeros(ROWS * words * WORD, np.int8), np.zeros(lines * LINE, np.int8)
    logits, scaled, sums = np.empty(ROWS * stride, q.dtype), np.empty(D, q.dtype), np.empty(ROWS * Dv, q.dtype)
    pieces = (Tk + VALUES - 1) // VALUES
    totals, ends = np.empty(ROWS, q.dtype), np.empty(ROWS * pieces, np.int64)
    for item in range(first, last):
        head, start = item // blocks, item % blocks * ROWS
        b, h, rows = head // H, head % H, min(ROWS, Tq - start)
        g, kept = h // (H // Hkv), span(counts, head * Tq + start, rows)
        for r in range(rows):
            _set_nibbles(span(nibbles, r * words * WORD, D), _row(q_codes, b, h, start + r), nearest)
        reach = min(Tk, max(0, start + rows + Tk - Tq)) if causal else Tk
        keys = offset(_first(panels), (b * Hkv + g) * n_panels * words * PANEL * WORD)
        _estimate(_first(estimates), stride, _first(nibbles), keys, (reach + PANEL - 1) // PANEL, words, rows)
        of_keys = offset(_first(code_rows), (b * Hkv + g) * n_panels * PANEL * lines * LINE)
        for r in range(rows):
            i = start + r
            of_row = span(estimates, r * stride, min(Tk, max(0, i + 1 + Tk - Tq)) if causal else Tk)
            kept[r], totals[r] = _weigh_kept(
                of_row, margins[b, h], masked, mask, q, k, q_codes, b, h, i, codes, scaled, of_keys, lines, exact,
                scale, steps[b, h], span(logits, r * stride, stride), span(indices, r * stride, stride),
                span(ends, r * pieces, pieces),
            )  # fmt: skip
        sums[:] = 0
        values, value_stride = _row(v, b, g, 0), v.strides[2] // v.itemsize
        _add_values(sums, logits, indices, stride, ends, rows, values, value_stride, Dv)
        for r in range(rows):
            target, factor = _row(out, b, h, start + r), q.dtype.type(1) / totals[r] if kept[r] else zero
            for d in range(Dv):
                target[d] = sums[r * Dv + d] * factor


@any_strides(
    read(4), read(4), read(4), CODES, BYTES, BYTES, FLOATS, INTS, types.boolean, types.boolean, lambda number: number,
    types.boolean, types.boolean, MASK, write(4), COUNTS, types.intp,
)  # fmt: skip
def kernel_filtered(
    q, k, v, q_codes, panels, code_rows, steps, margins, nearest, exact, scale, causal, masked, mask, out, counts, parts
):
    """Set out (B, H, Tq, Dv) and, for each row, the number of kept keys: counts (B * H * Tq,)."""
    items = q.shape[0] * q.shape[1] * ((q.shape[2] + ROWS - 1) // ROWS)
    share(
        _filter_items,
        (q, k, v, q_codes, panels, code_rows, steps, margins, nearest, exact, scale, causal, masked, mask, out, counts),
        items,
        parts,
    )
