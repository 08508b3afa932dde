"""Exact attention in a smaller shape: what methods have in common that leave away heads, or parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from refimpl.cache import Stored
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import UnsupportedError
from refimpl.methods.dense import Dense
from refimpl.methods.flash import Flash
from refimpl.methods.steps import Layer
from refimpl.recorder import At


class Smaller(Dense):
    """``dense`` (or ``flash``) whose attention sublayers are those of `shape`; `derive` has the weights for it."""

    def __init__(self, config: ModelConfig, parameters: Any) -> None:
        super().__init__(config, parameters)
        self.shape: ModelConfig = parameters.shape(config)
        self.exact = (Flash if parameters.fused else Dense)(self.shape, None)

    def stored(self) -> Sequence[Stored]:
        return self.exact.stored()

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        heads = self.shape.heads
        if layer.mask is not None and layer.mask.shape[1] not in (1, heads):
            raise UnsupportedError(
                f"the mask is for {layer.mask.shape[1]} heads; {heads} are left: give one mask for all"
            )
        return self.exact.attention(at, x, replace(layer, config=self.shape))
