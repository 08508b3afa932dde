"""The ops of folding attention; the mirror of ``refimpl.methods.folding``.

Against a dense layer, with S keys per query: weights / n^2, matrix FLOPs of the projections / n, of the map x n, and
keys and values in the cache as they were. FLOPs fall if and only if S < 2 d / n.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.flash import Flash
from costmodel.methods.steps import Setting, times
from costmodel.ops import MASK_BYTES, Op, Quantity
from refimpl.components import POSITIONS
from refimpl.parameters.folding import FoldingParameters


@dataclass(frozen=True)
class Folded(Setting):
    """What a folded sublayer meets: T n positions of a model d / n wide."""

    masked: Quantity = 0

    @property
    def mask(self) -> Quantity:
        """Elements of the mask that lets parts of a position see each other."""
        return self.masked


class Folding(Dense):
    """Each sublayer as one of a narrower model with more positions; a cache keeps what ``dense`` keeps."""

    parameters: FoldingParameters

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        return {
            f"layer folded by {n}" if n > 1 else "unfolded layer": (count, self.exact(n).compute_layer())
            for n, count in self.attention_folds.items()
        }

    def attention(self) -> list[Op]:
        return [*super().attention(), *(op for n in self.attention_folds for op in self.tables(n))]

    def feed_forward(self) -> list[Op]:
        each = steps.feed_forwards(self.setting.config)
        return [
            op
            for n, count in self.feed_forward_folds.items()
            for op in times(count * each, steps.feed_forward(self.folded_feed_forward(n)))
        ]

    def attention_parameters(self) -> Quantity:
        return sum(
            count * steps.attention_parameters(self.folded_attention(n).config)
            for n, count in self.attention_folds.items()
        )

    def feed_forward_parameters(self) -> Quantity:
        each = steps.feed_forwards(self.setting.config)
        return sum(
            count * each * steps.feed_forward_parameters(self.folded_feed_forward(n).config)
            for n, count in self.feed_forward_folds.items()
        )

    def exact(self, n: int) -> Dense:
        """The exact attention that runs inside a sublayer folded by `n`."""
        return (Flash if self.parameters.fused else Dense)(self.folded_attention(n), None)

    def folded_attention(self, n: int) -> Setting:
        """What an attention sublayer folded by `n` meets."""
        s, rule = self.setting, self.parameters.mask
        if n == 1:
            return s
        shape = self.parameters.attention_shape(s.config, n)
        strict = int(s.causal and rule == "subtoken")
        masked = _several(s.T) * s.T * s.S * n * n if s.causal and rule == "frame" else 0
        return Folded(shape, s.B, s.T * n, strict, s.past * n, s.cached, masked=masked)

    def folded_feed_forward(self, n: int) -> Setting:
        """What a feed-forward sublayer folded by `n` meets."""
        s = self.setting
        return s if n == 1 else Folded(self.parameters.feed_forward_shape(s.config, n), s.B, s.T * n, s.causal)

    def tables(self, n: int) -> list[Op]:
        """Rotary cosines and sines repeated for the parts of a position, once per pass."""
        s = self.folded_attention(n)
        if n == 1 or s.config.position != "rotary":
            return []
        return [Op(POSITIONS, "concat", {"elements": s.T * (s.config.head_dim // 2)}, calls=2)]

    @property
    def attention_folds(self) -> dict[int, int]:
        """n -> attention sublayers that fold by it."""
        return _counted(self.parameters.attention_folds(self.setting.config.layers))

    @property
    def feed_forward_folds(self) -> dict[int, int]:
        """n -> layers whose feed-forward folds by it."""
        return _counted(self.parameters.feed_forward_folds(self.setting.config.layers))

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        return [self.held() + moment for n in self.attention_folds for moment in self.exact(n).attention_live()]

    def feed_forward_live(self) -> list[Quantity]:
        return [memory.feed_forward(self.folded_feed_forward(n)) for n in self.feed_forward_folds]

    def held(self) -> Quantity:
        """The repeated rotary tables."""
        return sum(op.calls * op.sizes["elements"] for n in self.attention_folds for op in self.tables(n))

    def mask_bytes(self) -> Quantity:
        return sum(self.folded_attention(n).mask for n in self.attention_folds) * MASK_BYTES


def _counted(folds: tuple[int, ...]) -> dict[int, int]:
    return {n: folds.count(n) for n in sorted(set(folds))}


def _several(length: Quantity) -> Quantity:
    """1 where there are several new positions, of which not all see all; a symbol stands for several."""
    return 1 if hasattr(length, "free_symbols") else (length > 1) * 1
