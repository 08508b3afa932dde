"""Which designs are dominated by none."""

from __future__ import annotations

from typing import Any

import numpy as np


def front(objectives: Any) -> Any:
    """Where no other design is as good in every objective and better in one.

    Parameters
    ----------
    objectives : array, shape (n, k)
        Of each design; less is better. Equal designs do not dominate each other.

    Returns
    -------
    kept : array of bool, shape (n,)
        In O(n log n) for two objectives, else in O(n log n + n f) with f designs kept.
    """
    different, place = np.unique(objectives, axis=0, return_inverse=True)  # sorted by the first, then the second, ...
    kept = _of_two(different) if different.shape[1] == 2 else _of_many(different)
    return kept[place.reshape(-1)]


def _of_two(rising: Any) -> Any:
    """Rows in rising order: kept where the second is below those of all rows before."""
    best_before = np.minimum.accumulate(rising[:, 1])[:-1]
    return np.concatenate([np.ones(min(len(rising), 1), bool), rising[1:, 1] < best_before])


def _of_many(rising: Any) -> Any:
    """Rows in rising order: only rows before can dominate one, and of those the kept ones suffice."""
    kept = np.zeros(len(rising), bool)
    best = np.empty((0, rising.shape[1]))
    for index, row in enumerate(rising):
        if not (best <= row).all(axis=1).any():
            kept[index] = True
            best = np.concatenate([best, row[None]])
    return kept


def front_of_each(groups: Any, objectives: Any) -> Any:
    """The fronts among the designs of the same group.

    Parameters
    ----------
    groups : array of int, shape (n,)
    objectives : array, shape (n, k)
    """
    kept = np.ones(len(groups), bool)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    for members in np.split(order, starts):
        if len(members) > 1:  # one alone is not dominated
            kept[members] = front(objectives[members])
    return kept
