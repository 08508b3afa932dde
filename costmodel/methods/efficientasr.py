"""The ops of EfficientASR, our reading; the mirror of ``refimpl.methods.efficientasr``.

Of L layers in groups of G, g = ceil(L / G) compute a map. Weights without biases, norms and positions:
L (4 d^2 + 2 d f / n) - (L - g) 2 d^2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.flash import fused_context
from costmodel.methods.reuse import Reuse
from costmodel.methods.steps import Setting, times
from costmodel.ops import MASK_BYTES, Op, Quantity, visible_pairs
from refimpl.components import FEED_FORWARD, SCORES
from refimpl.config import ModelConfig
from refimpl.parameters.efficientasr import EfficientASRParameters


@dataclass(frozen=True)
class Banded(Setting):
    """Scores under a mask with a row for every query."""

    @property
    def mask(self) -> Quantity:
        """Its elements that are read."""
        return visible_pairs(self.T, self.S, self.causal)


class EfficientASR(Reuse):
    """Compute layers that add up their scores, reuse layers as in ``reuse``, feed-forwards in chunks."""

    def __init__(self, setting: Setting, parameters: EfficientASRParameters) -> None:
        super().__init__(Banded(**vars(setting)) if parameters.hides else setting, parameters.sharing)
        self.reading = parameters

    def kind(self, index: int) -> str:
        return "first compute layer" if self.carries and index == 0 else super().kind(index)

    def computing(self, index: int) -> list[Op]:
        s, c = self.setting, self.setting.config
        residual = self.carries and index > 0
        if self.reading.fused:
            return [*steps.project_heads(s), *fused_context(s), steps.project_output(s)]
        added = {"elements": memory.maps(s, c.heads), "operand": memory.maps(s, c.heads)}
        penalties = {"elements": memory.maps(s, c.heads), "operand": s.T * s.S, "scaled": 0}
        return [
            *steps.project_heads(s),
            *steps.logits(s, c.heads, c.kv_heads),
            *([Op(SCORES, "add", {**added, "scaled": int(self.reading.score_residual != 1)})] if residual else []),
            *([Op(SCORES, "add", penalties)] if self.penalises else []),
            steps.softmax(s, c.heads),
            steps.weighted_sum(s, c.heads, c.kv_heads),
            steps.project_output(s),
        ]

    def feed_forward(self) -> list[Op]:
        s, c = self.setting, self.setting.config
        chunks, chunk = self.reading.ffn_chunks, self.chunk
        if chunks == 1 or self.reading.ffn_tied:  # an ordinary one, on n rows for each position
            one = steps.feed_forward(replace(s, config=chunk, T=s.T * chunks))
        else:
            one = self.chunked_feed_forward()
        return times(c.layers * steps.feed_forwards(c), one)

    def chunked_feed_forward(self) -> list[Op]:
        """One feed-forward sublayer with weights of its own for each chunk."""
        s, c, chunk = self.setting, self.setting.config, self.chunk
        common = {"rows": s.rows, "blocks": self.reading.ffn_chunks}
        up = {**common, "d_in": chunk.d_model, "d_out": chunk.d_ff, "bias": s.bias}
        down = {**common, "d_in": chunk.d_ff, "d_out": chunk.d_model, "bias": s.bias}
        return [
            Op(FEED_FORWARD, "block_linear", up, calls=2 if c.gated else 1),
            Op(FEED_FORWARD, "swiglu" if c.gated else c.activation, {"elements": s.rows * c.d_ff}),
            Op(FEED_FORWARD, "block_linear", down),
        ]

    def feed_forward_parameters(self) -> Quantity:
        c, copies = self.setting.config, 1 if self.reading.ffn_tied else self.reading.ffn_chunks
        return steps.feed_forwards(c) * c.layers * copies * steps.feed_forward_parameters(self.chunk)

    @property
    def chunk(self) -> ModelConfig:
        """The model whose feed-forward is that of one chunk."""
        return self.reading.chunk(self.setting.config)

    @property
    def carries(self) -> bool:
        """Whether scores are handed from one compute layer to another."""
        return self.reading.score_residual > 0 and len(set(self._leaders)) > 1

    @property
    def penalises(self) -> bool:
        """A soft band: penalties are added to the scores."""
        return self.reading.band is not None and not self.reading.hides

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        """``reuse``, beside the scores of a compute layer before: they are kept until those of the next are added."""
        moments = memory.fused(self.setting) if self.reading.fused else super().attention_live()
        return [self._kept() + moment for moment in moments]

    def held(self) -> Quantity:
        return self._kept() + super().held()

    def mask_bytes(self) -> Quantity:
        s = self.setting
        return s.T * s.S * MASK_BYTES if self.reading.hides else 0

    def _kept(self) -> Quantity:
        """Scores for the next compute layer, and the penalties of a soft band."""
        s = self.setting
        scores = memory.maps(s, s.config.heads) if self.carries else 0
        return scores + (s.T * s.S if self.penalises else 0)
