"""Kernels that compute each element of a result from the elements at its place, in one pass over memory."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .parallel import KERNEL, STEP, share
from .polynomials import full_width, gelu, multiply_add, sigmoid, span

GELU, GELU_TANH, SILU, RELU = range(4)  # the `kind` of `kernel_activation`

_TWICE_ROOT = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


@njit(**STEP)
def activation_rows(kind, x, x_stride, out, width, first, last):
    """Apply one activation to rows of a flat array; the last row may be shorter than `width`."""
    full_width()
    steep, cubic, zero = x.dtype.type(_TWICE_ROOT), x.dtype.type(_CUBIC), x.dtype.type(0)
    for i in range(first, last):
        n = min(width, out.size - i * width)
        a, y = span(x, i * x_stride, n), span(out, i * width, n)
        if kind == GELU:
            for j in range(n):
                y[j] = gelu(a[j])
        elif kind == GELU_TANH:  # (1 + tanh u) / 2 = sigmoid(2 u)
            for j in range(n):
                y[j] = a[j] * sigmoid(steep * (a[j] + cubic * a[j] * a[j] * a[j]))
        elif kind == SILU:
            for j in range(n):
                y[j] = a[j] * sigmoid(a[j])
        else:
            for j in range(n):
                y[j] = zero if a[j] < zero else a[j]


@njit(**KERNEL)
def kernel_activation(kind, x, x_stride, out, width, rows, parts):
    """Apply the activation `kind` to rows of `width` elements, `x_stride` apart; out is row-major."""
    share(activation_rows, (kind, x, x_stride, out, width), rows, parts)


@njit(**STEP)
def gate_rows(smooth, a, a_stride, b, b_stride, out, width, first, last):
    """Gate rows of flat arrays: ``a sigmoid(b)``, or ``a b sigmoid(b)`` when `smooth`."""
    full_width()
    for i in range(first, last):
        n = min(width, out.size - i * width)
        value, gate, y = span(a, i * a_stride, n), span(b, i * b_stride, n), span(out, i * width, n)
        if smooth:
            for j in range(n):
                y[j] = gate[j] * sigmoid(gate[j]) * value[j]
        else:
            for j in range(n):
                y[j] = value[j] * sigmoid(gate[j])


@njit(**KERNEL)
def kernel_gate(smooth, a, a_stride, b, b_stride, out, width, rows, parts):
    """Gate rows of `width` elements, `a_stride` and `b_stride` apart, as GLU or (`smooth`) as SwiGLU."""
    share(gate_rows, (smooth, a, a_stride, b, b_stride, out, width), rows, parts)


@njit(**STEP)
def sum_rows(x, x_stride, y, y_stride, period, scale, out, width, first, last):
    """Add ``scale`` times row ``i % period`` of y to row i of x."""
    full_width()
    factor = x.dtype.type(scale)
    for i in range(first, last):
        n = min(width, out.size - i * width)
        a, b, z = span(x, i * x_stride, n), span(y, i % period * y_stride, n), span(out, i * width, n)
        for j in range(n):
            z[j] = a[j] + factor * b[j]


@njit(**KERNEL)
def kernel_add(x, x_stride, y, y_stride, period, scale, out, width, rows, parts):
    """Add ``scale * y`` to x row by row, where y repeats every `period` rows."""
    share(sum_rows, (x, x_stride, y, y_stride, period, scale, out, width), rows, parts)


@njit(**STEP)
def _bias_rows(out, bias, first, last):
    """Add the bias (d,) to rows of out (rows * d,), in place."""
    full_width()
    for i in range(first, last):
        y = span(out, i * bias.size, bias.size)
        for j in range(bias.size):
            y[j] += bias[j]


@njit(**KERNEL)
def kernel_bias(out, bias, rows, parts):
    """Add the bias (d,) to every row of out (rows * d,), in place."""
    share(_bias_rows, (out, bias), rows, parts)


# Indices below are unsigned: such are never negative, which LLVM cannot see of ``2 j`` and would test each time.


@njit(**STEP)
def _rotate_halves(x, cos, sin, out):
    """Rotate pairs (x[j], x[j + D / 2]): x and out (D,), cos and sin (D / 2,)."""
    full_width()
    half = np.uintp(cos.size)
    for j in range(half):
        a, b = x[j], x[j + half]
        out[j] = multiply_add(a, cos[j], -(b * sin[j]))
        out[j + half] = multiply_add(a, sin[j], b * cos[j])


@njit(**STEP)
def _rotate_neighbours(x, cos, sin, out):
    """Rotate pairs (x[2j], x[2j + 1]): x and out (D,), cos and sin (D / 2,)."""
    full_width()
    one, two = np.uintp(1), np.uintp(2)
    for j in range(np.uintp(cos.size)):
        a, b = x[two * j], x[two * j + one]
        out[two * j] = multiply_add(a, cos[j], -(b * sin[j]))
        out[two * j + one] = multiply_add(a, sin[j], b * cos[j])


@njit(**STEP)
def rotary_rows(x, strides, cos, sin, interleaved, out, heads, length, first, last):
    """Rotate rows of x (B, H, T, D) by the angles of their t."""
    half = cos.size // length
    t, h, b = first % length, first // length % heads, first // (length * heads)
    for i in range(first, last):
        start, place = b * strides[0] + h * strides[1] + t * strides[2], 2 * i * half
        row, y = span(x, start, 2 * half), span(out, place, 2 * half)
        if interleaved:
            _rotate_neighbours(row, span(cos, t * half, half), span(sin, t * half, half), y)
        else:
            _rotate_halves(row, span(cos, t * half, half), span(sin, t * half, half), y)
        t += 1
        if t == length:
            t, h = 0, h + 1
        if h == heads:
            h, b = 0, b + 1


@njit(**KERNEL)
def kernel_rotary(x, strides, cos, sin, interleaved, out, heads, length, rows, parts):
    """Rotate x (B, H, T, D), flat with the strides of three axes; cos and sin (T * D / 2,), out row-major."""
    share(rotary_rows, (x, strides, cos, sin, interleaved, out, heads, length), rows, parts)
