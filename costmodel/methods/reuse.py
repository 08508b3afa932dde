"""The ops of attention map reuse; the mirror of ``refimpl.methods.reuse``.

With full reuse a reuse layer costs 4 B T d^2 + 2 B T^2 d matrix FLOPs, exactly half of a compute layer without
positions. L layers in groups of G have ceil(L / G) compute layers.
"""

from __future__ import annotations

from functools import cached_property

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.steps import times
from costmodel.ops import Op, Quantity
from refimpl.components import QKV, SOFTMAX, WEIGHTED_SUM
from refimpl.parameters.reuse import ReuseParameters


class Reuse(Dense):
    """Compute layers as in ``dense``; reuse layers without query, key, scores and softmax."""

    parameters: ReuseParameters

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        return self.layers_by_kind()

    def kind(self, index: int) -> str:
        return "compute layer" if self._leaders[index] == index else "reuse layer"

    def sublayer(self, index: int) -> list[Op]:
        return self.computing(index) if self._leaders[index] == index else self.reuse_layer()

    def computing(self, index: int) -> list[Op]:
        """Attention sublayer `index`, which computes a map for its group."""
        s, c = self.setting, self.setting.config
        weighted_sum = steps.weighted_sum(s, c.heads, c.kv_heads)
        maps = self.whole.attention_map(index)
        return [*self.whole.project(index), *maps, weighted_sum, steps.project_output(s)]

    def attention(self) -> list[Op]:
        passing = sum(self._leaders[index] in self._leaders[index + 1 :] for index in self._reusing)
        return [*super().attention(), *times(passing, self.passed_on())]

    def attention_parameters(self) -> Quantity:
        c, reusing = self.setting.config, len(self._reusing)
        kept = self.kept * c.head_dim  # rows of Wq and of Wk
        one = (2 * kept + c.d_kv) * (c.d_model + int(c.bias))
        if self.kept:
            one += steps.position_parameters(c)
        if self.parameters.output_projection:
            one += c.d_model * (c.d_attention + int(c.bias))
        return (c.layers - reusing) * steps.attention_parameters(c) + reusing * one

    def stored(self) -> Quantity:
        c, reusing = self.setting.config, len(self._reusing)
        return (c.layers - reusing) * 2 * c.d_kv + reusing * (self.kept * c.head_dim + c.d_kv)

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
            *steps.append(s, c.kv_heads),
            *self._renormalised(c.heads),
            steps.weighted_sum(s, c.heads, c.kv_heads),
        ]

    def _part(self) -> list[Op]:
        s, c, kept = self.setting, self.setting.config, self.kept
        width, reused = kept * c.head_dim, c.heads - kept
        return [
            steps.linear(s, QKV, c.d_model, 2 * width + c.d_attention, s.bias, "project"),
            *steps.place(s, kept, kept),
            *steps.append(s, kept, c.heads),
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
        return [Op(SOFTMAX, "concat", {"elements": memory.maps(s, c.heads)})]

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        """A compute layer beside the maps of other groups under way; a reuse layer beside those and its own."""
        s, one = self.setting, memory.maps(self.setting, self.setting.config.heads)
        leaders, last = self._leaders, self._last_uses
        computing = [i for i, leader in enumerate(leaders) if leader == i]
        others = max(sum(first < i < last[first] for first in computing) for i in computing)
        moments = [others * one + moment for moment in self.whole.map_live()]
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
    def _reusing(self) -> list[int]:
        """The layers that take a map."""
        return [index for index, leader in enumerate(self._leaders) if leader != index]

    @cached_property
    def _leaders(self) -> tuple[int, ...]:
        return self.parameters.leaders(self.setting.config.layers)

    @property
    def _last_uses(self) -> dict[int, int]:
        """Compute layer -> the last layer that uses its map."""
        return {leader: index for index, leader in enumerate(self._leaders)}
