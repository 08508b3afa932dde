"""Kernels that compute each result element from the elements at the same place, in one pass over memory."""

from __future__ import annotations

import math

from numba import njit

from .parallel import KERNEL, STEP, share
from .polynomials import full_width, gelu, sigmoid

GELU, GELU_TANH, SILU, RELU = range(4)  # the `kind` of `kernel_activation`

_TWICE_ROOT = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


@njit(**STEP)
def _activation_rows(kind, x, x_stride, out, width, first, last):
    """Apply one activation to rows `first` to `last`: x and out are flat; a last row may be shorter than `width`."""
    full_width()
    steep, cubic = x.dtype.type(_TWICE_ROOT), x.dtype.type(_CUBIC)
    zero = x.dtype.type(0)
    for i in range(first, last):
        a = x[i * x_stride : i * x_stride + width]
        y = out[i * width : i * width + width]
        if kind == GELU:
            for j in range(y.size):
                y[j] = gelu(a[j])
        elif kind == GELU_TANH:  # (1 + tanh u) / 2 = sigmoid(2 u)
            for j in range(y.size):
                y[j] = a[j] * sigmoid(steep * (a[j] + cubic * a[j] * a[j] * a[j]))
        elif kind == SILU:
            for j in range(y.size):
                y[j] = a[j] * sigmoid(a[j])
        else:
            for j in range(y.size):
                y[j] = zero if a[j] < zero else a[j]


@njit(**KERNEL)
def kernel_activation(kind, x, x_stride, out, width, rows, parts):
    """Apply the activation `kind` to rows of `width` elements that are `x_stride` apart; out is row-major."""
    share(_activation_rows, (kind, x, x_stride, out, width), rows, parts)


@njit(**STEP)
def _gate_rows(smooth, a, a_stride, b, b_stride, out, width, first, last):
    """Gate rows: ``a sigmoid(b)``, or ``a b sigmoid(b)`` when `smooth`."""
    full_width()
    for i in range(first, last):
        value = a[i * a_stride : i * a_stride + width]
        gate = b[i * b_stride : i * b_stride + width]
        y = out[i * width : i * width + width]
        if smooth:
            for j in range(y.size):
                y[j] = gate[j] * sigmoid(gate[j]) * value[j]
        else:
            for j in range(y.size):
                y[j] = value[j] * sigmoid(gate[j])


@njit(**KERNEL)
def kernel_gate(smooth, a, a_stride, b, b_stride, out, width, rows, parts):
    """Gate rows of `width` elements, `a_stride` and `b_stride` apart, as GLU or (`smooth`) as SwiGLU."""
    share(_gate_rows, (smooth, a, a_stride, b, b_stride, out, width), rows, parts)


@njit(**STEP)
def _add_rows(x, x_stride, y, y_stride, period, scale, out, width, first, last):
    """Add ``scale`` times row ``i % period`` of y to row i of x."""
    full_width()
    factor = x.dtype.type(scale)
    for i in range(first, last):
        a = x[i * x_stride : i * x_stride + width]
        b = y[(i % period) * y_stride : (i % period) * y_stride + width]
        z = out[i * width : i * width + width]
        for j in range(z.size):
            z[j] = a[j] + factor * b[j]


@njit(**KERNEL)
def kernel_add(x, x_stride, y, y_stride, period, scale, out, width, rows, parts):
    """Add ``scale * y`` to x row by row, y repeating every `period` rows."""
    share(_add_rows, (x, x_stride, y, y_stride, period, scale, out, width), rows, parts)


@njit(**STEP)
def _bias_rows(out, bias, first, last):
    """Add the bias (d,) to rows of out (rows * d,), in place."""
    full_width()
    for i in range(first, last):
        y = out[i * bias.size : (i + 1) * bias.size]
        for j in range(bias.size):
            y[j] += bias[j]


@njit(**KERNEL)
def kernel_bias(out, bias, rows, parts):
    """Add the bias (d,) to every row of out (rows * d,), in place."""
    share(_bias_rows, (out, bias), rows, parts)


@njit(**STEP)
def _rotate_row(x, cos, sin, interleaved, out):
    """Rotate the pairs of one position: x and out (D,), cos and sin (D / 2,)."""
    full_width()
    half = cos.size
    if interleaved:
        for j in range(half):
            out[2 * j] = x[2 * j] * cos[j] - x[2 * j + 1] * sin[j]
            out[2 * j + 1] = x[2 * j] * sin[j] + x[2 * j + 1] * cos[j]
    else:
        a, b, y, z = x[:half], x[half:], out[:half], out[half:]
        for j in range(half):
            y[j] = a[j] * cos[j] - b[j] * sin[j]
            z[j] = a[j] * sin[j] + b[j] * cos[j]


@njit(**STEP)
def _rotary_rows(x, strides, cos, sin, interleaved, out, heads, length, first, last):
    """Rotate rows `first` to `last` of the (B, H, T) rows of x."""
    half = cos.size // max(length, 1)
    for i in range(first, last):
        t, h, b = i % length, i // length % heads, i // (length * heads)
        start = b * strides[0] + h * strides[1] + t * strides[2]
        _rotate_row(
            x[start : start + 2 * half],
            cos[t * half : (t + 1) * half],
            sin[t * half : (t + 1) * half],
            interleaved,
            out[i * 2 * half : (i + 1) * 2 * half],
        )


@njit(**KERNEL)
def kernel_rotary(x, strides, cos, sin, interleaved, out, heads, length, rows, parts):
    """Rotate x (B, H, T, D), flat with element strides of its first three axes, into row-major out; cos (T * D / 2,)."""
    share(_rotary_rows, (x, strides, cos, sin, interleaved, out, heads, length), rows, parts)
