"""Keys and values of past positions: allocated once, filled from the front, never copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.components import CACHE
from refimpl.engines.protocol import Array, Engine
from refimpl.errors import InputError, ShapeError
from refimpl.recorder import At


@dataclass(frozen=True)
class Stored:
    """What one layer keeps of a position.

    Attributes
    ----------
    key_heads, value_heads : int
        Heads kept; 0 where the layer takes keys or values from elsewhere.
    width : int
        D, of a head.
    rows : int
        Rows of a head per position; more than one where a method splits positions.
    """

    key_heads: int
    value_heads: int
    width: int
    rows: int = 1

    @property
    def elements(self) -> int:
        """Elements per position."""
        return (self.key_heads + self.value_heads) * self.width * self.rows


class Cache:
    """The keys and values of a batch of sequences, layer by layer.

    Parameters
    ----------
    engine : Engine
        Whose arrays it holds.
    stored : sequence of Stored
        One per layer; from the program of the method that fills it.
    batch, capacity : int
        B, and the most positions that it can hold.
    dtype : dtype
    window : int, optional
        How many of the last positions are seen; default all.
    ahead : int, default 0
        Positions that come along behind the new ones and are not held: the next ones overwrite them.
    room : int, default 0
        Positions that a pass always finds free: where fewer are, the cache is compacted first.

    Attributes
    ----------
    length : int
        Positions held. A pass appends behind them and then advances; `truncate` forgets the last ones.
    """

    def __init__(
        self,
        engine: Engine,
        stored: Sequence[Stored],
        batch: int,
        capacity: int,
        dtype: Any,
        window: int | None = None,
        ahead: int = 0,
        room: int = 0,
    ) -> None:
        if capacity < 1:
            raise ShapeError(f"a cache of {capacity} positions was asked for; it must hold at least 1")
        self.stored, self._engine = tuple(stored), engine
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.window, self.room = window, room

        def empty(heads: int, one: Stored) -> Array | None:
            shape = (batch, heads, (capacity + ahead) * one.rows, one.width)
            return engine.asarray(np.zeros(shape, dtype)) if heads else None

        self._keys = [empty(one.key_heads, one) for one in self.stored]  # (B, Hkv, S, D) each, or None
        self._values = [empty(one.value_heads, one) for one in self.stored]

    @property
    def past(self) -> int:
        """Positions that the next ones see: all that are held, or the last of them."""
        return self.length if self.window is None else min(self.length, self.window)

    @property
    def bytes(self) -> int:
        """Of all arrays, filled or not."""
        return sum(int(store.nbytes) for store in (*self._keys, *self._values) if store is not None)

    def keys(self, at: At, index: int, new: Array) -> Array:
        """Append the keys of new positions to layer `index`; all keys that are seen (B, Hkv, S, D), a view."""
        return self._append(at, self._keys[index], index, new)

    def values(self, at: At, index: int, new: Array) -> Array:
        """Append the values of new positions to layer `index`; all values that are seen (B, Hkv, S, D), a view."""
        return self._append(at, self._values[index], index, new)

    def _append(self, at: At, store: Array | None, index: int, new: Array) -> Array:
        if store is None:
            raise ShapeError(f"layer {index} keeps nothing in this cache: it was made for another method")
        if new.dtype != store.dtype:  # NumPy would round in silence
            raise ShapeError(f"the cache holds {store.dtype}, the pass {new.dtype}: make one with Runner.new_cache")
        rows = self.stored[index].rows
        held = at(CACHE).append(store, new, self.length * rows)
        return held[:, :, (self.length - self.past) * rows :, :]

    def check(self, stored: Sequence[Stored], batch: int, positions: int) -> None:
        """Raise InputError or ShapeError where `positions` more do not fit, or method or batch are others."""
        if tuple(stored) != self.stored:
            raise ShapeError("the cache was made for another model or method: make one with Runner.new_cache")
        if batch != self.batch:
            raise ShapeError(f"the cache was made for {self.batch} sequences; {batch} are given")
        if self.length + positions > self.capacity and not self.room:
            raise InputError(
                f"the cache holds {self.length} of {self.capacity} positions, {positions} more do not fit: allot a "
                "longer one or truncate it"
            )

    def advance(self, positions: int) -> None:
        """Count `positions` appended ones as held."""
        self.length += positions

    def make_room(self, at: At) -> None:
        """Compact the cache where it keeps room and has too little."""
        if self.length + self.room > self.capacity:
            self.compact(at)

    def compact(self, at: At | None = None) -> None:
        """Forget what is seen no more and move the rest to the front, so that a stream need not end with the capacity.

        Does nothing while fewer positions are out of sight than are seen.
        """
        seen = self.past
        if self.length < 2 * seen:
            return
        ops = self._engine if at is None else at(CACHE)
        for one, *stores in zip(self.stored, self._keys, self._values, strict=True):
            for store in stores:
                if store is not None and seen:
                    ops.append(store, store[:, :, (self.length - seen) * one.rows : self.length * one.rows, :], 0)
        self.length = seen

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on.

        Raises
        ------
        ShapeError
            If fewer are held.
        """
        if not 0 <= length <= self.length:
            raise ShapeError(f"the cache holds {self.length} positions; it cannot be cut to {length}")
        self.length = length
