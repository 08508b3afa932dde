"""How attention maps look on real input: how diagonal, how alike from layer to layer, and which layers could share.

The line of work of attention map reuse (ICLR 2022, OpenReview AvcfxqRy4Y) chooses the layers that share a map by these
figures. The exact normalisation of the papers is not known; the definitions here are ours where that is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.engines.protocol import Array, Engine
from refimpl.errors import ConfigError
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, Queries
from refimpl.model import Runner
from refimpl.recorder import At
from refimpl.weights import Model


class _Capture(Dense):
    """Exact attention that keeps some rows of every map."""

    def __init__(self, model: Model, rows: Array) -> None:
        super().__init__(model.config, None)
        self.rows = rows
        self.maps: list[Array] = []

    def attention_map(self, at: At, q: Queries, k: Array, layer: Layer) -> Array:
        weights = super().attention_map(at, q, k, layer)
        self.maps.append(weights[:, :, self.rows, :])  # (B, H, R, T)
        return weights


def attention_maps(
    model: Model, inputs: Array, engine: str | Engine = "numpy", *, rows: Array | None = None
) -> list[Array]:
    """The attention map of every layer on one input.

    Parameters
    ----------
    model : Model
    inputs : array
        What the model's stem reads, see `refimpl.forward`.
    engine : str or Engine
        A CPU engine.
    rows : array of int, optional
        Query positions to keep, to save memory; default all. Leave out padding here.

    Returns
    -------
    maps : list of array, one per layer, shape (B, H, R, T)
    """
    runner = Runner(model, engine)
    capture = _Capture(model, slice(None) if rows is None else rows)
    runner(inputs, capture, record=False)
    return capture.maps


def diagonality(weights: Array, rows: Array | None = None) -> Array:
    """Cumulative attention diagonality (CAD) of each head: 1 for the identity, 2/3 for a uniform map of large T.

    ``C(r) = 1/T sum_i sum_{|i - j| <= r (T - 1)} A[i, j]``, CAD its integral over r in [0, 1]. C is a step function, so
    the integral is exactly ``1/T sum_ij A[i, j] (1 - |i - j| / (T - 1))``.

    Parameters
    ----------
    weights : array, shape (B, H, R, T)
        Rows that sum to 1.
    rows : array of int, shape (R,), optional
        The query position of each row; default 0 to R - 1.

    Returns
    -------
    cad : array, shape (H,)
        Mean over the batch. Normalisation as in the formula; that of the paper is not confirmed.
    """
    length = weights.shape[3]
    positions = np.arange(weights.shape[2]) if rows is None else np.asarray(rows)
    distance = np.abs(positions[:, None] - np.arange(length)[None, :])  # (R, T)
    nearness = 1.0 - distance / max(length - 1, 1)
    return (weights * nearness).sum(axis=-1).mean(axis=(0, 2))


def map_similarity(maps: list[Array]) -> Array:
    """How alike the maps of two layers are: cosine of the flattened maps, head by head, mean over heads and batch.

    Parameters
    ----------
    maps : list of array, shape (B, H, R, T)

    Returns
    -------
    similarity : array, shape (L, L)
        1 on the diagonal. Head h is compared with head h, because reuse hands it to head h.
    """
    flat = [weights.reshape(*weights.shape[:2], -1) for weights in maps]  # (B, H, R T)
    unit = [w / np.maximum(np.linalg.norm(w, axis=-1, keepdims=True), np.finfo(w.dtype).tiny) for w in flat]
    return np.array([[(a * b).sum(axis=-1).mean() for b in unit] for a in unit])


def suggest_groups(similarity: Array, compute_layers: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive groups of layers that could share a map, most similar neighbours first.

    Starts with every layer alone and joins, again and again, the two neighbouring groups whose layers are most like the
    first layer of the left one (the least likeness within the joined group decides), until `compute_layers` are left.

    Parameters
    ----------
    similarity : array, shape (L, L)
        From `map_similarity`.
    compute_layers : int
        Layers that shall still compute a map, 1 to L.

    Returns
    -------
    groups : tuple of tuple of int
        As the parameter ``reuse.groups`` takes them.
    """
    layers = len(similarity)
    if not 1 <= compute_layers <= layers:
        raise ConfigError(f"compute_layers={compute_layers}; the model has {layers} layers")
    groups: list[tuple[int, ...]] = [(layer,) for layer in range(layers)]

    def likeness(left: int) -> Any:
        joined = groups[left] + groups[left + 1]
        return similarity[joined[0], list(joined[1:])].min()

    while len(groups) > compute_layers:
        best = max(range(len(groups) - 1), key=likeness)
        groups[best : best + 2] = [groups[best] + groups[best + 1]]
    return tuple(groups)
