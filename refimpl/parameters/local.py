"""Parameters of local attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refimpl.config import ModelConfig
from refimpl.parameters.base import parameter, require_int


@dataclass(frozen=True)
class LocalParameters:
    """Local attention; without a `window` it is exact attention."""

    window: int | None = parameter(
        64, "w: a query sees keys at most so many positions away, on either side; null is exact, as flash"
    )

    def __post_init__(self) -> None:
        if self.window is not None:
            require_int("window", self.window, 0)

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """All keys, and narrowing windows."""
        return {"window": (None, 256, 128, 64, 32, 16)}

    def check(self, config: ModelConfig) -> None:
        """Every model can look at a part of its keys."""
