"""Parameters of narrow attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, require_choice, require_int


@dataclass(frozen=True)
class NarrowParameters:
    """Attention with narrower heads; `width` at the model's own head width is exact attention."""

    width: int | None = parameter(
        None, "D', the width of queries, keys and values of a head; default half of D, D is exact"
    )
    fused: bool = parameter(False, "attention as one fused op, without a map")

    def __post_init__(self) -> None:
        if self.width is not None:
            require_int("width", self.width, 1)
        require_choice("fused", self.fused, (True, False))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """The full width, and three, two and one quarter of it; the full width alone where heads are rotated."""
        quarters = (4,) if config.position == "rotary" else (1, 2, 3, 4)
        return {"width": tuple(sorted({max(1, config.head_dim * n // 4) for n in quarters}, reverse=True))}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if hasattr(config.head_dim, "free_symbols"):
            return
        width = self.shape(config).head_dim
        if width > config.head_dim:
            raise ConfigError(
                f"width={width}; the heads of {config.name} are {config.head_dim} wide: give at most that"
            )
        if config.position == "rotary" and width != config.head_dim:
            raise ConfigError(
                f"narrow projects queries and keys, which {config.name} turns by their positions in between: give "
                f"narrow.width={config.head_dim}, or a model without rotary positions"
            )

    def is_off(self, config: ModelConfig) -> bool:
        """Whether heads keep their width."""
        return bool(self.shape(config).head_dim == config.head_dim)

    def shape(self, config: ModelConfig) -> ModelConfig:
        """The model that a narrow attention sublayer is a sublayer of."""
        if self.width is not None:
            return replace(config, head_dim=self.width)
        width: Any = config.head_dim
        return replace(config, head_dim=width / 2 if hasattr(width, "free_symbols") else max(1, width // 2))
