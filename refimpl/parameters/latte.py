"""Parameters of LATTE: how many pairs are kept, and the thresholds of the heads."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any, ClassVar, Literal

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import NOT_JSON, parameter, read_json, require_choice, require_int, require_number

Row = tuple[Any, ...]  # one value for each head of a layer

METHOD, VERSION = "latte", 1  # of a file
FORMS = "a file of 'effref prepare', or [[theta, ...], ...], one for each head of each layer"
NIBBLES = ("floor", "round")
STAGES = ("int8", "float")
DENOMINATOR = 10**6  # fractions given as decimals are read as so fine a ratio


class Thresholds(tuple[Row, ...]):
    """theta of every head of every layer, None where it is infinite: a tuple that also knows where it is from.

    Attributes
    ----------
    record : dict
        What was noted: model, layers, heads, nibble, source, target and measured kept fractions. Empty for thresholds
        given by hand.
    """

    record: Mapping[str, Any]

    def __new__(cls, rows: Iterable[Iterable[float | None]], record: Mapping[str, Any] | None = None) -> Thresholds:
        made = super().__new__(cls, (tuple(None if x is None or x == math.inf else x for x in row) for row in rows))
        made.record = dict(record or {})
        return made


@dataclass(frozen=True)
class LatteParameters:
    """LATTE; `kept` = 1 or `gamma` = 0 filters nothing, and with ``stage2="float"`` is exact attention."""

    FILE: ClassVar[str] = "thresholds"  # the parameter that takes what `effref prepare` writes
    CURVES: ClassVar[dict[str, str]] = {  # what a curve over a parameter is of
        "kept": "the same quantile of each head",
        "gamma": "one threshold for all heads",
        "thresholds": "thresholds of files",
    }

    kept: Any = parameter(  # noqa: RUF009  # a field like the others
        0.15, "part of the visible pairs that is kept, for all heads or [[one for each head], ...]; 1 filters nothing"
    )
    thresholds: Thresholds | None = parameter(  # noqa: RUF009  # a field like the others
        None,
        "theta >= 0 of each head of each layer, null for none, instead of calibration: a file of 'effref prepare', or "
        "[[theta, ...], ...]",
    )
    gamma: float | None = parameter(
        None, "exp(-theta), one number for all heads, instead of calibration; 0 filters nothing"
    )
    nibble: Literal["floor", "round"] = parameter(
        "floor", "the four bits of an estimate: code >> 4, or round: min((code + 8) >> 4, 7)"
    )
    stage2: Literal["int8", "float"] = parameter(
        "int8", "scores of kept pairs: the whole product of the 8-bit codes, or float: that of queries and keys"
    )
    samples: int = parameter(8, "calibration samples, at most")
    sample_tokens: int = parameter(512, "tokens of a sample; longer rows of tokens are cut into several")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", _as_kept(self.kept))
        require_choice("nibble", self.nibble, NIBBLES)
        require_choice("stage2", self.stage2, STAGES)
        require_int("samples", self.samples, 1)
        require_int("sample_tokens", self.sample_tokens, 2)
        if self.gamma is not None:
            require_number("gamma", self.gamma, 0, 1)
            if self.thresholds is not None:
                raise ConfigError("gamma and thresholds are given; gamma is one threshold for all heads: give one")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", _as_thresholds(self.thresholds))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Kept pairs: all, and down to fewer than the paper keeps."""
        return {"kept": (1.0, 0.5, 0.3, 0.15, 0.1)}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if config.position == "relative":
            raise ConfigError(
                f"latte estimates scores from 4-bit queries and keys; those of {config.name} also have a term of "
                "relative positions, for which there is no estimate: take a model without"
            )
        if not isinstance(self.kept, Real):
            _check_shape("kept", self.kept, config)
        if self.thresholds is None:
            return
        _check_shape("thresholds", self.thresholds, config)
        nibble = self.thresholds.record.get("nibble", self.nibble)
        if nibble != self.nibble:
            raise ConfigError(f"thresholds were found with nibble={nibble!r}; nibble is {self.nibble!r}: set it alike")

    def is_complete(self, config: ModelConfig) -> bool:
        """Whether nothing has to be calibrated."""
        filters = any(fraction < 1 for row in self._kept_rows(config) for fraction in row)
        return self.thresholds is not None or self.gamma is not None or not filters

    @property
    def PER_CAUSALITY(self) -> bool:  # as PER_LENGTH of other methods
        """Whether something is looked for in passes, which are causal or not."""
        return self.thresholds is None and self.gamma is None

    def thetas(self, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
        """theta of every head of every layer; infinite where nothing is filtered.

        Raises
        ------
        ConfigError
            If they are still to be calibrated.
        """
        if not self.is_complete(config):
            raise ConfigError(f"the thresholds are not known yet: calibrate on inputs, or give {FORMS}")
        if self.thresholds is not None:
            return tuple(tuple(math.inf if theta is None else float(theta) for theta in row) for row in self.thresholds)
        theta = -math.log(self.gamma) if self.gamma else math.inf
        return ((theta,) * config.heads,) * config.layers

    def fractions(self, config: ModelConfig) -> tuple[Fraction, ...]:
        """The kept part of the visible pairs of each layer: what was measured in calibration, else `kept`.

        Exact for whole numbers and fractions; decimals are read as a ratio of small numbers.
        """
        if self.gamma == 0:
            return (Fraction(1),) * config.layers
        measured = self.thresholds.record.get("kept") if self.thresholds is not None else None
        if measured is None and isinstance(self.kept, Real):
            return (_fraction(self.kept),) * config.layers
        rows = self.kept if measured is None else measured
        return tuple(sum(map(_fraction, row), Fraction(0)) / len(row) for row in rows)

    def with_kept(self, share: float) -> LatteParameters:
        """With the share that a run kept, where none is known: one threshold for all heads says nothing of it."""
        return replace(self, kept=share) if self.gamma else self

    def _kept_rows(self, config: ModelConfig) -> tuple[Row, ...]:
        return ((self.kept,) * config.heads,) * config.layers if isinstance(self.kept, Real) else self.kept

    def target(self, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
        """The part that calibration is to keep of the visible pairs of each head of each layer."""
        return tuple(tuple(map(float, row)) for row in self._kept_rows(config))

    def to_document(self) -> dict[str, Any]:
        """The thresholds as JSON; `thresholds` reads it.

        Raises
        ------
        ConfigError
            If there are none.
        """
        if self.thresholds is None:
            raise ConfigError("there are no thresholds yet: they are calibrated on inputs of a model")
        rows = [list(row) for row in self.thresholds]
        record = {name: value for name, value in self.thresholds.record.items() if name != "thresholds"}
        about = {"schema_version": VERSION, "method": METHOD, "effref": "latte thresholds"}
        return {**about, **record, "thresholds": rows}


def _fraction(given: Any) -> Fraction:
    return Fraction(given).limit_denominator(DENOMINATOR) if isinstance(given, float) else Fraction(given)


def _check_shape(name: str, rows: Any, config: ModelConfig) -> None:
    if len(rows) != config.layers or any(len(row) != config.heads for row in rows):
        shape = f"{len(rows)} layers of {'/'.join(map(str, sorted({len(row) for row in rows})))} heads"
        raise ConfigError(f"{name} are for {shape}; {config.name} has {config.layers} of {config.heads}")


# --- what kept and thresholds may be given as -------------------------------------------------------------------------


def _as_kept(given: Any) -> Any:
    if _is_number(given):
        one = given
    elif isinstance(given, (list, tuple)) and given and all(_is_row(row, _is_number) for row in given):
        for one in (value for row in given for value in row):
            _check_kept(one)
        return tuple(map(tuple, given))
    else:
        raise ConfigError(f"kept={reprlib.repr(given)}; it must be a number, or one for each head of each layer")
    _check_kept(one)
    return one


def _check_kept(given: Any) -> None:
    if not 0 < given <= 1:
        raise ConfigError(f"kept={given!r}; it must be above 0 and at most 1, which filters nothing")


def _as_thresholds(given: Any) -> Thresholds:
    if isinstance(given, Thresholds):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _read(given)
    return Thresholds(_as_rows("thresholds", given))


def _read(path: str | os.PathLike[str]) -> Thresholds:
    """The thresholds of a file; ConfigError where it holds none of a version that is known here."""
    found = read_json("thresholds", path, f"give {FORMS}", NOT_JSON)
    if not isinstance(found, dict) or found.get("method") != METHOD:
        raise ConfigError(f"thresholds='{path}' holds none of latte: make one with 'effref prepare --method latte'")
    if found.get("schema_version") != VERSION:
        version = reprlib.repr(found.get("schema_version"))
        raise ConfigError(f"thresholds='{path}' has schema_version {version}; {VERSION} can be read")
    if found.get("nibble") not in NIBBLES:
        raise ConfigError(f"thresholds='{path}': nibble is {reprlib.repr(found.get('nibble'))}; known: floor, round")
    rows = _as_rows(f"thresholds='{path}': thresholds", found.get("thresholds"))
    kept = found.get("kept")
    if kept is not None:
        fits = isinstance(kept, list) and [len(r) if _is_row(r, _is_part) else -1 for r in kept] == list(map(len, rows))
        if not fits:
            raise ConfigError(f"thresholds='{path}': kept must have a number from 0 to 1 beside every threshold")
    record = {k: v for k, v in found.items() if k not in ("schema_version", "method", "thresholds")}
    return Thresholds(rows, record)


def _as_rows(name: str, given: Any) -> list[Row]:
    if not isinstance(given, (list, tuple)) or not given or not all(_is_row(row, _is_theta) for row in given):
        raise ConfigError(f"{name}={reprlib.repr(given)}; it must be {FORMS}; a theta is at least 0, or null for none")
    return [tuple(row) for row in given]


def _is_row(given: Any, fits: Any) -> bool:
    return isinstance(given, (list, tuple)) and len(given) > 0 and all(map(fits, given))


def _is_number(given: Any) -> bool:
    return isinstance(given, Real) and not isinstance(given, bool)


def _is_part(given: Any) -> bool:
    return _is_number(given) and 0 <= given <= 1


def _is_theta(given: Any) -> bool:
    return given is None or (_is_number(given) and given >= 0)
