"""Narrow attention: heads of width D' < D, with the weights that come nearest to those of the exact model.

    Q_h', K_h', V_h' = X Wq_h'ᵀ, X Wk_h'ᵀ, X Wv_h'ᵀ        (T, D')
    Y = sum over h of softmax(Q_h' K_h'ᵀ / sqrt(D') + mask) V_h' Wo_h'ᵀ

Scores are x Wq_hᵀ Wk_h yᵀ: what counts of a head is the matrix Wq_hᵀ Wk_h of rank D, and of its values Wv_hᵀ Wo_hᵀ.
Each is replaced by the nearest matrix of rank D' in the Frobenius norm, its truncated singular value decomposition
(Eckart, Young, Psychometrika 1936). Biases take part as weights of a further input, 1. Query heads that share a key
head are decomposed together. With relative positions keys and projected offsets meet the same queries and are
decomposed together, too. The projection is our reading, for weights that were not trained narrow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.smaller import Smaller
from refimpl.parameters.narrow import NarrowParameters
from refimpl.weights.layout import Weights


class Narrow(Smaller):
    """Exact attention of narrower heads."""

    parameters: NarrowParameters

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: NarrowParameters) -> Weights:
        """Weights of width D' with scores and outputs nearest to those of width D."""
        if parameters.is_off(config):
            return weights
        width = parameters.shape(config).head_dim
        return weights.but(
            layers=[layer.but(attention=_narrowed(layer.attention, config, width)) for layer in weights.layers]
        )


def truncated(left: Array, right: Array, width: int) -> tuple[Array, Array]:
    """A and B, (D, D') each, with ``left A Bᵀ rightᵀ`` the nearest matrix of rank D' to ``left rightᵀ``.

    ``left = Q1 R1`` and ``right = Q2 R2`` (thin) give ``left rightᵀ = Q1 (U S Vᵀ) Q2ᵀ`` with the decomposition of the
    small matrix ``R1 R2ᵀ``; A = R2ᵀ V S^(-1/2) and B = R1ᵀ U S^(-1/2), of the D' largest singular values.
    """
    r1, r2 = (np.asarray(np.linalg.qr(matrix, mode="r")) for matrix in (left, right))  # (D, D) or flatter
    u, s, vt = np.linalg.svd(r1 @ r2.T, full_matrices=False)
    kept = min(width, len(s))
    tiny = np.finfo(np.float64).eps * s[0] * max(left.shape + right.shape)
    inverse = np.where(s[:kept] > tiny, 1 / np.sqrt(np.maximum(s[:kept], tiny or 1.0)), 0.0)  # no direction, no weight
    a, b = np.zeros((left.shape[1], width)), np.zeros((left.shape[1], width))
    a[:, :kept], b[:, :kept] = r2.T @ vt[:kept].T * inverse, r1.T @ u[:, :kept] * inverse
    return a, b


def _narrowed(w: Weights, config: ModelConfig, width: int) -> Weights:
    """The attention sublayer's weights, key head by key head."""
    heads = [_HeadGroup(w, config, g) for g in range(config.kv_heads)]
    parts = [head.narrowed(width) for head in heads]
    dtype = w.qkv.weight.dtype

    def joined(name: str, axis: int = 0) -> Array:
        return np.ascontiguousarray(np.concatenate([part[name] for part in parts], axis), dtype)

    qkv = [np.concatenate([joined(name) for name in ("q", "k", "v")])]
    bias = [np.concatenate([joined(name) for name in ("q_bias", "k_bias", "v_bias")])] if config.bias else []
    changed = {
        "qkv": Weights(**dict(zip(("weight", "bias"), qkv + bias, strict=False))),
        "output": w.output.but(weight=joined("output", 1)),
    }
    if config.position == "relative":
        changed["position"] = w.position.but(weight=joined("position"))
        changed |= {name: joined(name) for name in ("content_bias", "position_bias")}
    return w.but(**changed)


class _HeadGroup:
    """A key head and the G query heads that share it, in float64; rows of a matrix are those of a head."""

    def __init__(self, w: Weights, config: ModelConfig, index: int) -> None:
        self.config, self.w = config, w
        width, group = config.head_dim, config.heads // config.kv_heads
        self.of_queries = slice(index * group * width, (index + 1) * group * width)
        first = config.d_attention + index * width
        self.of_keys = slice(first, first + width)
        self.of_values = slice(first + config.d_kv, first + config.d_kv + width)

    def narrowed(self, width: int) -> dict[str, Array]:
        """Every matrix and vector of these heads, with D' for D."""
        return {**self._scores(width), **self._values(width)}

    def _scores(self, width: int) -> dict[str, Array]:
        q, q_bias = self._stacked(self.of_queries)  # (G, D, d), (G, D)
        k, k_bias = self._map(self.of_keys)  # (D, d), (D,)
        relative = self.config.position == "relative"
        added = {name: self._vector(name) for name in ("content_bias", "position_bias")} if relative else {}
        left = [*np.swapaxes(q, 1, 2), q_bias, *added.values()]  # rows of D numbers each
        offsets = self.w.position.weight[self.of_queries].astype(np.float64) if relative else np.zeros((len(k), 0))
        right = np.concatenate([k.T, k_bias[None], offsets.T])
        a, b = truncated(np.concatenate(left), right, width)
        a *= math.sqrt(width / self.config.head_dim) ** 0.5  # scores are divided by sqrt(D'), not sqrt(D)
        b *= math.sqrt(width / self.config.head_dim) ** 0.5
        found = {"q": np.concatenate([a.T @ one for one in q]), "q_bias": (q_bias @ a).reshape(-1)}
        found |= {"k": b.T @ k, "k_bias": k_bias @ b, "position": b.T @ offsets}
        return found | {name: (vector @ a).reshape(-1) for name, vector in added.items()}

    def _values(self, width: int) -> dict[str, Array]:
        v, v_bias = self._map(self.of_values)
        output = self.w.output.weight[:, self.of_queries].astype(np.float64)  # (d, G D)
        outputs = output.reshape(len(output), -1, self.config.head_dim)  # (d, G, D)
        a, b = truncated(np.concatenate([v.T, v_bias[None]]), outputs.reshape(-1, self.config.head_dim), width)
        return {"v": a.T @ v, "v_bias": v_bias @ a, "output": (outputs @ b).reshape(len(output), -1)}

    def _map(self, rows: slice) -> tuple[Array, Array]:
        weight: Any = self.w.qkv.weight[rows].astype(np.float64)
        bias = self.w.qkv.bias
        return weight, np.zeros(len(weight)) if bias is None else bias[rows].astype(np.float64)

    def _stacked(self, rows: slice) -> tuple[Array, Array]:
        weight, bias = self._map(rows)
        return weight.reshape(-1, self.config.head_dim, weight.shape[1]), bias.reshape(-1, self.config.head_dim)

    def _vector(self, name: str) -> Array:
        """A bias of relative positions: (1, D)."""
        found: Array = getattr(self.w, name)[self.of_queries].astype(np.float64).reshape(-1, self.config.head_dim)
        return found
