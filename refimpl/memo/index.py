"""The nearest stored features to a query: exact, or by a graph of neighbours (HNSW, arXiv 1603.09320) from Faiss.

Distances are Euclidean, not squared: Faiss returns squares, the embedding is trained on distances, and so is the
threshold. A query hits where ``max(0, 1 - distance) >= tau``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import DatabaseError, MissingDependencyError

NEIGHBOURS = 32  # of a node of the graph: the M of Faiss's own default
SEARCHED = 64  # candidates kept during a search, Faiss's efSearch; ours


def is_hit(distances: Array, tau: float) -> Array:
    """Which predicted distances are near enough: (B,) of bool. Tau = 0 takes all, above 1 none."""
    return np.maximum(0.0, 1.0 - np.asarray(distances, np.float64)) >= tau


def load_faiss() -> Any:
    """The module; MissingDependencyError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "index='hnsw' needs Faiss: pip install 'effref[memo]', or give index='flat', which is exact"
        ) from error
    return faiss


class GraphIndex:
    """A graph over features (N, w).

    Parameters
    ----------
    points : array, shape (N, w)
    seed : bytes, optional
        What `to_bytes` of the same points gave: spares the building.

    Raises
    ------
    MissingDependencyError
        If Faiss is not installed.
    DatabaseError
        If the bytes are no graph of so many points.
    """

    def __init__(self, points: Array, seed: bytes | None = None) -> None:
        self._faiss = load_faiss()
        self.compared = 0  # points that the last search looked at
        self._index = self._restored(seed, points.shape) if seed else self._built(points)
        self._index.hnsw.efSearch = SEARCHED

    def _built(self, points: Array) -> Any:
        index = self._faiss.IndexHNSWFlat(points.shape[1], NEIGHBOURS)
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # the graph depends on the order of insertion
        try:
            index.add(np.ascontiguousarray(points, np.float32))
        finally:
            self._faiss.omp_set_num_threads(threads)
        return index

    def _restored(self, data: bytes, shape: tuple[int, ...]) -> Any:
        try:
            index = self._faiss.deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            raise DatabaseError("the graph of the index is damaged: build the database anew") from error
        if (index.ntotal, index.d) != shape:
            raise DatabaseError(
                f"the graph is of {index.ntotal} points of {index.d}; there are {shape[0]} of {shape[1]}"
            )
        return index

    def to_bytes(self) -> bytes:
        """The graph, for a file."""
        return bytes(self._faiss.serialize_index(self._index))

    def search(self, queries: Array) -> tuple[Array, Array]:
        """Distance and row of a near point, most often the nearest, of each query: (B,) and (B,) of int64."""
        self._faiss.cvar.hnsw_stats.reset()
        squared, rows = self._index.search(np.ascontiguousarray(queries, np.float32), 1)
        self.compared = int(self._faiss.cvar.hnsw_stats.ndis)
        return np.sqrt(np.maximum(squared[:, 0], 0)).astype(queries.dtype), rows[:, 0]
