"""The ops of KVSharer; the mirror of ``refimpl.methods.kvsharer``.

A shared layer saves 4 T d d_kv matrix FLOPs, 2 d d_kv weights, and 2 T d_kv elements that it would append to a cache.
Scores, weighted sum and what they read are those of every layer.
"""

from __future__ import annotations

from functools import cached_property

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.flash import fused_context
from costmodel.ops import Op, Quantity
from refimpl.components import QKV
from refimpl.parameters.kvsharer import KVSharerParameters


class KVSharer(Dense):
    """Own layers as in ``dense`` (or ``flash``); shared layers without keys and values of their own."""

    parameters: KVSharerParameters

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        return self.layers_by_kind()

    def kind(self, index: int) -> str:
        return "own layer" if self._sources[index] == index else "shared layer"

    def project(self, index: int) -> list[Op]:
        return super().project(index) if self._sources[index] == index else self._project_queries()

    def _project_queries(self) -> list[Op]:
        s, c = self.setting, self.setting.config
        placed = steps.place(s, c.heads, c.kv_heads)
        if self.parameters.drop_projections:
            return [steps.linear(s, QKV, c.d_model, c.d_attention, s.bias), *placed[:1]]  # the first is of queries
        return [steps.linear(s, QKV, c.d_model, c.d_attention + 2 * c.d_kv, s.bias, "project"), *placed]

    def context(self, index: int) -> list[Op]:
        return fused_context(self.setting) if self.parameters.fused else super().context(index)

    def attention_parameters(self) -> Quantity:
        c = self.setting.config
        dropped = 2 * c.d_kv * (c.d_model + int(c.bias)) if self.parameters.drop_projections else 0
        return super().attention_parameters() - self._count * dropped

    def stored(self) -> Quantity:
        c = self.setting.config
        return 2 * (c.layers - self._count) * c.d_kv

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        """An own layer beside the sources under way; a shared layer beside those, its own among them."""
        sources, last = self._sources, self._last_uses
        moments = self.whole.context_live()
        own = [layer for layer, source in enumerate(sources) if source == layer]
        others = max(sum(source < layer < last[source] for source in own) for layer in own)
        found = [others * self._kept + moment for moment in moments]
        shared = set(range(len(sources))) - set(own)
        if shared:
            under_way = max(sum(source < layer <= last[source] for source in own) for layer in shared)
            found += [under_way * self._kept + moment - self._not_made for moment in moments]
        return found

    def context_live(self) -> list[Quantity]:
        return memory.fused(self.setting) if self.parameters.fused else super().context_live()

    def held(self) -> Quantity:
        """Keys and values of the sources that are under way."""
        between = [sum(first <= layer < end for first, end in self._last_uses.items()) for layer in self._layers]
        return max(between) * self._kept

    @property
    def _kept(self) -> Quantity:
        """What a source holds: the product of which its values are a part, and rotated keys; nothing beside a cache."""
        s, c = self.setting, self.setting.config
        if s.cached:
            return 0
        rotated = c.d_kv if c.position == "rotary" else 0
        return s.rows * (c.d_attention + 2 * c.d_kv + rotated)

    @property
    def _not_made(self) -> Quantity:
        """What a shared layer has less of than an own one: keys and values, and rotated keys."""
        s, c = self.setting, self.setting.config
        rotated = c.d_kv if c.position == "rotary" else 0
        return s.rows * (rotated + (2 * c.d_kv if self.parameters.drop_projections else 0))

    @property
    def _count(self) -> int:
        return self.parameters.count(self.setting.config)

    @cached_property
    def _sources(self) -> tuple[int, ...]:
        return self.parameters.sources(self.setting.config)

    @property
    def _layers(self) -> range:
        return range(self.setting.config.layers)

    @property
    def _last_uses(self) -> dict[int, int]:
        """Source -> the last layer that uses it."""
        return {source: layer for layer, source in enumerate(self._sources)}
