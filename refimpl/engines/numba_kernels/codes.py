"""Vector building blocks for filtered attention: products of small whole numbers, and products with chosen rows.

A *word* is four neighbouring bytes. The processor's ``vpdpbusd`` adds, in each of 16 lanes, the product of a word of
bytes without sign and a word of bytes with sign to a 32-bit sum: 64 multiply-adds. Where it lacks that, the same is
said in instructions that every target has. All sums are exact. As in `vector`, LLVM splits vectors that a target lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import _assign, _current, _in_blocks, _target_features, _variables, _Vectors

QUERIES = 4  # rows of queries in a tile of estimates
BLOCKS = 4  # vectors of keys in it: 16 sums and four vectors of keys fill the registers of AVX-512
LANES = 16  # 32-bit sums in a vector
PANEL = BLOCKS * LANES  # keys in a panel
WORD = 4  # bytes
LINE = LANES * WORD  # bytes of a vector

_BYTE, _INT = ir.IntType(8), ir.IntType(32)
_BYTES, _INTS = ir.VectorType(_BYTE, LINE), ir.VectorType(_INT, LANES)
_HAS_VNNI = "avx512vnni" in _target_features()
_HAS_COMPRESS = "avx512f" in _target_features()
# LLVM 22 declares the operands of vpdpbusd as bytes, earlier ones as 32-bit words.
_OPERAND = _BYTES if llvmlite.binding.llvm_version_info[0] >= 22 else _INTS

MultiplyAdd = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]


def multiply_add_vnni(builder: ir.IRBuilder, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Add the products of words, one sum per lane, in one instruction."""
    kind = ir.FunctionType(_INTS, [_INTS, _OPERAND, _OPERAND])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, [sums, *(builder.bitcast(x, _OPERAND) for x in (unsigned, signed))])


def multiply_add_portable(builder: ir.IRBuilder, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """The same in 32-bit arithmetic, from which LLVM makes products of 16-bit pairs where there are such."""
    wide = ir.VectorType(_INT, LINE)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    parts = [_pick(builder, products, products, list(range(byte, LINE, WORD))) for byte in range(WORD)]
    return builder.add(sums, builder.add(builder.add(parts[0], parts[1]), builder.add(parts[2], parts[3])))


_multiply_add: MultiplyAdd = multiply_add_vnni if _HAS_VNNI else multiply_add_portable


def _pick(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
    """Lanes of two vectors laid end to end."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(order)), list(order)))


def _at(builder: ir.IRBuilder, pointer: ir.Value, elements: ir.Value | int) -> ir.Value:
    return builder.gep(pointer, [cgutils.intp_t(elements) if isinstance(elements, int) else elements])


def _load(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value, align: int) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))


def _lane_sums(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """One vector of the sums over the lanes of 16 vectors of whole numbers."""
    width = LANES
    while width > 1:
        low = [c for c in range(2 * LANES) if c % width < width // 2]
        high = [c + width // 2 for c in low]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.add(_pick(builder, a, b, low), _pick(builder, a, b, high)) for a, b in pairs]
        width //= 2
    return vectors[0]


def product_of_words(form: MultiplyAdd) -> Any:
    """A function of compiled code: add the products of 16 words in memory to 16 sums there."""

    def intrinsic_of_form(typingctx: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            total = form(builder, _load(builder, args[0], _INTS, 4), *(_load(builder, x, _BYTES) for x in args[1:]))
            _store(builder, total, args[0], 4)
            return context.get_dummy_value()

        return types.void(sums, unsigned, signed), codegen

    return intrinsic(intrinsic_of_form)


@intrinsic
def estimate_tile(
    typingctx: Any, out: Any, stride: Any, queries: Any, query_stride: Any, panel: Any, words: Any
) -> Any:
    """Set four rows of out, `stride` apart, to ``queries . keys`` for the 64 keys of a panel.

    The queries are rows of bytes with sign, the panel (words, BLOCKS, 16, WORD) of bytes without.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, row_stride, rows, q_stride, keys, count = args
        zero = ir.Constant(_INTS, [0] * LANES)
        starts = [_at(builder, rows, builder.mul(q_stride, cgutils.intp_t(r))) for r in range(QUERIES)]
        sums = [_variables(builder, [zero] * BLOCKS) for _ in starts]
        with cgutils.for_range(builder, count) as loop:
            line = _at(builder, keys, builder.mul(loop.index, cgutils.intp_t(BLOCKS * LINE)))
            vectors = [_load(builder, _at(builder, line, block * LINE), _BYTES) for block in range(BLOCKS)]
            step = builder.mul(loop.index, cgutils.intp_t(WORD))
            for start, slots in zip(starts, sums, strict=True):
                word = _splat(builder, _load(builder, _at(builder, start, step), _INT), LANES)
                factor = builder.bitcast(word, _BYTES)
                pairs = zip(_current(builder, slots), vectors, strict=True)
                _assign(builder, slots, [_multiply_add(builder, total, key, factor) for total, key in pairs])
        for r, slots in enumerate(sums):
            row = _at(builder, target, builder.mul(row_stride, cgutils.intp_t(r)))
            for block, value in enumerate(_current(builder, slots)):
                _store(builder, value, _at(builder, row, block * LANES), 4)
        return context.get_dummy_value()

    return types.void(out, types.intp, queries, types.intp, panel, types.intp), codegen


@intrinsic
def pack_square(typingctx: Any, panel: Any, rows: Any, row_bytes: Any, words: Any, nearest: Any) -> Any:
    """Set the first `words` words of 16 keys in a panel to upper nibbles of their rows of codes, all without sign.

    With 128 added to a code u, ``u >> 4`` is its upper nibble with 8 added, and so is ``min(u + 8, 255) >> 4`` of the
    nearest one. The square of words is transposed: rows hold the words of a key, a panel holds one word of all keys.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, source, stride, count, round_ = args
        add = ir.Constant(_BYTES, [8] * LINE)
        add = builder.select(round_, add, ir.Constant(_BYTES, [0] * LINE))
        kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
        saturating = cgutils.get_or_insert_function(builder.module, kind, f"llvm.uadd.sat.v{LINE}i8")
        square = []
        for key in range(LANES):
            row = _load(builder, _at(builder, source, builder.mul(stride, cgutils.intp_t(key))), _BYTES)
            nibbles = builder.lshr(builder.call(saturating, [row, add]), ir.Constant(_BYTES, [4] * LINE))
            square.append(builder.bitcast(nibbles, _INTS))
        for word, value in enumerate(_transposed(builder, square)):
            with builder.if_then(builder.icmp_signed("<", cgutils.intp_t(word), count)):
                _store(builder, value, _at(builder, target, word * BLOCKS * LINE), 4)
        return context.get_dummy_value()

    return types.void(panel, rows, types.intp, types.intp, types.boolean), codegen


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose a square of 16 vectors: swap off-diagonal blocks of halving size."""
    rows, block = list(rows), LANES // 2
    while block:
        upper = [c if not c & block else c - block + LANES for c in range(LANES)]
        lower = [c + block if not c & block else c + LANES for c in range(LANES)]
        for r in range(LANES):
            if not r & block:
                pair = rows[r], rows[r + block]
                rows[r], rows[r + block] = _pick(builder, *pair, upper), _pick(builder, *pair, lower)
        block //= 2
    return rows


def _compress(builder: ir.IRBuilder, values: ir.Value, kept: ir.Value, target: ir.Value) -> None:
    """Write the lanes that are kept one after the other; what follows them may be overwritten."""
    if _HAS_COMPRESS:  # to a register and from there to memory: straight to memory takes three times as long
        kind = ir.FunctionType(_INTS, [_INTS, _INTS, kept.type])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.compress.v{LANES}i32")
        _store(builder, builder.call(function, [values, values, kept]), target, 4)
        return
    kind = ir.FunctionType(ir.VoidType(), [_INTS, _INTS.as_pointer(), kept.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.compressstore.v{LANES}i32")
    builder.call(function, [values, builder.bitcast(target, _INTS.as_pointer()), kept])


@intrinsic
def keep_from(typingctx: Any, indices: Any, estimates: Any, first: Any, last: Any, least: Any) -> Any:
    """Write the places from first to last but one whose estimates are at least `least`, in order; return how many.

    Up to the next multiple of 16 after `last`, estimates must be less. Indices must have room for 16 more numbers.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, source, begin, end, bound = args
        limit, lanes = _splat(builder, bound, LANES), ir.Constant(_INTS, list(range(LANES)))
        number, bits = ir.IntType(64), ir.IntType(LANES)
        start = builder.add(_splat(builder, builder.trunc(begin, _INT), LANES), lanes)
        found, places = _variables(builder, [number(0), start])
        with cgutils.for_range_slice(builder, begin, end, number(LANES)) as (start, _):
            kept = builder.icmp_signed(">=", _load(builder, _at(builder, source, start), _INTS, 4), limit)
            here, lanes_here = _current(builder, [found, places])
            _compress(builder, lanes_here, kept, _at(builder, target, here))
            some = builder.zext(builder.ctpop(builder.bitcast(kept, bits)), number)
            after = builder.add(lanes_here, ir.Constant(_INTS, [LANES] * LANES))
            _assign(builder, [found, places], [builder.add(here, some), after])
        return builder.load(found)

    return types.intp(indices, estimates, types.intp, types.intp, least), codegen


@intrinsic
def dot_chosen_codes(
    typingctx: Any, out: Any, indices: Any, count: Any, query: Any, codes: Any, lines: Any, bias: Any, step: Any
) -> Any:
    """Set ``out[n] = step (query . codes[indices[n]] - bias)`` for n < count, a multiple of 16.

    Rows of codes are bytes without sign, the query is bytes with sign; both have `lines` times 64. The whole product is
    exact and so is its conversion to float64, in which it is multiplied.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, places, total, x, rows, n_lines, correction, factor = args
        vectors = _Vectors(builder, out)
        row_bytes = builder.mul(n_lines, cgutils.intp_t(LINE))
        zero, wide = ir.Constant(_INTS, [0] * LANES), ir.VectorType(ir.DoubleType(), LANES)
        with cgutils.for_range_slice(builder, cgutils.intp_t(0), total, cgutils.intp_t(LANES)) as (start, _):
            block = _at(builder, places, start)
            rows_here = []
            for lane in range(LANES):
                row = builder.sext(builder.load(_at(builder, block, lane)), cgutils.intp_t)
                rows_here.append(_at(builder, rows, builder.mul(row, row_bytes)))
            sums = _variables(builder, [zero] * LANES)
            with cgutils.for_range(builder, n_lines) as loop:
                step_bytes = builder.mul(loop.index, cgutils.intp_t(LINE))
                signed = _load(builder, _at(builder, x, step_bytes), _BYTES)
                lines_here = [_load(builder, _at(builder, row, step_bytes), _BYTES) for row in rows_here]
                pairs = zip(_current(builder, sums), lines_here, strict=True)
                _assign(builder, sums, [_multiply_add(builder, value, line, signed) for value, line in pairs])
            products = _lane_sums(builder, _current(builder, sums))
            products = builder.sub(products, _splat(builder, correction, LANES))
            scaled = builder.fmul(builder.sitofp(products, wide), _splat(builder, factor, LANES))
            if vectors.bits == 32:
                scaled = builder.fptrunc(scaled, ir.VectorType(vectors.element, LANES))
            _store(builder, scaled, _at(builder, target, start), vectors.itemsize)
        return context.get_dummy_value()

    return types.void(out, indices, types.intp, query, codes, types.intp, bias, step), codegen


@intrinsic
def dot_chosen_rows(
    typingctx: Any, out: Any, indices: Any, count: Any, x: Any, rows: Any, stride: Any, depth: Any
) -> Any:
    """Set ``out[n] = x . rows[indices[n]]`` for n < count, a multiple of 16; rows are `stride` apart."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, places, total, query, matrix, row_stride, length = args
        vectors = _Vectors(builder, out)
        lanes = cgutils.intp_t(vectors.count)
        with cgutils.for_range_slice(builder, cgutils.intp_t(0), total, lanes) as (start, _):
            block = _at(builder, places, start)
            starts = []
            for lane in range(vectors.count):
                row = builder.sext(builder.load(_at(builder, block, lane)), cgutils.intp_t)
                starts.append(vectors.at(matrix, builder.mul(row, row_stride)))
            sums = _variables(builder, [vectors.constant(0.0)] * vectors.count)

            def step(t: ir.Value, width: int, starts: Any = starts, sums: Any = sums) -> None:
                load = vectors.load if width > 1 else vectors.load_one
                value = load(vectors.at(query, t))
                factors = [load(vectors.at(row, t)) for row in starts]
                pairs = zip(factors, _current(builder, sums), strict=True)
                _assign(builder, sums, [vectors.multiply_add(value, *pair) for pair in pairs])

            _in_blocks(builder, length, (vectors.count, 1), step)
            vectors.store_sums(_current(builder, sums), vectors.at(target, start))
        return context.get_dummy_value()

    return types.void(out, indices, types.intp, out, rows, types.intp, types.intp), codegen


def _fold(
    builder: ir.IRBuilder, zero: ir.Value, count: ir.Value, lanes: int, value: Callable[[ir.Value], ir.Value],
    combine: Callable[[ir.Value, ir.Value], ir.Value],
) -> ir.Value:  # fmt: skip
    """Combine the vectors ``value(n)`` for n = 0, lanes, ... < count in two chains; every lane holds the result."""
    chains = _variables(builder, [zero] * 2)

    def some(n: ir.Value, vectors: int) -> None:
        for chain in range(vectors // lanes):
            place = builder.add(n, cgutils.intp_t(chain * lanes))
            builder.store(combine(builder.load(chains[chain]), value(place)), chains[chain])

    _in_blocks(builder, count, (2 * lanes, lanes), some)
    found, width = combine(*_current(builder, chains)), lanes // 2
    while width:
        other = _pick(builder, found, found, [lane ^ width for lane in range(lanes)])
        found, width = combine(found, other), width // 2
    return found


@intrinsic
def largest(typingctx: Any, estimates: Any, count: Any) -> Any:
    """The largest of the first `count` estimates, a multiple of 16."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, total = args

        def value(n: ir.Value) -> ir.Value:
            return _load(builder, _at(builder, source, n), _INTS, 4)

        def larger(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        lowest = ir.Constant(_INTS, [-(2**31)] * LANES)
        return builder.extract_element(_fold(builder, lowest, total, LANES, value, larger), _INT(0))

    return types.int32(estimates, types.intp), codegen


@intrinsic
def fill(typingctx: Any, target: Any, number: Any) -> Any:
    """Set 16 numbers in memory."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        value = _splat(builder, args[1], LANES)
        _store(builder, value, args[0], signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, target.dtype), codegen


@intrinsic
def largest_size(typingctx: Any, x: Any, count: Any) -> Any:
    """The largest absolute value of numbers that lie side by side; NaN if there is one.

    Without their sign, bits of floating-point numbers are in the order of the numbers, NaN above all.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        vectors = _Vectors(builder, x)
        most = ir.Constant(vectors.integers, [2 ** (vectors.bits - 1) - 1] * vectors.count)
        zero = ir.Constant(vectors.integers, [0] * vectors.count)
        found = _variables(builder, [zero])[0]

        def some(n: ir.Value, width: int) -> None:
            load = vectors.load if width > 1 else vectors.load_one
            size = builder.and_(builder.bitcast(load(vectors.at(args[0], n)), vectors.integers), most)
            before = builder.load(found)
            builder.store(builder.select(builder.icmp_signed(">", size, before), size, before), found)

        _in_blocks(builder, args[1], (vectors.count, 1), some)
        value, width = builder.load(found), vectors.count // 2
        while width:
            other = _pick(builder, value, value, [lane ^ width for lane in range(vectors.count)])
            value, width = builder.select(builder.icmp_signed(">", value, other), value, other), width // 2
        return builder.bitcast(builder.extract_element(value, _INT(0)), vectors.element)

    return x.dtype(x, types.intp), codegen


@intrinsic
def soften(typingctx: Any, logits: Any, count: Any) -> Any:
    """Turn so many logits, a multiple of 16, into ``exp(logits - their maximum)``; return their sum.

    A vector at a time: loops over so few numbers pass mostly one by one.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, length = args
        vectors = _Vectors(builder, logits)
        lowest = vectors.constant(-math.inf)

        def load(n: ir.Value) -> ir.Value:
            return vectors.load(vectors.at(target, n))

        most = _fold(builder, lowest, length, vectors.count, load, vectors.maximum)
        none = builder.fcmp_ordered("==", most, lowest)
        shift, log2_e = builder.select(none, vectors.constant(0.0), most), vectors.constant(math.log2(math.e))

        def weight(n: ir.Value) -> ir.Value:
            value = vectors.exp2(builder.fsub(load(n), shift), log2_e)
            vectors.store(value, vectors.at(target, n))
            return value

        total = _fold(builder, vectors.constant(0.0), length, vectors.count, weight, builder.fadd)
        return builder.extract_element(total, _INT(0))

    return logits.dtype(logits, types.intp), codegen


@intrinsic
def add_chosen_rows(
    typingctx: Any, out: Any, weights: Any, indices: Any, count: Any, rows: Any, stride: Any, columns: Any
) -> Any:
    """Add ``sum over n < count of weights[n] rows[indices[n]]`` to out.

    The sum is taken before it is added. Rows are taken in pairs, an odd last one with a row of zeros: the end of a list
    would be foreseen by the processor even less often if the last row went another way.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, numbers, places, total, matrix, row_stride, width = args
        vectors = _Vectors(builder, out)
        zeros = cgutils.alloca_once(builder, ir.ArrayType(vectors.type, 4))  # and set to zero
        zeros = builder.bitcast(zeros, vectors.element.as_pointer())
        last = builder.sub(total, cgutils.intp_t(1))

        def tile(c: ir.Value, size: int) -> None:
            load, store = (vectors.load, vectors.store) if size > 1 else (vectors.load_one, vectors.store_one)
            parts = range(0, size, vectors.count)
            sums = [_variables(builder, [vectors.constant(0.0)] * len(parts)) for _ in range(2)]
            with cgutils.for_range_slice(builder, cgutils.intp_t(0), total, cgutils.intp_t(2)) as (n, _):
                odd = builder.icmp_signed("==", n, last)
                for which, slots in enumerate(sums):
                    m = builder.select(odd, n, builder.add(n, cgutils.intp_t(1))) if which else n
                    row = builder.sext(builder.load(_at(builder, places, m)), cgutils.intp_t)
                    start = vectors.at(matrix, builder.add(builder.mul(row, row_stride), c))
                    start = builder.select(odd, zeros, start) if which else start
                    weight = vectors.load_scalar(vectors.at(numbers, m))
                    values = [load(vectors.at(start, part)) for part in parts]
                    pairs = zip(values, _current(builder, slots), strict=True)
                    _assign(builder, slots, [vectors.multiply_add(weight, *pair) for pair in pairs])
            for part, *both in zip(parts, *(_current(builder, slots) for slots in sums), strict=True):
                place = vectors.at(target, builder.add(c, cgutils.intp_t(part)))
                store(builder.fadd(load(place), builder.fadd(*both)), place)

        _in_blocks(builder, width, (4 * vectors.count, vectors.count, 1), tile)
        return context.get_dummy_value()

    return types.void(out, out, indices, types.intp, rows, types.intp, types.intp), codegen
