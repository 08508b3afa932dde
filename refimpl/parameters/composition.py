"""Methods combined, as ``reuse+svd-softmax``: what each replaces, what therefore cannot be combined, their parameters.

Every method replaces parts of exact attention's forward pass. Two methods can be combined where no part is replaced by
both; a part that none replaces is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, unknown
from refimpl.parameters import PARAMETERS
from refimpl.parameters.base import make
from refimpl.parameters.parts import ATTENTION, PARTS, REPLACES


def members(name: str) -> tuple[str, ...]:
    """The methods that a name combines, in the order of the catalogue; ``dense`` alone, as it replaces nothing.

    Raises
    ------
    ConfigError
        A name that is unknown, empty, or given twice.
    """
    given = [part.strip() for part in name.split("+")]
    for part in given:
        if not part and len(given) > 1:
            raise ConfigError(f"method '{name}' holds an empty name: give names joined by +, as reuse+svd-softmax")
        if part not in PARAMETERS:
            raise unknown("method", part, PARAMETERS)
        if given.count(part) > 1:
            raise ConfigError(f"method '{name}' names {part} twice: give each method once")
    return tuple(one for one in PARAMETERS if one in given and one != "dense") or ("dense",)


def canonical(name: str) -> str:
    """The one name under which a combination is known, whatever the order it is given in."""
    return "+".join(members(name))


def declared(method: str) -> tuple[str, ...]:
    """The parts that a method of the catalogue replaces; the whole attention where it does not say."""
    return REPLACES.get(method, ATTENTION)


def in_common(one: str, other: str) -> tuple[str, ...]:
    """The parts that two methods both replace; they can be combined where there are none."""
    return tuple(part for part in PARTS if part in declared(one) and part in declared(other))


def combines(one: str, other: str) -> str:
    """Whether two methods can be combined: "yes"; "in part", with some of several parts at off; or "no"."""
    if not in_common(one, other):
        return "yes"
    pairs = itertools.product(_choices(one), _choices(other))
    return "in part" if any(not set(first) & set(second) for first, second in pairs) else "no"


def _choices(method: str) -> list[tuple[str, ...]]:
    """What a method may replace: its attention, its feed-forward, or both, where either can be at off alone."""
    parts = declared(method)
    if not hasattr(PARAMETERS[method], "replaces"):
        return [parts]
    return [parts, tuple(part for part in parts if part in ATTENTION), *((p,) for p in parts if p not in ATTENTION)]


def parameters_of(name: str, given: Any) -> Any:
    """The parameters of a method or combination: from names and values, or as they are where they are made already."""
    kind = PARAMETERS[name]
    if isinstance(given, kind):
        return given
    return Composition.of(name, given) if kind is Composition else make(kind, name, given)


def as_dict(parameters: Any) -> dict[str, Any]:
    """Parameters by name; those of a combination by method, and in it by name."""
    if isinstance(parameters, Composition):
        return {name: asdict(given) for name, given in parameters.members}
    return asdict(parameters)


@dataclass(frozen=True)
class Composition:
    """The parameters of methods that are combined.

    Attributes
    ----------
    members : tuple of (str, dataclass)
        Each method with its own parameters, in the order of the catalogue.
    """

    members: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any] | None) -> Composition:
        """From ``{"reuse": {"group": 4}}``; a method that is left out has its defaults."""
        names, given = members(name), dict(given or {})
        for key in given:
            if key not in names:
                raise ConfigError(
                    f"parameters of {name} are given by method, as {{'{names[0]}': {{...}}}}; '{key}' is none of "
                    f"{', '.join(names)}"
                )
        return cls(tuple((one, parameters_of(one, given.get(one))) for one in names))

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where two methods replace the same part, or parameters do not fit the model."""
        self.check_parts(config)
        for _, given in self.members:
            given.check(config)
            if hasattr(given, "check_beside"):
                given.check_beside(self.owners(config), config)

    def check_parts(self, config: ModelConfig) -> None:
        """Raise ConfigError where two methods replace the same part."""
        for (one, first), (other, second) in itertools.combinations(self.members, 2):
            replaced = replaced_by(other, second, config)
            for part in replaced_by(one, first, config):
                if part in replaced:
                    raise ConfigError(
                        f"{one} and {other} cannot be combined: both replace '{part}' ({PARTS[part]}): leave one of "
                        f"them out{_or_at_off(one, other)}"
                    )

    def owners(self, config: ModelConfig) -> dict[str, str]:
        """Part -> the method that replaces it."""
        return {part: name for name, given in self.members for part in replaced_by(name, given, config)}

    @property
    def fused(self) -> bool:
        """Whether exact attention runs as one fused op, where no method replaces it."""
        return any(getattr(given, "fused", False) for _, given in self.members)

    @property
    def PER_LENGTH(self) -> bool:  # as in the parameters of methods
        """Whether what is found beforehand fits one length alone."""
        return any(getattr(given, "PER_LENGTH", False) for _, given in self.members)

    @property
    def PER_CAUSALITY(self) -> bool:
        """Whether what is found beforehand is found in passes that are causal, or that are not."""
        return any(getattr(given, "PER_CAUSALITY", False) for _, given in self.members)


def _or_at_off(one: str, other: str) -> str:
    """What else can be done where one of two methods has several parts."""
    several = next((name for name in (other, one) if hasattr(PARAMETERS[name], "replaces")), None)
    return f", or put that part of {several} at off" if several and combines(one, other) == "in part" else ""


def replaced_by(method: str, given: Any, config: ModelConfig) -> tuple[str, ...]:
    """The parts that a method replaces under these parameters: of several, those that are not at off."""
    narrowed = getattr(given, "replaces", None)
    return narrowed(config) if narrowed else declared(method)
