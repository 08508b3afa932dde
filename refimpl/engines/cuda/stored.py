"""Stored maps, caches and parts of batches: what moves rows of arrays; kernels of ``stored.cu``.

Records lie in files that the host maps. `fetch` gathers those that a batch takes in pinned memory and sends them at
once; from a database that was copied to the device before (`hold_records`), it gathers there.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.launch import Launcher, Source, flag
from refimpl.engines.cuda.rows import pack_of
from refimpl.engines.cuda.shapes import BLOCKS, Launch, block_per_row
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError
from refimpl.memo.mapping import check_rows

STORED = Source("stored.cu", ("distances<T, A>", "nearest<T, A>", "move<T, true>", "move<T, false>"))

STAGING_BYTES = 256 << 20  # of pinned memory at most: more would be taken from the host's other work
FREE_SHARE = 0.5  # of the free device memory that a database may take
LEAST_POINTS = 64  # features of a block, so that they stay in its first-level cache for all queries
COPIES = 4  # of a thread: stored.cu
NEAREST_BYTES = 16  # of a squared distance and a row


class StoredMaps(Launcher):
    """Look-ups, gathers and appends."""

    def __init__(self) -> None:
        super().__init__()
        self._staging: tuple[Array, Any] | None = None  # pinned memory; the event after which it may be written to
        self._resident: dict[int, tuple[Any, Array]] = {}  # databases on the device, by the identity of their records

    def concat(self, parts: tuple[Array, ...], axis: int) -> Array:
        return self.xp.concatenate(list(parts), axis=axis)

    def append(self, store: Array, new: Array, start: int) -> Array:
        stop = start + new.shape[2]
        if start < 0 or stop > store.shape[2]:
            raise ShapeError(f"append: rows {start} to {stop - 1} of new {new.shape} are not in store {store.shape}")
        rows = store[:, :, start:stop]
        rows[...] = self._operand(store, new, rows.shape)
        return store[:, :, :stop]

    def max_pool(self, x: Array) -> Array:
        rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        tall = self.xp.maximum(x[:, 0:rows:2, :columns], x[:, 1:rows:2, :columns])  # (B, T // 2, d)
        return self.xp.maximum(tall[:, :, 0::2], tall[:, :, 1::2])

    def nearest(self, x: Array, points: Array) -> tuple[Array, Array]:
        if x.ndim != 2 or x.shape[1:] != points.shape[1:] or not len(points) or x.dtype != points.dtype:
            raise ShapeError(
                f"nearest: x is {x.shape} {x.dtype}, points {points.shape} {points.dtype}; it takes (B, w) and (N, w), "
                "N > 0, of one dtype"
            )
        distances, rows = self.xp.empty((len(x),), x.dtype), self.xp.empty((len(x),), np.int64)
        (x, batch, width, x_stride), (points, count, _, stride) = self._rows(x), self._rows(points)
        blocks, span, launch = blocks_of_points(count)
        found = self.xp.empty((batch, blocks, NEAREST_BYTES), np.uint8)
        sizes = batch, count, width, x_stride, stride, blocks, span
        self._launch(STORED, "distances<T, A>", x, launch, x, points, found, *sizes)
        self._launch(STORED, "nearest<T, A>", x, block_per_row(batch, blocks), found, distances, rows, blocks)
        return distances, rows

    def search_graph(self, x: Array, index: Any) -> tuple[Array, Array]:
        distances, rows = index.search(self.to_numpy(x))
        return self.xp.asarray(distances), self.xp.asarray(rows)

    def fetch(self, records: Any, rows: tuple[int | None, ...], transfer: str) -> Array:
        out = self.xp.empty((len(rows), *records.layout.shape), records.layout.dtype)
        hits = [(b, row) for b, row in enumerate(rows) if row is not None]
        for _, row in hits:
            if not 0 <= row < len(records.array):
                raise ShapeError(f"fetch: record {row} of {len(records.array)}")
        held = self._resident.get(id(records))
        if held is not None and held[0]() is records:
            return self._move(held[1], out, hits)
        per_piece = max(1, STAGING_BYTES // max(1, math.prod(out.shape[1:]) * out.dtype.itemsize))
        for first in range(0, len(hits), per_piece):  # either way records cross the bus once
            self._send(records.array, hits[first : first + per_piece], out)
        return out

    def hold_records(self, records: Any) -> bool:
        """Keep a copy of all records on the device, for as long as they are in use; False if they do not fit.

        They may take `FREE_SHARE` of the free memory. Fetching from the copy is a gather at the rate of device memory.
        """
        if records.array.nbytes > FREE_SHARE * self.free_bytes():
            return False
        copy = self.xp.empty(records.array.shape, records.layout.dtype)
        per_piece = max(1, STAGING_BYTES // max(1, records.array[:1].nbytes))
        for first in range(0, len(copy), per_piece):
            stop = min(first + per_piece, len(copy))
            self._send(records.array, [(row, row) for row in range(first, stop)], copy)
        key = id(records)
        self._resident[key] = weakref.ref(records, lambda _: self._resident.pop(key, None)), copy
        return True

    def take_rows(self, x: Array, rows: tuple[int, ...]) -> Array:
        if not all(0 <= row < len(x) for row in rows):
            raise ShapeError(f"take_rows: x has shape {x.shape}; the rows are {rows}")
        out = self.xp.empty((len(rows), *x.shape[1:]), x.dtype)
        return self._move(self.xp.ascontiguousarray(x), out, list(enumerate(rows)))

    def scatter(self, store: Array, new: Array, rows: tuple[int, ...]) -> Array:
        check_rows("scatter", store, new, rows)
        if not store.flags.c_contiguous:
            raise ShapeError(f"scatter: store {store.shape} must lie in row-major order")
        return self._move(self.xp.ascontiguousarray(new), store, [(b, i) for i, b in enumerate(rows)])

    # --- shared steps -------------------------------------------------------------------------------------------

    def _move(self, source: Array, target: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        """Copy record j of source to record i of target for pairs (i, j); both in row-major order."""
        size = math.prod(target.shape[1:])
        if not pairs or not size:
            return target
        places = self.asarray(np.array(pairs, np.int64))  # (n, 2)
        vector = pack_of(size, ((source, size), (target, size))) > 1
        blocks, launch = blocks_of_record(len(pairs), size // (16 // target.dtype.itemsize) if vector else size)
        self._launch(STORED, f"move<T, {flag(vector)}>", target, launch, source, target, places, size, blocks)
        return target

    def _send(self, records: Array, pairs: Sequence[tuple[int, int]], out: Array) -> None:
        """Copy record j on the host to row i of out for pairs (i, j), ascending in i; returns before it is done."""
        shape = (len(pairs), *out.shape[1:])
        size = math.prod(shape) * out.dtype.itemsize
        memory = self._pinned(size)
        batch = memory[:size].view(out.dtype).reshape(shape)
        for place, (_, row) in enumerate(pairs):
            batch[place] = records[row]
        stream = self.xp.cuda.get_current_stream()
        for first, stop in runs([i for i, _ in pairs]):
            start = pairs[first][0]
            out[start : start + stop - first].set(batch[first:stop], stream=stream)
        event = self.xp.cuda.Event()
        event.record()
        self._staging = memory, event

    def _pinned(self, size: int) -> Array:
        """So many bytes of host memory, or more, that the device reads by itself, once what they held was sent."""
        memory, event = self._staging or (np.empty(0, np.uint8), None)
        if event is not None:
            event.synchronize()
        return memory if memory.size >= size else np.frombuffer(self.xp.cuda.alloc_pinned_memory(size), np.uint8)


# --- launch shapes --------------------------------------------------------------------------------------------------


def blocks_of_points(count: int) -> tuple[int, int, Launch]:
    """Blocks that share the points, points of each, and their launch."""
    wanted = max(1, min(-(-count // LEAST_POINTS), BLOCKS))
    span = -(-count // wanted)
    blocks = -(-count // span)
    return blocks, span, Launch((blocks,), (shapes.THREADS,))


def blocks_of_record(records: int, words: int) -> tuple[int, Launch]:
    """Blocks that copy a record of so many words, and the launch for all records."""
    blocks = -(-words // (shapes.THREADS * COPIES))
    return blocks, Launch((records * blocks,), (shapes.THREADS,))


def runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """First and one past the last of each stretch of places that follow each other: 3 4 7 gives (0, 2) and (2, 3)."""
    ends = [n for n in range(1, len(places)) if places[n] != places[n - 1] + 1]
    return list(zip([0, *ends], [*ends, len(places)], strict=True)) if places else []
