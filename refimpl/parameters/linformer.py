"""Parameters of Linformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, require_choice, require_int


@dataclass(frozen=True)
class LinformerParameters:
    """Linformer; without a `length`, or with one of at least T, it is exact attention."""

    length: int | None = parameter(256, "k: keys and values that are left of T; null, or T and more, is exact")
    projection: Literal["average", "random"] = parameter(
        "average", "E: each row the mean of T / k neighbours, or normal numbers of variance 1 / k"
    )
    seed: int = parameter(0, "of random projections")
    fused: bool = parameter(False, "attention as one fused op, without a map")

    def __post_init__(self) -> None:
        if self.length is not None:
            require_int("length", self.length, 1)
        require_choice("projection", self.projection, ("average", "random"))
        require_int("seed", self.seed, 0)
        require_choice("fused", self.fused, (True, False))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """All keys, and fewer and fewer."""
        return {"length": (None, 256, 128, 64, 32, 16)}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if self.length is None:
            return
        if config.streams:
            raise ConfigError(
                f"linformer mixes all positions of a sequence; {config.name} sees chunks: give linformer.length=null"
            )
        if config.position == "relative":
            raise ConfigError(
                f"linformer mixes keys of several positions, which have no offset to a query; {config.name} has "
                "relative positions: give linformer.length=null"
            )
        self.check_pass(config, config.causal)

    def check_pass(self, config: ModelConfig, causal: bool) -> None:
        """Raise ConfigError where a pass is causal: a mixed key holds later positions."""
        if causal and self.length is not None:
            raise ConfigError(
                f"linformer mixes keys with later ones, so {config.name} cannot be causal under it: give "
                "linformer.length=null, or a model that is not causal"
            )
