"""Parameters of folding attention, and named settings of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, unknown
from refimpl.parameters.base import parameter, require_choice, require_int
from refimpl.parameters.parts import ATTENTION

# Combinations that make emformer-rnnt-base with its predictor and joiner 12 to 62 % smaller. Ours: none is the paper's.
# Size does not say which layers fold where not all do; here the first ones do.
SETTINGS: dict[str, Mapping[str, Any]] = {
    "attention-2": {"fold": 2, "fold_ffn": False, "layers": None},
    "attention-4": {"fold": 4, "fold_ffn": False, "layers": None},
    "attention-8": {"fold": 8, "fold_ffn": False, "layers": None},
    "attention-2-first-12": {"fold": 2, "fold_ffn": False, "layers": tuple(range(12))},
    "attention-4-first-9": {"fold": 4, "fold_ffn": False, "layers": tuple(range(9))},
    "attention-8-first-9": {"fold": 8, "fold_ffn": False, "layers": tuple(range(9))},
    "both-2": {"fold": 2, "fold_ffn": True, "layers": None},
    "both-2-first-4": {"fold": 2, "fold_ffn": True, "layers": tuple(range(4))},
    "both-2-first-8": {"fold": 2, "fold_ffn": True, "layers": tuple(range(8))},
    "ffn-2-first-6": {"fold": 1, "fold_ffn": 2, "layers": tuple(range(6))},
    "ffn-2-first-12": {"fold": 1, "fold_ffn": 2, "layers": tuple(range(12))},
}


@dataclass(frozen=True)
class FoldingParameters:
    """Folding attention; `fold` = 1 with `fold_ffn` true or false is exact attention."""

    fold: int | tuple[int, ...] = parameter(
        2, "n, the parts that attention folds a position into; one for all layers or a list, one per layer; 1 is off"
    )
    fold_ffn: bool | int | tuple[int, ...] = parameter(
        True, "feed-forward folds as attention does; false: not at all; or a number or list of its own, as fold"
    )
    layers: tuple[int, ...] | None = parameter(None, "the layers that fold, as [0,1,5]; default all")
    heads: Literal["keep-width", "keep-count"] = parameter(
        "keep-width", "heads of a folded layer: H / n of width D, or H of width D / n"
    )
    mask: Literal["frame", "subtoken"] = parameter(
        "frame", "causal models: parts of a position see each other, or only themselves and those before"
    )
    ffn_hidden: int | None = parameter(None, "hidden width of a folded feed-forward, for each part; default f / n")
    fused: bool = parameter(False, "attention as one fused op, without a map")
    setting: str | None = parameter(None, "fold, fold_ffn and layers by a name of the method's page, as attention-2")

    def __post_init__(self) -> None:
        object.__setattr__(self, "fold", _factors("fold", self.fold))
        if not isinstance(self.fold_ffn, bool):
            factors = _factors("fold_ffn", self.fold_ffn)
            # 1 == True, so that 1 (not folded) would count as the same parameters as true (folded as attention).
            object.__setattr__(self, "fold_ffn", False if factors == 1 else factors)
        if self.layers is not None:
            object.__setattr__(self, "layers", _as_layers(self.layers))
        require_choice("heads", self.heads, ("keep-width", "keep-count"))
        require_choice("mask", self.mask, ("frame", "subtoken"))
        if self.ffn_hidden is not None:
            require_int("ffn_hidden", self.ffn_hidden, 1)
        if not isinstance(self.fused, bool):
            raise ConfigError(f"fused={self.fused!r}; it must be true or false")
        if self.setting is not None:
            self._take_setting()

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Growing factors, as far as they divide the model."""
        return {"fold": tuple(n for n in (1, 2, 4, 8) if cls(fold=n).fits(config))}

    def fits(self, config: ModelConfig) -> bool:
        """Whether `check` would pass."""
        try:
            self.check(config)
        except ConfigError:
            return False
        return True

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        attention, feed_forward = self.attention_folds(config.layers), self.feed_forward_folds(config.layers)
        if config.position == "relative" and set(attention) != {1}:
            raise ConfigError(
                f"fold={_written(self.fold)}; {config.name} has relative positions, which are offsets of whole "
                "positions, not of their parts: give fold=1, and fold_ffn=2 to fold its feed-forward"
            )
        if hasattr(config.d_model, "free_symbols"):
            return  # SymPy symbols are taken to divide
        for n in sorted(set(attention)):
            _require_divisor("fold", n, self._attention_sizes(config), f" with heads={self.heads}")
        for n in sorted(set(feed_forward)):
            _require_divisor("fold_ffn", n, {"d_model": config.d_model, "d_ff": config.d_ff})

    def replaces(self, config: ModelConfig) -> tuple[str, ...]:
        """The parts of a pass that some layer folds."""
        attention, feed_forward = self.attention_folds(config.layers), self.feed_forward_folds(config.layers)
        return (*(ATTENTION if set(attention) != {1} else ()), *(["feed-forward"] if set(feed_forward) != {1} else []))

    def attention_folds(self, layers: int) -> tuple[int, ...]:
        """n of the attention sublayer of each layer; 1 where it is not folded."""
        return self._per_layer("fold", self.fold, layers)

    def feed_forward_folds(self, layers: int) -> tuple[int, ...]:
        """n of the feed-forward sublayers of each layer; 1 where they are not folded."""
        if self.fold_ffn is True:
            return self.attention_folds(layers)
        return self._per_layer("fold_ffn", 1 if self.fold_ffn is False else self.fold_ffn, layers)

    def attention_shape(self, config: ModelConfig, n: int) -> ModelConfig:
        """The model that an attention sublayer folded by `n` is a sublayer of: d / n wide, with H' heads."""
        if self.heads == "keep-count":
            return _narrow(config, n, head_dim=config.head_dim // n)
        return _narrow(config, n, heads=config.heads // n, kv_heads=config.kv_heads // n)

    def feed_forward_shape(self, config: ModelConfig, n: int) -> ModelConfig:
        """The model that a feed-forward sublayer folded by `n` is a sublayer of: d / n wide."""
        return _narrow(config, n, d_ff=self.ffn_hidden or config.d_ff // n)

    def _take_setting(self) -> None:
        """Fill in the parameters that the setting decides; what is given beside it must not contradict."""
        if self.setting not in tuple(SETTINGS):
            raise unknown("setting of folding", str(self.setting), SETTINGS)
        for name, value in SETTINGS[self.setting].items():
            given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if given not in (default, value):
                raise ConfigError(
                    f"{name}={_written(given)}; setting={self.setting} says {_written(value)}: give one of the two"
                )
            object.__setattr__(self, name, value)

    def _per_layer(self, name: str, factors: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
        if isinstance(factors, tuple) and len(factors) != layers:
            raise ConfigError(f"{name} lists {len(factors)} layers; the model has {layers}: give one number per layer")
        chosen = range(layers) if self.layers is None else self.layers
        if any(index >= layers for index in chosen):
            raise ConfigError(f"layers names layer {max(chosen)}; the model has layers 0 to {layers - 1}")
        every = factors if isinstance(factors, tuple) else (factors,) * layers
        return tuple(n if index in chosen else 1 for index, n in enumerate(every))

    def _attention_sizes(self, config: ModelConfig) -> dict[str, int]:
        """What n must divide."""
        if self.heads == "keep-width":
            return {"d_model": config.d_model, "heads": config.heads, "kv_heads": config.kv_heads}
        if config.position == "rotary":  # pairs of channels are turned together
            return {"d_model": config.d_model, "head_dim / 2": config.head_dim // 2}
        return {"d_model": config.d_model, "head_dim": config.head_dim}


def _factors(name: str, given: Any) -> int | tuple[int, ...]:
    """One factor, or one per layer."""
    if not isinstance(given, (list, tuple)):
        require_int(name, given, 1)
        return int(given)
    for index, factor in enumerate(given):
        require_int(f"{name}[{index}]", factor, 1)
    return tuple(given)


def _as_layers(given: Any) -> tuple[int, ...]:
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"layers={given!r}; it must be a list of layers such as [0,1,5]")
    for index, layer in enumerate(given):
        require_int(f"layers[{index}]", layer, 0)
    if list(given) != sorted(set(given)):
        raise ConfigError(f"layers={_written(given)}; it must rise, with no layer twice")
    return tuple(given)


def _narrow(config: ModelConfig, n: int, **changes: Any) -> ModelConfig:
    """A model d / n wide; its stem, which no sublayer reads, need not stack frames to this width."""
    return replace(config, d_model=config.d_model // n, stack=min(config.stack, 1), **changes)


def _require_divisor(name: str, n: int, sizes: Mapping[str, int], where: str = "") -> None:
    common = math.gcd(*sizes.values())
    if common % n:
        size = next(size for size, value in sizes.items() if value % n)
        fitting = [str(m) for m in range(1, common + 1) if common % m == 0]
        raise ConfigError(
            f"{name}={n} does not divide {size}={sizes[size]}; those that fit{where}: {', '.join(fitting)}"
        )


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    return str(list(value)).replace(" ", "") if isinstance(value, (list, tuple)) else str(value).lower()
