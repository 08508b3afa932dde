"""The ops of exact attention as one fused op; the mirror of ``refimpl.methods.flash``."""

from __future__ import annotations

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.steps import Setting
from costmodel.ops import Op, Quantity
from refimpl.components import ATTENTION


class Flash(Dense):
    """The same projections; no term of the traffic grows with T^2."""

    def context(self, index: int) -> list[Op]:
        return fused_context(self.setting)

    def context_live(self) -> list[Quantity]:
        return memory.fused(self.setting)


def fused_context(s: Setting) -> list[Op]:
    """Scores, softmax and weighted sum of all heads as one op."""
    c = s.config
    if c.position == "relative":
        sizes = {
            "maps": s.B * c.heads, "heads": c.heads, "length": s.T, "head_dim": c.head_dim,
            "causal": s.causal, "mask": s.mask,
        }  # fmt: skip
        return [steps.position_keys(s, c.heads), Op(ATTENTION, "relative_attention", sizes)]
    sizes = {
        "maps": s.B * c.heads, "kv_maps": s.B * c.kv_heads, "q_len": s.T, "k_len": s.S,
        "head_dim": c.head_dim, "causal": s.causal, "mask": s.mask,
    }  # fmt: skip
    return [Op(ATTENTION, "attention", sizes)]
