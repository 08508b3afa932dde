"""KVSharer: layer-wise sharing of keys and values (Yang et al., arXiv 2410.18517).

A shared layer i takes the keys and values of an earlier layer j = source(i), which the method found to be dissimilar:

    own layer:     O_j = softmax(Q_j K_jᵀ / sqrt(D) + mask) V_j Wo_jᵀ
    shared layer:  O_i = softmax(Q_i K_jᵀ / sqrt(D) + mask) V_j Wo_iᵀ

Queries, output projection and feed-forward of a shared layer are its own. Its keys and values are neither computed nor
kept in a cache; those of its source are read once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refimpl.cache import Stored
from refimpl.components import QKV
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError
from refimpl.methods.dense import Dense
from refimpl.methods.flash import fused_context
from refimpl.methods.steps import Layer, Queries, place_keys, place_queries, project_heads
from refimpl.methods.subject import Subject
from refimpl.parameters.kvsharer import KVSharerParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights, rows_of


class KVSharer(Dense):
    """`kept` holds keys and values of layers that later ones take: with a cache they are views of it."""

    parameters: KVSharerParameters

    def __init__(self, config: ModelConfig, parameters: KVSharerParameters) -> None:
        super().__init__(config, parameters)
        if not parameters.is_complete(config):
            raise ConfigError(
                f"which {parameters.count(config)} layers share is not known yet: let Runner.prepare search on inputs, "
                "or give strategy"
            )
        self.sources = parameters.sources(config)
        self.kept: dict[int, tuple[Array, Array]] = {}  # layer -> keys and values (B, Hkv, S, D)

    @classmethod
    def complete(cls, parameters: KVSharerParameters, subject: Subject) -> KVSharerParameters:
        """With the strategy that is searched on the subject's inputs, where none is given."""
        if parameters.is_complete(subject.model.config):
            return parameters
        from refimpl.preparation.kvsharer import search_strategy

        return replace(parameters, strategy=search_strategy(parameters, subject))

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: KVSharerParameters) -> Weights:
        """Shared layers without Wk and Wv, unless they are to be kept."""
        if not parameters.drop_projections:
            return weights
        layers = [
            layer if source == index else layer.but(attention=_without_keys_and_values(layer.attention, config))
            for index, (layer, source) in enumerate(zip(weights.layers, parameters.sources(config), strict=True))
        ]
        return weights.but(layers=layers)

    def stored(self) -> Sequence[Stored]:
        """Nothing for a shared layer."""
        own, none = (Stored(heads, heads, self.config.head_dim) for heads in (self.config.kv_heads, 0))
        return tuple(own if source == index else none for index, source in enumerate(self.sources))

    def project(self, at: At, x: Array, layer: Layer) -> tuple[Queries, Array, Array]:
        source, later = self.sources[layer.index], self.sources[layer.index + 1 :]
        if source == layer.index:
            q, k, v = self.project_own(at, x, layer)
            self.kept[source] = k, v
        else:
            q = self._project_queries(at, x, layer)
            k, v = self.kept[source]
        if source not in later:
            del self.kept[source]  # its last use
        return q, k, v

    def project_own(self, at: At, x: Array, layer: Layer) -> tuple[Queries, Array, Array]:
        """Q, K and V of a layer that has its own."""
        return project_heads(at, x, layer)

    def _project_queries(self, at: At, x: Array, layer: Layer) -> Queries:
        """``Q = x Wqᵀ`` alone; or with K and V, which are discarded after K was rotated."""
        config, qkv = self.config, layer.weights.attention.qkv
        if self.parameters.drop_projections:
            q = at(QKV).linear(x, qkv.weight, qkv.bias)  # (B, T, H D)
        else:
            q, k, _ = at(QKV).project(x, qkv.weight, qkv.bias, (config.d_attention, config.d_kv, config.d_kv))
            place_keys(at, k, layer)
        return place_queries(at, q, layer)

    def context(self, at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
        if self.parameters.fused:
            return fused_context(at, q, k, v, layer)
        return super().context(at, q, k, v, layer)


def _without_keys_and_values(w: Weights, config: ModelConfig) -> Weights:
    return w.but(qkv=rows_of(w.qkv, [slice(0, config.d_attention)]))
