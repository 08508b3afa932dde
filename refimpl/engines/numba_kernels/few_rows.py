"""Products with few rows, as decoding has them: the large operand passes once, as fast as memory gives it.

A number of a weight matrix, or of the cached keys and values, meets each row of x once, so with few rows the time is
that of reading it; BLAS first copies it. Here rows of the large operand pass through registers, several at once, meet
all rows of x there, and are asked for early: see `vector`. The order of every sum depends on sizes alone, never on
the number of threads, and in a linear map not even on the number of rows.

Attention cuts the keys of a head into ranges, each of which yields the maximum m of its scores s, the sum l of
``exp(s - m)`` and the output o before division, and puts these together (online softmax [1]_ over ranges [2]_):

    m = max m_r,   l = sum l_r exp(m_r - m),   o = sum o_r exp(m_r - m) / l

The query heads that share keys are rows of one product, so keys and values are read once.

.. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
.. [2] T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference", 2023,
   https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from .parallel import STEP, any_strides, read, share, write
from .polynomials import exp, full_width, maximum, span
from .sums import sum_of
from .vector import add_rows, dot_rows, offset, pointer

UNIT = 8  # rows of a weight matrix that are shared out together
KEYS = 128  # keys whose scores are held at a time

_STRIP = 16  # rows of a weight matrix that stay in the nearest cache until all rows of x have met them

NO_BIAS = {number(0).itemsize: np.empty(0, number) for number in (np.float32, np.float64)}  # by bytes of a number

MASK = types.Array(types.boolean, 4, "A", readonly=True)


@njit(**STEP)
def _start(x):
    """Point at the first number of an array."""
    return pointer(x.ctypes.data, x.dtype.type(0))


@njit(**STEP)
def _stride(x, axis):
    """Count the elements from one place on an axis to the next."""
    return x.strides[axis] // x.itemsize


# --- linear maps ----------------------------------------------------------------------------------------------------


@njit(**STEP)
def linear_units(x, w, bias, out, first, last):
    """Set the columns of out (rows, d_out) that belong to some units of rows of w."""
    (d_out, d_in), w_stride, out_stride = w.shape, _stride(w, 0), _stride(out, 0)
    start, stop = first * UNIT, min(last * UNIT, d_out)
    for n in range(start, stop, _STRIP):
        rows, columns, size = offset(_start(w), n * w_stride), offset(_start(out), n), min(_STRIP, stop - n)
        dot_rows(len(x), size, d_in, columns, out_stride, _start(x), _stride(x, 0), rows, w_stride)
    if bias.size:
        for i in range(len(x)):
            for n in range(start, stop):
                out[i, n] += bias[n]


@any_strides(read(2), read(2), read(1), write(2), types.intp)
def kernel_linear(x, w, bias, out, parts):
    """Set ``out = x wᵀ + bias``: x (rows, d_in), w (d_out, d_in), bias (d_out,) or (0,), out (rows, d_out)."""
    share(linear_units, (x, w, bias, out), (len(w) + UNIT - 1) // UNIT, parts)


# --- heads ----------------------------------------------------------------------------------------------------------
# Queries q (B, H, Tq, D) are scaled and without gaps, so that the M = H / Hkv * Tq rows that share keys follow one
# another; keys k (B, Hkv, Tk, D) and values v (B, Hkv, Tk, Dv) are views of a cache. An *item* is one of the `ranges`
# into which the keys of one head of one batch are cut.


@njit(**STEP)
def _keys_of(item, ranges, Tk):
    """Tell an item's head, all batches counted through, its first key and its last but one."""
    part = item % ranges
    return item // ranges, part * Tk // ranges, (part + 1) * Tk // ranges


@njit(**STEP)
def _row(x, head, t):
    """Point at row t of a head of x (B, Hkv, T, D)."""
    b, h = head // x.shape[1], head % x.shape[1]
    return offset(_start(x), b * _stride(x, 0) + h * _stride(x, 1) + t * _stride(x, 2))


@njit(**STEP)
def score_items(q, k, out, M, ranges, first, last):
    """Set the scores of some items."""
    Tk, D = k.shape[2:]
    for item in range(first, last):
        head, start, stop = _keys_of(item, ranges, Tk)
        queries, columns = offset(_start(q), head * M * D), offset(_start(out), head * M * Tk + start)
        dot_rows(M, stop - start, D, columns, Tk, queries, D, _row(k, head, start), _stride(k, 2))


@any_strides(read(4), read(4), write(4), types.intp, types.intp)
def kernel_scores(q, k, out, ranges, parts):
    """Set ``out = q kᵀ``: out (B, H, Tq, Tk) without gaps."""
    heads, M = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1] * q.shape[2]
    share(score_items, (q, k, out, M, ranges), heads * ranges, parts)


@njit(**STEP)
def sum_items(p, v, sums, M, ranges, first, last):
    """Add the weighted values of some items to sums (items * M * Dv,)."""
    Tk, Dv = v.shape[2:]
    for item in range(first, last):
        head, start, stop = _keys_of(item, ranges, Tk)
        out, weights = offset(_start(sums), item * M * Dv), offset(_start(p), head * M * Tk + start)
        add_rows(M, Dv, stop - start, out, Dv, weights, Tk, _row(v, head, start), _stride(v, 2))


@njit(**STEP)
def combine(sums, factors, out, M):
    """Set each row of out (B, H, Tq, Dv) to its items' sums (items * M * Dv,) times factors (rows, ranges)."""
    (rows, ranges), (Tq, Dv) = factors.shape, out.shape[2:]
    for row in range(rows):
        y, first = _row(out, row // Tq, row % Tq), row // M * ranges * M + row % M
        for d in range(Dv):
            y[d] = 0
        if np.any(factors[row]):  # else all is hidden, and what was summed meaningless
            add_rows(1, Dv, ranges, y, Dv, offset(_start(factors), row * ranges), ranges,
                     offset(_start(sums), first * Dv), M * Dv)  # fmt: skip


@any_strides(read(4), read(4), write(4), types.intp, types.intp)
def kernel_weighted_sum(p, v, out, ranges, parts):
    """Set ``out = P v``: P (B, H, Tq, Tk) without gaps, out (B, H, Tq, Dv)."""
    heads, rows = v.shape[0] * v.shape[1], p.shape[0] * p.shape[1] * p.shape[2]
    sums = np.zeros(ranges * rows * v.shape[3], v.dtype)
    share(sum_items, (p, v, sums, rows // heads, ranges), heads * ranges, parts)
    combine(sums, np.ones((rows, ranges), v.dtype), out, rows // heads)


@njit(**STEP)
def _hide(scores, mask, causal, head, heads, start, keys, Tk):
    """Set scores (M * KEYS,) of some keys to -inf where the query of their row must not see them."""
    H, Tq = mask.shape[1:3]
    M = H // heads * Tq
    for m in range(M):
        h, i = head % heads * (H // heads) + m // Tq, m % Tq
        seen = min(max(i + 1 + Tk - Tq - start, 0), keys) if causal else keys
        row = span(scores, m * KEYS, keys)
        span(row, seen, keys - seen)[:] = -np.inf
        for j in range(seen):
            if not mask[head // heads, h, i, start + j]:
                row[j] = -np.inf


@njit(**STEP)
def weigh(scores, largest, total):
    """Turn scores (n,) into weights, given the maximum of the scores and the sum of the weights before them.

    Returns both anew, and the factor by which all that was summed before must be multiplied.
    """
    full_width()
    before = largest
    for j in range(scores.size):
        largest = maximum(largest, scores[j])
    shift = scores.dtype.type(0) if largest == -np.inf else largest
    for j in range(scores.size):
        scores[j] = exp(scores[j] - shift)
    factor = exp(before - shift)
    return largest, total * factor + sum_of(scores), factor


@njit(**STEP)
def attend_items(q, k, v, hides, causal, mask, sums, maxima, totals, first, last):
    """Set what some items contribute: sums (items * M * Dv,) of values, maxima and totals (rows, ranges) of weights."""
    (Tk, D), Dv, (rows, ranges) = k.shape[2:], v.shape[3], maxima.shape
    M = rows // (k.shape[0] * k.shape[1])
    scores = np.empty(M * KEYS, q.dtype)
    for item in range(first, last):
        head, start, stop = _keys_of(item, ranges, Tk)
        queries, out = offset(_start(q), head * M * D), span(sums, item * M * Dv, M * Dv)
        own, part = slice(head * M, (head + 1) * M), item % ranges
        largest, total = maxima[own, part], totals[own, part]
        out[:], largest[:], total[:] = 0, -np.inf, 0
        for j in range(start, stop, KEYS):
            keys = min(KEYS, stop - j)
            dot_rows(M, keys, D, _start(scores), KEYS, queries, D, _row(k, head, j), _stride(k, 2))
            if hides:
                _hide(scores, mask, causal, head, k.shape[1], j, keys, Tk)
            for m in range(M):
                largest[m], total[m], factor = weigh(span(scores, m * KEYS, keys), largest[m], total[m])
                row = span(out, m * Dv, Dv)
                for d in range(Dv):
                    row[d] *= factor
            add_rows(M, Dv, keys, _start(out), Dv, _start(scores), KEYS, _row(v, head, j), _stride(v, 2))


@njit(**STEP)
def factors_of(maxima, totals):
    """Turn the maxima m_r (rows, ranges) into factors ``exp(m_r - m) / l``, in place; 0 in a row that sees no key."""
    for row in range(len(maxima)):
        largest = np.max(maxima[row])
        for r in range(maxima.shape[1]):
            maxima[row, r] = 0 if largest == -np.inf else exp(maxima[row, r] - largest)
            totals[row, r] *= maxima[row, r]
        total = sum_of(totals[row])
        for r in range(maxima.shape[1]):
            maxima[row, r] /= 1 if largest == -np.inf else total


@any_strides(read(4), read(4), read(4), types.boolean, types.boolean, MASK, write(4), types.intp, types.intp)
def kernel_attention(q, k, v, hides, causal, mask, out, ranges, parts):
    """Set ``out = softmax(q kᵀ) v`` (B, H, Tq, Dv); `hides` if `causal` or the mask (B, H, Tq, Tk) hides a key."""
    heads, rows = k.shape[0] * k.shape[1], q.shape[0] * q.shape[1] * q.shape[2]
    sums = np.empty(ranges * rows * v.shape[3], q.dtype)
    maxima, totals = np.empty((rows, ranges), q.dtype), np.empty((rows, ranges), q.dtype)
    share(attend_items, (q, k, v, hides, causal, mask, sums, maxima, totals), heads * ranges, parts)
    factors_of(maxima, totals)
    combine(sums, maxima, out, rows // heads)
