"""The ops of attention map reuse; the mirror of ``refimpl.methods.reuse``.

With full reuse a reuse layer costs 4 B T d^2 + 2 B T^2 d matrix FLOPs, exactly half of a compute layer without
positions. L layers in groups of G have ceil(L / G) compute layers.
"""

from __future__ import annotations

from collections import Counter

from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.steps import times
from costmodel.ops import Op, Quantity
from refimpl.components import QKV, SOFTMAX, WEIGHTED_SUM
from refimpl.parameters import ReuseParameters


class Reuse(Dense):
    """Compute layers as in ``dense``; reuse layers without query, key, scores and softmax."""

    parameters: ReuseParameters

    def attention(self) -> list[Op]:
        leaders = self.parameters.leaders(self.setting.config.layers)
        reusing = [index for index, leader in enumerate(leaders) if leader != index]
        passing = sum(leaders[index] in leaders[index + 1 :] for index in reusing)
        return [
            *times(len(leaders) - len(reusing), self.compute_layer()),
            *times(len(reusing), self.reuse_layer()),
            *times(passing, self.passed_on()),
        ]

    @property
    def kept(self) -> Quantity:
        """Heads of a reuse layer that still compute their own map."""
        return self.parameters.kept_heads(self.setting.config)

    def reuse_layer(self) -> list[Op]:
        """One attention sublayer that takes a map from an earlier layer."""
        output = [steps.project_output(self.setting)] if self.parameters.output_projection else []
        return [*(self._part() if self.kept else self._whole()), *output]

    def _whole(self) -> list[Op]:
        s, c = self.setting, self.setting.config
        return [
            steps.linear(s, QKV, c.d_model, c.d_kv, s.bias),
            *self._renormalised(c.heads),
            steps.weighted_sum(s, c.heads, c.kv_heads),
        ]

    def _part(self) -> list[Op]:
        s, c, kept = self.setting, self.setting.config, self.kept
        width, reused = kept * c.head_dim, c.heads - kept
        return [
            steps.linear(s, QKV, c.d_model, width, s.bias),
            steps.linear(s, QKV, c.d_model, width + c.d_attention, s.bias, "project"),
            *steps.place(s, kept, kept),
            *steps.logits(s, kept, kept),
            steps.softmax(s, kept),
            *self._renormalised(reused),
            steps.weighted_sum(s, reused, reused),
            steps.weighted_sum(s, kept, kept),
            Op(WEIGHTED_SUM, "concat", {"elements": s.rows * c.d_attention}),
        ]

    def _renormalised(self, heads: Quantity) -> list[Op]:
        """Where scores are shared, their softmax is taken again."""
        return [steps.softmax(self.setting, heads)] if self.parameters.share == "scores" else []

    def passed_on(self) -> list[Op]:
        """The rotated map that a partial reuse layer hands to the next one."""
        s, c = self.setting, self.setting.config
        if not self.kept or self.parameters.head_order == "keep":
            return []
        return [Op(SOFTMAX, "concat", {"elements": s.B * c.heads * s.T * s.T})]

    def held(self) -> Quantity:
        """One map per group that is under way, at the fullest moment."""
        s, c = self.setting, self.setting.config
        leaders = self.parameters.leaders(c.layers)
        under_way = Counter(
            index
            for leader in set(leaders)
            for index in range(leader, max(i for i, of in enumerate(leaders) if of == leader))
        )
        return max(under_way.values(), default=0) * s.B * c.heads * s.T * s.T
