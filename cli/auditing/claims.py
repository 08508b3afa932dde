"""The claims of ``claims.toml``, checked as they are read."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from refimpl.errors import ConfigError, unknown
from refimpl.methods import CATALOG

TAGS = ("confirmed", "repository code", "third-party")  # what may be quoted, each with its source named
FORMS, RELATIONS, JUDGES = ("share", "ratio"), ("at least", "about"), ("closed form", "measured")


@dataclass(frozen=True)
class Besides:
    """A second figure that must hold for a reading to count.

    Attributes
    ----------
    figure : str
        Its name among the figures of a reading.
    least, most : float or None
    why : str
        Where the limit is from.
    """

    figure: str
    why: str
    least: float | None = None
    most: float | None = None

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether the figure is there and within the limit."""
        value = figures.get(self.figure)
        if value is None:
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def missed(self, figures: Mapping[str, float]) -> str:
        """What was found where it does not hold, beside what is needed."""
        limits = {"at least": self.least, "at most": self.most}
        needed = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        found = f"{figures[self.figure]:.3g}" if self.figure in figures else "not known"
        return f"met where the {self.figure.replace('_', ' ')} is {found}, and {needed} is needed"


@dataclass(frozen=True)
class Claim:
    """What a paper says, how well that is known, and how it is judged; see the head of ``claims.toml``.

    Attributes
    ----------
    name, method, says : str
    value : float
        A share as a fraction, or a ratio.
    form : {"share", "ratio"}
    relation : {"at least", "about"}
    tolerance : float
        Relative.
    tag : str
        One of `TAGS`.
    source, conditions : str
    judged_by : {"closed form", "measured"}
    besides : Besides or None
    needs_weights : bool
    least_passes : int
        A time of fewer does not count.
    unchecked, not_here : str
    settings : dict
    """

    name: str
    method: str
    says: str
    value: float
    form: str
    relation: str
    tolerance: float
    tag: str
    source: str
    conditions: str
    judged_by: str
    not_here: str
    settings: Mapping[str, Any]
    besides: Besides | None = None
    needs_weights: bool = False
    least_passes: int = 0
    unchecked: str = ""

    def __post_init__(self) -> None:
        for name, known in (("method", CATALOG), ("tag", TAGS), ("form", FORMS), ("relation", RELATIONS)):
            if getattr(self, name) not in known:
                raise unknown(f"{name} of the claim {self.name}", getattr(self, name), known)
        if self.judged_by not in JUDGES:
            raise unknown(f"judge of the claim {self.name}", self.judged_by, JUDGES)
        if not (self.value > 0 and 0 <= self.tolerance < 1):
            raise ConfigError(f"{self.name}: value is {self.value} and tolerance {self.tolerance}; give positive ones")

    def meets(self, reading: Reading) -> bool:
        """Whether a number of the claim's own kind meets it; of a time by its spread, what it is at least."""
        if self.relation == "at least":
            return (reading.value if reading.low is None else reading.low) >= self.value * (1 - self.tolerance)
        return abs(reading.value - self.value) <= self.tolerance * self.value


@dataclass(frozen=True)
class Reading:
    """A number beside a claim.

    Attributes
    ----------
    value : float
        A share as a fraction, a ratio, or another number.
    of : str
        What it is, in words.
    condition : str
        What holds for it beyond what the claim says; empty where nothing does.
    form : {"share", "ratio", "number"}
    comparable : bool
        Whether it is what the claim is about; others are shown and decide nothing.
    passes : int or None
        Timed passes, or sequences or positions looked at, as `counted` says.
    counted : str
    weights : str or None
        Of what ran; None where nothing did.
    pretrained : bool
    figures : dict of str to float
        What else is known at this point.
    low : float or None
        What it is at least, by the spread of the passes: 10th percentile of the exact method's times over 90th of the
        other's. None for what has no spread.
    """

    value: float
    of: str
    condition: str = ""
    form: str = "share"
    comparable: bool = True
    passes: int | None = None
    counted: str = ""
    weights: str | None = None
    pretrained: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
    low: float | None = None


@cache
def claims() -> dict[str, Claim]:
    """All claims by name, in reading order.

    Raises
    ------
    ConfigError
        If one names an unknown method or tag, or a value that is not allowed.
    """
    table = tomllib.loads(Path(__file__).with_name("claims.toml").read_text("utf-8"))
    return {entry["name"]: _claim(entry) for entry in table["claims"]}


def _claim(entry: Mapping[str, Any]) -> Claim:
    besides = entry.get("besides")
    return Claim(**{**entry, "besides": Besides(**besides) if besides else None})


def claims_of(methods: Iterable[str] | None) -> list[Claim]:
    """The claims about these methods, or all.

    Raises
    ------
    ConfigError
        For an unknown method, and for methods about which there is no claim.
    """
    wanted = None if methods is None else [methods] if isinstance(methods, str) else list(methods)
    for name in wanted or ():
        if name not in CATALOG:
            raise unknown("method", name, CATALOG)
    found = [claim for claim in claims().values() if wanted is None or claim.method in wanted]
    if not found:
        able = ", ".join(dict.fromkeys(claim.method for claim in claims().values()))
        raise ConfigError(
            f"no claim about {', '.join(wanted or ()) or 'no method'} is kept; there are some about: {able}"
        )
    return found
