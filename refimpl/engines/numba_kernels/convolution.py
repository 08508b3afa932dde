"""Depthwise convolution along time, in tiles that stay in the second-level cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .options import KERNEL, STEP
from .vector import TILE as _REGISTERS

TILE = 64  # output rows per tile; a multiple of ROWS
ROWS = 8  # output rows whose sums are in registers together
VECTOR_BYTES = _REGISTERS.vector_bytes


@intrinsic
def _convolve_block(typingctx: Any, window: Any, weight: Any, out: Any, kernel: Any, width: Any) -> Any:
    """Set ROWS rows of out to ``sum over taps of weight[tap] * window[row + tap]`` for one vector of channels.

    The arguments are addresses of numbers of the type of `width`'s companion arrays; rows are `width` elements apart.
    """
    element = window.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:3], args[:3], strict=True)
        ]
        scalar = context.get_data_type(element)
        vector = ir.VectorType(scalar, VECTOR_BYTES * 8 // element.bitwidth)

        def at(base: ir.Value, row: ir.Value) -> ir.Value:
            return builder.gep(base, [builder.mul(row, args[4])], source_etype=scalar)

        zero = ir.Constant(vector, [0.0] * vector.count)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(ROWS)]
        with cgutils.for_range(builder, args[3]) as loop:
            factor = builder.load(at(data[1], loop.index), align=element.bitwidth // 8, typ=vector)
            for row, total in enumerate(sums):
                place = at(data[0], builder.add(loop.index, cgutils.intp_t(row)))
                product = builder.fmul(
                    factor, builder.load(place, align=element.bitwidth // 8, typ=vector), flags=("contract",)
                )
                builder.store(builder.fadd(builder.load(total, typ=vector), product, flags=("contract",)), total)
        for row, total in enumerate(sums):
            builder.store(builder.load(total, typ=vector), at(data[2], cgutils.intp_t(row)), align=element.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(window, weight, out, types.intp, types.intp), codegen
