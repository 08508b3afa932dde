"""Sums of the numbers of a row, in an order that their count alone decides.

What LLVM makes of a sum in a loop differs with the function that the loop ends up in, and with whether arrays lie close
together; so here sums are written out. Called from Python these are the plain NumPy formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, type_callable

from .vector import _assign, _current, _in_blocks, _variables, _Vectors

Array = Any

_SUMS = 4  # vectors that numbers are dealt to: an addition takes about four clocks, and two can begin in each


def sum_of(x: Array) -> Any:
    """Add up a flat array without gaps."""
    return x.sum()


def sum_of_squares(x: Array, center: Any) -> Any:
    """Add up ``(x - center) ** 2`` over a flat array without gaps."""
    return ((x - center) ** 2).sum()


# --- their lowerings ------------------------------------------------------------------------------------------------


@type_callable(sum_of)
def _type_sum_of(context: Any) -> Callable[..., Any]:
    return lambda x: x.dtype if isinstance(x, types.Array) and x.ndim == 1 else None


@type_callable(sum_of_squares)
def _type_sum_of_squares(context: Any) -> Callable[..., Any]:
    return lambda x, center: x.dtype if isinstance(x, types.Array) and x.ndim == 1 else None


@lower_builtin(sum_of, types.Array)
def _lower_sum_of(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    def added(vectors: _Vectors, before: ir.Value, place: ir.Value, width: int) -> ir.Value:
        return builder.fadd(before, vectors.load(place) if width > 1 else vectors.load_one(place))

    return _sum(context, builder, sig.args[0], args[0], added)


@lower_builtin(sum_of_squares, types.Array, types.Float)
def _lower_sum_of_squares(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    center = context.cast(builder, args[1], sig.args[1], sig.args[0].dtype)

    def added(vectors: _Vectors, before: ir.Value, place: ir.Value, width: int) -> ir.Value:
        if width > 1:
            difference = builder.fsub(vectors.load(place), vectors.splat(center))
        else:  # the other lanes add nothing
            alone = builder.insert_element(vectors.constant(0.0), center, ir.IntType(32)(0))
            difference = builder.fsub(vectors.load_one(place), alone)
        return vectors.multiply_add(difference, difference, before)

    return _sum(context, builder, sig.args[0], args[0], added)


def _sum(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, added: Callable[..., ir.Value]) -> ir.Value:
    """Emit a sum; ``added(vectors, before, place, width)`` is a vector of sums with one vector, or number, more."""
    view = context.make_array(kind)(context, builder, array)
    vectors = _Vectors(builder, types.CPointer(kind.dtype))
    sums = _variables(builder, [vectors.constant(0.0)] * _SUMS)

    def add(i: ir.Value, width: int) -> None:
        slots = sums[: max(1, width // vectors.count)]
        places = [vectors.at(vectors.at(view.data, i), k * vectors.count) for k in range(len(slots))]
        found = zip(_current(builder, slots), places, strict=True)
        _assign(builder, slots, [added(vectors, before, place, width) for before, place in found])

    count = builder.extract_value(view.shape, 0)
    _in_blocks(builder, count, (_SUMS * vectors.count, vectors.count, 1), add)
    values = _current(builder, sums)
    while len(values) > 1:
        values = list(map(builder.fadd, values[::2], values[1::2]))
    result = cgutils.alloca_once(builder, vectors.element)
    vectors.store_sums(values, result)
    return builder.load(result)
