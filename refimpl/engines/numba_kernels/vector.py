"""Explicit-vector building blocks for the CPU kernels, emitted as LLVM IR.

LLVM's auto-vectoriser neither keeps a matrix tile in registers nor vectorises ``exp``, so the inner loops are written here
with vector values. Everything works on *panels*: row-major matrices whose rows are `lanes` numbers long (a few vectors) and
start on a cache line. The width of a vector and the shape of a register tile follow the host's instruction set; LLVM splits
vectors that a target lacks, so every tile is right everywhere and only its speed differs.

In all pictures ``a @ b`` is the matrix product, a *pointer* is a C pointer to float32 or float64, strides count elements, and
memory is only assumed to be aligned to one element.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
import numpy as np
from numba import config, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

# Fusing a multiplication with the addition after it is the only licence given to LLVM: inf and NaN keep their meaning.
_FUSE = ("contract",)


class Tile(NamedTuple):
    """The register tile of the product kernels: ``rows x (vectors * vector_bytes)``."""

    vector_bytes: int
    vectors: int
    rows: int

    @property
    def panel_bytes(self) -> int:
        """Bytes in a row of a panel."""
        return self.vectors * self.vector_bytes


def _target_features() -> set[str]:
    """Name the instruction-set extensions that Numba compiles for."""
    if config.CPU_NAME and not config.CPU_FEATURES:
        return set()
    if config.CPU_FEATURES is not None:
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    return {name for name, present in llvmlite.binding.get_host_cpu_features().items() if present}


def _choose_tile(features: set[str], machine: str) -> Tile:
    """Pick the tile whose accumulators fill most registers: 32 of them with AVX-512 and on Arm, else 16."""
    if "avx512f" in features:
        return Tile(vector_bytes=64, vectors=3, rows=8)
    if "avx2" in features:
        return Tile(vector_bytes=32, vectors=3, rows=4)
    if machine in ("arm64", "aarch64"):
        return Tile(vector_bytes=16, vectors=3, rows=8)
    return Tile(vector_bytes=16, vectors=3, rows=4)


import os  # TODO remove
TILE = _choose_tile(_target_features(), platform.machine().lower())
if os.environ.get("TILE"):
    TILE = Tile(*map(int, os.environ["TILE"].split(",")))


class _ExpShape(NamedTuple):
    """How exp2 is computed for one element type: exponent layout and length of the polynomial."""

    mantissa_bits: int
    exponent_bias: int
    degree: int


_EXP_SHAPES = {
    32: _ExpShape(mantissa_bits=23, exponent_bias=127, degree=7),
    64: _ExpShape(mantissa_bits=52, exponent_bias=1023, degree=13),
}


def panel_lanes(itemsize: int) -> int:
    """Numbers in a row of a panel, for elements of `itemsize` bytes."""
    return TILE.panel_bytes // itemsize


class _Vectors:
    """Vector arithmetic on one element type, written through an IR builder."""

    def __init__(self, builder: ir.IRBuilder, pointer: types.CPointer) -> None:
        self.builder = builder
        self.bits: int = pointer.dtype.bitwidth
        self.itemsize = self.bits // 8
        self.element = ir.FloatType() if self.bits == 32 else ir.DoubleType()
        self.integer = ir.IntType(self.bits)
        self.count = TILE.vector_bytes // self.itemsize
        self.type = ir.VectorType(self.element, self.count)
        self.integers = ir.VectorType(self.integer, self.count)
        self.lanes = panel_lanes(self.itemsize)

    def at(self, pointer: ir.Value, *offsets: ir.Value | int) -> ir.Value:
        """Move `pointer` by the sum of `offsets` elements."""
        index = cgutils.intp_t(0)
        for offset in offsets:
            index = self.builder.add(index, cgutils.intp_t(offset) if isinstance(offset, int) else offset)
        return self.builder.gep(pointer, [index])

    def load(self, pointer: ir.Value) -> ir.Value:
        """Read one vector."""
        return self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()), align=self.itemsize)

    def load_row(self, pointer: ir.Value) -> list[ir.Value]:
        """Read one row of a panel."""
        return [self.load(self.at(pointer, v * self.count)) for v in range(TILE.vectors)]

    def load_scalar(self, pointer: ir.Value) -> ir.Value:
        """Read one number into every lane."""
        return self.splat(self.builder.load(pointer))

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        """Write one vector."""
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=self.itemsize)

    def store_row(self, row: Sequence[ir.Value], pointer: ir.Value) -> None:
        """Write one row of a panel."""
        for v, value in enumerate(row):
            self.store(value, self.at(pointer, v * self.count))

    def splat(self, scalar: ir.Value) -> ir.Value:
        """Repeat one number in every lane."""
        first = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), scalar, ir.IntType(32)(0))
        same = ir.Constant(ir.VectorType(ir.IntType(32), self.count), [0] * self.count)
        return self.builder.shuffle_vector(first, first, same)

    def constant(self, value: float) -> ir.Value:
        """Repeat one literal in every lane."""
        return ir.Constant(self.type, [value] * self.count)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Compute ``a * b + c``, in one rounding where the target can."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)

    def maximum(self, running: ir.Value, value: ir.Value) -> ir.Value:
        """Take the larger; a NaN in `value` leaves `running` as it is (and reaches the result through exp2)."""
        return self.builder.select(self.builder.fcmp_ordered(">", value, running), value, running)

    def exp2(self, x: ir.Value) -> ir.Value:
        """Compute ``2 ** x`` for x below about 1: 0 where x would give a subnormal number, NaN where x is NaN.

        x = n + f with n an integer, |f| <= 1/2. Adding `magic` leaves n + bias in the low bits, whence 2^n by one shift.
        """
        shape, builder = _EXP_SHAPES[self.bits], self.builder
        magic = self.constant(1.5 * 2.0**shape.mantissa_bits + shape.exponent_bias)
        shifted = builder.fadd(x, magic)
        fraction = builder.fsub(x, builder.fsub(shifted, magic))
        power = self.constant(math.log(2) ** shape.degree / math.factorial(shape.degree))
        for k in reversed(range(shape.degree)):
            term = self.constant(math.log(2) ** k / math.factorial(k))
            power = self.multiply_add(power, fraction, term)
        shift = ir.Constant(self.integers, [shape.mantissa_bits] * self.count)
        scale = builder.bitcast(builder.shl(builder.bitcast(shifted, self.integers), shift), self.type)
        tiny = builder.fcmp_ordered("<", x, self.constant(1.0 - shape.exponent_bias))
        return builder.select(tiny, self.constant(0.0), builder.fmul(power, scale))

    def transpose(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Transpose a square of vectors: swap off-diagonal blocks of halving size."""
        rows, block = list(rows), self.count // 2
        while block:
            upper = [c if not c & block else c - block + self.count for c in range(self.count)]
            lower = [c + block if not c & block else c + self.count for c in range(self.count)]
            for r in range(self.count):
                if not r & block:
                    pair = rows[r], rows[r + block]
                    rows[r], rows[r + block] = self.shuffle(*pair, upper), self.shuffle(*pair, lower)
            block //= 2
        return rows

    def shuffle(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
        """Pick lanes from two vectors laid end to end."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), self.count), order))


def _variables(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Allocate loop-carried variables, which LLVM turns into registers, and set them to `values`."""
    slots = [cgutils.alloca_once(builder, value.type) for value in values]
    _assign(builder, slots, values)
    return slots


def _assign(builder: ir.IRBuilder, slots: Sequence[ir.Value], values: Sequence[ir.Value]) -> None:
    for slot, value in zip(slots, values, strict=True):
        builder.store(value, slot)


def _values(builder: ir.IRBuilder, slots: Sequence[ir.Value], kind: ir.Type) -> list[ir.Value]:
    return [builder.load(slot) for slot in slots]


def _add_products(
    vectors: _Vectors,
    accumulators: Sequence[ir.Value],
    a: ir.Value,
    b: ir.Value,
    depth: ir.Value,
    row_stride: ir.Value | int,
    step_stride: ir.Value | int,
) -> None:
    """Emit ``accumulators[i, :] += a[i * row_stride + t * step_stride] * b[t, :]`` over all steps t."""
    builder = vectors.builder
    as_value = lambda n: cgutils.intp_t(n) if isinstance(n, int) else n
    row_starts = [vectors.at(a, builder.mul(cgutils.intp_t(i), as_value(row_stride))) for i in range(TILE.rows)]
    with cgutils.for_range(builder, depth) as loop:
        panel_row = vectors.load_row(vectors.at(b, builder.mul(loop.index, cgutils.intp_t(vectors.lanes))))
        step = builder.mul(loop.index, as_value(step_stride))
        for i, start in enumerate(row_starts):
            factor = vectors.load_scalar(vectors.at(start, step))
            for v, value in enumerate(panel_row):
                slot = accumulators[i * TILE.vectors + v]
                builder.store(vectors.multiply_add(factor, value, builder.load(slot)), slot)


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Turn an address into a pointer to numbers of the type of `like`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), codegen


@intrinsic
def offset(typingctx: Any, base: Any, elements: Any) -> Any:
    """Move a pointer by a number of elements."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _Vectors(builder, base).at(*args)

    return base(base, types.intp), codegen


@intrinsic
def fetch_add(typingctx: Any, counter: Any) -> Any:
    """Return the int64 at an address and add one to it, as one step among threads."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(types.intp), codegen


@intrinsic
def dot_tile(typingctx: Any, out: Any, a: Any, b: Any, depth: Any, row_stride: Any) -> Any:
    """Set the tile ``out = a @ b``: a is (rows, depth) with rows `row_stride` apart, b (depth, lanes) a panel."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, left, right, steps, stride = args
        sums = _variables(builder, [vectors.constant(0.0)] * (TILE.rows * TILE.vectors))
        _add_products(vectors, sums, left, right, steps, stride, 1)
        for i in range(TILE.rows):
            row = _values(builder, sums[i * TILE.vectors : (i + 1) * TILE.vectors], vectors.type)
            vectors.store_row(row, vectors.at(target, i * vectors.lanes))
        return context.get_dummy_value()

    return types.void(out, out, out, types.intp, types.intp), codegen


@intrinsic
def rescale_add_tile(typingctx: Any, out: Any, factor: Any, a: Any, b: Any, depth: Any, step_stride: Any) -> Any:
    """Set the tile ``out = factor * out + a.T @ b``: a is (depth, rows) with rows `step_stride` apart, b a panel."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, factors, left, right, steps, stride = args
        factor_row = vectors.load_row(factors)
        scaled = []
        for i in range(TILE.rows):
            row = vectors.load_row(vectors.at(target, i * vectors.lanes))
            scaled += [builder.fmul(x, y) for x, y in zip(row, factor_row, strict=True)]
        sums = _variables(builder, scaled)
        _add_products(vectors, sums, left, right, steps, 1, stride)
        for i in range(TILE.rows):
            row = _values(builder, sums[i * TILE.vectors : (i + 1) * TILE.vectors], vectors.type)
            vectors.store_row(row, vectors.at(target, i * vectors.lanes))
        return context.get_dummy_value()

    return types.void(out, out, out, out, types.intp, types.intp), codegen


@intrinsic
def online_softmax(typingctx: Any, scores: Any, rows: Any, log2_scale: Any, state: Any) -> Any:
    """Turn a panel of scores into weights relative to the running maximum of each lane.

    `state` holds four panel rows: running maximum of the scores, the shift subtracted so far (in powers of two), running sum
    of the weights, and, set here, the factor by which everything accumulated before this panel must be multiplied.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, scores)
        panel, count, scale, place = args
        lanes = cgutils.intp_t(vectors.lanes)
        places = [vectors.at(place, r * vectors.lanes) for r in range(4)]
        maxima = _variables(builder, vectors.load_row(places[0]))
        with cgutils.for_range(builder, count) as loop:
            row = vectors.load_row(vectors.at(panel, builder.mul(loop.index, lanes)))
            old = _values(builder, maxima, vectors.type)
            _assign(builder, maxima, [vectors.maximum(m, s) for m, s in zip(old, row, strict=True)])
        maxima = _values(builder, maxima, vectors.type)
        scale = vectors.splat(scale)
        nothing = vectors.constant(-math.inf)
        unseen = [builder.fcmp_ordered("==", m, nothing) for m in maxima]
        shifts = [builder.select(u, vectors.constant(0.0), builder.fmul(m, scale)) for u, m in zip(unseen, maxima)]
        old_shifts = vectors.load_row(places[1])
        factors = [vectors.exp2(builder.fsub(a, b)) for a, b in zip(old_shifts, shifts)]
        old_sums = vectors.load_row(places[2])
        sums = _variables(builder, [builder.fmul(x, y) for x, y in zip(old_sums, factors)])
        vectors.store_row(maxima, places[0])
        vectors.store_row([builder.select(u, nothing, s) for u, s in zip(unseen, shifts)], places[1])
        vectors.store_row(factors, places[3])
        negated = [builder.fneg(s) for s in shifts]
        with cgutils.for_range(builder, count) as loop:
            start = vectors.at(panel, builder.mul(loop.index, lanes))
            row = vectors.load_row(start)
            weights = [vectors.exp2(vectors.multiply_add(s, scale, n)) for s, n in zip(row, negated)]
            vectors.store_row(weights, start)
            old = _values(builder, sums, vectors.type)
            _assign(builder, sums, [builder.fadd(o, w) for o, w in zip(old, weights)])
        vectors.store_row(_values(builder, sums, vectors.type), places[2])
        return context.get_dummy_value()

    return types.void(scores, types.intp, log2_scale, scores), codegen


@intrinsic
def transpose_in(typingctx: Any, out: Any, a: Any, row_stride: Any, factor: Any) -> Any:
    """Set one square of a panel, one vector wide, to ``factor * a.T``; rows of a are `row_stride` apart."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, source, stride, scalar = args
        times = vectors.splat(scalar)
        starts = [vectors.at(source, builder.mul(cgutils.intp_t(r), stride)) for r in range(vectors.count)]
        rows = [builder.fmul(vectors.load(start), times) for start in starts]
        for r, row in enumerate(vectors.transpose(rows)):
            vectors.store(row, vectors.at(target, r * vectors.lanes))
        return context.get_dummy_value()

    return types.void(out, out, types.intp, factor), codegen


@intrinsic
def transpose_out(typingctx: Any, out: Any, row_stride: Any, a: Any, factors: Any) -> Any:
    """Set a square of rows `row_stride` apart to ``(a * factors).T``, where a is one vector wide in a panel."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, stride, source, factor = args
        times = vectors.load(factor)
        rows = [vectors.load(vectors.at(source, r * vectors.lanes)) for r in range(vectors.count)]
        rows = vectors.transpose([builder.fmul(row, times) for row in rows])
        for r, row in enumerate(rows):
            vectors.store(row, vectors.at(target, builder.mul(cgutils.intp_t(r), stride)))
        return context.get_dummy_value()

    return types.void(out, types.intp, out, out), codegen


@intrinsic
def hide_square(typingctx: Any, scores: Any, mask: Any, row_stride: Any) -> Any:
    """Set one square of a panel, one vector wide, to -inf where ``mask.T`` is 0; rows of the mask are `row_stride` bytes apart."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, scores)
        panel, source, stride = args
        bits = ir.VectorType(ir.IntType(8), vectors.count)
        starts = [builder.gep(source, [builder.mul(cgutils.intp_t(c), stride)]) for c in range(vectors.count)]
        rows = [builder.load(builder.bitcast(start, bits.as_pointer()), align=1) for start in starts]
        hidden, zeros = vectors.constant(-math.inf), ir.Constant(bits, [0] * vectors.count)
        for r, row in enumerate(vectors.transpose(rows)):
            place = vectors.at(panel, r * vectors.lanes)
            seen = builder.icmp_unsigned("!=", row, zeros)
            vectors.store(builder.select(seen, vectors.load(place), hidden), place)
        return context.get_dummy_value()

    return types.void(scores, mask, types.intp), codegen


@intrinsic
def skew_add(typingctx: Any, scores: Any, rows: Any, positions: Any) -> Any:
    """Add ``scores[j, i] += positions[j - i + lanes - 1, i]``; `positions`, with ``rows + lanes - 1`` rows, is used up.

    Within a vector, lane c must come from c rows above: for each bit of c one pass moves the lanes that have that bit.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, scores)
        panel, count, skewed = args
        lanes = cgutils.intp_t(vectors.lanes)
        last = builder.add(count, cgutils.intp_t(vectors.lanes - 2))
        shift = vectors.count // 2
        while shift:
            order = [c + vectors.count if c & shift else c for c in range(vectors.count)]
            with cgutils.for_range(builder, builder.sub(last, cgutils.intp_t(shift - 1))) as loop:
                here = vectors.at(skewed, builder.mul(builder.sub(last, loop.index), lanes))
                above = vectors.load_row(vectors.at(here, -shift * vectors.lanes))
                moved = [vectors.shuffle(a, b, order) for a, b in zip(vectors.load_row(here), above, strict=True)]
                vectors.store_row(moved, here)
            shift //= 2
        with cgutils.for_range(builder, count) as loop:
            here = vectors.at(panel, builder.mul(loop.index, lanes))
            row = vectors.load_row(here)
            for v, value in enumerate(row):
                distance = (vectors.lanes - 1 - v * vectors.count) * vectors.lanes + v * vectors.count
                add = vectors.load(vectors.at(skewed, builder.mul(loop.index, lanes), distance))
                vectors.store(builder.fadd(value, add), vectors.at(here, v * vectors.count))
        return context.get_dummy_value()

    return types.void(scores, types.intp, scores), codegen


@intrinsic
def _invoke(typingctx: Any, function: Any, thread: Any, argument: Any) -> Any:
    """Call the C function ``void (*)(intp thread, void *argument)`` at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [args[1].type, args[2].type])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@njit(parallel=True, nogil=True, cache=True)
def run_on_threads(threads, function, argument):
    """Call ``function(thread, argument)``, both given by address, for thread = 0, 1, ..., threads - 1 at the same time.

    A kernel called inside ``prange`` would be compiled anew in each of the layers that Numba wraps around a parallel loop, six
    times in all. This loop knows a kernel by its address only, so the kernel is compiled once, and the loop serves all kernels.
    """
    for thread in prange(threads):
        _invoke(function, np.intp(thread), argument)
