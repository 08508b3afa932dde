"""Stored maps, caches and parts of batches: what moves rows of arrays."""

from __future__ import annotations

from typing import Any

from refimpl.engines.cuda.launch import Launcher
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError
from refimpl.memo.mapping import check_rows


class StoredMaps(Launcher):
    """Look-ups, gathers and appends."""

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
        if x.shape[1:] != points.shape[1:] or not len(points):
            raise ShapeError(
                f"nearest: x has shape {x.shape}, points {points.shape}; it takes (B, w) and (N, w), N > 0"
            )
        squared = self.xp.empty((len(x), len(points)), x.dtype)
        for b in range(len(x)):
            difference = points - x[b]  # (N, w)
            squared[b] = (difference * difference).sum(axis=-1)
        return self.xp.sqrt(squared.min(axis=1)), squared.argmin(axis=1)

    def search_graph(self, x: Array, index: Any) -> tuple[Array, Array]:
        distances, rows = index.search(self.to_numpy(x))
        return self.xp.asarray(distances), self.xp.asarray(rows)

    def fetch(self, records: Any, rows: tuple[int | None, ...], transfer: str) -> Array:
        out = self.xp.empty((len(rows), *records.layout.shape), records.layout.dtype)
        for b, row in enumerate(rows):
            if row is not None:
                out[b] = self.xp.asarray(records.array[row])  # either way it crosses the bus once
        return out

    def take_rows(self, x: Array, rows: tuple[int, ...]) -> Array:
        return self.xp.concatenate([x[b : b + 1] for b in rows]) if rows else x[:0]

    def scatter(self, store: Array, new: Array, rows: tuple[int, ...]) -> Array:
        check_rows("scatter", store, new, rows)
        for i, b in enumerate(rows):
            store[b] = new[i]
        return store
