"""Attention map reuse across layers (Shim, Choi, Sung, arXiv 2301.12444; ICLR 2022).

The first layer c of a group computes its map, every other layer r of the group takes it:

    compute layer:  A_h = softmax(Q_h K_hᵀ / sqrt(D) + mask),   Y_c = [A_1 V_1, ..., A_H V_H] Woᵀ
    reuse layer:    Y_r = [A_1 (X_r Wv_1ᵀ), ..., A_H (X_r Wv_Hᵀ)] Woᵀ

A reuse layer has no query, no key, no scores, no softmax and no relative-position term. Partial reuse (Reuse
Transformers, arXiv 2110.06821): the first P heads take a shared map, the others compute their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refimpl.cache import Stored
from refimpl.components import QKV, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.dense import Dense
from refimpl.methods.steps import (
    Layer,
    logits,
    place_keys,
    place_queries,
    project_output,
    seen_keys,
    seen_values,
)  # fmt: skip
from refimpl.parameters.reuse import ReuseParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights, rows_of


class Reuse(Dense):
    """`shared` holds, per group, what its compute layer passed on: probabilities, or scores before softmax."""

    parameters: ReuseParameters

    def __init__(self, config: ModelConfig, parameters: ReuseParameters) -> None:
        super().__init__(config, parameters)
        self.leaders = parameters.leaders(config.layers)
        self.shared: dict[int, Array] = {}  # compute layer -> (B, H, T, T)

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: ReuseParameters) -> Weights:
        """Reuse layers without the weights of what they do not compute."""
        leaders, kept = parameters.leaders(config.layers), parameters.kept_heads(config)
        layers = list(weights.layers)
        for index, leader in enumerate(leaders):
            if leader != index:
                layers[index] = layers[index].but(
                    attention=_without_reused_heads(layers[index].attention, config, kept, parameters)
                )
        return weights.but(layers=layers)

    def stored(self) -> Sequence[Stored]:
        c, kept = self.config, self.parameters.kept_heads(self.config)
        return tuple(
            Stored(c.kv_heads if leader == index else kept, c.kv_heads, c.head_dim)
            for index, leader in enumerate(self.leaders)
        )

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        leader = self.leaders[layer.index]
        computes = leader == layer.index
        context = self._compute(at, x, layer) if computes else self._reuse(at, x, layer, leader)
        if leader not in self.leaders[layer.index + 1 :]:
            self.shared.pop(leader, None)  # the last layer of a group drops its map
        if not computes and not self.parameters.output_projection:
            return at(WEIGHTED_SUM).merge_heads(context)
        return project_output(at, context, layer)

    def _compute(self, at: At, x: Array, layer: Layer) -> Array:
        q, k, v = self.whole.project(at, x, layer)
        if self.parameters.share == "probabilities":
            weights = self.shared[layer.index] = self.whole.attention_map(at, q, k, layer)  # (B, H, T, T)
        else:
            scores = self.shared[layer.index] = logits(at, q, k, layer)  # (B, H, T, T)
            weights = at(SOFTMAX).softmax(scores, layer.causal)
            del scores
        return at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)  # (B, H, T, D)

    def _reuse(self, at: At, x: Array, layer: Layer, leader: int) -> Array:
        kept = self.parameters.kept_heads(self.config)
        if kept:
            return self._reuse_part(at, x, layer, leader, self.config.heads - kept)
        v = _project_values(at, x, layer)  # (B, Hkv, S, D)
        weights = self._probabilities(at, self.shared[leader], layer)
        return at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)

    def _reuse_part(self, at: At, x: Array, layer: Layer, leader: int, reused: int) -> Array:
        """Heads [0, P) take the first P shared maps, heads [P, H) compute theirs."""
        new = slice(reused, self.config.heads)
        shared = self.shared[leader][:, :reused, :, :]  # (B, P, T, T)
        q, k, v = _project_some_heads(at, x, layer, reused)
        k = seen_keys(at, place_keys(at, k, layer), layer)  # (B, H - P, S, D)
        own = layer if layer.mask is None else replace(layer, mask=_of_heads(layer.mask, new))
        scores = logits(at, place_queries(at, q, layer, new), k, own, new)
        weights = at(SOFTMAX).softmax(scores, layer.causal)  # (B, H - P, T, T)
        taken = self._probabilities(at, shared, layer)
        context = (
            at(WEIGHTED_SUM).weighted_sum(taken, v[:, :reused, :, :], layer.causal),
            at(WEIGHTED_SUM).weighted_sum(weights, v[:, reused:, :, :], layer.causal),
        )
        if self._passes_on(layer.index, leader):
            emitted = weights if self.parameters.share == "probabilities" else scores
            self.shared[leader] = at(SOFTMAX).concat((emitted, shared), axis=1)  # [new, reused]: the head order rotates
        return at(WEIGHTED_SUM).concat(context, axis=1)  # (B, H, T, D)

    def _probabilities(self, at: At, shared: Array, layer: Layer) -> Array:
        if self.parameters.share == "probabilities":
            return shared
        return at(SOFTMAX).softmax(shared, layer.causal)

    def _passes_on(self, index: int, leader: int) -> bool:
        """Whether a later layer of the group reads what this one emits."""
        return self.parameters.head_order == "rotate" and leader in self.leaders[index + 1 :]


def _project_values(at: At, x: Array, layer: Layer) -> Array:
    """``V = x Wvᵀ`` as heads: the only projection of a full reuse layer."""
    qkv = layer.weights.attention.qkv
    v = at(QKV).split_heads(at(QKV).linear(x, qkv.weight, qkv.bias), layer.config.kv_heads)  # (B, Hkv, T, D)
    return seen_values(at, v, layer)


def _project_some_heads(at: At, x: Array, layer: Layer, reused: int) -> tuple[Array, Array, Array]:
    """Q and K of heads [P, H) and V of all heads."""
    config, qkv = layer.config, layer.weights.attention.qkv
    kept = (config.heads - reused) * config.head_dim
    q, k, v = at(QKV).project(x, qkv.weight, qkv.bias, (kept, kept, config.d_attention))  # (B, T, (H - P) D) twice
    return q, k, seen_values(at, at(QKV).split_heads(v, config.heads), layer)


def _of_heads(mask: Array, heads: slice) -> Array:
    """The part of a broadcastable mask that concerns these heads."""
    return mask if mask.shape[1] == 1 else mask[:, heads, :, :]


def _without_reused_heads(w: Weights, config: ModelConfig, kept: int, parameters: ReuseParameters) -> Weights:
    """The weights of a reuse layer: rows of Wq and Wk for `kept` heads, all of Wv."""
    d, d_kv = config.d_attention, config.d_kv
    skipped = d - kept * config.head_dim
    rows = [slice(d + d_kv, d + 2 * d_kv)]
    if kept:  # one key head per query head
        rows = [slice(skipped, d), slice(d + skipped, 3 * d)]
    found = w.but(qkv=rows_of(w.qkv, rows))
    unused = [] if kept else ["position", "content_bias", "position_bias"]
    unused += [] if parameters.output_projection else ["output"]
    return Weights(**{name: value for name, value in vars(found).items() if name not in unused})
