"""The ops of exact attention in a smaller shape; the mirror of ``refimpl.methods.smaller``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from costmodel.methods.dense import Dense
from costmodel.methods.flash import Flash
from costmodel.methods.steps import Setting
from costmodel.ops import Op, Quantity


class Smaller(Dense):
    """Attention sublayers as in ``dense`` (or ``flash``) of the model that `parameters.shape` gives."""

    def __init__(self, setting: Setting, parameters: Any) -> None:
        super().__init__(setting, parameters)
        inside = replace(setting, config=parameters.shape(setting.config))
        self.exact = (Flash if parameters.fused else Dense)(inside, None)

    def compute_layer(self) -> list[Op]:
        return self.exact.compute_layer()

    def attention_parameters(self) -> Quantity:
        return self.exact.attention_parameters()

    def stored(self) -> Quantity:
        return self.exact.stored()

    def attention_live(self) -> list[Quantity]:
        return self.exact.attention_live()
