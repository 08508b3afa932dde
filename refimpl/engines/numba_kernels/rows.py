"""Kernels that need whole rows: softmax, norms, masks. A row is read from memory once and stays in cache."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .few_rows import factors_of
from .parallel import KERNEL, STEP, share
from .polynomials import accumulate, exp, full_width, maximum, span
from .sums import sum_of, sum_of_squares

RANGE = 2**13  # logits of a long row that are worked on at a time, in the nearest cache
ORDERED = 2**10  # numbers of a row up to which its sum is taken in an order of ours: beyond, that costs a fifth


@njit(**STEP)
def _exponentiate(x, shift, out, ordered):
    """Set ``out = exp(x - shift)``, rows (n,); return its sum, taken in the order of `sum_of` if `ordered`."""
    full_width()
    total = x.dtype.type(0)
    if ordered:
        for j in range(x.size):
            out[j] = exp(x[j] - shift)
        return sum_of(out)
    for j in range(x.size):
        e = exp(x[j] - shift)
        out[j] = e
        total = accumulate(total, e)
    return total


@njit(**STEP)
def _softmax_row(x, out, ordered):
    """Softmax of one row of logits (n,), maximum subtracted; zeros if all of them are -inf."""
    full_width()
    largest = x.dtype.type(-np.inf)
    for j in range(x.size):
        largest = maximum(largest, x[j])
    if largest == -np.inf:
        out[:] = 0
        return
    scale = x.dtype.type(1) / _exponentiate(x, largest, out, ordered)
    for j in range(x.size):
        out[j] *= scale


@njit(**STEP)
def _visible(i, q_len, k_len):
    """How many keys row i of the maps sees under a causal mask."""
    return min(max(i % q_len + 1 + k_len - q_len, 0), k_len)


@njit(**STEP)
def softmax_rows(x, x_stride, out, k_len, q_len, causal, rows, lanes, first, last):
    """Softmax of rows lane, lane + lanes, lane + 2 lanes, ... for each lane from `first` to `last`."""
    for lane in range(first, last):
        for i in range(lane, rows, lanes):
            seen = _visible(i, q_len, k_len) if causal else k_len
            _softmax_row(span(x, i * x_stride, seen), span(out, i * k_len, seen), q_len == 1 or seen < ORDERED)
            span(out, i * k_len + seen, k_len - seen)[:] = 0


@njit(**KERNEL)
def kernel_softmax(x, x_stride, out, k_len, q_len, causal, rows, parts):
    """Softmax of rows of `k_len` logits; row i is query ``i % q_len``, which sees the first keys if `causal`.

    Rows are dealt out in turn: under a causal mask all parts then have the same work.
    """
    share(softmax_rows, (x, x_stride, out, k_len, q_len, causal, rows, parts), parts, parts)


@njit(**STEP)
def _exponentiate_ranges(x, x_stride, out, maxima, totals, k_len, ranges, first, last):
    """Set ``out = exp(x - m)`` for some ranges of rows; of each its maximum m and the sum of out."""
    full_width()
    for item in range(first, last):
        row, start = item // ranges, item % ranges * RANGE
        part = span(x, row * x_stride + start, min(RANGE, k_len - start))
        y = span(out, row * k_len + start, part.size)
        largest = x.dtype.type(-np.inf)
        for j in range(part.size):
            largest = maximum(largest, part[j])
        shift = x.dtype.type(0) if largest == -np.inf else largest
        maxima[item], totals[item] = largest, _exponentiate(part, shift, y, True)


@njit(**STEP)
def _scale_ranges(out, factors, k_len, ranges, first, last):
    """Multiply some ranges of rows, in place, each by its factor."""
    full_width()
    for item in range(first, last):
        row, start = item // ranges, item % ranges * RANGE
        y, factor = span(out, row * k_len + start, min(RANGE, k_len - start)), factors[item]
        for j in range(y.size):
            y[j] *= factor


@njit(**KERNEL)
def kernel_softmax_of_long_rows(x, x_stride, out, k_len, rows, parts):
    """Softmax of few rows of many logits: ranges of a row are worked on at once, then put to one maximum and sum."""
    ranges = (k_len + RANGE - 1) // RANGE
    maxima, totals = np.empty(rows * ranges, x.dtype), np.empty(rows * ranges, x.dtype)
    share(_exponentiate_ranges, (x, x_stride, out, maxima, totals, k_len, ranges), rows * ranges, parts)
    factors_of(maxima.reshape(rows, ranges), totals.reshape(rows, ranges))
    share(_scale_ranges, (out, maxima, k_len, ranges), rows * ranges, parts)


@njit(**STEP)
def layer_norm_rows(x, x_stride, weight, bias, eps, out, first, last):
    """Normalise rows (d,), `x_stride` apart: one pass for the mean, one for the variance, one to write."""
    full_width()
    width = weight.size
    for i in range(first, last):
        row, y = span(x, i * x_stride, width), span(out, i * width, width)
        mean = x.dtype.type(sum_of(row) / width)
        squares = sum_of_squares(row, mean)
        scale = x.dtype.type(1.0 / math.sqrt(squares / width + eps))
        for j in range(width):
            y[j] = (row[j] - mean) * scale * weight[j] + bias[j]


@njit(**KERNEL)
def kernel_layer_norm(x, x_stride, weight, bias, eps, out, rows, parts):
    """Layer norm of rows (d,), `x_stride` apart; weight and bias (d,), out row-major."""
    share(layer_norm_rows, (x, x_stride, weight, bias, eps, out), rows, parts)


@njit(**STEP)
def rms_norm_rows(x, x_stride, weight, eps, out, first, last):
    """Divide rows (d,) by their root mean square, then scale."""
    full_width()
    width = weight.size
    for i in range(first, last):
        row, y = span(x, i * x_stride, width), span(out, i * width, width)
        squares = sum_of_squares(row, x.dtype.type(0))
        scale = x.dtype.type(1.0 / math.sqrt(squares / width + eps))
        for j in range(width):
            y[j] = row[j] * scale * weight[j]


@njit(**KERNEL)
def kernel_rms_norm(x, x_stride, weight, eps, out, rows, parts):
    """RMS norm of rows (d,), `x_stride` apart; weight (d,), out row-major."""
    share(rms_norm_rows, (x, x_stride, weight, eps, out), rows, parts)


@njit(**STEP)
def _batch_norm_rows(x, x_stride, mean, scale, bias, out, first, last):
    """Shift and scale rows (d,) per channel."""
    full_width()
    width = mean.size
    for i in range(first, last):
        row, y = span(x, i * x_stride, width), span(out, i * width, width)
        for j in range(width):
            y[j] = (row[j] - mean[j]) * scale[j] + bias[j]


@njit(**KERNEL)
def kernel_batch_norm(x, x_stride, mean, scale, bias, out, rows, parts):
    """``(x - mean) * scale + bias`` for rows (d,), `x_stride` apart; mean, scale and bias (d,)."""
    share(_batch_norm_rows, (x, x_stride, mean, scale, bias, out), rows, parts)


@njit(**STEP)
def _add_relative_rows(scores, position, out, length, first, last):
    """Add to row i of a map the `length` position scores from column ``T - 1 - i % T`` of row i."""
    full_width()
    for i in range(first, last):
        start = i * (2 * length - 1) + length - 1 - i % length
        x, y = span(scores, i * length, length), span(position, start, length)
        z = span(out, i * length, length)
        for j in range(length):
            z[j] = x[j] + y[j]


@njit(**KERNEL)
def kernel_add_relative(scores, position, out, length, rows, parts):
    """Add shifted position scores: scores and out flat (B, H, T, T), position flat (B, H, T, 2T - 1)."""
    share(_add_relative_rows, (scores, position, out, length), rows, parts)


@njit(**STEP)
def _hide_future_rows(scores, k_len, q_len, first, last):
    """Set to -inf, in place, the logits after those that a causal mask shows."""
    for i in range(first, last):
        seen = _visible(i, q_len, k_len)
        span(scores, i * k_len + seen, k_len - seen)[:] = -np.inf


@njit(**KERNEL)
def kernel_hide_future(scores, k_len, q_len, rows, parts):
    """Set logits, flat (B, H, Tq, Tk), to -inf in place where a causal mask hides them."""
    share(_hide_future_rows, (scores, k_len, q_len), rows, parts)


@njit(**STEP)
def _hide_masked_rows(scores, mask, strides, heads, q_len, k_len, first, last):
    """Set rows of logits to -inf, in place, where their row of the mask is False."""
    full_width()
    hidden = scores.dtype.type(-np.inf)
    for i in range(first, last):
        start = i // (q_len * heads) * strides[0] + i // q_len % heads * strides[1] + i % q_len * strides[2]
        row, shown = span(scores, i * k_len, k_len), span(mask, start, k_len)
        for j in range(k_len):
            row[j] = row[j] if shown[j] else hidden


@njit(**KERNEL)
def kernel_hide_masked(scores, mask, strides, heads, q_len, k_len, rows, parts):
    """Set masked logits (B, H, Tq, Tk) to -inf in place; the flat mask has strides of three axes."""
    share(_hide_masked_rows, (scores, mask, strides, heads, q_len, k_len), rows, parts)
