"""The ops of exact attention with the map materialised; the mirror of ``refimpl.methods.dense``.

Per layer without positions: 8 B T d^2 + 4 B T^2 d matrix FLOPs (d = H D, one key head per query head).
"""

from __future__ import annotations

from typing import Any

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.steps import Setting, times
from costmodel.ops import Op, Quantity
from refimpl.components import HEAD


class Dense:
    """Closed form of a whole model under one method; subclasses change single parts, as the programs do."""

    def __init__(self, setting: Setting, parameters: Any) -> None:
        self.setting = setting
        self.parameters = parameters

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        """The kinds of attention sublayers: how many there are, and the ops of one."""
        return {"every layer": (self.setting.config.layers, self.compute_layer())}

    def attention(self) -> list[Op]:
        """The attention sublayers of all layers."""
        return [op for count, ops in self.layers().values() for op in times(count, ops)]

    def compute_layer(self) -> list[Op]:
        """One attention sublayer that computes its own map."""
        s, heads, kv_heads = self.setting, self.setting.config.heads, self.setting.config.kv_heads
        return [
            *steps.project_heads(s),
            *steps.logits(s, heads, kv_heads),
            steps.softmax(s, heads),
            steps.weighted_sum(s, heads, kv_heads),
            steps.project_output(s),
        ]

    def feed_forward(self) -> list[Op]:
        """The feed-forward sublayers of all layers."""
        c = self.setting.config
        return times(c.layers * steps.feed_forwards(c), steps.feed_forward(self.setting))

    def head(self) -> list[Op]:
        """The tied language head."""
        c = self.setting.config
        return [steps.linear(self.setting, HEAD, c.d_model, c.vocab, 0)] if c.head else []

    def head_parameters(self) -> Quantity:
        """Weights of a head beside the table of tokens that it is tied to."""
        return 0

    def attention_parameters(self) -> Quantity:
        """Weights of the attention sublayers of all layers."""
        return self.setting.config.layers * steps.attention_parameters(self.setting.config)

    def copied_parameters(self) -> Quantity:
        """Weights that memory holds once more while the method runs, though they are kept once."""
        return 0

    def index_bytes(self) -> Quantity:
        """Bytes kept beside the weights to say which are used where."""
        return 0

    def feed_forward_parameters(self) -> Quantity:
        """Weights of the feed-forward sublayers of all layers."""
        c = self.setting.config
        return steps.feed_forwards(c) * c.layers * steps.feed_forward_parameters(c)

    def stored(self) -> Quantity:
        """Elements of keys and values that a cache keeps of one position, in all layers."""
        return 2 * self.setting.config.layers * self.setting.config.d_kv

    def attention_live(self) -> list[Quantity]:
        """Elements alive at the fullest moments of an attention sublayer."""
        return memory.materialised(self.setting)

    def feed_forward_live(self) -> list[Quantity]:
        """Elements alive at the fullest moments of a feed-forward sublayer."""
        return [memory.feed_forward(self.setting)]

    def head_live(self) -> Quantity:
        """Elements alive at the fullest moment of the head, or of the last linear map."""
        return memory.head(self.setting)

    def mask_bytes(self) -> Quantity:
        """Bytes of the masks that the method makes for a pass."""
        return 0

    def held(self) -> Quantity:
        """Elements that the method keeps between sublayers, at most."""
        return 0
