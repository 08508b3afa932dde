"""Norms and elementwise ops."""

from __future__ import annotations

import math

import numpy as np

from refimpl.engines.cuda.launch import Source
from refimpl.engines.cuda.rows import RowKernels, held, packed
from refimpl.engines.cuda.shapes import element_strides
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError

ELEMENTWISE = Source(
    "elementwise.cu",
    packed(
        "gate<T, V>", "add<T, V>", "batch_norm<T, V>", "rotary<T, V>", "activation<T, V, Gelu>",
        "activation<T, V, GeluTanh>", "activation<T, V, Silu>", "activation<T, V, Relu>",
        "activation<T, V, EluPlusOne>", "gather<T, V>", "repeat<T, V>",
    ),
)  # fmt: skip
NORMS = Source("norms.cu", held("layer_norm<T, V, P>", "rms_norm<T, V, P>"))


class Elementwise(RowKernels):
    """Ops on single elements and on rows."""

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self._norm("layer_norm<T, V, P>", x, (weight, bias), eps)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self._norm("rms_norm<T, V, P>", x, (weight,), eps)

    def batch_norm(self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
        columns = tuple(self._operand(x, y, x.shape[-1:]) for y in (mean, variance, weight, bias))
        return self._elementwise(ELEMENTWISE, "batch_norm<T, V>", x, columns, float(eps))

    def _norm(self, kernel: str, x: Array, columns: tuple[Array, ...], eps: float) -> Array:
        columns = tuple(self._operand(x, y, x.shape[-1:]) for y in columns)
        x, rows, width, stride = self._rows(x)
        out = self.xp.empty(x.shape, x.dtype)
        arrays = (x, stride), *((y, width) for y in columns), (out, width)
        self._launch_rows(NORMS, kernel, rows, width, arrays, stride, float(eps))
        return out

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        y, period = self._repeated(x, y)
        return self._elementwise(ELEMENTWISE, "add<T, V>", x, (y,), period, float(scale))

    def _repeated(self, x: Array, y: Array) -> tuple[Array, int]:
        """y, which broadcasts to x, as rows that repeat, and the number of them."""
        if y.ndim == 0 or y.shape != x.shape[-y.ndim :]:
            y = self.xp.broadcast_to(y, x.shape)
        return self._operand(x, y, y.shape), max(1, math.prod(y.shape[:-1]))

    def gelu(self, x: Array) -> Array:
        return self._elementwise(ELEMENTWISE, "activation<T, V, Gelu>", x)

    def gelu_tanh(self, x: Array) -> Array:
        return self._elementwise(ELEMENTWISE, "activation<T, V, GeluTanh>", x)

    def silu(self, x: Array) -> Array:
        return self._elementwise(ELEMENTWISE, "activation<T, V, Silu>", x)

    def relu(self, x: Array) -> Array:
        return self._elementwise(ELEMENTWISE, "activation<T, V, Relu>", x)

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
        arrays = (value, stride), (gate, gate_stride), (out, width)
        self._launch_tiles(ELEMENTWISE, "gate<T, V>", rows, width, arrays, stride, gate_stride, int(swish))
        return out

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        batch, heads, length, width = x.shape
        rows, half = batch * heads * length, width // 2
        cos, sin = self._operand(x, cos, (length, half)), self._operand(x, sin, (length, half))
        x = self._unit_columns(x)
        out = self.xp.empty(x.shape, x.dtype)
        *strides, _ = element_strides(x)
        apart = math.gcd(*strides)  # what divides it divides every stride
        arrays = (x, apart), (cos, half), (sin, half), (out, half)
        sizes = heads, length, *strides, int(interleaved)
        self._launch_tiles(ELEMENTWISE, "rotary<T, V>", rows, half, arrays, *sizes, rows_each=1)
        return out

    def elu_plus_one(self, x: Array) -> Array:
        return self._elementwise(ELEMENTWISE, "activation<T, V, EluPlusOne>", x)

    def embedding(self, table: Array, ids: Array) -> Array:
        table, count, width, stride = self._rows(table)
        ids = self.xp.ascontiguousarray(ids.astype(np.int64, copy=False))
        out = self.xp.empty((*ids.shape, width), table.dtype)
        arrays = (table, stride), (ids, 0), (out, width)
        self._launch_tiles(ELEMENTWISE, "gather<T, V>", ids.size, width, arrays, stride, count)
        return out
