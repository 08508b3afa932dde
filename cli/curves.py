"""The settings that fidelity is asked of: curves of points, each curve a method with one knob turned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, unknown
from refimpl.parameters import PARAMETERS
from refimpl.parameters.composition import members

from .request import BASELINES, params_of
from .results import flat

Settings = Mapping[str, Mapping[str, Any]]  # method -> parameter -> value
Choices = Mapping[str, Mapping[str, Sequence[Any]]]  # method -> parameter -> values


@dataclass(frozen=True)
class Point:
    """One setting of a method.

    Attributes
    ----------
    method : str
    params : mapping
        Its parameters as given; the knob is among them.
    curve : str
        The method, with what tells its curves apart.
    knob, value
        The parameter along the curve, and its value here; "" and None where there is none.
    """

    method: str
    params: Mapping[str, Any]
    curve: str
    knob: str = ""
    value: Any = None

    @property
    def name(self) -> str:
        """The point in words."""
        return f"{self.curve}, {self.knob}={plain(self.value)}" if self.knob else self.curve


def plain(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def points(
    methods: Sequence[str], params: Settings, over: Choices, vary: Choices, config: ModelConfig
) -> tuple[Point, ...]:
    """The exact baselines, and the curves of every method.

    Parameters
    ----------
    methods : sequence of str
    params : mapping
        Parameters that hold along all curves of a method.
    over : mapping
        Knobs and their values; by default those of the parameters' ``sweep``. It is not turned where `params` fixes it,
        or what the method would search for.
    vary : mapping
        Parameters of which every combination of values gives a curve of its own.
    config : ModelConfig

    Raises
    ------
    ConfigError
        If an option is for a method that is not asked for, names an unknown parameter or no value, or two options
        decide the same parameter.
    """
    for option, given in (("--set", params), ("--over", over), ("--vary", vary)):
        _check(option, given, methods)
    found = [Point(name, {}, name) for name in BASELINES]
    for name in methods:
        if name not in BASELINES:
            fixed, turned, varied = (flat(params_of(name, given) or {}) for given in (params, over, vary))
            found += _curves(name, fixed, turned, varied, config)
    return tuple(found)


def _by_method(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `results.flat`."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        method, dot, key = name.partition(".")
        if dot:
            found.setdefault(method, {})[key] = value
        else:
            found[name] = value
    return found


def sweep_of(name: str, fixed: Mapping[str, Any], config: ModelConfig) -> dict[str, Sequence[Any]]:
    """The knobs of a method, or of every method of several; none of one that is given what it would search for."""
    names = members(name)
    found: dict[str, Sequence[Any]] = {}
    for one in names:
        row, prefix = PARAMETERS[one], "" if len(names) == 1 else f"{one}."
        if f"{prefix}{getattr(row, 'FILE', None)}" not in fixed:
            found |= {prefix + knob: values for knob, values in row.sweep(config).items()}
    return found


def _check(option: str, given: Settings, methods: Sequence[str]) -> None:
    for name, chosen in given.items():
        if name not in {one for method in methods for one in members(method)}:
            raise ConfigError(f"{option} is given for '{name}', which is not among the methods: {', '.join(methods)}")
        known = list(PARAMETERS[name].__dataclass_fields__)
        for key, value in chosen.items():
            if key not in known:
                raise unknown(f"parameter of {name}", key, known)
            if option != "--set" and (isinstance(value, str) or not isinstance(value, Sequence) or not value):
                raise ConfigError(f"{option} {name}.{key} is {value!r}; it must be a list of values")


def _curves(
    name: str, fixed: Mapping[str, Any], over: Mapping[str, Sequence[Any]], vary: Mapping[str, Sequence[Any]],
    config: ModelConfig,
) -> Iterator[Point]:  # fmt: skip
    _check_apart(name, {"--set": fixed, "--over": over, "--vary": vary})
    knobs = over or sweep_of(name, fixed, config)
    turned = {knob: values for knob, values in knobs.items() if knob not in fixed and knob not in vary}
    for chosen in itertools.product(*vary.values()):
        own = dict(zip(vary, chosen, strict=True))
        curve = " ".join([name, *(f"{key}={plain(value)}" for key, value in own.items())])
        for knob, values in turned.items():
            for value in values:
                yield Point(name, _by_method({**fixed, **own, knob: value}), curve, knob, value)
        if not turned:
            yield Point(name, _by_method({**fixed, **own}), curve)


def _check_apart(name: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    for (one, keys), (other, others) in itertools.combinations(options.items(), 2):
        for key in keys:
            if key in others:
                raise ConfigError(f"{one} and {other} both decide {name}.{key}: give it to one of them")
