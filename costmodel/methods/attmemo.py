"""The ops of AttMemo; the mirror of ``refimpl.methods.attmemo``.

With a hits of B sequences, a layer that looks up saves a (4 T d² + 2 T² d) matrix FLOPs and a H T² (5 + d / H) vector
ones, and pays B (128 T d / 2) for the embedding and 384 B N vector FLOPs for the search among N records.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.steps import Setting, linear
from costmodel.ops import Op, Quantity
from refimpl.components import MEMO, QKV
from refimpl.errors import ConfigError
from refimpl.parameters.attmemo import WIDTH, AttMemoParameters


class AttMemo(Dense):
    """Layers that look up, by how many sequences hit; the others as in ``dense``."""

    parameters: AttMemoParameters

    def __init__(self, setting: Setting, parameters: AttMemoParameters) -> None:
        super().__init__(setting, parameters)
        if setting.cached and not parameters.is_off(setting.config):
            raise ConfigError("attmemo keeps no keys for a cache: estimate a prefill without one, or give tau=1.1")

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        looked_up, layers = self.parameters.looked_up(self.setting.config), self.setting.config.layers
        kinds: dict[str, tuple[Quantity, list[Op]]] = {}
        if len(looked_up) < layers:
            kinds["computing layer"] = (layers - len(looked_up), self.compute_layer())
        for rate in self._rates:
            count = sum(self.parameters.rate(layer) == rate for layer in looked_up)
            hits = self._hits(rate)
            some = _positive(hits)
            if _may_be(some):
                kinds[f"layer with {rate:.0%} hits"] = count * some, [*self.look_up(), *self._with_hits(hits)]
            if _may_be(1 - some):
                kinds[f"layer with {rate:.0%} hits, none here"] = (
                    count * (1 - some),
                    [*self.look_up(), *self.compute_layer()],
                )
        return kinds

    @property
    def _rates(self) -> list[float]:
        """The different hit rates of the layers that look up."""
        return sorted({self.parameters.rate(layer) for layer in self.parameters.looked_up(self.setting.config)})

    def _hits(self, rate: float) -> Quantity:
        """Sequences of the batch that hit, a whole number."""
        B = self.setting.B
        if rate in (0, 1):
            return B * int(rate)
        return np.rint(rate * B).astype(int) if isinstance(B, np.ndarray) else round(rate * B)

    def look_up(self) -> list[Op]:
        """Embedding and search of all sequences."""
        s = self.setting
        pooled = s.B * self._states
        return [
            Op(MEMO, "max_pool", {"elements": pooled}),
            Op(MEMO, "linear", {"rows": s.B, "d_in": self._states, "d_out": WIDTH, "bias": 1}),
            self._search(),
        ]

    def _search(self) -> Op:
        s, p = self.setting, self.parameters
        records = p.records(s.B)
        if p.index == "flat":
            return Op(MEMO, "nearest", {"rows": s.B, "points": records, "width": WIDTH})
        compared = records if p.compared is None else p.compared
        return Op(MEMO, "search_graph", {"rows": s.B, "compared": s.B * compared, "width": WIDTH})

    def _with_hits(self, hits: Quantity) -> list[Op]:
        """Values of all sequences, stored maps of those that hit, computed maps of the others."""
        s, c = self.setting, self.setting.config
        one_map = c.heads * s.T * s.S
        copied = int(self.parameters.transfer == "copy")
        return [
            linear(s, QKV, c.d_model, c.d_kv, s.bias),
            Op(MEMO, "fetch", {"elements": hits * one_map, "copied": copied}),
            *self._of_misses(s.B - hits, one_map),
            steps.weighted_sum(s, c.heads, c.kv_heads),
            steps.project_output(s),
        ]

    def _of_misses(self, misses: Quantity, one_map: Quantity) -> list[Op]:
        some, c = _positive(misses), self.setting.config
        if not _may_be(some):
            return []
        s = replace(self.setting, B=misses)
        ops = [
            Op(MEMO, "take_rows", {"elements": s.rows * c.d_model}),
            linear(s, QKV, c.d_model, c.d_attention + c.d_kv, s.bias, "project"),
            *steps.place(s, c.heads, c.kv_heads),
            *steps.logits(s, c.heads, c.kv_heads),
            steps.softmax(s, c.heads),
            Op(MEMO, "scatter", {"elements": misses * one_map}),
        ]
        return steps.times(some, ops)

    # --- weights and memory -----------------------------------------------------------------------------------------

    def attention_parameters(self) -> Quantity:
        """With the folded embedding and the features of the records of each layer that looks up."""
        looked_up = len(self.parameters.looked_up(self.setting.config))
        table = WIDTH * (self._states + 1 + self.parameters.records(self.setting.B))
        return super().attention_parameters() + looked_up * table

    def attention_live(self) -> list[Quantity]:
        """A computing layer; or values, fetched maps, and what the misses need beside them."""
        moments = []
        looked_up = self.parameters.looked_up(self.setting.config)
        if len(looked_up) < self.setting.config.layers or any(self.parameters.rate(layer) < 1 for layer in looked_up):
            moments += super().attention_live()
        return [*moments, *(moment for rate in self._rates for moment in self._live(rate))]

    def _live(self, rate: float) -> list[Quantity]:
        s, c = self.setting, self.setting.config
        hits = self._hits(rate)
        fetched = memory.maps(s, c.heads) if self.parameters.transfer == "copy" else 0
        misses = replace(s, B=s.B - hits)
        computed = memory.materialised(misses)[0] - memory.BESIDE_ATTENTION[c.recipe] * memory.hidden(misses)
        beside = memory.BESIDE_ATTENTION[c.recipe] * memory.hidden(s) + s.rows * c.d_kv + fetched
        return [memory.reusing(s) + fetched, beside + memory.hidden(misses) + computed]

    @property
    def _states(self) -> Quantity:
        """Elements of the pooled hidden states of one sequence: (T / 2) (d / 2)."""
        return (self.setting.T // 2) * (self.setting.config.d_model // 2)


def _positive(count: Quantity) -> Quantity:
    """1 where a count is above 0, else 0; a symbol is taken to be."""
    if isinstance(count, (int, np.integer, np.ndarray)):
        return (count > 0) * 1
    return int(count != 0)


def _may_be(share: Quantity) -> bool:
    """Whether a share, or an element of it, is not 0."""
    return bool(np.any(share))
