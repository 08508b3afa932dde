"""Which heads have alike weights (Cao, Yang, Zhao, arXiv 2402.11819; the authors' ``find_match.py`` at de44feb).

    m(l, h) = max over l' < l and h' of  phi(l, h) . phi(l', h') / (|phi(l, h)| |phi(l', h')|)

phi is a head's slice of Wq and Wk, flattened, or another choice of slices. All heads are compared at once, block by
block of the model's width, so that every weight is read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.subject import Progress
from refimpl.parameters.headshare import require_a_key_head_each
from refimpl.weights.layout import Weights

PARTS = {"q": (0,), "k": (1,), "v": (2,), "qk": (0, 1), "qkv": (0, 1, 2), "total": (2,)}  # of Q, K, V
BLOCK = 2**24  # numbers of all heads compared in one product: 128 MiB in float64


class Match(NamedTuple):
    """A head, the head of an earlier layer whose weights are most alike, and their cosine."""

    layer: int
    head: int
    source_layer: int
    source_head: int
    cosine: float


def find_matches(
    weights: Weights, config: ModelConfig, match: str = "qk", progress: Progress | None = None
) -> tuple[Match, ...]:
    """The best match of every head of layers 1 to L - 1, the largest cosine first.

    Parameters
    ----------
    weights : Weights
        Of the exact model, as NumPy arrays.
    config : ModelConfig
        With as many key heads as query heads.
    match : {"q", "k", "v", "qk", "qkv", "total"}
        What is compared.
    progress : callable, optional
        Told of each block.

    Returns
    -------
    matches : tuple of Match
        (L - 1) H of them. Of equally good sources the first counts: the lowest layer, and in it the lowest head. Of
        equal cosines the lower layer comes first, and in it the higher head, as from the repository's sort, which
        rises and is stable over layers L - 1 to 1.

    Raises
    ------
    ConfigError
        If query heads share key heads.
    """
    similar, heads = cosines(weights, config, match, progress), config.heads
    found = []
    for layer in range(config.layers - 1, 0, -1):
        rows = similar[layer * heads : (layer + 1) * heads, : layer * heads]  # (H, l H): strictly earlier layers
        best = rows.argmax(axis=1)
        for head, source in enumerate(best.tolist()):
            found.append(Match(layer, head, source // heads, source % heads, float(rows[head, source])))
    return tuple(sorted(found, key=lambda one: one.cosine)[::-1])


def cosines(
    weights: Weights, config: ModelConfig, match: str = "qk", progress: Progress | None = None, block: int = BLOCK
) -> Array:
    """The cosine of every two heads: (L H, L H), float64; 0 where a head is all zeros.

    Sums are taken in float64: best cosines of large models differ in the fourth decimal, and a sum of 2 D d float32
    products would blur them.

    Parameters
    ----------
    weights, config, match, progress
        As in `find_matches`.
    block : int
        Numbers compared in one product: one float64 array of about this many numbers is made, beside 16 (L H)^2 bytes
        of results, and L H D^2 numbers with ``match="total"``.

    Raises
    ------
    ConfigError
        If query heads share key heads.
    """
    require_a_key_head_each(config)
    heads, width = config.layers * config.heads, config.d_model
    columns = max(1, block // (heads * len(PARTS[match]) * config.head_dim))
    mixing = _mixing(weights, config) if match == "total" else None
    products = np.zeros((heads, heads))
    for first in range(0, width, columns):
        if progress:
            progress(f"matching {heads} heads", first / width)
        x = _features(weights, config, PARTS[match], slice(first, first + columns), mixing)  # (L H, F)
        products += x @ x.T
    norms = np.sqrt(products.diagonal())
    norms = np.where(norms > 0.0, norms, 1.0)
    return products / norms[:, None] / norms


def head_rows(layer: Weights, config: ModelConfig) -> Array:
    """A layer's slices of Wq, Wk and Wv: (3, H, D, d), a view."""
    return layer.attention.qkv.weight.reshape(3, config.heads, config.head_dim, -1)


def _features(
    weights: Weights, config: ModelConfig, parts: Sequence[int], columns: slice, mixing: Array | None
) -> Array:
    """These columns of what is compared, a row a head: (L H, F), float64."""
    wanted = len(range(*columns.indices(config.d_model)))
    x = np.empty((config.layers, config.heads, len(parts), config.head_dim, wanted))
    for found, layer in zip(x, weights.layers, strict=True):
        found[:] = head_rows(layer, config)[list(parts), :, :, columns].swapaxes(0, 1)
    if mixing is not None:
        x = mixing[:, :, None] @ x
    return x.reshape(config.layers * config.heads, -1)


def _mixing(weights: Weights, config: ModelConfig) -> Array:
    """``softmax(Wq_h Wk_hᵀ / sqrt(d))`` of every head: (L, H, D, D), float64; d is the length of a row of Wq."""
    maps = []
    for layer in weights.layers:
        q, k, _ = head_rows(layer, config).astype(np.float64)  # (H, D, d)
        scores = q @ k.swapaxes(1, 2) / math.sqrt(config.d_model)  # (H, D, D)
        powers = np.exp(scores - scores.max(axis=2, keepdims=True))
        maps.append(powers / powers.sum(axis=2, keepdims=True))
    return np.stack(maps)
