"""Exact attention as one fused op that never holds the map (FlashAttention, arXiv 2205.14135; online softmax,
arXiv 1805.02867). The same function as ``dense``, other traffic."""

from __future__ import annotations

from refimpl.components import ATTENTION
from refimpl.engines.protocol import Array
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, Queries, position_keys
from refimpl.recorder import At


class Flash(Dense):
    """``dense`` with scores, softmax and weighted sum in one op."""

    def context(self, at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
        return fused_context(at, q, k, v, layer)


def fused_context(at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
    """``softmax(scale q kᵀ + mask) v``, with the relative-position term where the model has one: (B, H, T, D)."""
    ops = at(ATTENTION)
    if q.position is None:
        return ops.attention(q.content, k, v, layer.scale, layer.causal, layer.mask)
    p = position_keys(at, layer)[0, :, :, :]  # (H, 2T - 1, D)
    return ops.relative_attention(q.content, q.position, k, v, p, layer.scale, layer.causal, layer.mask)
