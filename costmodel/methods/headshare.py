"""The cost of head-wise sharing; the mirror of ``refimpl.methods.headshare``.

Ops, traffic and cache are those of ``dense``. With n_s replaced heads, 4 d D n_s of 4 d^2 L weights are not kept.
"""

from __future__ import annotations

from costmodel.methods.dense import Dense
from costmodel.ops import Quantity
from refimpl.config import ModelConfig
from refimpl.parameters.headshare import HeadShareParameters

# Weights of a head that are compared, in units of D d.
COMPARED = {"q": 1, "k": 1, "v": 1, "qk": 2, "qkv": 3, "total": 1}
INDEX_BYTES = 4  # of a head's place in the pool, int32


class HeadShare(Dense):
    """``dense`` with fewer distinct weights."""

    parameters: HeadShareParameters

    def attention_parameters(self) -> Quantity:
        return super().attention_parameters() - self.copied_parameters()

    def copied_parameters(self) -> Quantity:
        """The slices of replaced heads: of Wq, Wk and Wv with their biases and, where it is shared, of Wo."""
        c = self.setting.config
        slices = 3 * (c.d_model + int(c.bias)) + (c.d_model if self.parameters.share_output else 0)
        return self.parameters.replaced(c) * slices * c.head_dim

    def index_bytes(self) -> Quantity:
        c = self.setting.config
        return INDEX_BYTES * c.layers * c.heads if self.parameters.replaced(c) else 0


def matching_flops(config: ModelConfig, match: str = "qk") -> int:
    """FLOPs of comparing each head with those of all earlier layers, once: two per weight compared.

    ((L - 1) L / 2) H^2 pairs; norms, and what ``match="total"`` computes of each head first, are not counted.
    """
    pairs = config.layers * (config.layers - 1) // 2 * config.heads**2
    return pairs * 2 * COMPARED[match] * config.head_dim * config.d_model
