"""Depthwise convolution along time, in tiles that stay in the second-level cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .parallel import KERNEL, STEP, share
from .polynomials import full_width, span
from .vector import TILE as _REGISTERS

TILE = 64  # output rows per tile; a multiple of ROWS
ROWS = 8  # output rows whose sums are held in registers together
VECTOR_BYTES = _REGISTERS.vector_bytes


def padded_width(channels: int, itemsize: int) -> int:
    """Channels rounded up to whole vectors."""
    lanes = VECTOR_BYTES // itemsize
    return -(-channels // lanes) * lanes


@intrinsic
def _convolve_block(typingctx: Any, window: Any, weight: Any, bias: Any, out: Any, kernel: Any, width: Any) -> Any:
    """Convolve ROWS rows of one vector of channels, at which every array starts; rows are `width` apart.

    LLVM's loop vectoriser does not keep sums in registers while it walks over the taps; this does.
    """
    element = out.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vector = ir.VectorType(context.get_data_type(element), VECTOR_BYTES * 8 // element.bitwidth)
        align = element.bitwidth // 8
        x, taps, shift, y = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:4], args[:4], strict=True)
        )

        def at(base: ir.Value, row: ir.Value) -> ir.Value:
            return builder.bitcast(builder.gep(base, [builder.mul(row, args[5])]), vector.as_pointer())

        def load(place: ir.Value) -> ir.Value:
            return builder.load(place, align=align)

        first = cgutils.intp_t(0)
        sums = [cgutils.alloca_once_value(builder, load(at(shift, first))) for _ in range(ROWS)]
        with cgutils.for_range(builder, args[4]) as loop:
            factor = load(at(taps, loop.index))
            for row, total in enumerate(sums):
                product = builder.fmul(
                    factor, load(at(x, builder.add(loop.index, cgutils.intp_t(row)))), flags=("contract",)
                )
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        for row, total in enumerate(sums):
            builder.store(builder.load(total), at(y, cgutils.intp_t(row)), align=align)
        return context.get_dummy_value()

    return types.void(window, weight, bias, out, types.intp, types.intp), codegen


@njit(**STEP)
def _copy(source, target):
    """Copy a flat array to one of the same size."""
    full_width()
    for j in range(target.size):
        target[j] = source[j]


@njit(**STEP)
def _load_tile(x, start, row_stride, first, length, channels, padded, width):
    """Copy rows of x (length, channels) from `first` on to padded rows (n * width,); zeros outside x."""
    for place in range(padded.size // width):
        row = span(padded, place * width, channels)
        if 0 <= first + place < length:
            _copy(span(x, start + (first + place) * row_stride, channels), row)
        else:
            row[:] = 0


@njit(**STEP)
def _convolve_tile(padded, weight, bias, kernel, tile, width):
    """Convolve padded ((TILE + kernel - 1) * d,) with weight (kernel * d,) into tile (TILE * d,)."""
    for i in range(0, TILE, ROWS):
        for c in range(0, width, VECTOR_BYTES // tile.itemsize):
            start = i * width + c
            _convolve_block(
                span(padded, start, padded.size - start), span(weight, c, weight.size - c),
                span(bias, c, width - c), span(tile, start, tile.size - start), kernel, width,
            )  # fmt: skip


@njit(**STEP)
def _depthwise_tiles(x, strides, weight, bias, kernel, out, length, width, channels, first, last):
    """Convolve tiles of TILE rows; the tiles of all sequences are numbered through."""
    padded = np.zeros((TILE + kernel - 1) * width, x.dtype)  # channels from `channels` on stay zero
    tile = np.empty(TILE * width, x.dtype)
    per_sequence = -(-length // TILE)
    for item in range(first, last):
        b, start = item // per_sequence, item % per_sequence * TILE
        _load_tile(x, b * strides[0], strides[1], start - (kernel - 1) // 2, length, channels, padded, width)
        _convolve_tile(padded, weight, bias, kernel, tile, width)
        for i in range(min(TILE, length - start)):
            _copy(span(tile, i * width, channels), span(out, (b * length + start + i) * channels, channels))


@njit(**KERNEL)
def kernel_depthwise_conv(x, strides, weight, bias, kernel, out, length, width, channels, tiles, parts):
    """Convolve each channel of x (B, T, channels), flat with the strides of two axes, into row-major out.

    weight (kernel * d,) and bias (d,) have their channels padded to d = `width`, see `padded_width`.
    """
    share(_depthwise_tiles, (x, strides, weight, bias, kernel, out, length, width, channels), tiles, parts)
