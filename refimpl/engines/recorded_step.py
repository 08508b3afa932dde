"""A decoding step written down once, then run again and again as one compiled call, on the CPU.

A step of one position is some 450 small ops between which Python works on data that the weights have driven out of the
caches (docs/decoding.md). `StepRecorder` offers the ops of the Numba engine; each writes an instruction instead of
computing, and `RecordedStep` hands the table to `numba_kernels.instructions`. The loops are those of the Numba engine,
so results are the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.engines.numba_kernels import elementwise, few_rows, instructions, layout, threads
from refimpl.engines.numba_kernels.instructions import INSTRUCTION, LINE
from refimpl.errors import UnsupportedError

Array = Any
Instruction = Callable[[Any], int]  # its address for a dtype


class StepRecorder:
    """The ops of a step, each of which writes an instruction.

    Parameters
    ----------
    position : int
        Positions in the cache while recording.
    tables : sequence of arrays
        Whose row number `position` is that of the step, as those of rotary positions.
    """

    def __init__(self, position: int, tables: Sequence[Array] = ()) -> None:
        self._position, self._tables = position, tables
        self._rows: list[dict[str, Any]] = []
        self._kept: list[Array] = []  # whose addresses stand in the table
        self._growing: dict[int, int] = {}  # address of an array whose length is that of the text: the most it can be

    def __getattr__(self, op: str) -> Any:
        raise cannot(f"the op '{op}' has no instruction")

    def finished(self, ids: Array, output: Array) -> RecordedStep:
        """The step from ids (B, 1) to its output, an array of the last op."""
        table = np.zeros(len(self._rows), INSTRUCTION)
        for entry, row in zip(table, self._rows, strict=True):
            for name, value in row.items():
                entry[name] = value
        return RecordedStep(table, ids, output, self._kept)

    # --- services -------------------------------------------------------------------------------------------

    def split_heads(self, x: Array, heads: int) -> Array:
        batch, length, width = x.shape
        return _view(x, (batch, length, heads, width // heads)).transpose(0, 2, 1, 3)

    def merge_heads(self, x: Array) -> Array:
        batch, heads, length, width = x.shape
        return _view(x.transpose(0, 2, 1, 3), (batch, length, heads * width))

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return _view(x, shape)

    # --- linear maps ----------------------------------------------------------------------------------------

    def embedding(self, table: Array, ids: Array) -> Array:
        out = np.empty((*ids.shape, table.shape[1]), table.dtype)  # (B, 1, d)
        self._write(instructions.embedding, out, width=table.shape[1], x=ids, y=_whole(table))
        return out

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        d_out, d_in = weight.shape
        out = np.empty((*x.shape[:-1], d_out), x.dtype)  # (B, 1, d_out)
        if len(x) > layout.FEW_ROWS:
            raise cannot(f"it has {len(x)} sequences, and up to {layout.FEW_ROWS} can be recorded")
        parts = layout.count(-(-d_out // few_rows.UNIT), weight.size)
        z = {} if bias is None else {"z": _whole(bias)}
        flat = _whole(_view(x, (len(x), d_in)))
        self._write(instructions.linear, out, width=d_out, depth=d_in, parts=parts, x=flat, y=_whole(weight), **z)
        return out

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        return layout.columns(self.linear(x, weight, bias), widths)

    # --- norms, elementwise ---------------------------------------------------------------------------------

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self._by_rows(instructions.layer_norm, x, y=_whole(weight), z=_whole(bias), number=eps)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self._by_rows(instructions.rms_norm, x, y=_whole(weight), number=eps)

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        if y.shape == x.shape and self._table_of(y) is None:
            return self._by_rows(instructions.add, x, y=y, y_stride=self._stride(y), number=scale)
        if y.size != x.shape[-1]:
            raise cannot(f"it adds {y.shape} to {x.shape}")
        return self._by_rows(instructions.add_vector, x, number=scale, **self._at_position(y=y))

    def gelu(self, x: Array) -> Array:
        return self._by_rows(instructions.activation, x, kind=elementwise.GELU)

    def gelu_tanh(self, x: Array) -> Array:
        return self._by_rows(instructions.activation, x, kind=elementwise.GELU_TANH)

    def silu(self, x: Array) -> Array:
        return self._by_rows(instructions.activation, x, kind=elementwise.SILU)

    def relu(self, x: Array) -> Array:
        return self._by_rows(instructions.activation, x, kind=elementwise.RELU)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._by_rows(instructions.swiglu, up, y=gate, y_stride=self._stride(gate))

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        _, heads, _, width = x.shape
        out = np.empty(x.shape, x.dtype)  # (B, H, 1, D)
        angles = self._at_position(y=cos, z=sin)
        self._write(
            instructions.rotary,
            out,
            x=x,
            x_stride=self._stride(x),
            width=width,
            heads=heads,
            kind=interleaved,
            **angles,
        )
        return out

    # --- attention ------------------------------------------------------------------------------------------

    def append(self, store: Array, new: Array, start: int) -> Array:
        _, heads, room, width = store.shape
        if start != self._position or new.shape[2] != 1:
            raise cannot(f"it appends {new.shape[2]} rows at {start} behind {self._position} positions")
        self._write(
            instructions.append, _whole(store), x=new, x_stride=self._stride(new), width=width, heads=heads, depth=room
        )
        held = store[:, :, : start + 1]
        self._growing[held.ctypes.data] = room
        return held

    def attention(
        self, q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False, mask: Array | None = None
    ) -> Array:
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        heads, room = self._heads(q, k, mask), self._room(k)
        if k.shape != v.shape or self._room(v) != room:
            raise cannot(f"its keys {k.shape} and values {v.shape} differ in shape")
        scaled = self._by_rows(instructions.scale, q, number=scale)
        rows, most = q.shape[0] * q.shape[1], self._most_ranges(k, room)
        shared = {
            "sums": np.empty(most * rows * q.shape[3], q.dtype),
            "maxima": np.empty(most * rows, q.dtype),
            "totals": np.empty(most * rows, q.dtype),
        }
        out = np.empty(q.shape, q.dtype)  # (B, H, 1, D)
        self._write(instructions.attend, out, x=scaled, y=k, z=v, depth=room, parts=0, **heads, **shared)
        self._write(instructions.combine_attended, out, **heads, **shared)
        return out

    def scores(self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
        heads, room = self._heads(q, k, mask), self._room(k)
        scaled = self._by_rows(instructions.scale, q, number=scale)
        out = self._map(q, k, room)  # (B, H, 1, S)
        self._write(instructions.scores, out, x=scaled, y=k, depth=room, parts=0, **heads)
        return out

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        room = self._room(scores, axis=3)
        if room >= layout.LONG_ROW:
            raise cannot(f"its cache has room for {room} positions; maps of {layout.LONG_ROW} are worked on otherwise")
        out = self._map(scores, scores, room)
        self._write(instructions.softmax, out, x=scores, heads=scores.shape[1], parts=scores.shape[0] * scores.shape[1])
        return out

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        heads, room = self._heads(weights, v, None), self._room(v)
        self._room(weights, axis=3)
        shape = (*weights.shape[:3], v.shape[3])
        sums = np.empty(self._most_ranges(v, room) * math.prod(shape), v.dtype)
        out = np.empty(shape, v.dtype)  # (B, H, 1, D)
        self._write(instructions.weighted_sum, out, x=weights, y=v, depth=room, parts=0, sums=sums, **heads)
        self._write(instructions.combine_sums, out, sums=sums, **heads)
        return out

    # --- shared steps ---------------------------------------------------------------------------------------

    def _write(self, op: Instruction, out: Array, **fields: Any) -> None:
        """Add an instruction: arrays by their addresses; one part unless told."""
        row = {"function": op(out.dtype), "parts": 1, "rows": len(out), "out": out} | fields
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                if value.dtype not in (out.dtype, np.int64):
                    raise cannot(f"it reads {value.dtype} and writes {out.dtype}")
                self._kept.append(value)
                row[name] = value.ctypes.data
        self._rows.append(row)

    def _by_rows(self, op: Instruction, x: Array, **fields: Any) -> Array:
        """An instruction that makes a row (d,) of each row of x."""
        out = np.empty(x.shape, x.dtype)
        self._write(op, out, x=x, x_stride=self._stride(x), width=x.size // len(x), **fields)
        return out

    def _stride(self, x: Array) -> int:
        """Elements from a sequence's row of x to the next; within a row there are no gaps."""
        rows = _view(x, (len(x), x.size // len(x)))
        if x.ctypes.data in self._growing or self._table_of(x) is not None:
            raise cannot(f"it reads an array {x.shape} that another step has otherwise")
        if rows.shape[1] > 1 and rows.strides[1] != x.itemsize:
            raise cannot(f"an array {x.shape} has gaps")
        return int(rows.strides[0] // x.itemsize)

    def _table_of(self, x: Array) -> Array | None:
        """The table of positions that x is a part of, if it is."""
        return next((table for table in self._tables if np.may_share_memory(table, x)), None)

    def _at_position(self, **vectors: Array) -> dict[str, Any]:
        """Fields for vectors that are the same in each step, or all the rows of the position in their tables."""
        step = 0
        for name, vector in vectors.items():
            table = self._table_of(vector)
            if table is not None:
                if vector.ctypes.data != table[self._position :].ctypes.data or vector.size != table.shape[1]:
                    raise cannot("it reads other rows of a table than that of its position")
                vectors[name], step = _whole(table), table.shape[1]
        return {**vectors, "y_step": step}

    def _room(self, x: Array, axis: int = 2) -> int:
        """The most positions of keys or values (axis 2), or of a map (axis 3), which grow with the text."""
        if x.ctypes.data not in self._growing or x.shape[axis] != self._position + 1:
            raise cannot(f"its attention reads an array {x.shape} that is not all that the cache holds")
        return self._growing[x.ctypes.data]

    def _heads(self, q: Array, k: Array, mask: Array | None) -> dict[str, int]:
        """Fields for heads of queries, or of a map, and of keys or values."""
        if mask is not None:
            raise cannot("it has a mask")
        if not layout.few_queries(q, k):
            raise cannot(f"{q.shape[1]} heads share {k.shape[1]} heads of keys, and up to {layout.FEW_ROWS} a head can")
        return {"heads": q.shape[1], "key_heads": k.shape[1], "width": k.shape[3]}

    def _most_ranges(self, k: Array, room: int) -> int:
        return layout.key_ranges(k.shape[0] * k.shape[1], room, few_rows.KEYS)

    def _map(self, q: Array, k: Array, room: int) -> Array:
        """A map (B, H, 1, S) with memory for the longest."""
        memory = np.empty(len(q) * q.shape[1] * room, q.dtype)
        self._growing[memory.ctypes.data] = room
        length = self._position + 1
        return memory[: len(q) * q.shape[1] * length].reshape(len(q), q.shape[1], 1, length)


class RecordedStep:
    """A step as a table of instructions.

    Attributes
    ----------
    table : array of INSTRUCTION
    """

    def __init__(self, table: Array, ids: Array, output: Array, kept: Sequence[Array]) -> None:
        self.table, self._ids, self._output, self._kept = table, ids, output, kept
        most = threads.most()
        self._taken, self._done = (np.zeros(len(table) * n * LINE, np.int64) for n in (most, 1))

    def __call__(self, ids: Array, position: int) -> Array:
        """Run it for ids (B, 1) behind `position` positions: its output, which the next call overwrites."""
        self._ids[...] = ids
        instructions.kernel_walk(self.table, position, self._taken, self._done, threads.count())
        return self._output


def cannot(reason: str) -> UnsupportedError:
    """The error for a step that cannot be recorded."""
    return UnsupportedError(f"the step cannot be recorded on the CPU: {reason}")


def _view(x: Array, shape: tuple[int, ...]) -> Array:
    """x under another shape, never a copy, which would be made once and not in each step."""
    y = x.reshape(shape)
    if x.size and not np.may_share_memory(x, y):
        raise cannot(f"an array {x.shape} with gaps is taken as {shape}")
    return y


def _whole(x: Array) -> Array:
    """x, whose elements must follow one another in memory."""
    if not x.flags.c_contiguous or not x.flags.aligned:
        raise cannot(f"an array {x.shape} has gaps")
    return x
