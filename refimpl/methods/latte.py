"""LATTE: low-precision approximate attention with a threshold for each head (Wang, Lin, Wu, arXiv 2404.07519).

Queries and keys are quantised to eight bits; the upper four of both estimate the scores. Of a row only keys whose
estimate lies at most theta_h below the row's largest are kept, and see softmax with the exact product of the codes:

    keep j      iff  m~_ij >= max_j m~_ij - theta_h sqrt(D) / (sigma_q sigma_k),    m~_ij = 256 q^h_i . k^h_j
    O_i  =  softmax over kept j (sigma_q sigma_k m_ij / sqrt(D)) V,                 m_ij = q_i . k_j of the codes
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refimpl.components import ATTENTION
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, Queries
from refimpl.methods.subject import Subject
from refimpl.parameters.latte import LatteParameters
from refimpl.recorder import At


class Latte(Dense):
    """``dense`` with scores, softmax and weighted sum in one op that filters keys."""

    parameters: LatteParameters

    def __init__(self, config: ModelConfig, parameters: LatteParameters) -> None:
        super().__init__(config, parameters)
        if not parameters.is_complete(config):
            raise ConfigError(
                "the thresholds are not known yet: let Runner.prepare calibrate them on inputs, or give thresholds or "
                "gamma"
            )
        self.thetas = parameters.thetas(config)

    @classmethod
    def complete(cls, parameters: LatteParameters, subject: Subject) -> LatteParameters:
        """With thresholds that are calibrated on the subject's inputs, where none are given."""
        if parameters.is_complete(subject.model.config):
            return parameters
        from refimpl.preparation.latte import calibrate_thresholds

        return replace(parameters, thresholds=calibrate_thresholds(parameters, subject))

    def context(self, at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
        """Softmax over the kept keys, times their values: (B, H, T, D)."""
        return self.filtered_context(at, q.content, k, v, layer)

    def filtered_context(self, at: At, q: Array, k: Array, v: Array, layer: Layer) -> Array:
        """`context` of queries (B, H, T, D)."""
        p = self.parameters
        context, _ = at(ATTENTION).filtered_attention(
            q, k, v, *self._filter(at, q, k, layer), layer.scale, layer.causal, layer.mask, p.nibble, p.stage2
        )
        return context

    def attention_map(self, at: At, q: Queries, k: Array, layer: Layer) -> Array:
        """Softmax over the kept keys, zero elsewhere, for a method that hands the map on: (B, H, T, S)."""
        p = self.parameters
        weights, _ = at(ATTENTION).filtered_map(
            q.content, k, *self._filter(at, q.content, k, layer), layer.scale, layer.causal, layer.mask, p.nibble,
            p.stage2,
        )  # fmt: skip
        return weights

    def _filter(self, at: At, q: Array, k: Array, layer: Layer) -> tuple[Array, Array, Array, Array, Array]:
        """Codes of queries and keys, their scales, and the thresholds (H,)."""
        ops = at(ATTENTION)
        q_codes, q_scale = ops.quantize(q)  # (B, H, T, D), (B, H, 1, 1)
        k_codes, k_scale = ops.quantize(k)  # (B, Hkv, S, D), (B, Hkv, 1, 1)
        thresholds = ops.asarray(np.array(self.thetas_of(at, layer, (q_codes, q_scale), (k_codes, k_scale))))
        return q_codes, k_codes, q_scale, k_scale, thresholds

    def thetas_of(
        self, at: At, layer: Layer, queries: tuple[Array, Array], keys: tuple[Array, Array]
    ) -> tuple[float, ...]:
        """The thresholds of a layer's heads, whose codes and scales are given."""
        return self.thetas[layer.index]
