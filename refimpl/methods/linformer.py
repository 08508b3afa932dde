"""Linformer (Wang, Li, Khabsa, Fang, Ma, arXiv 2006.04768): keys and values projected along time, from T to k of them.

    head_h = softmax(Q_h (E K_h)ᵀ / sqrt(D) + mask) (E V_h)          eq. 7; E (k, T), the map (T, k)

One E for all layers and heads, for keys and for values: the paper's layerwise sharing. The paper learns it. Here it is
made for a length, without training: means of neighbours (the paper names pooling as a choice), or normal numbers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from refimpl.components import QKV, WEIGHTED_SUM
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import UnsupportedError
from refimpl.methods.dense import Dense
from refimpl.methods.flash import Flash, fused_context
from refimpl.methods.steps import Layer, project_heads, project_output
from refimpl.parameters.linformer import LinformerParameters
from refimpl.recorder import At


class Linformer(Dense):
    """`projection` and `mask` are what all layers read: made once per pass."""

    parameters: LinformerParameters

    def __init__(self, config: ModelConfig, parameters: LinformerParameters) -> None:
        super().__init__(config, parameters)
        self.exact = (Flash if parameters.fused else Dense)(config, None)
        self.projection: Array | None = None  # (k, T)
        self.mask: Array | None = None  # (B or 1, 1, 1, k)

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        length = self.parameters.length
        self.parameters.check_pass(self.config, layer.causal)
        if length is None or length >= x.shape[1]:
            return self.exact.attention(at, x, layer)
        if self.projection is None:
            self._prepare(at, x, layer, length)
        q, k, v = project_heads(at, x, layer)
        k = at(QKV).project_length(k, self.projection, layer.mask)  # (B, Hkv, k, D)
        v = at(QKV).project_length(v, self.projection, layer.mask)
        few = replace(layer, mask=self.mask)
        if self.parameters.fused:
            return project_output(at, fused_context(at, q, k, v, few), layer)
        weights = self.attention_map(at, q, k, few)  # (B, H, T, k)
        return project_output(at, at(WEIGHTED_SUM).weighted_sum(weights, v), layer)

    def _prepare(self, at: At, x: Array, layer: Layer, length: int) -> None:
        """E, and which of its rows see a position that is not hidden."""
        e = projection(length, x.shape[1], self.parameters.projection, self.parameters.seed, _name(x.dtype))
        self.projection = at(QKV).asarray(e)
        if layer.mask is None:
            return
        if tuple(layer.mask.shape[1:]) != (1, 1, x.shape[1]):
            raise UnsupportedError(
                f"linformer mixes keys before queries meet them; the mask is {tuple(layer.mask.shape)}: give one of "
                f"keys alone, (B or 1, 1, 1, {x.shape[1]})"
            )
        seen = at(QKV).to_numpy(layer.mask)[:, 0, 0, :] @ (e != 0).T  # (B or 1, k)
        self.mask = at(QKV).asarray(seen[:, None, None, :])


@lru_cache(maxsize=8)
def projection(length: int, positions: int, kind: str, seed: int, dtype: str) -> Array:
    """E, (k, T): row r has the mean of positions floor(r T / k) to floor((r + 1) T / k) - 1; or normal numbers.

    With k = T the means are of one position each: E is the identity.
    """
    if kind == "random":
        drawn = np.random.default_rng((seed, length, positions)).standard_normal((length, positions))
        return (drawn / np.sqrt(length)).astype(dtype)
    edges = np.arange(length + 1) * positions // length
    places = np.arange(positions)
    within = (places >= edges[:-1, None]) & (places < edges[1:, None])  # (k, T)
    return (within / np.diff(edges)[:, None]).astype(dtype)


def _name(dtype: Any) -> str:
    """float32 of any engine's dtype."""
    return str(dtype).rpartition(".")[2]
