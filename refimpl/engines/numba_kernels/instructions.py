"""A decoding step as a table of instructions, which all threads walk together in one compiled call.

Every instruction is cut into parts. A thread takes parts of an instruction until none is left, waits until those that
others took are done, and goes on to the next. It waits only for what somebody works on, so a thread that starts late,
or never, holds nobody up. Between two instructions lies nothing else: no interpreter, no waking of threads.

An array is an address and, where its rows have gaps, the elements from one row to the next; results have no gaps. There
is a row for each of the B sequences, which have one new position each. How many positions came before is no part of the
table, so that one table serves all steps of a text.

An instruction is the address of a C function, ``void (row, like, position, part, parts)``, and what that reads in its
row of the table; `like` is a pointer that tells by its type what all numbers are, and is never followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from .elementwise import activation_rows, gate_rows, rotary_rows, sum_rows
from .few_rows import KEYS, UNIT, attend_items, combine, factors_of, linear_units, score_items, sum_items
from .layout import key_ranges
from .parallel import KERNEL, STEP, share
from .rows import layer_norm_rows, rms_norm_rows, softmax_rows
from .vector import fetch_add, finish, finished, give_way, invoke, offset, pointer, relax

INSTRUCTION = np.dtype(
    [
        ("function", np.int64),  # an address
        ("kind", np.int64),  # which activation; whether neighbours are rotated
        ("parts", np.int64),  # 0: one for each range of the keys of each head
        *((name, np.int64) for name in ("x", "y", "z", "out")),  # addresses of arrays
        *((name, np.int64) for name in ("sums", "maxima", "totals")),  # of what ranges of keys contribute
        ("x_stride", np.int64),  # elements from row to row
        ("y_stride", np.int64),
        ("y_step", np.int64),  # elements that y and z move on with each position
        ("rows", np.int64),  # B
        ("width", np.int64),  # of a row of the result, or of a head
        ("depth", np.int64),  # of a sum; in a cache, positions that there is room for
        ("heads", np.int64),
        ("key_heads", np.int64),
        ("number", np.float64),  # eps, or a scale
    ]
)
LINE = 8  # counters in a cache line: each has one of its own
PATIENCE = 1024  # looks at a counter, some 50 us, before the core is given away: who works may be waiting for it

_SIZES = (types.intp,) * 3  # position, part, parts
_key_ranges = njit(**STEP)(key_ranges)


def instruction(work: Callable[..., None]) -> Callable[[Any], int]:
    """Compile an instruction for a float type when its address is first asked for."""
    versions: dict[Any, Any] = {}

    def address(dtype: Any) -> int:
        if dtype not in versions:
            arguments = (types.CPointer(from_dtype(INSTRUCTION)), types.CPointer(from_dtype(dtype)), *_SIZES)
            versions[dtype] = cfunc(types.void(*arguments), cache=True, **STEP)(work)
        return int(versions[dtype].address)

    return address


@njit(**STEP)
def _view(address, shape, like):
    """View what lies at an address as an array without gaps."""
    return carray(pointer(address, like), shape)


@njit(**STEP)
def _moved(address, row, position, size, like):
    """View the `size` numbers of a table of positions that belong to this one, or what is the same for all."""
    return carray(offset(pointer(address, like), position * row.y_step), (size,))


@instruction
def embedding(table, like, position, part, parts):
    """``out[b] = y[x[b]]``."""
    row = carray(table, 1)[0]
    ids, out = pointer(row.x, np.int64(0)), pointer(row.out, like)
    for b in range(row.rows):
        source = offset(pointer(row.y, like), ids[b] * row.width)
        for j in range(row.width):
            out[b * row.width + j] = source[j]


@instruction
def linear(table, like, position, part, parts):
    """``out = x yᵀ + z``."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows, row.depth), like), _view(row.out, (row.rows, row.width), like)
    weight, bias = _view(row.y, (row.width, row.depth), like), _view(row.z, (row.width if row.z else 0,), like)
    units = (row.width + UNIT - 1) // UNIT
    linear_units(x, weight, bias, out, part * units // parts, (part + 1) * units // parts)


@instruction
def layer_norm(table, like, position, part, parts):
    """Layer norm of the rows of x with weight y and bias z."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (row.rows * row.width,), like)
    weight, bias = _view(row.y, (row.width,), like), _view(row.z, (row.width,), like)
    layer_norm_rows(x, row.x_stride, weight, bias, row.number, out, 0, row.rows)


@instruction
def rms_norm(table, like, position, part, parts):
    """RMS norm of the rows of x with weight y."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (row.rows * row.width,), like)
    rms_norm_rows(x, row.x_stride, _view(row.y, (row.width,), like), row.number, out, 0, row.rows)


@instruction
def add(table, like, position, part, parts):
    """``out = x + number y``, row by row."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (row.rows * row.width,), like)
    y = _view(row.y, (row.rows * row.y_stride,), like)
    sum_rows(x, row.x_stride, y, row.y_stride, row.rows, row.number, out, row.width, 0, row.rows)


@instruction
def add_vector(table, like, position, part, parts):
    """``out = x + number y``, y a vector (d,): the position's, or the same for all."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (row.rows * row.width,), like)
    y = _moved(row.y, row, position, row.width, like)
    sum_rows(x, row.x_stride, y, 0, 1, row.number, out, row.width, 0, row.rows)


@instruction
def scale(table, like, position, part, parts):
    """``out = number x``."""
    row = carray(table, 1)[0]
    x, out = pointer(row.x, like), _view(row.out, (row.rows, row.width), like)
    factor = out.dtype.type(row.number)
    for b in range(row.rows):
        for j in range(row.width):
            out[b, j] = x[b * row.x_stride + j] * factor


@instruction
def activation(table, like, position, part, parts):
    """An activation of the rows of x."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (row.rows * row.width,), like)
    activation_rows(row.kind, x, row.x_stride, out, row.width, 0, row.rows)


@instruction
def swiglu(table, like, position, part, parts):
    """``out = x y sigmoid(y)``."""
    row = carray(table, 1)[0]
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (row.rows * row.width,), like)
    y = _view(row.y, (row.rows * row.y_stride,), like)
    gate_rows(True, x, row.x_stride, y, row.y_stride, out, row.width, 0, row.rows)


@instruction
def rotary(table, like, position, part, parts):
    """Rotate heads of x by the angles of the position, of which y are the cosines and z the sines."""
    row = carray(table, 1)[0]
    items, half = row.rows * row.heads, row.width // 2
    x, out = _view(row.x, (row.rows * row.x_stride,), like), _view(row.out, (items * row.width,), like)
    cos, sin = _moved(row.y, row, position, half, like), _moved(row.z, row, position, half, like)
    rotary_rows(x, (row.x_stride, row.width, 0), cos, sin, row.kind != 0, out, row.heads, 1, 0, items)


@instruction
def append(table, like, position, part, parts):
    """``out[b, h, position] = x[b, h]``: out (B, H, S, D) a cache."""
    row = carray(table, 1)[0]
    x, store = pointer(row.x, like), pointer(row.out, like)
    for b in range(row.rows):
        for h in range(row.heads):
            source = offset(x, b * row.x_stride + h * row.width)
            place = offset(store, ((b * row.heads + h) * row.depth + position) * row.width)
            for j in range(row.width):
                place[j] = source[j]


# --- attention: x queries or a map, y keys or values in a cache -------------------------------------------------------


@njit(**STEP)
def _held(address, row, position, like):
    """View the keys or values (B, Hkv, S, D) of all positions so far."""
    return _view(address, (row.rows, row.key_heads, row.depth, row.width), like)[:, :, : position + 1]


@njit(**STEP)
def _ranges(row, position):
    """Count the ranges that the keys of a head are cut into."""
    return _key_ranges(row.rows * row.key_heads, position + 1, KEYS)


@instruction
def scores(table, like, position, part, parts):
    """``out = x yᵀ`` for a range of keys."""
    row = carray(table, 1)[0]
    q, k = _view(row.x, (row.rows, row.heads, 1, row.width), like), _held(row.y, row, position, like)
    out = _view(row.out, (row.rows, row.heads, 1, position + 1), like)
    score_items(q, k, out, row.heads // row.key_heads, _ranges(row, position), part, part + 1)


@instruction
def softmax(table, like, position, part, parts):
    """``out = softmax(x)`` for one row of a map."""
    row = carray(table, 1)[0]
    keys, maps = position + 1, row.rows * row.heads
    x, out = _view(row.x, (maps * keys,), like), _view(row.out, (maps * keys,), like)
    softmax_rows(x, keys, out, keys, 1, False, maps, maps, part, part + 1)


@njit(**STEP)
def _sums(row, ranges, like):
    """View what ranges of keys contribute, (items * M * D,)."""
    return _view(row.sums, (ranges * row.rows * row.heads * row.width,), like)


@njit(**STEP)
def _put_together(row, factors, like):
    """``out``: the sums of all ranges times factors (B * H, ranges)."""
    out = _view(row.out, (row.rows, row.heads, 1, row.width), like)
    combine(_sums(row, factors.shape[1], like), factors, out, row.heads // row.key_heads)


@instruction
def weighted_sum(table, like, position, part, parts):
    """What a range of keys adds to ``x y``."""
    row = carray(table, 1)[0]
    ranges, item = _ranges(row, position), row.heads // row.key_heads * row.width
    p, v = _view(row.x, (row.rows, row.heads, 1, position + 1), like), _held(row.y, row, position, like)
    sums = _sums(row, ranges, like)
    for i in range(part * item, (part + 1) * item):
        sums[i] = 0
    sum_items(p, v, sums, row.heads // row.key_heads, ranges, part, part + 1)


@instruction
def combine_sums(table, like, position, part, parts):
    """``out``: what all ranges added."""
    row = carray(table, 1)[0]
    shape = (row.rows * row.heads, _ranges(row, position))
    _put_together(row, np.ones(shape, _sums(row, 0, like).dtype), like)


@instruction
def attend(table, like, position, part, parts):
    """What a range of keys contributes to ``softmax(x yᵀ) z``: sums, maxima and totals, see `few_rows`."""
    row = carray(table, 1)[0]
    shape = (row.rows * row.heads, _ranges(row, position))
    q = _view(row.x, (row.rows, row.heads, 1, row.width), like)
    k, v = _held(row.y, row, position, like), _held(row.z, row, position, like)
    maxima, totals = _view(row.maxima, shape, like), _view(row.totals, shape, like)
    no_mask = carray(pointer(row.x, np.bool_(0)), (1, 1, 1, 1))
    attend_items(q, k, v, False, False, no_mask, _sums(row, shape[1], like), maxima, totals, part, part + 1)


@instruction
def combine_attended(table, like, position, part, parts):
    """``out``: what all ranges contributed."""
    row = carray(table, 1)[0]
    shape = (row.rows * row.heads, _ranges(row, position))
    maxima = _view(row.maxima, shape, like)
    factors_of(maxima, _view(row.totals, shape, like))
    _put_together(row, maxima, like)


# --- the walk -------------------------------------------------------------------------------------------------------


@njit(**STEP)
def _walk(table, like, position, taken, done, threads, thread, _):
    """Walk the table as one of several threads; each begins with a range of the parts that is its own."""
    for i in range(len(table)):
        row, address, ended = table[i], table.ctypes.data + i * table.itemsize, done.ctypes.data + 8 * LINE * i
        parts = row.parts if row.parts else row.rows * row.key_heads * _ranges(row, position)
        for other in range(threads):
            owner = (thread + other) % threads
            first, last = owner * parts // threads, (owner + 1) * parts // threads
            counter = taken.ctypes.data + 8 * LINE * (i * threads + owner)
            part = first + fetch_add(counter)
            while part < last:
                invoke(row.function, (address, like, position, part, parts))
                finish(ended)
                part = first + fetch_add(counter)
        looks = 0
        while finished(ended) < parts:
            looks += 1
            if looks % PATIENCE:
                relax()
            else:
                give_way()


@njit(**KERNEL)
def kernel_walk(table, position, taken, done, threads):
    """Run a table of n instructions behind `position` earlier positions.

    Parts are counted in `taken` (at least n * threads * LINE,) and `done` (n * LINE,).
    """
    taken[:] = 0
    done[:] = 0
    share(_walk, (table, table.ctypes.data, position, taken, done, threads), threads, threads)
