"""Linear maps and convolutions: products by cuBLAS, windows by kernels."""

from __future__ import annotations

import itertools
import math

from refimpl.engines.cuda.elementwise import ELEMENTWISE
from refimpl.engines.cuda.launch import Source
from refimpl.engines.cuda.products import Products
from refimpl.engines.cuda.rows import RowKernels, packed
from refimpl.engines.cuda.tiles import RUN
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError

CONVOLUTIONS = Source("convolutions.cu", packed("depthwise<T, V>", "windows<T, V>"))


class LinearMaps(RowKernels, Products):
    """`linear` and what is made of it."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        rows, (d_out, d_in) = math.prod(x.shape[:-1]), weight.shape
        if x.shape[-1] != d_in:
            raise ShapeError(f"x has shape {x.shape}; the weight {weight.shape} needs rows of {d_in}")
        out = self.xp.empty((*x.shape[:-1], d_out), x.dtype)
        if bias is not None:
            self._repeat(self._operand(x, bias, (d_out,)), out)  # the product is added to it
        self._multiply(
            x.reshape(rows, d_in), weight, out.reshape(rows, d_out), transposed=True, beta=float(bias is not None)
        )
        return out

    def _repeat(self, row: Array, out: Array) -> None:
        rows, width = math.prod(out.shape[:-1]), out.shape[-1]
        self._launch_tiles(ELEMENTWISE, "repeat<T, V>", rows, width, ((row, width), (out, width)))

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        y = self.linear(x, weight, bias)  # (..., sum of widths); the parts are views of it
        ends = itertools.accumulate(widths)
        return tuple(y[..., end - width : end] for end, width in zip(ends, widths, strict=True))

    def conv1d(self, x: Array, weight: Array, bias: Array, stride: int) -> Array:
        (batch, length, d_in), (d_out, kernel, _) = x.shape, weight.shape
        if weight.shape[2] != d_in:
            raise ShapeError(f"x has shape {x.shape}; the weight {weight.shape} needs rows of {weight.shape[2]}")
        steps, wide = -(-length // stride), kernel * d_in
        windows = self.xp.empty((batch, steps, wide), x.dtype)
        x, _, _, row = self._rows(x)
        arrays = (x, math.gcd(row, d_in)), (windows, wide)  # a pack lies within one tap
        self._launch_tiles(CONVOLUTIONS, "windows<T, V>", batch * steps, wide, arrays, row, d_in, length, steps, stride)
        return self.linear(windows, weight.reshape(d_out, wide), bias)

    def depthwise_conv(self, x: Array, weight: Array, bias: Array) -> Array:
        (batch, length, width), kernel = x.shape, weight.shape[0]
        weight, bias = self._operand(x, weight, (kernel, width)), self._operand(x, bias, (width,))
        x, _, _, stride = self._rows(x)
        out = self.xp.empty(x.shape, x.dtype)
        runs, arrays = batch * -(-length // RUN), ((x, stride), (weight, width), (bias, width), (out, width))
        self._launch_tiles(CONVOLUTIONS, "depthwise<T, V>", runs, width, arrays, stride, length, kernel, rows_each=1)
        return out

    def block_linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        blocks, d_out, d_in = weight.shape
        if x.shape[-1] != blocks * d_in:
            raise ShapeError(f"x has shape {x.shape}; the weight {weight.shape} needs rows of {blocks * d_in}")
        out = self.xp.empty((*x.shape[:-1], blocks * d_out), x.dtype)
        if bias is not None:
            self._repeat(self._operand(x, bias, (blocks * d_out,)), out)  # the products are added to it
        rows = math.prod(x.shape[:-1])
        parts = x.reshape(rows, blocks, d_in).transpose(1, 0, 2)  # (n, rows, q)
        products = out.reshape(rows, blocks, d_out).transpose(1, 0, 2)  # (n, rows, p)
        self._multiply(parts, weight, products, transposed=True, beta=float(bias is not None))
        return out
