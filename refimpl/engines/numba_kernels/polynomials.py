"""Scalar functions as branch-free arithmetic: LLVM turns a loop over them into vector code.

Each is callable from Python, where it is the plain NumPy formula (so that a kernel's ``py_func`` runs), and
inside a kernel, where its *lowering* writes LLVM instructions for float32 or float64. Numba's ``fastmath``
would mark these too and break them (``(x + magic) - magic`` is not x), so kernels allow LLVM only to fuse a
product with the sum after it, and say with `accumulate` which sums may be reordered: inf and NaN keep their
meaning. Numba's disk cache watches a kernel's own file only: after a change here, clear it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable
from numba.np.arrayobj import populate_array

Array = Any
_FUSE = ("contract",)


class _Format(NamedTuple):
    """How exp is computed in one floating-point format."""

    mantissa_bits: int
    exponent_bias: int
    ln2: tuple[float, float]  # a sum, the first part with so many trailing zero bits that its products with n are exact
    power_of_e: tuple[float, ...]  # e**r for |r| <= ln(2) / 2, to well below a unit in the last place


_FORMATS = {
    32: _Format(
        23, 127, (0.693145751953125, 1.4286068203094172e-06),
        (1.0, 1.0, 0.5, 0.16666415333747864, 0.04166635125875473, 0.00837512593716383, 0.0013941108481958508),
    ),
    64: _Format(
        52, 1023, (0.6931471803691238, 1.9082149292705877e-10),
        tuple(1 / math.factorial(k) for k in range(14)),
    ),
}  # fmt: skip

# Float32 gelu. -log2(erfc(a / sqrt 2) / 2) on 0 <= a <= 6.5 as a polynomial in a, and 2**r on |r| <= 1/2: weighted
# minimax fits (Lawson) whose constants are held at 1, so that gelu(x) -> x / 2. Their error in gelu(x) is below 3e-8,
# and below 2e-5 of gelu(x) where |x| < 5.
_GAUSSIAN_TAIL = (
    1.0, 1.1511094570159912, 0.45918169617652893, 0.052548184990882874, -0.00709206098690629,
    0.00011099640687461942, 0.00022897777671460062, -6.236809713300318e-05, 8.63225977809634e-06,
    -6.468109177149017e-07, 2.0718029958288753e-08,
)  # fmt: skip
_POWER_OF_2 = (
    1.0, 0.6931470036506653, 0.24022242426872253, 0.05550732463598251, 0.009671499952673912,
    0.0013265119632706046,
)  # fmt: skip


# --- what kernels call --------------------------------------------------------------------------------------


def exp(x: Any) -> Any:
    """``e**x``: 0 for what would be subnormal, inf from ``2**(largest exponent + 1/2)`` on, NaN for NaN."""
    return np.exp(x)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    return 1 / (1 + np.exp(-x))


def gelu(x: Any) -> Any:
    """``x / 2 (1 + erf(x / sqrt 2))``; float32 as ``max(x, 0) - |x| 2**-h(|x|)``, which does not cancel."""
    return type(x)(x / 2 * math.erfc(-x / math.sqrt(2)))


def maximum(a: Any, b: Any) -> Any:
    """The larger of two numbers; NaN if one is NaN."""
    return np.maximum(a, b)


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    """``a b + c``, in one rounding where the target can. For sums of two products: else LLVM chooses which is fused."""
    return a * b + c


def accumulate(total: Any, x: Any) -> Any:
    """``total + x`` in a loop whose sums LLVM may take in any order, so that it vectorises it; compare `sums`."""
    return total + x


def span(array: Array, start: Any, length: Any) -> Array:
    """``array[start : start + length]`` of a flat array, as a view that is not counted as a reference.

    Counting is an atomic addition to a number that all threads share: more than the work on a short row.
    """
    return array[start : start + length]


def full_width() -> None:
    """Let LLVM use the widest registers in the function that calls this; else it uses half of AVX-512's.

    The function is not inlined, since it would lose that within another.
    """


# --- their lowerings ----------------------------------------------------------------------------------------


class _Scalar:
    """Arithmetic on one number, written through an IR builder."""

    def __init__(self, builder: ir.IRBuilder, kind: types.Float) -> None:
        self.builder = builder
        self.bits: int = kind.bitwidth
        self.type = ir.FloatType() if self.bits == 32 else ir.DoubleType()
        self.integer = ir.IntType(self.bits)
        self.format = _FORMATS[self.bits]

    def constant(self, value: float) -> ir.Value:
        return ir.Constant(self.type, float(np.float32(value)) if self.bits == 32 else value)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a * b + c``, in one rounding where the target can."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """Horner's rule; coefficients from the constant upwards."""
        value = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = self.multiply_add(value, x, self.constant(coefficient))
        return value

    def choose(self, a: ir.Value, relation: str, b: ir.Value, then: ir.Value, otherwise: ir.Value) -> ir.Value:
        """``then if a <relation> b else otherwise``; a NaN chooses `otherwise`."""
        return self.builder.select(self.builder.fcmp_ordered(relation, a, b), then, otherwise)

    def round(self, x: ir.Value, log2_base: float) -> tuple[ir.Value, ir.Value]:
        """``n = round(x * log2_base)`` and ``2**n``: adding `magic` leaves n + bias in the low bits."""
        magic = self.constant(1.5 * 2.0**self.format.mantissa_bits + self.format.exponent_bias)
        shifted = self.multiply_add(x, self.constant(log2_base), magic)
        bits = self.builder.bitcast(shifted, self.integer)
        power = self.builder.shl(bits, self.integer(self.format.mantissa_bits))
        return self.builder.fsub(shifted, magic), self.builder.bitcast(power, self.type)

    def exp(self, x: ir.Value) -> ir.Value:
        """``x = n ln 2 + r`` gives ``2**n`` by a shift and ``e**r`` by a polynomial."""
        lowest = self.constant((1 - self.format.exponent_bias) * math.log(2))
        highest = self.constant((self.format.exponent_bias + 1) * math.log(2))
        x = self.choose(x, ">", highest, highest, x)
        n, power = self.round(x, 1 / math.log(2))
        r = x
        for part in self.format.ln2:
            r = self.multiply_add(n, self.constant(-part), r)
        value = self.builder.fmul(self.polynomial(r, self.format.power_of_e), power)
        return self.choose(x, "<", lowest, self.constant(0.0), value)

    def exp2(self, x: ir.Value) -> ir.Value:
        """``2**x`` for x <= 0 in float32; 0 where it would be subnormal."""
        n, power = self.round(x, 1.0)
        value = self.builder.fmul(self.polynomial(self.builder.fsub(x, n), _POWER_OF_2), power)
        return self.choose(x, "<", self.constant(1.0 - self.format.exponent_bias), self.constant(0.0), value)

    def sigmoid(self, x: ir.Value) -> ir.Value:
        one = self.constant(1.0)
        return self.builder.fdiv(one, self.builder.fadd(one, self.exp(self.builder.fneg(x))))

    def gelu(self, x: ir.Value) -> ir.Value:
        zero, negative = self.constant(0.0), self.builder.fneg(x)
        size = self.choose(x, "<", zero, negative, x)
        size = self.choose(size, ">", self.constant(16.0), self.constant(16.0), size)  # 2**-h is 0 from 12 on
        tail = self.exp2(self.builder.fneg(self.polynomial(size, _GAUSSIAN_TAIL)))
        positive = self.choose(x, "<", zero, zero, x)
        return self.multiply_add(self.builder.fneg(size), tail, positive)


def _returns_its_kind(function: Callable[..., Any], arguments: int) -> None:
    """Type a function: all arguments are one float type, and so is the result."""

    @type_callable(function)
    def typing(context: Any) -> Callable[..., Any]:
        def unary(x: Any) -> Any:
            return x if isinstance(x, types.Float) else None

        def binary(a: Any, b: Any) -> Any:
            return a if isinstance(a, types.Float) and a == b else None

        def ternary(a: Any, b: Any, c: Any) -> Any:
            return a if isinstance(a, types.Float) and a == b == c else None

        return (unary, binary, ternary)[arguments - 1]


for _function, _arguments in ((exp, 1), (sigmoid, 1), (gelu, 1), (maximum, 2), (accumulate, 2), (multiply_add, 3)):
    _returns_its_kind(_function, _arguments)


@lower_builtin(exp, types.Float)
def _lower_exp(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _Scalar(builder, sig.return_type).exp(args[0])


@lower_builtin(sigmoid, types.Float)
def _lower_sigmoid(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _Scalar(builder, sig.return_type).sigmoid(args[0])


@lower_builtin(gelu, types.float32)
def _lower_gelu32(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _Scalar(builder, sig.return_type).gelu(args[0])


@lower_builtin(gelu, types.float64)
def _lower_gelu64(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    scalar = _Scalar(builder, sig.return_type)
    erfc = context.get_function(math.erfc, signature(types.float64, types.float64))
    tail = erfc(builder, [builder.fmul(args[0], scalar.constant(-1 / math.sqrt(2)))])
    return builder.fmul(builder.fmul(args[0], scalar.constant(0.5)), tail)


@lower_builtin(maximum, types.Float, types.Float)
def _lower_maximum(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    kind = args[0].type
    function = builder.module.declare_intrinsic("llvm.maximum", [kind], ir.FunctionType(kind, [kind, kind]))
    return builder.call(function, args, fastmath=("nsz",))


@lower_builtin(multiply_add, types.Float, types.Float, types.Float)
def _lower_multiply_add(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    kind = args[0].type
    name = f"llvm.fmuladd.f{sig.return_type.bitwidth}"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name), args)


@lower_builtin(accumulate, types.Float, types.Float)
def _lower_accumulate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return builder.fadd(*args, flags=("reassoc", "contract"))


@type_callable(span)
def _type_span(context: Any) -> Callable[..., Any]:
    def typing(array: Any, start: Any, length: Any) -> Any:
        return array.copy(readonly=False) if isinstance(array, types.Array) and array.ndim == 1 else None

    return typing


@lower_builtin(span, types.Array, types.Integer, types.Integer)
def _lower_span(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    source = context.make_array(sig.args[0])(context, builder, args[0])
    view = context.make_array(sig.return_type)(context, builder)
    populate_array(
        view, builder.gep(source.data, [args[1]]), [args[2]], [source.itemsize], source.itemsize, meminfo=None
    )
    return view._getvalue()


@type_callable(full_width)
def _type_full_width(context: Any) -> Callable[[], Any]:
    return lambda: types.none


@lower_builtin(full_width)
def _lower_full_width(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    # Other targets ignore the attribute. llvmlite's own add() knows few attributes, hence set.add.
    set.add(builder.function.attributes, '"prefer-vector-width"="512"')
    builder.function.attributes.add("noinline")
    return context.get_dummy_value()
