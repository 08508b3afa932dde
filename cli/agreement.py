"""How far one output lies from another."""

from __future__ import annotations

from typing import Any

import numpy as np

_BLOCK = 256  # positions that are compared at a time, in float64


def agreement(output: Any, exact: Any, positions: int | None = None) -> dict[str, float]:
    """Relative L2 error, cosine similarity and largest deviation.

    Parameters
    ----------
    output, exact : array, shape (B, T, d)
    positions : int, optional
        Compare the first ones only; the rest is padding.

    Returns
    -------
    errors : dict
        ``rel_l2`` is |output - exact| / |exact|, ``cosine`` of the two as vectors, ``max_abs`` the largest deviation.
    """
    squared = product = own = theirs = largest = 0.0
    for start in range(0, positions or exact.shape[1], _BLOCK):
        part = slice(start, min(start + _BLOCK, positions or exact.shape[1]))
        a, b = (np.asarray(x[:, part], np.float64) for x in (output, exact))
        squared += float(np.sum((a - b) ** 2))
        product += float(np.sum(a * b))
        own += float(np.sum(a * a))
        theirs += float(np.sum(b * b))
        largest = max(largest, float(np.max(np.abs(a - b))))
    return {
        "rel_l2": (squared / theirs) ** 0.5 if theirs else squared**0.5,
        "cosine": product / (own * theirs) ** 0.5 if own and theirs else float(own == theirs),
        "max_abs": largest,
    }
