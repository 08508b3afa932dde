"""The ops of linear attention; the mirror of ``refimpl.methods.linear``.

Per layer 4 T d D matrix FLOPs for state and outputs instead of 4 T^2 d for map and values.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.steps import Setting
from costmodel.ops import Op, Quantity
from refimpl.components import ATTENTION
from refimpl.errors import ConfigError
from refimpl.parameters.linear import FEATURES, NO_DECODING, LinearParameters


class Linear(Dense):
    """Features of queries and keys, and sums over them."""

    parameters: LinearParameters

    def __init__(self, setting: Setting, parameters: LinearParameters) -> None:
        super().__init__(replace(setting, cached=False), parameters)  # nothing is appended
        if np.any(setting.past):
            raise ConfigError(NO_DECODING)

    def compute_layer(self) -> list[Op]:
        s, c = self.setting, self.setting.config
        phi = FEATURES[self.parameters.feature]
        sizes = {
            "maps": s.B * c.heads, "kv_maps": s.B * c.kv_heads, "q_len": s.T, "k_len": s.S, "head_dim": c.head_dim,
            "causal": s.causal, "mask": s.mask,
        }  # fmt: skip
        return [
            *steps.project_heads(s),
            Op(ATTENTION, phi, {"elements": s.rows * c.d_attention}),
            Op(ATTENTION, phi, {"elements": s.rows * c.d_kv}),
            Op(ATTENTION, "linear_attention", sizes),
            steps.project_output(s),
        ]

    def stored(self) -> Quantity:
        """Nothing of a position."""
        return 0

    def attention_live(self) -> list[Quantity]:
        """As in ``flash``, beside the features of queries and keys."""
        s, c = self.setting, self.setting.config
        features = s.rows * (c.d_attention + c.d_kv)
        return [moment + features for moment in memory.fused(s)]
