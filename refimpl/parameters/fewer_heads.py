"""Parameters of attention with fewer heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, require_choice, require_int


@dataclass(frozen=True)
class FewerHeadsParameters:
    """Attention with fewer heads; `heads` at the model's own number is exact attention."""

    heads: int | None = parameter(
        None, "query heads that remain in each layer, a multiple of H / Hkv; default half, all is exact"
    )
    keep: Literal["norm", "first"] = parameter(
        "norm", "which remain: those with the greatest norm of Wo_h Wv_h, or the first ones"
    )
    fused: bool = parameter(False, "attention as one fused op, without a map")

    def __post_init__(self) -> None:
        if self.heads is not None:
            require_int("heads", self.heads, 1)
        require_choice("keep", self.keep, ("norm", "first"))
        require_choice("fused", self.fused, (True, False))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """All heads, and three, two and one quarter of them."""
        group = config.heads // config.kv_heads
        kept = {max(1, config.kv_heads * quarters // 4) for quarters in (1, 2, 3, 4)}
        return {"heads": tuple(sorted((group * heads for heads in kept), reverse=True))}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if self.heads is None or hasattr(config.heads, "free_symbols"):
            return
        if self.heads > config.heads:
            raise ConfigError(f"heads={self.heads}; {config.name} has {config.heads} heads: give at most that many")
        group = config.heads // config.kv_heads
        if self.heads % group:
            raise ConfigError(
                f"heads={self.heads}; {group} query heads of {config.name} share a key head and leave together: give a "
                f"multiple of {group}"
            )

    def in_numbers(self, config: ModelConfig) -> FewerHeadsParameters:
        """With the number of heads, where the default is not half of them, as formulas in symbols take it to be."""
        heads = self.shape(config).heads
        return self if self.heads is not None or 2 * heads == config.heads else replace(self, heads=heads)

    def is_off(self, config: ModelConfig) -> bool:
        """Whether all heads remain."""
        return self.shape(config).heads == config.heads

    def shape(self, config: ModelConfig) -> ModelConfig:
        """The model that an attention sublayer with fewer heads is a sublayer of."""
        all_heads: Any = config.heads
        if hasattr(all_heads, "free_symbols"):  # SymPy symbols are taken to divide
            heads = all_heads / 2 if self.heads is None else self.heads
            return replace(config, heads=heads, kv_heads=heads / (all_heads / config.kv_heads))
        group = config.heads // config.kv_heads
        kv_heads = max(1, config.kv_heads // 2) if self.heads is None else self.heads // group
        return replace(config, heads=kv_heads * group, kv_heads=kv_heads)
