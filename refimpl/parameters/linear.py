"""Parameters of linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, require_choice

FEATURES = {"elu": "elu_plus_one", "relu": "relu"}  # phi -> op
NO_DECODING = (
    "linear attention keeps a state of D x D a head, which the cache of positions does not hold: run whole sequences, "
    "not steps behind a cache"
)


@dataclass(frozen=True)
class LinearParameters:
    """Linear attention; no setting of it is exact attention."""

    feature: Literal["elu", "relu"] = parameter("elu", "phi: elu(x) + 1 as in the paper, or max(x, 0)")

    def __post_init__(self) -> None:
        require_choice("feature", self.feature, tuple(FEATURES))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """None: it has no off."""
        return {}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if config.position == "relative":
            raise ConfigError(
                f"linear attention has no scores that offsets could be added to; {config.name} has relative positions: "
                "choose a model with absolute or rotary ones"
            )
        if config.streams:
            raise ConfigError(
                f"linear attention keeps a state, not the keys of a left context as {config.name} does: choose a model "
                "that does not stream"
            )
