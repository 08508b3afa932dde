"""Parameters of KVSharer, and its strategy: which layer takes the keys and values of which earlier one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import is_index, parameter, read_prepared, require_choice, require_int, require_number

Pair = tuple[int, int]  # a layer and its source, an earlier one

FORMAT, VERSION = "kvsharer strategy", 1  # of a file
FORMS = "a file of 'effref prepare', or pairs [[layer, source], ...]"


class Strategy(tuple[Pair, ...]):
    """Pairs (layer, source) in the order in which they were accepted: a tuple that also knows where it is from.

    Attributes
    ----------
    record : dict
        What the search noted: model, layers, settings, all pairs that were tried. Empty for pairs given by hand.
    """

    record: Mapping[str, Any]

    def __new__(cls, pairs: Iterable[Pair], record: Mapping[str, Any] | None = None) -> Strategy:
        made = super().__new__(cls, pairs)
        made.record = dict(record or {})
        return made


@dataclass(frozen=True)
class KVSharerParameters:
    """KVSharer; `layers` = 0 is exact attention."""

    FILE: ClassVar[str] = "strategy"  # the parameter that takes what `effref prepare` writes

    layers: int | None = parameter(None, "C: layers that share; default a quarter of the model's, 0 is exact attention")
    strategy: Strategy | None = parameter(  # noqa: RUF009  # a field like the others
        None, "instead of a search: a file of 'effref prepare', or pairs [[layer, source], ...]; overrides layers"
    )
    order: Literal["dissimilar", "similar", "random"] = parameter(
        "dissimilar", "pairs are tried with the largest distance first, the smallest, or in a random order"
    )
    seed: int = parameter(0, "of the random order")
    distance: Literal["flattened", "per_position"] = parameter(
        "flattened", "Euclidean over all averaged keys (values) of a layer, or over a head and then the mean"
    )
    similarity: Literal["per_sample_mean", "of_mean"] = parameter(
        "per_sample_mean", "cosine of last hidden states sample by sample and then the mean, or that of their means"
    )
    threshold: float = parameter(0.5, "a pair is accepted where that similarity is above")
    samples: int = parameter(30, "calibration samples, at most")
    sample_tokens: int = parameter(64, "tokens of a sample; longer rows of tokens are cut into several")
    drop_projections: bool = parameter(
        True, "shared layers are without Wk and Wv; False projects, rotates and discards, as the published code"
    )
    fused: bool = parameter(False, "attention as one fused op in all layers, as in flash")

    def __post_init__(self) -> None:
        if self.layers is not None:
            require_int("layers", self.layers, 0)
        require_choice("order", self.order, ("dissimilar", "similar", "random"))
        require_int("seed", self.seed, 0)
        require_choice("distance", self.distance, ("flattened", "per_position"))
        require_choice("similarity", self.similarity, ("per_sample_mean", "of_mean"))
        require_number("threshold", self.threshold, -2, 2)
        require_int("samples", self.samples, 1)
        require_int("sample_tokens", self.sample_tokens, 1)
        require_choice("drop_projections", self.drop_projections, (True, False))
        require_choice("fused", self.fused, (True, False))
        if self.strategy is not None:
            object.__setattr__(self, "strategy", _as_strategy(self.strategy))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Shared layers: none, 12.5, 25 and 37.5 % as in the paper, and half of them."""
        return {"layers": tuple(sorted({eighths * config.layers // 8 for eighths in range(5)}))}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if self.strategy is None:
            if self.count(config) >= config.layers:
                raise ConfigError(
                    f"layers={self.layers}; {config.name} has {config.layers} layers, of which at most "
                    f"{config.layers - 1} can share: the first has keys and values of its own"
                )
            return
        found_for = self.strategy.record.get("layers", config.layers)
        if found_for != config.layers:
            raise ConfigError(
                f"strategy is for a model of {found_for} layers; {config.name} has {config.layers}: search one for it"
            )
        missing = next((layer for layer, _ in self.strategy if layer >= config.layers), None)
        if missing is not None:
            raise ConfigError(f"strategy names layer {missing}; {config.name} has layers 0 to {config.layers - 1}")

    def is_complete(self, config: ModelConfig) -> bool:
        """Whether nothing has to be searched."""
        return self.strategy is not None or self.count(config) == 0

    @property
    def PER_CAUSALITY(self) -> bool:  # as PER_LENGTH of other methods
        """Whether something is looked for in passes, which are causal or not."""
        return self.strategy is None

    def count(self, config: ModelConfig) -> int:
        """C, the layers that share."""
        if self.strategy is not None:
            return len(self.strategy)
        return config.layers // 4 if self.layers is None else self.layers

    def sources(self, config: ModelConfig) -> tuple[int, ...]:
        """For each layer the one whose keys and values it uses: itself, or an earlier one that has its own.

        Without a strategy, layers whose costs stand for all: the last C share, with as many different sources as there
        can be. FLOPs, traffic and cache do not depend on the choice; without a cache this one takes the most memory.
        """
        if self.strategy is not None:
            return roots(self.strategy, config.layers)
        own = config.layers - self.count(config)
        return (*range(own), *(index % own for index in range(config.layers - own)))

    def to_document(self) -> dict[str, Any]:
        """The strategy as JSON; `strategy` reads it.

        Raises
        ------
        ConfigError
            If there is none.
        """
        if self.strategy is None:
            raise ConfigError("there is no strategy yet: it is searched on inputs of a model")
        pairs = [list(pair) for pair in self.strategy]
        return {"effref": FORMAT, "version": VERSION, "pairs": pairs, **self.strategy.record}


def roots(pairs: Sequence[Pair], layers: int) -> tuple[int, ...]:
    """The source of each layer, chains followed to their end: with (3, 1) and (5, 3), layer 5 takes that of layer 1."""
    sources = list(range(layers))
    for layer, source in pairs:
        sources[layer] = source
    for layer in range(layers):  # a source is earlier, so its own is already final
        sources[layer] = sources[sources[layer]]
    return tuple(sources)


# --- what a strategy may be given as --------------------------------------------------------------------------------


def _as_strategy(given: Any) -> Strategy:
    if isinstance(given, Strategy):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _read(given)
    return Strategy(_as_pairs(given))


def _read(path: str | os.PathLike[str]) -> Strategy:
    """The strategy of a file; ConfigError where it is none of a version that is known here."""
    found = read_prepared("strategy", path, FORMAT, VERSION, "kvsharer", FORMS)
    if not is_index(found.get("layers")):
        raise ConfigError(f"strategy='{path}': layers is {_short(found.get('layers'))}; it must be a whole number")
    record = {name: value for name, value in found.items() if name not in ("effref", "version", "pairs")}
    return Strategy(_as_pairs(found.get("pairs")), record)


def _as_pairs(given: Any) -> tuple[Pair, ...]:
    if not isinstance(given, (list, tuple)) or not all(_is_pair(pair) for pair in given):
        raise ConfigError(f"strategy={_short(given)}; it must be {FORMS}")
    pairs = tuple((layer, source) for layer, source in given)
    for layer, source in pairs:
        if layer == 0:
            raise ConfigError("strategy lets layer 0 share; the first layer has keys and values of its own")
        if source >= layer:
            raise ConfigError(f"strategy lets layer {layer} take those of layer {source}; a source must be earlier")
    if len({layer for layer, _ in pairs}) != len(pairs):
        raise ConfigError(f"strategy={_short(given)} names a layer twice; each has one source")
    return pairs


def _is_pair(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and len(given) == 2 and all(map(is_index, given))


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."
