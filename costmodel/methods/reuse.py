"""The ops of attention map reuse; the mirror of ``refimpl.methods.reuse``.

With full reuse a reuse layer costs 4 B T d^2 + 2 B T^2 d matrix FLOPs, exactly half of a compute layer without
positions. L layers in groups of G have ceil(L / G) compute layers.
"""

from __future__ import annotations

from costmodel import memory
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
        leaders = self._leaders
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

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        """A compute layer beside the maps of other groups under way; a reuse layer beside those and its own."""
        s, one = self.setting, memory.maps(self.setting, self.setting.config.heads)
        leaders, last = self._leaders, self._last_uses
        computing = [i for i, leader in enumerate(leaders) if leader == i]
        others = max(sum(first < i < last[first] for first in computing) for i in computing)
        moments = [others * one + moment for moment in memory.materialised(s)]
        if self.parameters.share == "scores":  # they outlive the softmax
            moments.append(moments[1] + one)
        reusing = set(range(len(leaders))) - set(computing)
        if reusing:
            under_way = max(sum(first < i <= last[first] for first in computing) for i in reusing)
            moments.append(under_way * one + self._own_share() + memory.reusing(s))
        return moments

    def _own_share(self) -> Quantity:
        """What a reuse layer makes beside values, context and output: maps of its own heads, and what it passes on."""
        s, c, kept = self.setting, self.setting.config, self.kept
        renormalised = memory.maps(s, c.heads - kept) if self.parameters.share == "scores" else 0
        passed_on = memory.maps(s, c.heads) if self.passed_on() else 0
        return 2 * memory.maps(s, kept) + 2 * s.rows * kept * c.head_dim + renormalised + passed_on

    def held(self) -> Quantity:
        """One map per group that is under way."""
        between = [sum(first <= i < end for first, end in self._last_uses.items()) for i in range(len(self._leaders))]
        return max(between) * memory.maps(self.setting, self.setting.config.heads)

    @property
    def _leaders(self) -> tuple[int, ...]:
        return self.parameters.leaders(self.setting.config.layers)

    @property
    def _last_uses(self) -> dict[int, int]:
        """Compute layer -> the last layer that uses its map."""
        return {leader: index for index, leader in enumerate(self._leaders)}
