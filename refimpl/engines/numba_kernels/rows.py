"""Kernels that need a whole row: softmax and norms. A row is read from memory once and stays in the nearest cache."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .options import KERNEL, STEP
from .polynomials import accumulate, exp, full_width, maximum


@njit(**STEP)
def _softmax_row(x, out):
    """Softmax of one row of logits (n,), maximum subtracted; zeros if all of them are -inf."""
    full_width()
    largest = x.dtype.type(-np.inf)
    for j in range(x.size):
        largest = maximum(largest, x[j])
    if largest == -np.inf:
        out[:] = 0
        return
    total = x.dtype.type(0)
    for j in range(x.size):
        e = exp(x[j] - largest)
        out[j] = e
        total = accumulate(total, e)
    scale = x.dtype.type(1) / total
    for j in range(x.size):
        out[j] *= scale


@njit(**KERNEL)
def kernel_softmax(x, x_stride, out, k_len, q_len, causal, rows, parts):
    """Softmax of rows of `k_len` logits; row i is query ``i % q_len``, which sees a prefix of the keys if `causal`.

    Part p takes rows p, p + parts, ...: under a causal mask every part then has the same work.
    """
    for p in prange(parts):
        for i in range(p, rows, parts):
            seen = min(max(i % q_len + 1 + k_len - q_len, 0), k_len) if causal else k_len
            y = out[i * k_len : (i + 1) * k_len]
            _softmax_row(x[i * x_stride : i * x_stride + seen], y[:seen])
            y[seen:] = 0


@njit(**STEP)
def _layer_norm_row(x, weight, bias, eps, out):
    """Normalise one row (d,): two passes for mean and variance, then scale and shift."""
    full_width()
    total = x.dtype.type(0)
    for j in range(x.size):
        total = accumulate(total, x[j])
    mean = x.dtype.type(total / x.size)
    squares = x.dtype.type(0)
    for j in range(x.size):
        squares = accumulate(squares, (x[j] - mean) * (x[j] - mean))
    scale = x.dtype.type(1.0 / math.sqrt(squares / x.size + eps))
    for j in range(x.size):
        out[j] = (x[j] - mean) * scale * weight[j] + bias[j]


@njit(**KERNEL)
def kernel_layer_norm(x, x_stride, weight, bias, eps, out, width, rows, parts):
    """Layer norm of rows of `width` elements, `x_stride` apart."""
    for p in prange(parts):
        for i in range(p * rows // parts, (p + 1) * rows // parts):
            row = x[i * x_stride : i * x_stride + width]
            _layer_norm_row(row, weight, bias, eps, out[i * width : (i + 1) * width])


@njit(**STEP)
def _rms_norm_row(x, weight, eps, out):
    """Divide one row (d,) by its root mean square, then scale."""
    full_width()
    squares = x.dtype.type(0)
    for j in range(x.size):
        squares = accumulate(squares, x[j] * x[j])
    scale = x.dtype.type(1.0 / math.sqrt(squares / x.size + eps))
    for j in range(x.size):
        out[j] = x[j] * scale * weight[j]


@njit(**KERNEL)
def kernel_rms_norm(x, x_stride, weight, eps, out, width, rows, parts):
    """RMS norm of rows of `width` elements, `x_stride` apart."""
    for p in prange(parts):
        for i in range(p * rows // parts, (p + 1) * rows // parts):
            row = x[i * x_stride : i * x_stride + width]
            _rms_norm_row(row, weight, eps, out[i * width : (i + 1) * width])


@njit(**STEP)
def _batch_norm_row(x, mean, scale, bias, out):
    """Shift and scale one row (d,) per channel."""
    full_width()
    for j in range(x.size):
        out[j] = (x[j] - mean[j]) * scale[j] + bias[j]


@njit(**KERNEL)
def kernel_batch_norm(x, x_stride, mean, scale, bias, out, width, rows, parts):
    """``(x - mean) * scale + bias`` per channel, for rows of `width` channels, `x_stride` apart."""
    for p in prange(parts):
        for i in range(p * rows // parts, (p + 1) * rows // parts):
            row = x[i * x_stride : i * x_stride + width]
            _batch_norm_row(row, mean, scale, bias, out[i * width : (i + 1) * width])


@njit(**STEP)
def _add_row(x, y, out):
    """Sum of two rows (n,)."""
    full_width()
    for j in range(x.size):
        out[j] = x[j] + y[j]


@njit(**KERNEL)
def kernel_add_relative(scores, position, out, length, rows, parts):
    """Add to row i of each (T, T) map the T position scores from column ``T - 1 - i`` of its (T, 2T - 1) map."""
    for p in prange(parts):
        for i in range(p * rows // parts, (p + 1) * rows // parts):
            start = i * (2 * length - 1) + length - 1 - i % length
            row = slice(i * length, (i + 1) * length)
            _add_row(scores[row], position[start : start + length], out[row])


@njit(**KERNEL)
def kernel_hide_future(scores, k_len, q_len, rows, parts):
    """Set to -inf, in place, the logits of keys that a query may not see under a causal mask."""
    for p in prange(parts):
        for i in range(p * rows // parts, (p + 1) * rows // parts):
            seen = min(max(i % q_len + 1 + k_len - q_len, 0), k_len)
            scores[i * k_len + seen : (i + 1) * k_len] = -np.inf


@njit(**STEP)
def _hide_row(row, mask):
    """Set one row (n,) to -inf where the mask (n,) is False, in place."""
    full_width()
    hidden = row.dtype.type(-np.inf)
    for j in range(row.size):
        row[j] = row[j] if mask[j] else hidden


@njit(**KERNEL)
def kernel_hide_masked(scores, mask, strides, heads, q_len, k_len, rows, parts):
    """Set masked logits (B, H, Tq, Tk) to -inf in place; the flat mask has element strides of its first three axes."""
    for p in prange(parts):
        for i in range(p * rows // parts, (p + 1) * rows // parts):
            start = i // (q_len * heads) * strides[0] + i // q_len % heads * strides[1] + i % q_len * strides[2]
            _hide_row(scores[i * k_len : (i + 1) * k_len], mask[start : start + k_len])
