"""Hidden states and maps that belong together, for tests of memoised attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def clusters(
    count: int, seed: int = 0, length: int = 8, width: int = 6, heads: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Sequences of four kinds, alike within a kind: hidden states (N, T, d), maps (N, H, T, T), kinds (N,)."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, count)
    centres = rng.standard_normal((4, length, width))
    logits = 3 * rng.standard_normal((4, heads, length, length))
    hidden = centres[kinds] + 0.1 * rng.standard_normal((count, length, width))
    e = np.exp(logits[kinds] + 0.1 * rng.standard_normal((count, heads, length, length)))
    return hidden.astype(np.float32), (e / e.sum(-1, keepdims=True)).astype(np.float32), kinds


def listed(maps: np.ndarray) -> Any:
    """Maps in memory as `refimpl.memo.mapping.gather` reads records."""
    return SimpleNamespace(array=maps, layout=SimpleNamespace(shape=maps.shape[1:], dtype=maps.dtype))


class ExactIndex:
    """What `search_graph` calls: here every point is compared, one by one."""

    def __init__(self, points: np.ndarray) -> None:
        self.points, self.compared = points, 0

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.compared = len(queries) * len(self.points)
        truth = np.array([[np.linalg.norm(query - point) for point in self.points] for query in queries.astype(float)])
        truth = truth.reshape(len(queries), len(self.points))
        return truth.min(1).astype(queries.dtype), truth.argmin(1)
