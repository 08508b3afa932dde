"""Folding attention (Li et al., arXiv 2309.07988): a position of width d as n parts of width d / n.

    fold(X):  X'[t n + j] = X[t, j d/n : (j + 1) d/n]     a reshape, no copy
    attention: Y = unfold(attention'(fold(X)))            weights d/n wide, the same for all parts
    feed-forward: Y = unfold(feed_forward'(fold(X)))      d/n -> f/n -> d/n

A folded sublayer is an ordinary sublayer of a model that is d/n wide and has n times the positions; parts of all
visible positions attend to each other, and mix nowhere else. Heads, mask and feed-forward are our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refimpl.cache import Stored
from refimpl.components import FEED_FORWARD, OUTPUT, POSITIONS, QKV, SCORES
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array, Engine
from refimpl.errors import UnsupportedError
from refimpl.methods.dense import Dense
from refimpl.methods.flash import Flash
from refimpl.methods.steps import Layer, feed_forward
from refimpl.parameters.folding import FoldingParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights, rows_of


class Folding(Dense):
    """`masks` and `tables` hold, per n, what all layers folded by n read: made once per pass."""

    parameters: FoldingParameters

    def __init__(self, config: ModelConfig, parameters: FoldingParameters) -> None:
        super().__init__(config, parameters)
        self.folds = parameters.attention_folds(config.layers)
        self.feed_forward_folds = parameters.feed_forward_folds(config.layers)
        self.exact = (Flash if parameters.fused else Dense)(config, None)
        self.masks: dict[int, Array | None] = {}
        self.tables: dict[int, tuple[Array, ...]] = {}

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: FoldingParameters) -> Weights:
        """Of each folded map the mean of the n blocks on its diagonal: our reading, for weights not trained folded."""
        folds = parameters.attention_folds(config.layers), parameters.feed_forward_folds(config.layers)
        if {*folds[0], *folds[1]} == {1}:
            return weights
        layers = [_folded(layer, config, parameters, *of) for layer, *of in zip(weights.layers, *folds, strict=True)]
        return weights.but(layers=layers)

    def stored(self) -> Sequence[Stored]:
        """n rows per position where a layer folds: as many elements as without."""
        shapes = [self.parameters.attention_shape(self.config, n) for n in self.folds]
        return tuple(Stored(c.kv_heads, c.kv_heads, c.head_dim, n) for c, n in zip(shapes, self.folds, strict=True))

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        n = self.folds[layer.index]
        if n == 1:
            return self.exact.attention(at, x, layer)
        inside = self._folded_layer(at, layer, n, x.shape[1])
        return unfold(at(OUTPUT), self.exact.attention(at, fold(at(QKV), x, n), inside), n)

    def feed_forward(self, at: At, x: Array, weights: Weights, layer: Layer) -> Array:
        n = self.feed_forward_folds[layer.index]
        if n == 1:
            return super().feed_forward(at, x, weights, layer)
        ops, shape = at(FEED_FORWARD), self.parameters.feed_forward_shape(self.config, n)
        return unfold(ops, feed_forward(at, fold(ops, x, n), weights, shape), n)

    def _folded_layer(self, at: At, layer: Layer, n: int, length: int) -> Layer:
        """What an attention sublayer over parts knows beside its input."""
        if n not in self.masks:
            self.masks[n] = self._folded_mask(at, layer, n, length)
            self.tables[n] = tuple(_folded_table(at, table, self.parameters.heads, n) for table in layer.tables)
        shape = self.parameters.attention_shape(layer.config, n)
        strict = layer.causal and self.parameters.mask == "subtoken"
        return replace(layer, config=shape, causal=strict, mask=self.masks[n], tables=self.tables[n])

    def _folded_mask(self, at: At, layer: Layer, n: int, length: int) -> Array | None:
        """``kron(M, ones(n, n))`` of the causal mask and of a given one; None where every part sees all."""
        past = 0 if layer.cache is None else layer.cache.past
        mask = None if layer.mask is None else at(SCORES).to_numpy(layer.mask)
        if layer.causal and self.parameters.mask == "frame" and length > 1:  # one new position sees all
            seen = np.tri(length, past + length, past, dtype=bool)[None, None, :, :]  # (1, 1, T, S)
            mask = seen if mask is None else mask & seen
        if mask is None:
            return None
        shape = self.parameters.attention_shape(layer.config, n)
        if mask.shape[1] not in (1, shape.heads):
            raise UnsupportedError(
                f"the mask is for {mask.shape[1]} heads; a layer folded by {n} has {shape.heads}: give one mask for all"
            )
        for axis in (2, 3):
            if mask.shape[axis] > 1:
                mask = np.repeat(mask, n, axis)
        return at(SCORES).asarray(mask)


def fold(ops: Engine, x: Array, n: int) -> Array:
    """(B, T, d) as (B, T n, d / n): row t n + j is part j of position t. A view."""
    batch, length, width = x.shape
    return ops.reshape(x, (batch, length * n, width // n))


def unfold(ops: Engine, x: Array, n: int) -> Array:
    """(B, T n, d / n) as (B, T, d), the inverse of `fold`. A view."""
    batch, rows, width = x.shape
    return ops.reshape(x, (batch, rows // n, width * n))


def _folded_table(at: At, table: Array, heads: str, n: int) -> Array:
    """Rotary cosines or sines (T, D / 2) for parts: those of their position, (T n, D' / 2).

    Where heads are n times narrower, pair i of D' / 2 turns at the rate of pair i n: base ** (-2 i / D').
    """
    pairs = table[:, ::n] if heads == "keep-count" else table
    ops = at(POSITIONS)
    repeated = ops.concat((pairs,) * n, axis=1)  # (T, n D' / 2)
    return ops.reshape(repeated, (pairs.shape[0] * n, pairs.shape[1]))


# --- weights ------------------------------------------------------------------------------------------------------


def _folded(
    layer: Weights, config: ModelConfig, parameters: FoldingParameters, of_attention: int, of_feed_forward: int
) -> Weights:
    """A layer whose attention and feed-forward fold by these factors."""
    changed = {}
    if of_attention > 1:
        changed["attention"] = _folded_attention(layer.attention, config, of_attention)
    if of_feed_forward > 1:
        shape = parameters.feed_forward_shape(config, of_feed_forward)
        for name in ("first_feed_forward", "feed_forward"):
            if hasattr(layer, name):
                changed[name] = _folded_feed_forward(getattr(layer, name), config, of_feed_forward, shape)
    return layer.but(**changed)


def _folded_attention(w: Weights, config: ModelConfig, n: int) -> Weights:
    """Q, K and V fold one by one. Part j of the queries comes from rows j H D / n to (j + 1) H D / n of Wq."""
    d, d_kv = config.d_attention, config.d_kv
    parts = [slice(0, d), slice(d, d + d_kv), slice(d + d_kv, d + 2 * d_kv)]
    return w.but(qkv=_joined([_tied(rows_of(w.qkv, [rows]), n) for rows in parts]), output=_tied(w.output, n))


def _folded_feed_forward(w: Weights, config: ModelConfig, n: int, shape: ModelConfig) -> Weights:
    """Gate and up fold one by one. A smaller `ffn_hidden` keeps the first units of a part, a greater one adds zeros."""
    parts = [slice(row, row + config.d_ff) for row in range(0, len(w.up.weight), config.d_ff)]
    up = [_resized(_tied(rows_of(w.up, [rows]), n), shape.d_ff, shape.d_model) for rows in parts]
    return w.but(up=_joined(up), down=_resized(_tied(w.down, n), shape.d_model, shape.d_ff))


def _tied(linear: Weights, n: int) -> Weights:
    """The W' for which ``I_n (x) W'`` is nearest to W in the Frobenius norm: the mean of W's diagonal blocks."""

    def mean_of_blocks(array: Array) -> Array:
        sizes = [size // n for size in array.shape]
        blocks = [array[tuple(slice(j * size, (j + 1) * size) for size in sizes)] for j in range(n)]
        return np.mean(blocks, axis=0)

    return Weights(**{name: mean_of_blocks(array) for name, array in vars(linear).items()})


def _joined(parts: Sequence[Weights]) -> Weights:
    """Linear maps of one input as one map, their outputs one after the other."""
    return Weights(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def _resized(linear: Weights, d_out: int, d_in: int) -> Weights:
    """The map cut, or widened by zeros, to these sizes."""

    def resized(array: Array) -> Array:
        found = np.zeros((d_out, d_in)[: array.ndim], array.dtype)
        common = tuple(slice(0, min(sizes)) for sizes in zip(array.shape, found.shape, strict=True))
        found[common] = array[common]
        return found

    return Weights(**{name: resized(array) for name, array in vars(linear).items()})
