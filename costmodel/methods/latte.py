"""The ops of LATTE; the mirror of ``refimpl.methods.latte``.

How many pairs are kept depends on the data: it is a size of the op, here a given part of the visible pairs.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from costmodel import memory
from costmodel.methods.dense import Dense
from costmodel.ops import Op, Quantity, visible_pairs
from refimpl.components import ATTENTION
from refimpl.parameters.latte import LatteParameters


class Latte(Dense):
    """The projections of ``dense``, and one op that keeps part of the pairs."""

    parameters: LatteParameters

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        return self.layers_by_kind()

    def kind(self, index: int) -> str:
        return self.KIND if self._alike else f"layer {index} keeps {float(self._fractions[index]):.4g}"

    def context(self, index: int) -> list[Op]:
        return self._filtered("filtered_attention", index)

    def attention_map(self, index: int) -> list[Op]:
        return self._filtered("filtered_map", index)

    def _filtered(self, op: str, index: int) -> list[Op]:
        """Codes, and the op that keeps a part of the visible pairs."""
        s, c = self.setting, self.setting.config
        fraction = self._fractions[index]
        maps, kv_maps = s.B * c.heads, s.B * c.kv_heads
        sizes = {
            "maps": maps, "kv_maps": kv_maps, "q_len": s.T, "k_len": s.S, "head_dim": c.head_dim, "causal": s.causal,
            "mask": s.mask, "heads": c.heads, "exact": int(self.parameters.stage2 == "float"),
            "kept": part_of(maps * visible_pairs(s.T, s.S, s.causal), fraction),
        }  # fmt: skip
        return [
            Op(ATTENTION, "quantize", {"maps": maps, "elements": maps * s.T * c.head_dim}),
            Op(ATTENTION, "quantize", {"maps": kv_maps, "elements": kv_maps * s.S * c.head_dim}),
            Op(ATTENTION, op, sizes),
        ]

    @cached_property
    def _alike(self) -> bool:
        """Whether all layers keep the same part."""
        return len(set(self._fractions)) == 1

    @cached_property
    def _fractions(self) -> tuple[Fraction, ...]:
        return self.parameters.fractions(self.setting.config)

    def context_live(self) -> list[Quantity]:
        """That of ``flash``, and before its output projection the codes."""
        return memory.filtering(self.setting)

    def map_live(self) -> list[Quantity]:
        """That of ``dense`` with one map instead of scores and map, and before it the codes."""
        return memory.filtering_map(self.setting)


def part_of(pairs: Quantity, fraction: Fraction) -> Any:
    """The nearest whole number of pairs, of halves the larger; exact in symbols."""
    above, below = fraction.numerator, fraction.denominator
    if isinstance(pairs, (int, np.integer, np.ndarray)):
        wholes, rest = pairs // below, pairs % below  # their products stay within 64 bits
        return above * wholes + (2 * above * rest + below) // (2 * below)
    return pairs * above / below
