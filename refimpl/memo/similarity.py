"""How alike attention maps are: the mean total variation of their rows.

    TV(p, q) = 1/2 sum_j |p_j - q_j|                 in [0, 1]
    dist(A, A') = mean over heads and rows of TV(A[h, i], A'[h, i])
    SC(A, A') = 1 - dist(A, A')

Total variation as the basis, and the mean over heads, are what the published code of the authors' group has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError


def map_distance(a: Array, b: Array, lengths: tuple[int, int] | None = None) -> float:
    """``dist(A, A')`` of two maps.

    Parameters
    ----------
    a, b : array, shape (H, T, T)
        Each row a distribution, or zeros.
    lengths : (int, int), optional
        Positions of each that are no padding. Rows that are padding in both are left out; a row that is padding in one
        of them has the distance 1. Default: all rows count, whatever they are.

    Returns
    -------
    float
        From 0 to 1; 0 for equal maps. Symmetric.
    """
    if a.shape != b.shape:
        raise ShapeError(f"maps of shape {a.shape} and {b.shape} cannot be compared")
    return float(pair_distances(np.stack([a, b]), lengths)[0])


def similarity(a: Array, b: Array, lengths: tuple[int, int] | None = None) -> float:
    """``SC(A, A') = 1 - dist(A, A')``; see `map_distance`."""
    return 1.0 - map_distance(a, b, lengths)


def pair_distances(maps: Array, lengths: Sequence[int] | None = None) -> Array:
    """``dist`` of all pairs of maps.

    Parameters
    ----------
    maps : array, shape (B, H, T, T)
    lengths : sequence of int, optional
        One per map; see `map_distance`.

    Returns
    -------
    array, shape (B (B - 1) / 2,), float64
        Pairs (0, 1), (0, 2), ..., (1, 2), ...
    """
    from scipy.spatial.distance import pdist  # loads much of SciPy

    count, heads, rows, _ = maps.shape
    if lengths is None:
        return pdist(maps.reshape(count, -1), "cityblock") / (2 * heads * rows)
    real = np.arange(rows) < np.asarray(lengths)[:, None]  # (B, T)
    kept = np.where(real[:, None, :, None], maps, 0)
    both = pdist(kept.reshape(count, -1), "cityblock") / 2  # a row of padding beside a real one gives 1/2
    either, one = _rows_of_pairs(real)
    return (both + heads * one / 2) / (heads * np.maximum(either, 1))


def _rows_of_pairs(real: Array) -> tuple[Array, Array]:
    """Of each pair, how many rows are real in one map or both, and in one alone."""
    i, j = np.triu_indices(len(real), 1)
    return (real[i] | real[j]).sum(axis=1), (real[i] ^ real[j]).sum(axis=1)
