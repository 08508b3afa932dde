"""Exact attention with the map materialised: ``softmax(Q Kᵀ / sqrt(D) + mask) V`` (arXiv 1706.03762, eq. 1).

The other programs change single steps of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from refimpl.cache import Stored
from refimpl.components import HEAD, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.steps import Layer, Queries, feed_forward, logits, project_heads, project_output
from refimpl.methods.subject import Subject
from refimpl.recorder import At
from refimpl.weights.layout import Weights


class Dense:
    """One forward pass; a fresh instance per pass, so that a method may keep state from layer to layer."""

    composite: Callable[[], Dense | None] | None = None  # a weak reference: arrays are freed without a collector

    def __init__(self, config: ModelConfig, parameters: Any) -> None:
        self.config = config
        self.parameters = parameters

    @property
    def whole(self) -> Dense:
        """The program whose steps run: this one, or the combination of methods that it is part of."""
        return (self.composite() if self.composite else None) or self

    @classmethod
    def complete(cls, parameters: Any, subject: Subject) -> Any:
        """The parameters with what has to be found first, as a sharing strategy; by default as they are."""
        return parameters

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: Any) -> Weights:
        """The weights as this method reads them, from those of the exact model; by default the same."""
        return weights

    def stored(self) -> Sequence[Stored]:
        """What each layer keeps of a position in a cache."""
        return (Stored(self.config.kv_heads, self.config.kv_heads, self.config.head_dim),) * self.config.layers

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        """The attention sublayer: (B, T, d) -> (B, T, d)."""
        q, k, v = self.whole.project(at, x, layer)
        return project_output(at, self.whole.context(at, q, k, v, layer), layer)

    def project(self, at: At, x: Array, layer: Layer) -> tuple[Queries, Array, Array]:
        """Queries of the new positions, keys and values of all that are seen."""
        return project_heads(at, x, layer)

    def context(self, at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
        """The map times the values: (B, H, T, D)."""
        weights = self.whole.attention_map(at, q, k, layer)  # (B, H, T, S)
        return at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)

    def attention_map(self, at: At, q: Queries, k: Array, layer: Layer) -> Array:
        """``softmax(scale q kᵀ + mask)``: (B, H, T, S); S keys, which are T without a cache."""
        return at(SOFTMAX).softmax(logits(at, q, k, layer), layer.causal)

    def feed_forward(self, at: At, x: Array, weights: Weights, layer: Layer) -> Array:
        """The feed-forward sublayer: (B, T, d) -> (B, T, d)."""
        return feed_forward(at, x, weights, layer.config)

    def head(self, at: At, x: Array, weights: Weights) -> Array:
        """The tied language head: (B, T, d) -> (B, T, V)."""
        return at(HEAD).linear(x, weights.stem.embedding)
