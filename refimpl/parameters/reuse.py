"""Parameters of attention map reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import is_index, parameter, require_choice, require_int


@dataclass(frozen=True)
class ReuseParameters:
    """Attention map reuse; `group` = 1 or `heads` = 0 is exact attention."""

    group: int = parameter(2, "layers that share one map, consecutive; 1 is exact attention")
    groups: tuple[tuple[int, ...], ...] | None = parameter(
        None, "explicit groups instead, as [[0,1],[3,4,5]]; a layer in none computes its own map"
    )
    heads: int | None = parameter(None, "heads of a reuse layer that take a shared map; default all, 0 is exact")
    head_order: Literal["rotate", "keep"] = parameter(
        "rotate", "partial reuse: pass on [new, reused] maps as Reuse Transformers does, or keep the heads in place"
    )
    share: Literal["probabilities", "scores"] = parameter("probabilities", "share the map after or before softmax")
    output_projection: bool = parameter(True, "reuse layers keep their output projection")

    def __post_init__(self) -> None:
        require_int("group", self.group, 1)
        if self.heads is not None:
            require_int("heads", self.heads, 0)
        require_choice("head_order", self.head_order, ("rotate", "keep"))
        require_choice("share", self.share, ("probabilities", "scores"))
        require_choice("output_projection", self.output_projection, (True, False))
        if self.groups is not None:
            object.__setattr__(self, "groups", _as_groups(self.groups))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Growing groups, up to all layers."""
        return {"group": tuple(group for group in (1, 2, 3, 4, 6) if group <= config.layers)}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if self.heads is not None and self.heads > config.heads:
            raise ConfigError(f"heads={self.heads}; the model has {config.heads} heads")
        if self.heads and self.kept_heads(config) and config.kv_heads != config.heads:
            raise ConfigError(
                f"heads={self.heads} needs as many key heads as query heads; the model has {config.kv_heads} for "
                f"{config.heads}: reuse all heads or none"
            )
        if not self.output_projection and config.d_attention != config.d_model:
            raise ConfigError("output_projection=false needs heads that together are as wide as the model")
        self.leaders(config.layers)

    def check_beside(self, owners: Mapping[str, str], config: ModelConfig) -> None:
        """Raise ConfigError where another method makes the maps, and more of them is needed than it gives."""
        other = owners.get("map")
        if other and self.share == "scores":
            raise ConfigError(
                f"reuse.share='scores' hands on scores before softmax, which {other} does not give: "
                "give reuse.share=probabilities"
            )
        if other and self.kept_heads(config):
            raise ConfigError(
                f"reuse.heads={self.heads} leaves layers that compute a part of their maps, but {other} "
                "makes maps of all heads: leave reuse.heads out"
            )

    def kept_heads(self, config: ModelConfig) -> int:
        """Heads of a reuse layer that still compute their own map."""
        return 0 if self.heads is None else config.heads - self.heads

    def leaders(self, layers: int) -> tuple[int, ...]:
        """For each layer the layer whose map it uses: itself for a compute layer, an earlier one for a reuse layer."""
        if self.heads == 0:
            return tuple(range(layers))
        if self.groups is None:
            return tuple(layer - layer % self.group for layer in range(layers))
        leaders = list(range(layers))
        for group in self.groups:
            for layer in group:
                if layer >= layers:
                    raise ConfigError(f"groups names layer {layer}; the model has layers 0 to {layers - 1}")
                leaders[layer] = group[0]
        return tuple(leaders)


def _as_groups(given: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(given, (list, tuple)) or not all(_is_group(group) for group in given):
        raise ConfigError(f"groups={given!r}; it must be a list of layer lists such as [[0,1],[2,3]]")
    groups = tuple(map(tuple, given))
    named = [layer for group in groups for layer in group]
    if any(not group for group in groups):
        raise ConfigError("groups holds an empty group")
    if any(list(group) != sorted(set(group)) for group in groups) or len(named) != len(set(named)):
        raise ConfigError(f"groups={given!r}; each group must rise from layer 0 up and no layer may be in two")
    return groups


def _is_group(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and all(map(is_index, given))
