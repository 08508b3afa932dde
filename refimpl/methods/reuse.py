"""Attention map reuse across layers (Shim, Choi, Sung, arXiv 2301.12444; ICLR 2022).

The first layer c of a group computes its map, every other layer r of the group takes it:

    compute layer:  A_h = softmax(Q_h K_hᵀ / sqrt(D) + mask),   Y_c = [A_1 V_1, ..., A_H V_H] Woᵀ
    reuse layer:    Y_r = [A_1 (X_r Wv_1ᵀ), ..., A_H (X_r Wv_Hᵀ)] Woᵀ

A reuse layer has no query, no key, no scores, no softmax and no relative-position term. Partial reuse (Reuse
Transformers, arXiv 2110.06821): the first P heads take a shared map, the others compute their own.
"""

from __future__ import annotations

from refimpl.components import QKV, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, logits, place_keys, place_queries, project_heads, project_output
from refimpl.parameters import ReuseParameters
from refimpl.recorder import At


class Reuse(Dense):
    """`shared` holds, per group, what its compute layer passed on: probabilities, or scores before softmax."""

    parameters: ReuseParameters

    def __init__(self, config: ModelConfig, parameters: ReuseParameters) -> None:
        super().__init__(config, parameters)
        self.leaders = parameters.leaders(config.layers)
        self.shared: dict[int, Array] = {}  # compute layer -> (B, H, T, T)

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
        q, k, v = project_heads(at, x, layer)
        scores = logits(at, q, k, layer)  # (B, H, T, T)
        weights = at(SOFTMAX).softmax(scores, layer.causal)
        self.shared[layer.index] = weights if self.parameters.share == "probabilities" else scores
        del scores
        return at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)  # (B, H, T, D)

    def _reuse(self, at: At, x: Array, layer: Layer, leader: int) -> Array:
        kept = self.parameters.kept_heads(self.config)
        if kept:
            return self._reuse_part(at, x, layer, leader, self.config.heads - kept)
        v = _project_values(at, x, layer)  # (B, Hkv, T, D)
        weights = self._probabilities(at, self.shared[leader], layer)
        return at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)

    def _reuse_part(self, at: At, x: Array, layer: Layer, leader: int, reused: int) -> Array:
        """Heads [0, P) take the first P shared maps, heads [P, H) compute theirs."""
        new = slice(reused, self.config.heads)
        shared = self.shared[leader][:, :reused, :, :]  # (B, P, T, T)
        q, k, v = _project_some_heads(at, x, layer, reused)
        scores = logits(at, place_queries(at, q, layer, new), place_keys(at, k, layer), layer, new)
        weights = at(SOFTMAX).softmax(scores, layer.causal)  # (B, H - P, T, T)
        taken = self._probabilities(at, shared, layer)
        context = (
            at(WEIGHTED_SUM).weighted_sum(taken, v[:, :reused, :, :], layer.causal),
            at(WEIGHTED_SUM).weighted_sum(weights, v[:, reused:, :, :], layer.causal),
        )
        if self._passes_on(layer.index, leader):
            own = weights if self.parameters.share == "probabilities" else scores
            self.shared[leader] = at(SOFTMAX).concat((own, shared), axis=1)  # [new, reused]: the head order rotates
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
    qkv, d_kv = layer.weights.attention.qkv, layer.config.d_kv
    bias = None if qkv.bias is None else qkv.bias[-d_kv:]
    return at(QKV).split_heads(at(QKV).linear(x, qkv.weight[-d_kv:, :], bias), layer.config.kv_heads)


def _project_some_heads(at: At, x: Array, layer: Layer, reused: int) -> tuple[Array, Array, Array]:
    """Q and K of heads [P, H) and V of all heads; K and V rows adjoin, so they are one product."""
    config, qkv = layer.config, layer.weights.attention.qkv
    d, skipped = config.d_attention, reused * config.head_dim
    queries, others = slice(skipped, d), slice(d + skipped, 3 * d)
    bias_q, bias_kv = (None, None) if qkv.bias is None else (qkv.bias[queries], qkv.bias[others])
    q = at(QKV).linear(x, qkv.weight[queries, :], bias_q)  # (B, T, (H - P) D)
    k, v = at(QKV).project(x, qkv.weight[others, :], bias_kv, (d - skipped, d))
    return q, k, at(QKV).split_heads(v, config.heads)
