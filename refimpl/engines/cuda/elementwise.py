"""Norms and elementwise ops."""

from __future__ import annotations

import math
from importlib import import_module

from refimpl.engines.cuda.launch import Launcher, Source
from refimpl.engines.cuda.shapes import block_per_row, element_strides, rows_by_columns
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError

ELEMENTWISE = Source(
    "elementwise.cu",
    (
        "gate<T>", "add<T>", "batch_norm<T>", "depthwise<T>", "windows<T>", "rotary<T>",
        "activation<T, Gelu>", "activation<T, GeluTanh>", "activation<T, Silu>", "activation<T, Relu>",
    ),
)  # fmt: skip
NORMS = Source("norms.cu", ("layer_norm<T>", "rms_norm<T>"))


class Elementwise(Launcher):
    """Ops on single elements and on rows."""

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self._norm("layer_norm<T>", x, (weight, bias), eps)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self._norm("rms_norm<T>", x, (weight,), eps)

    def batch_norm(self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
        operands = tuple(self._operand(x, y, x.shape[-1:]) for y in (mean, variance, weight, bias))
        return self._by_rows(ELEMENTWISE, "batch_norm<T>", x, operands, float(eps))

    def _norm(self, kernel: str, x: Array, operands: tuple[Array, ...], eps: float) -> Array:
        operands = tuple(self._operand(x, y, x.shape[-1:]) for y in operands)
        x, rows, width, stride = self._rows(x)
        out = self.xp.empty(x.shape, x.dtype)
        self._launch(NORMS, kernel, x, block_per_row(rows, width), x, *operands, out, width, stride, float(eps))
        return out

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        if y.ndim == 0 or y.shape != x.shape[-y.ndim :]:
            y = self.xp.broadcast_to(y, x.shape)
        y = self._operand(x, y, y.shape)
        period = max(1, math.prod(y.shape[:-1]))
        return self._by_rows(ELEMENTWISE, "add<T>", x, (y,), period, float(scale))

    def gelu(self, x: Array) -> Array:
        return self._by_rows(ELEMENTWISE, "activation<T, Gelu>", x)

    def gelu_tanh(self, x: Array) -> Array:
        return self._by_rows(ELEMENTWISE, "activation<T, GeluTanh>", x)

    def silu(self, x: Array) -> Array:
        return self._by_rows(ELEMENTWISE, "activation<T, Silu>", x)

    def relu(self, x: Array) -> Array:
        return self._by_rows(ELEMENTWISE, "activation<T, Relu>", x)

    def glu(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        return self._gate(x[..., :half], x[..., half:], swish=False)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._gate(up, gate, swish=True)

    def _gate(self, value: Array, gate: Array, swish: bool) -> Array:
        if value.shape != gate.shape or value.dtype != gate.dtype:
            raise ShapeError(f"{value.shape} {value.dtype} does not go with {gate.shape} {gate.dtype}")
        value, rows, width, stride = self._rows(value)
        gate, _, _, gate_stride = self._rows(gate)
        out = self.xp.empty(value.shape, value.dtype)
        shape = rows_by_columns(rows, width)
        self._launch(
            ELEMENTWISE, "gate<T>", value, shape, value, gate, out, rows, width, stride, gate_stride, int(swish)
        )
        return out

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        batch, heads, length, width = x.shape
        rows, half = batch * heads * length, width // 2
        cos, sin = self._operand(x, cos, (length, half)), self._operand(x, sin, (length, half))
        x = self._unit_columns(x)
        out = self.xp.empty(x.shape, x.dtype)
        sizes = rows, half, heads, length, *element_strides(x)[:3], int(interleaved)
        self._launch(ELEMENTWISE, "rotary<T>", x, rows_by_columns(rows, half), x, cos, sin, out, *sizes)
        return out

    def elu_plus_one(self, x: Array) -> Array:
        zero = x.dtype.type(0)
        return self.xp.exp(self.xp.minimum(x, zero)) + self.xp.maximum(x, zero)

    def erf(self, x: Array) -> Array:
        return import_module("cupyx.scipy.special").erf(x)
