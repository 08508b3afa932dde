"""Parameters of AttMemo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, require_choice, require_int, require_number

if TYPE_CHECKING:
    from refimpl.memo.memo import Memo

WIDTH = 128  # of the features; as refimpl.memo.embedding, which this must not load


@dataclass(frozen=True)
class AttMemoParameters:
    """AttMemo; `tau` above 1 is exact attention."""

    PER_LENGTH: ClassVar[bool] = True  # what is found beforehand fits inputs of one length alone

    tau: float = parameter(
        0.9, "a stored map is taken where 1 - predicted distance is at least this; 0 takes all, above 1 none"
    )
    database: str | Memo | None = parameter(  # noqa: RUF009  # a field like the others
        None, "folder of 'effref memo build'; default one of the run's own inputs, in which every sequence is found"
    )
    index: Literal["flat", "hnsw"] = parameter("flat", "exact search, or a graph of neighbours by Faiss")
    transfer: Literal["copy", "map"] = parameter("copy", "stored maps are copied, or mapped into memory (Linux)")
    skip_layers: int = parameter(0, "the first layers, so many, compute their maps")
    select: Literal["auto", "all", "measured", "model"] = parameter(
        "auto",
        "layers that look up: all, or where it pays by the profile of the database, as measured or as predicted; auto: "
        "measured, but all where there is no profile at this tau",
    )
    layers: tuple[int, ...] | None = parameter(None, "instead of a selection: the layers that look up")
    padding: Literal["masked", "include"] = parameter(
        "masked", "under a mask: masked refuses, as a stored map has its own; include takes maps as they are"
    )
    heads: Literal["all", "first"] = parameter("all", "heads whose maps are compared in training on own inputs")
    epochs: int = parameter(6, "of training on own inputs")
    seed: int = parameter(0, "of that training")
    hit_rate: float | tuple[float, ...] | None = parameter(
        None, "for the cost model: share of sequences that hit, of all or of each layer; default all"
    )
    compared: int | None = parameter(None, "for the cost model: points that a search of the graph looks at")

    def __post_init__(self) -> None:
        require_number("tau", self.tau, 0, 2)
        object.__setattr__(self, "database", _as_database(self.database))
        require_choice("index", self.index, ("flat", "hnsw"))
        require_choice("transfer", self.transfer, ("copy", "map"))
        require_int("skip_layers", self.skip_layers, 0)
        require_choice("select", self.select, ("auto", "all", "measured", "model"))
        require_choice("padding", self.padding, ("masked", "include"))
        require_choice("heads", self.heads, ("all", "first"))
        require_int("epochs", self.epochs, 0)
        require_int("seed", self.seed, 0)
        if self.layers is not None:
            object.__setattr__(self, "layers", _as_layers(self.layers))
        if isinstance(self.hit_rate, Sequence):
            object.__setattr__(self, "hit_rate", tuple(self.hit_rate))
        for rate in self._rates:
            require_number("hit_rate", rate, 0, 1)
        if self.compared is not None:
            require_int("compared", self.compared, 1)

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Thresholds: off, those of Figure 4 of the paper, and all."""
        return {"tau": (1.1, 0.95, 0.9, 0.8, 0.7, 0.0)}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if isinstance(self.hit_rate, tuple) and len(self.hit_rate) != config.layers:
            raise ConfigError(f"hit_rate has {len(self.hit_rate)} values; {config.name} has {config.layers} layers")
        for layer in self.layers or ():
            if layer >= config.layers:
                raise ConfigError(f"layers names {layer}; {config.name} has the layers 0 to {config.layers - 1}")
        if self.is_off(config):
            return
        if config.position == "relative":
            raise ConfigError(
                f"{config.name} has relative positions, whose scores attmemo does not replace: take a model without "
                "them, as minilm-l6, or tau=1.1"
            )
        if config.streams:
            raise ConfigError(f"{config.name} streams over a cache; attmemo looks whole sequences up: give tau=1.1")
        if self._is_open:
            self.database.check(config)  # type: ignore[union-attr]

    def looked_up(self, config: ModelConfig) -> tuple[int, ...]:
        """The layers that look their maps up, in order."""
        if self.tau > 1 or (self._is_open and not self.database.count):  # type: ignore[union-attr]
            return ()
        candidates = range(config.layers) if self.layers is None else self.layers
        return tuple(layer for layer in candidates if layer >= self.skip_layers)

    def is_off(self, config: ModelConfig) -> bool:
        """Whether no layer looks up, which is exact attention."""
        return not self.looked_up(config)

    def is_complete(self, config: ModelConfig) -> bool:
        """Whether nothing has to be built, opened or selected before a pass."""
        return self.is_off(config) or (self._is_open and (self.select == "all" or self.layers is not None))

    def rate(self, layer: int) -> float:
        """Share of the sequences that hit in a layer, for the cost model."""
        if self.hit_rate is None:
            return 1.0
        return self.hit_rate[layer] if isinstance(self.hit_rate, tuple) else self.hit_rate

    def records(self, batch: Any) -> Any:
        """Stored maps of a layer: those of the database, or one for each sequence of the batch."""
        return self.database.count if self._is_open else batch  # type: ignore[union-attr]

    def announcement(self) -> str:
        """What was prepared, for whoever reads the result."""
        if not self._is_open:
            return "attmemo needs nothing"
        about, count = self.database.about, self.database.count  # type: ignore[union-attr]
        kept = f"{count} sequences of {about.length} positions"
        if self.own_inputs:
            return f"attmemo: a database was built of the run's own inputs ({kept}), so that every sequence is found"
        where = "" if self.layers is None else f"; layers that look up: {', '.join(map(str, self.layers)) or 'none'}"
        return f"attmemo: {kept} in {self.database}{where}"

    @property
    def own_inputs(self) -> bool:
        """Whether the database was built from what the method runs on."""
        return self._is_open and self.database.is_temporary  # type: ignore[union-attr]

    @property
    def _is_open(self) -> bool:
        return hasattr(self.database, "records")

    @property
    def _rates(self) -> tuple[Any, ...]:
        if self.hit_rate is None:
            return ()
        return self.hit_rate if isinstance(self.hit_rate, tuple) else (self.hit_rate,)


def _as_database(given: Any) -> Any:
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if given is None or hasattr(given, "records") or (isinstance(given, str) and given):
        return given
    raise ConfigError(f"database={given!r}; it must be the folder of a database, as 'effref memo build' makes it")


def _as_layers(given: Any) -> tuple[int, ...]:
    whole = isinstance(given, (list, tuple)) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given
    )
    if not whole or len(set(given)) != len(given):
        raise ConfigError(f"layers={given!r}; it must be a list of different layers, as [1, 2, 5]")
    return tuple(sorted(given))
