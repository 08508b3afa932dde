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

    KIND = "every layer"

    def __init__(self, setting: Setting, parameters: Any) -> None:
        self.setting = setting
        self.parameters = parameters
        self.whole: Dense = self  # whose steps run: these, or those of the combination of methods that this is part of

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        """The kinds of attention sublayers: how many there are, and the ops of one."""
        return {self.KIND: (self.setting.config.layers, self.compute_layer())}

    def layers_by_kind(self) -> dict[str, tuple[Quantity, list[Op]]]:
        """`layers` where they differ, from the kind and the ops of each."""
        kinds: dict[str, list[int]] = {}
        for index in range(self.setting.config.layers):
            kinds.setdefault(self.whole.kind(index), []).append(index)
        return {kind: (len(found), self.whole.sublayer(found[0])) for kind, found in kinds.items()}

    def kind(self, index: int) -> str:
        """What layer `index` is called; layers of the same kind have the same ops."""
        return self.KIND

    def sublayer(self, index: int) -> list[Op]:
        """Attention sublayer `index`."""
        return [*self.whole.project(index), *self.whole.context(index), steps.project_output(self.setting)]

    def attention(self) -> list[Op]:
        """The attention sublayers of all layers."""
        return [op for count, ops in self.whole.layers().values() for op in times(count, ops)]

    def compute_layer(self) -> list[Op]:
        """One attention sublayer that computes its own map."""
        return self.sublayer(0)

    def project(self, index: int) -> list[Op]:
        """Queries, keys and values of layer `index`."""
        return steps.project_heads(self.setting)

    def context(self, index: int) -> list[Op]:
        """The map of layer `index`, times the values."""
        s, c = self.setting, self.setting.config
        return [*self.whole.attention_map(index), steps.weighted_sum(s, c.heads, c.kv_heads)]

    def attention_map(self, index: int) -> list[Op]:
        """The map of layer `index`."""
        s, c = self.setting, self.setting.config
        return [*steps.logits(s, c.heads, c.kv_heads), steps.softmax(s, c.heads)]

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
        return self.whole.context_live()

    def context_live(self) -> list[Quantity]:
        """Those of one that computes its own map."""
        return self.whole.map_live()

    def map_live(self) -> list[Quantity]:
        """Those of one that holds its map."""
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
