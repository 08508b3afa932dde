"""Parameters of head-wise shareable attention."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import is_index, parameter, read_prepared, require_choice, require_number

Pair = tuple[int, int, int, int]  # layer and head, layer and head whose weights it takes
MATCHED = ("q", "k", "v", "qk", "qkv", "total")

FORMAT, VERSION = "headshare matches", 1  # of a file
FORMS = "a file of 'effref prepare', or [[layer, head, source layer, source head], ...]"


class Matches(tuple[Pair, ...]):
    """Heads with their sources, the best match first: a tuple that also knows where it is from.

    Attributes
    ----------
    record : dict
        What the search noted: model, layers, heads, what was compared, cosines. Empty for matches given by hand.
    """

    record: Mapping[str, Any]

    def __new__(cls, pairs: Iterable[Pair], record: Mapping[str, Any] | None = None) -> Matches:
        made = super().__new__(cls, pairs)
        made.record = dict(record or {})
        return made


@dataclass(frozen=True)
class HeadShareParameters:
    """Head-wise sharing of attention weights; `ratio` = 0 is exact attention."""

    FILE: ClassVar[str] = "matches"  # the parameter that takes what `effref prepare` writes

    ratio: float = parameter(0.3, "part of all L H heads that take another head's weights; 0 is exact attention")
    match: Literal["q", "k", "v", "qk", "qkv", "total"] = parameter(
        "qk", "weights of a head that are compared: q, k, v, qk, qkv, or total = softmax(Wq Wk^T / sqrt(d)) Wv"
    )
    chains: Literal["transitive", "repo"] = parameter(
        "transitive",
        "a source that is itself replaced: follow it to a head that keeps its weights, or, as the repository does, "
        "leave it its own",
    )
    share_output: bool = parameter(True, "the slice of the output projection is shared, too")
    matches: tuple[Pair, ...] | None = parameter(
        None,
        "heads and their sources, best match first, instead of a search in the weights: a file of 'effref prepare', or "
        "[[layer, head, source layer, source head], ...]",
    )

    def __post_init__(self) -> None:
        require_number("ratio", self.ratio, 0, 1)
        require_choice("match", self.match, MATCHED)
        require_choice("chains", self.chains, ("transitive", "repo"))
        require_choice("share_output", self.share_output, (True, False))
        if self.matches is not None:
            found = _as_matches(self.matches)
            if found.record.get("match", self.match) != self.match:
                raise ConfigError(
                    f"matches were found with match={found.record['match']!r}; match={self.match!r} is given"
                )
            object.__setattr__(self, "matches", found)

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Growing ratios, as far as the layers allow."""
        return {"ratio": tuple(r for r in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5) if r <= (config.layers - 1) / config.layers)}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if not self.ratio:
            return
        require_a_key_head_each(config)
        most = (config.layers - 1) / config.layers
        if self.ratio > most:
            raise ConfigError(
                f"ratio={self.ratio:g}; heads of the first of {config.layers} layers keep their weights, so at most "
                f"{most:.4g} of all can be replaced"
            )
        if self.matches is not None:
            self._check_matches(_as_matches(self.matches), config)

    def _check_matches(self, matches: Matches, config: ModelConfig) -> None:
        layers, heads = (matches.record.get(name, getattr(config, name)) for name in ("layers", "heads"))
        if (layers, heads) != (config.layers, config.heads):
            raise ConfigError(
                f"matches are for {layers} layers of {heads} heads; {config.name} has {config.layers} of "
                f"{config.heads}: find some for it"
            )
        for pair in matches:
            if pair[0] >= config.layers or max(pair[1], pair[3]) >= config.heads:
                raise ConfigError(
                    f"matches holds {list(pair)}; {config.name} has {config.layers} layers of {config.heads} heads, "
                    "counted from 0"
                )
        if len(matches) < self.selected(config):
            raise ConfigError(
                f"ratio={self.ratio:g} needs {self.selected(config)} matches; {len(matches)} are given: find them "
                "for all heads, or lower the ratio"
            )

    def is_complete(self, config: ModelConfig) -> bool:
        """Whether nothing has to be searched."""
        return self.matches is not None or not self.selected(config)

    def selected(self, config: ModelConfig) -> int:
        """floor(r L H): the heads selected to take another's weights.

        The product is rounded to nine decimals first, so that 0.29 of 100 heads are 29 although binary 0.29 is less.
        """
        if not self.ratio:
            return 0
        return math.floor(round(self.ratio * config.layers * config.heads, 9))

    def replaced(self, config: ModelConfig) -> int:
        """n_s, the heads without weights of their own.

        Raises
        ------
        ConfigError
            With ``chains="repo"`` and no matches, on which the number depends.
        """
        if self.chains == "transitive" or not self.selected(config):
            return self.selected(config)
        return sum(head != source for head, source in enumerate(self.sources(config)))

    def sources(self, config: ModelConfig) -> tuple[int, ...]:
        """For each of the L H heads, as l H + h, the head whose weights it uses: itself, or one of an earlier layer.

        A head that is used by another always uses its own.

        Raises
        ------
        ConfigError
            If heads are to be replaced and no matches are given.
        """
        found = list(range(config.layers * config.heads))
        chosen = self._chosen(config)
        used = set(chosen.values())
        for target in sorted(chosen):  # layer by layer: what an earlier head uses is settled before
            if self.chains == "transitive":
                found[target] = found[chosen[target]]
            elif target not in used:
                found[target] = chosen[target]
        return tuple(found)

    def _chosen(self, config: ModelConfig) -> dict[int, int]:
        """The selected matches: head -> its source, both as l H + h."""
        count, heads = self.selected(config), config.heads
        if count and self.matches is None:
            raise ConfigError(
                f"which heads are replaced with chains={self.chains!r} depends on the matches: give {FORMS}"
            )
        return {
            layer * heads + head: source_layer * heads + source_head
            for layer, head, source_layer, source_head in (self.matches or ())[:count]
        }

    def to_document(self) -> dict[str, Any]:
        """The matches as JSON; `matches` reads it.

        Raises
        ------
        ConfigError
            If there are none.
        """
        if self.matches is None:
            raise ConfigError("there are no matches yet: they are found from the weights of a model")
        pairs = [list(pair) for pair in self.matches]
        return {"effref": FORMAT, "version": VERSION, **_as_matches(self.matches).record, "matches": pairs}


def require_a_key_head_each(config: ModelConfig) -> None:
    """Raise ConfigError where query heads share key heads: there is no slice of Wk and Wv for each."""
    if config.kv_heads != config.heads:
        raise ConfigError(
            f"headshare needs a key head for every query head; {config.name} has {config.kv_heads} for {config.heads}: "
            "take another model, or ratio=0"
        )


# --- what matches may be given as -----------------------------------------------------------------------------------


def _as_matches(given: Any) -> Matches:
    if isinstance(given, Matches):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _read(given)
    return Matches(_as_pairs(given))


def _read(path: str | os.PathLike[str]) -> Matches:
    """The matches of a file; ConfigError where it holds none of a version that is known here."""
    found = read_prepared("matches", path, FORMAT, VERSION, "headshare", FORMS)
    for name in ("layers", "heads"):
        if not is_index(found.get(name)):
            raise ConfigError(f"matches='{path}': {name} is {reprlib.repr(found.get(name))}; it must be a whole number")
    if found.get("match") not in MATCHED:
        raise ConfigError(f"matches='{path}': match is {reprlib.repr(found.get('match'))}; known: {', '.join(MATCHED)}")
    record = {name: value for name, value in found.items() if name not in ("effref", "version", "matches")}
    return Matches(_as_pairs(found.get("matches")), record)


def _as_pairs(given: Any) -> list[Pair]:
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"matches={reprlib.repr(given)}; it must be {FORMS}")
    pairs = []
    for entry in given:
        if not isinstance(entry, (list, tuple)) or len(entry) != 4 or not all(map(is_index, entry)):
            raise ConfigError(f"matches holds {reprlib.repr(entry)}; it must be {FORMS}")
        if entry[2] >= entry[0]:
            raise ConfigError(f"matches holds {list(entry)}; a source must lie in an earlier layer")
        pairs.append((entry[0], entry[1], entry[2], entry[3]))
    if len({pair[:2] for pair in pairs}) != len(pairs):
        raise ConfigError("matches names a head twice; each has one source")
    return pairs
