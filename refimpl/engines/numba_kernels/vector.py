"""Explicit-vector building blocks for the CPU kernels, emitted as LLVM IR.

LLVM's auto-vectoriser neither keeps a matrix tile in registers nor vectorises ``exp``, so the inner loops are
written here with vector values. They work on *panels*: row-major matrices whose rows are `lanes` numbers long
(a few vectors), fastest if they start on a cache line. The width of a vector and the shape of a register tile
follow the instruction set; LLVM splits vectors that a target lacks, so every tile is right everywhere and
only its speed differs.

Here ``a @ b`` is the matrix product, a pointer is a C pointer to float32 or float64, strides count elements,
memory is only assumed to be aligned to one element, and a square of a panel is one vector wide. The private
functions *emit* code through an IR builder; the public ones are called from compiled code.

Numba's disk cache watches only the file of the outermost function: after editing this file, delete the
``*.nbi`` files in ``__pycache__``.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import config, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

# Fusing a product with the sum after it is the only licence given to LLVM: inf and NaN keep their meaning.
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


TILE = _choose_tile(_target_features(), platform.machine().lower())
_FEW_SUMS = 2 * TILE.rows  # vectors of sums that a product with few rows keeps: half of the registers
PICKED = 4  # rows of a matrix that `dot_picked` takes at once
_ROW_BLOCKS = (8, 4, 2, 1)  # rows that such a product takes at once
MOST_RANGES = 64  # of parts, one for each thread
_AHEAD_BYTES = 16 * 1024  # memory that streams by is asked for so much earlier; the processor stops at each page


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

    def at(self, pointer: ir.Value, elements: ir.Value | int) -> ir.Value:
        """Move `pointer` by a number of elements."""
        index = cgutils.intp_t(elements) if isinstance(elements, int) else elements
        return self.builder.gep(pointer, [index])

    def panel_row(self, panel: ir.Value, row: ir.Value | int) -> ir.Value:
        """Point at a row of a panel."""
        index = cgutils.intp_t(row) if isinstance(row, int) else row
        return self.at(panel, self.builder.mul(index, cgutils.intp_t(self.lanes)))

    def load(self, pointer: ir.Value) -> ir.Value:
        """Read one vector."""
        return self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()), align=self.itemsize)

    def load_row(self, pointer: ir.Value) -> list[ir.Value]:
        """Read one row of a panel."""
        return [self.load(self.at(pointer, v * self.count)) for v in range(TILE.vectors)]

    def load_one(self, pointer: ir.Value) -> ir.Value:
        """Read one number into the first lane; the others are zero."""
        return self.builder.insert_element(self.constant(0.0), self.builder.load(pointer), ir.IntType(32)(0))

    def load_scalar(self, pointer: ir.Value) -> ir.Value:
        """Read one number into every lane."""
        return self.splat(self.builder.load(pointer))

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        """Write one vector."""
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=self.itemsize)

    def store_one(self, value: ir.Value, pointer: ir.Value) -> None:
        """Write the first lane."""
        self.builder.store(self.builder.extract_element(value, ir.IntType(32)(0)), pointer)

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
        kind, name = ir.FunctionType(self.type, [self.type] * 3), f"llvm.fmuladd.v{self.count}f{self.bits}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def prefetch(self, pointer: ir.Value, ahead_bytes: int = _AHEAD_BYTES) -> None:
        """Ask for the memory so far after a pointer, which need not exist."""
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        ahead = self.builder.gep(self.builder.bitcast(pointer, byte), [cgutils.intp_t(ahead_bytes)])
        self.builder.call(function, [ahead, number(0), number(3), number(1)])  # to read, into all caches, as data

    def maximum(self, running: ir.Value, value: ir.Value) -> ir.Value:
        """Take the larger, ignoring a NaN in `value` (which reaches the result through exp2)."""
        return self.builder.select(self.builder.fcmp_ordered(">", value, running), value, running)

    def exp2(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """Compute ``2 ** (scale * x)`` for x <= 0: 0 instead of a subnormal number, NaN where x is NaN.

        The exponent is n + f with n an integer, |f| <= 1/2. Adding `magic` rounds it and leaves n + bias in
        the low bits, whence 2^n by one shift; 2^f is a Taylor polynomial, as long as the mantissa sees.
        """
        shape, builder = _EXP_SHAPES[self.bits], self.builder
        magic = self.constant(1.5 * 2.0**shape.mantissa_bits + shape.exponent_bias)
        shifted = self.multiply_add(x, scale, magic)
        n = builder.fsub(shifted, magic)
        fraction = self.multiply_add(x, scale, builder.fneg(n))
        terms = [math.log(2) ** k / math.factorial(k) for k in range(shape.degree + 1)]
        power = self.constant(terms.pop())
        while terms:
            power = self.multiply_add(power, fraction, self.constant(terms.pop()))
        shift = ir.Constant(self.integers, [shape.mantissa_bits] * self.count)
        two_to_n = builder.bitcast(builder.shl(builder.bitcast(shifted, self.integers), shift), self.type)
        tiny = builder.fcmp_ordered("<", n, self.constant(1.0 - shape.exponent_bias))
        return builder.select(tiny, self.constant(0.0), builder.fmul(power, two_to_n))

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
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))

    def store_sums(self, vectors: list[ir.Value], pointer: ir.Value) -> None:
        """Write the sum over the lanes of each vector (their number is a power of two), one after the other.

        Each round adds the upper half of what is left of a sum to its lower half, so the order of the additions
        does not depend on the number of vectors.
        """
        width = self.count
        while width > 1:
            single, length = len(vectors) == 1, vectors[0].type.count
            low = [c for c in range(length if single else 2 * length) if c % width < width // 2]
            high = [c + width // 2 for c in low]
            pairs = [(vectors[0], vectors[0])] if single else zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.builder.fadd(self.shuffle(a, b, low), self.shuffle(a, b, high)) for a, b in pairs]
            width //= 2
        for i, vector in enumerate(vectors):
            start = self.at(pointer, i * self.count)
            self.builder.store(vector, self.builder.bitcast(start, vector.type.as_pointer()), align=self.itemsize)


def _variables(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Allocate loop-carried variables, which LLVM turns into registers, and set them to `values`."""
    slots = [cgutils.alloca_once(builder, value.type) for value in values]
    _assign(builder, slots, values)
    return slots


def _assign(builder: ir.IRBuilder, slots: Sequence[ir.Value], values: Sequence[ir.Value]) -> None:
    for slot, value in zip(slots, values, strict=True):
        builder.store(value, slot)


def _current(builder: ir.IRBuilder, slots: Sequence[ir.Value]) -> list[ir.Value]:
    return [builder.load(slot) for slot in slots]


def _product_tile(
    vectors: _Vectors, a: ir.Value, b: ir.Value, depth: ir.Value, row_stride: ir.Value, step_stride: ir.Value
) -> list[list[ir.Value]]:
    """Emit the rows i of a tile, ``sum over t of a[i * row_stride + t * step_stride] * b[t, :]``.

    The sums stay in registers; each step reads one row of the panel b and one number of each row of a.
    """
    builder = vectors.builder
    starts = [vectors.at(a, builder.mul(cgutils.intp_t(i), row_stride)) for i in range(TILE.rows)]
    sums = [_variables(builder, [vectors.constant(0.0)] * TILE.vectors) for _ in starts]
    with cgutils.for_range(builder, depth) as loop:
        panel_row = vectors.load_row(vectors.panel_row(b, loop.index))
        step = builder.mul(loop.index, step_stride)
        for start, slots in zip(starts, sums, strict=True):
            factor = vectors.load_scalar(vectors.at(start, step))
            terms = zip(panel_row, _current(builder, slots), strict=True)
            _assign(builder, slots, [vectors.multiply_add(factor, value, total) for value, total in terms])
    return [_current(builder, slots) for slots in sums]


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Turn an address into a pointer to numbers of the type of `like`, a number or a pointer."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    kind = like if isinstance(like, types.CPointer) else types.CPointer(like)
    return kind(address, like), codegen


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
def finish(typingctx: Any, counter: Any) -> Any:
    """Add one to the int64 at an address; whoever reads that by `finished` sees all that was written before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", place, ir.IntType(64)(1), "release")
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def finished(typingctx: Any, counter: Any) -> Any:
    """Read the int64 at an address to which others add by `finish`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), codegen


@intrinsic
def relax(typingctx: Any) -> Any:
    """Tell the processor that this loop waits, where it has a word for that."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if platform.machine().lower() in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread have this core, where the C library can (POSIX)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if os.name == "posix":
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def dot_tile(typingctx: Any, out: Any, a: Any, b: Any, depth: Any, row_stride: Any) -> Any:
    """Set the tile ``out = a @ b``: a (rows, depth), rows `row_stride` apart, b (depth, lanes) a panel."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, left, right, steps, stride = args
        for i, row in enumerate(_product_tile(vectors, left, right, steps, stride, cgutils.intp_t(1))):
            vectors.store_row(row, vectors.panel_row(target, i))
        return context.get_dummy_value()

    return types.void(out, out, out, types.intp, types.intp), codegen


@intrinsic
def rescale_add_tile(typingctx: Any, out: Any, factor: Any, a: Any, b: Any, depth: Any, step_stride: Any) -> Any:
    """Set the tile ``out = factor * out + a.T @ b``: a (depth, rows), rows `step_stride` apart, b a panel."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, factors, left, right, steps, stride = args
        sums = _product_tile(vectors, left, right, steps, cgutils.intp_t(1), stride)
        factor_row = vectors.load_row(factors)
        for i, row in enumerate(sums):
            place = vectors.panel_row(target, i)
            old = vectors.load_row(place)
            vectors.store_row(list(map(vectors.multiply_add, factor_row, old, row)), place)
        return context.get_dummy_value()

    return types.void(out, out, out, out, types.intp, types.intp), codegen


def _row_maxima(vectors: _Vectors, panel: ir.Value, rows: ir.Value, start: list[ir.Value]) -> list[ir.Value]:
    """Emit the maximum of each lane over the rows of a panel and `start`."""
    maxima = _variables(vectors.builder, start)
    with cgutils.for_range(vectors.builder, rows) as loop:
        row = vectors.load_row(vectors.panel_row(panel, loop.index))
        _assign(vectors.builder, maxima, list(map(vectors.maximum, _current(vectors.builder, maxima), row)))
    return _current(vectors.builder, maxima)


def _exponentiate(
    vectors: _Vectors, panel: ir.Value, rows: ir.Value, scale: ir.Value, maxima: list[ir.Value]
) -> list[ir.Value]:
    """Emit ``panel = 2 ** (scale * (panel - maxima))`` and return the sum of each lane."""
    builder = vectors.builder
    sums = _variables(builder, [vectors.constant(0.0)] * TILE.vectors)
    with cgutils.for_range(builder, rows) as loop:
        place = vectors.panel_row(panel, loop.index)
        below = map(builder.fsub, vectors.load_row(place), maxima)
        weights = [vectors.exp2(x, scale) for x in below]
        vectors.store_row(weights, place)
        _assign(builder, sums, list(map(builder.fadd, _current(builder, sums), weights)))
    return _current(builder, sums)


@intrinsic
def online_softmax(typingctx: Any, scores: Any, rows: Any, log2_scale: Any, state: Any) -> Any:
    """Turn rows of scores s into weights ``2 ** (log2_scale * (s - m))`` and update `state`.

    `state` is a (3, lanes) panel: for each lane the maximum m of all its scores so far, the sum of its
    weights, and the factor, set here, by which all that was accumulated before must be multiplied. Where all
    scores are -inf, 0 stands for m.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, scores)
        panel, count, scale = args[0], args[1], vectors.splat(args[2])
        maximum_row, sum_row, factor_row = (vectors.panel_row(args[3], r) for r in range(3))
        old_maxima, old_sums = vectors.load_row(maximum_row), vectors.load_row(sum_row)

        maxima = _row_maxima(vectors, panel, count, old_maxima)
        vectors.store_row(maxima, maximum_row)
        unseen = [builder.fcmp_ordered("==", m, vectors.constant(-math.inf)) for m in maxima]
        maxima = [builder.select(u, vectors.constant(0.0), m) for u, m in zip(unseen, maxima, strict=True)]
        factors = [vectors.exp2(x, scale) for x in map(builder.fsub, old_maxima, maxima)]
        vectors.store_row(factors, factor_row)
        sums = _exponentiate(vectors, panel, count, scale, maxima)
        vectors.store_row(list(map(vectors.multiply_add, factors, old_sums, sums)), sum_row)
        return context.get_dummy_value()

    return types.void(scores, types.intp, log2_scale, scores), codegen


@intrinsic
def transpose_in(typingctx: Any, out: Any, a: Any, row_stride: Any, factor: Any) -> Any:
    """Set one square of a panel to ``factor * a.T``; rows of a are `row_stride` apart."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, source, stride, scalar = args
        times = vectors.splat(scalar)
        starts = [vectors.at(source, builder.mul(cgutils.intp_t(r), stride)) for r in range(vectors.count)]
        rows = [builder.fmul(vectors.load(start), times) for start in starts]
        for r, row in enumerate(vectors.transpose(rows)):
            vectors.store(row, vectors.panel_row(target, r))
        return context.get_dummy_value()

    return types.void(out, out, types.intp, factor), codegen


@intrinsic
def transpose_out(typingctx: Any, out: Any, row_stride: Any, a: Any, factors: Any) -> Any:
    """Set a square of rows `row_stride` apart to ``(a * factors).T``, where a is a square of a panel."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, out)
        target, stride, source, factor = args
        times = vectors.load(factor)
        rows = [vectors.load(vectors.panel_row(source, r)) for r in range(vectors.count)]
        rows = vectors.transpose([builder.fmul(row, times) for row in rows])
        for r, row in enumerate(rows):
            vectors.store(row, vectors.at(target, builder.mul(cgutils.intp_t(r), stride)))
        return context.get_dummy_value()

    return types.void(out, types.intp, out, out), codegen


@intrinsic
def hide_square(typingctx: Any, scores: Any, mask: Any, row_stride: Any) -> Any:
    """Set one square of a panel to -inf where ``mask.T`` is 0; its rows are `row_stride` bytes apart."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, scores)
        panel, source, stride = args
        bits = ir.VectorType(ir.IntType(8), vectors.count)
        starts = [builder.gep(source, [builder.mul(cgutils.intp_t(c), stride)]) for c in range(vectors.count)]
        rows = [builder.load(builder.bitcast(start, bits.as_pointer()), align=1) for start in starts]
        hidden, zeros = vectors.constant(-math.inf), ir.Constant(bits, [0] * vectors.count)
        for r, row in enumerate(vectors.transpose(rows)):
            place = vectors.panel_row(panel, r)
            seen = builder.icmp_unsigned("!=", row, zeros)
            vectors.store(builder.select(seen, vectors.load(place), hidden), place)
        return context.get_dummy_value()

    return types.void(scores, mask, types.intp), codegen


@intrinsic
def skew_add(typingctx: Any, scores: Any, rows: Any, positions: Any) -> Any:
    """Add ``scores[j, i] += positions[j - i + lanes - 1, i]``; the positions are overwritten.

    Within a vector, lane c must come from c rows above: for each bit of c one pass moves the lanes that have
    that bit.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, scores)
        panel, count, skewed = args
        last = builder.add(count, cgutils.intp_t(vectors.lanes - 2))
        shift = vectors.count // 2
        while shift:
            order = [c + vectors.count if c & shift else c for c in range(vectors.count)]
            with cgutils.for_range(builder, builder.sub(last, cgutils.intp_t(shift - 1))) as loop:
                here = vectors.panel_row(skewed, builder.sub(last, loop.index))
                above = vectors.load_row(vectors.panel_row(here, -shift))
                moved = [vectors.shuffle(a, b, order) for a, b in zip(vectors.load_row(here), above, strict=True)]
                vectors.store_row(moved, here)
            shift //= 2
        with cgutils.for_range(builder, count) as loop:
            here = vectors.panel_row(panel, loop.index)
            row = vectors.load_row(here)
            for v, value in enumerate(row):
                distance = (vectors.lanes - 1 - v * vectors.count) * vectors.lanes + v * vectors.count
                add = vectors.load(vectors.at(vectors.panel_row(skewed, loop.index), distance))
                vectors.store(builder.fadd(value, add), vectors.at(here, v * vectors.count))
        return context.get_dummy_value()

    return types.void(scores, types.intp, scores), codegen


class _Rows(NamedTuple):
    """Rows of numbers in memory, `stride` elements apart."""

    vectors: _Vectors
    start: ir.Value
    stride: ir.Value

    def at(self, row: ir.Value | int, column: ir.Value | int = 0) -> ir.Value:
        """Point at a number."""
        index = cgutils.intp_t(row) if isinstance(row, int) else row
        return self.vectors.at(self.vectors.at(self.start, self.vectors.builder.mul(index, self.stride)), column)

    def below(self, row: ir.Value) -> _Rows:
        """Leave out the rows before `row`."""
        return self._replace(start=self.at(row))


def _in_blocks(builder: ir.IRBuilder, count: ir.Value, sizes: Sequence[int], emit: Callable[..., None]) -> None:
    """Emit ``emit(start, size)`` for the blocks that 0 to `count` falls into: of sizes[0], the rest of sizes[1], ..."""
    start: ir.Value = cgutils.intp_t(0)
    for size in dict.fromkeys(sizes):
        step = cgutils.intp_t(size)
        stop = builder.sub(count, builder.srem(builder.sub(count, start), step))
        with cgutils.for_range_slice(builder, start, stop, step) as (index, _):
            emit(index, size)
        start = stop


def _dot_block(rows: int, out: _Rows, x: _Rows, w: _Rows, columns: ir.Value, depth: ir.Value) -> None:
    """Emit `dot_rows` for a fixed number of rows of x."""
    vectors, builder = out.vectors, out.vectors.builder

    def tile(n: ir.Value, size: int) -> None:
        w_rows = w.below(n)
        sums = [_variables(builder, [vectors.constant(0.0)] * size) for _ in range(rows)]

        def step(t: ir.Value, width: int) -> None:
            load = vectors.load if width > 1 else vectors.load_one
            places = [w_rows.at(r, t) for r in range(size)]
            for place in places if width > 1 else ():
                vectors.prefetch(place)
            factors = list(map(load, places))
            for i, slots in enumerate(sums):
                value, totals = load(x.at(i, t)), _current(builder, slots)
                terms = [vectors.multiply_add(value, *pair) for pair in zip(factors, totals, strict=True)]
                _assign(builder, slots, terms)

        _in_blocks(builder, depth, (vectors.count, 1), step)
        for i, slots in enumerate(sums):
            vectors.store_sums(_current(builder, slots), out.at(i, n))

    _in_blocks(builder, columns, (max(1, min(8, _FEW_SUMS // rows)), 1), tile)


def _add_block(rows: int, out: _Rows, p: _Rows, v: _Rows, columns: ir.Value, depth: ir.Value) -> None:
    """Emit `add_rows` for a fixed number of rows of out."""
    vectors, builder = out.vectors, out.vectors.builder

    def tile(c: ir.Value, size: int) -> None:
        load, store = (vectors.load, vectors.store) if size > 1 else (vectors.load_one, vectors.store_one)
        parts = [builder.add(c, cgutils.intp_t(part)) for part in range(0, size, vectors.count)]
        places = [[out.at(i, part) for part in parts] for i in range(rows)]
        sums = [_variables(builder, list(map(load, row))) for row in places]
        with cgutils.for_range(builder, depth) as loop:
            sources = [v.at(loop.index, part) for part in parts]
            for source in sources if size > 1 else ():
                vectors.prefetch(source)
            values = list(map(load, sources))
            for i, slots in enumerate(sums):
                weight, totals = vectors.load_scalar(p.at(i, loop.index)), _current(builder, slots)
                terms = [vectors.multiply_add(weight, *pair) for pair in zip(values, totals, strict=True)]
                _assign(builder, slots, terms)
        for row, slots in zip(places, sums, strict=True):
            for place, value in zip(row, _current(builder, slots), strict=True):
                store(value, place)

    widest = vectors.count * max(1, min(4, _FEW_SUMS // rows))
    _in_blocks(builder, columns, (widest, vectors.count, 1), tile)


def _by_blocks_of_rows(emit_block: Callable[..., None], builder: ir.IRBuilder, kind: Any, args: Any) -> None:
    """Emit a product of three operands, each a pointer and a stride, for any number of rows of the first two."""
    rows, columns, depth = args[:3]
    vectors = _Vectors(builder, kind)
    out, left, right = (_Rows(vectors, *args[i : i + 2]) for i in (3, 5, 7))

    def block(i: ir.Value, size: int) -> None:
        emit_block(size, out.below(i), left.below(i), right, columns, depth)

    _in_blocks(builder, rows, _ROW_BLOCKS, block)


@intrinsic
def dot_rows(
    typingctx: Any, rows: Any, columns: Any, depth: Any,
    out: Any, out_stride: Any, x: Any, x_stride: Any, w: Any, w_stride: Any,
) -> Any:  # fmt: skip
    """Set ``out[i, n] = x[i] . w[n]`` for `rows` rows i of x and `columns` rows n of w, `depth` numbers each.

    Meant for few rows of x; the terms of a sum are added in the same order however many there are.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _by_blocks_of_rows(_dot_block, builder, out, args)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 3, *(out, types.intp) * 3), codegen


@intrinsic
def add_rows(
    typingctx: Any, rows: Any, columns: Any, depth: Any,
    out: Any, out_stride: Any, p: Any, p_stride: Any, v: Any, v_stride: Any,
) -> Any:  # fmt: skip
    """Add ``sum over j of p[i, j] v[j]`` to `rows` rows i of out, for `depth` rows j of v, `columns` numbers each."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _by_blocks_of_rows(_add_block, builder, out, args)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 3, *(out, types.intp) * 3), codegen


@intrinsic
def dot_picked(
    typingctx: Any, depth: Any, out: Any, x: Any, w: Any, w_stride: Any, rows: Any, ahead: Any
) -> Any:  # fmt: skip
    """Set ``out[k] = x . w[rows[k]]`` for k < `PICKED`, `depth` numbers each, and ask for the rows ``ahead[k]`` of w.

    Both lists of rows are pointers to int64.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        columns, target, left, right, stride = args[:5]
        vectors = _Vectors(builder, out)

        def picked(list_: ir.Value) -> list[ir.Value]:
            numbers = [builder.load(builder.gep(list_, [cgutils.intp_t(k)])) for k in range(PICKED)]
            return [vectors.at(right, builder.mul(number, stride)) for number in numbers]

        now, later = picked(args[5]), picked(args[6])
        sums = _variables(builder, [vectors.constant(0.0)] * PICKED)

        def step(t: ir.Value, width: int) -> None:
            load = vectors.load if width > 1 else vectors.load_one
            if width > 1:
                for start in later:
                    vectors.prefetch(vectors.at(start, t), 0)
            value, totals = load(vectors.at(left, t)), _current(builder, sums)
            factors = [load(vectors.at(start, t)) for start in now]
            _assign(builder, sums, [vectors.multiply_add(value, *pair) for pair in zip(factors, totals, strict=True)])

        _in_blocks(builder, columns, (vectors.count, 1), step)
        vectors.store_sums(_current(builder, sums), target)
        return context.get_dummy_value()

    return types.void(types.intp, out, x, w, types.intp, rows, ahead), codegen


@intrinsic
def vector_lanes(typingctx: Any, x: Any) -> Any:
    """Count the numbers in a vector of the type that a pointer points to."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return cgutils.intp_t(_Vectors(builder, x).count)

    return types.intp(x), codegen


@intrinsic
def note_reaching(typingctx: Any, out: Any, x: Any, first: Any, threshold: Any) -> Any:
    """Write to out (int32) the places of the numbers of one vector that reach a threshold; return how many do.

    The places are `first` and those after it.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors, number = _Vectors(builder, x), ir.IntType(32)
        reach = builder.fcmp_ordered(">=", vectors.load(args[1]), vectors.splat(args[3]))
        kind = ir.VectorType(number, vectors.count)
        start = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(args[2], number), number(0))
        places = builder.shuffle_vector(start, start, ir.Constant(kind, [0] * vectors.count))
        places = builder.add(places, ir.Constant(kind, list(range(vectors.count))))
        compress = ir.FunctionType(ir.VoidType(), [kind, number.as_pointer(), reach.type])
        name = f"llvm.masked.compressstore.v{vectors.count}i32"
        builder.call(cgutils.get_or_insert_function(builder.module, compress, name), [places, args[0], reach])
        bits = ir.IntType(vectors.count)
        return builder.zext(builder.ctpop(builder.bitcast(reach, bits)), cgutils.intp_t)

    return types.intp(out, x, types.intp, threshold), codegen


@intrinsic
def invoke(typingctx: Any, function: Any, arguments: Any) -> Any:
    """Call the C function at an address, which returns nothing, with a tuple of integers or addresses."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, types.UniTuple(types.intp, len(arguments))), codegen


@njit(parallel=True, nogil=True, cache=True)
def run_on_threads(threads: int, function: int, argument: int) -> None:
    """Call ``function(thread, argument)``, both given by address, for all thread < threads at once.

    A kernel called inside ``prange`` would be compiled anew in each of the layers that Numba wraps around a
    parallel loop, six times in all. This loop knows kernels by address only: each is compiled once, and one
    loop serves all.
    """
    for thread in prange(threads):
        invoke(function, (np.intp(thread), argument))


@intrinsic
def _threads(typingctx: Any) -> Any:
    """Count Numba's threads, as its parallel loops do: a kernel with `numba.get_num_threads` cannot be cached."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(cgutils.intp_t, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "get_num_threads"), [])

    return types.intp(), codegen


@njit(parallel=True, nogil=True, cache=True)
def run_parts(parts: int, function: int, argument: int, taken: int) -> None:
    """Call ``function(part, argument)``, both given by address, for all part < parts, on Numba's threads.

    Each thread has a range of the parts and takes them in order, as neighbouring ones read neighbouring memory. One
    that has finished takes what is left of the others' ranges, so that nobody waits long for a thread that woke late.
    At `taken` are `MOST_RANGES` zeros of type int64: how many parts of each range somebody works on, or is done with.
    """
    threads = min(parts, _threads(), MOST_RANGES)
    for thread in prange(threads):
        for other in range(threads):
            owner = (thread + other) % threads
            first, last = owner * parts // threads, (owner + 1) * parts // threads
            part = first + fetch_add(taken + 8 * owner)
            while part < last:
                invoke(function, (np.intp(part), argument))
                part = first + fetch_add(taken + 8 * owner)
