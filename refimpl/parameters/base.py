"""What the parameters of all methods have in common: fields with a meaning, checks, and construction by name."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, unknown

NOT_JSON = "is not a JSON file: make one with 'effref prepare'"


def parameter(default: Any, about: str) -> Any:
    """A field with its meaning, which ``effref list`` and ``effref explain`` print."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class NoParameters:
    """For methods without a knob."""

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """The knob that trades fidelity for cost, with values worth comparing, from off onward; empty without one."""
        return {}

    def check(self, config: ModelConfig) -> None:
        """Nothing to check."""


def require_int(name: str, value: Any, least: int) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}; it must be a whole number of at least {least}")


def require_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise ConfigError unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigError(f"{name}={value!r}; it must be a number from {least:g} to {most:g}")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r}; it must be one of {', '.join(map(repr, choices))}")


def is_index(given: Any) -> bool:
    """Whether a value of a file is a whole number from 0."""
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def read_json(name: str, path: str | os.PathLike[str], absent: str, damaged: str) -> Any:
    """What the JSON file that is given as parameter `name` holds; ConfigError with a hint where it holds none."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}='{path}' cannot be read ({error.strerror}): {absent}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}='{path}' {damaged}") from error


def read_prepared(
    name: str, path: str | os.PathLike[str], kind: str, version: int, method: str, forms: str
) -> dict[str, Any]:
    """What ``effref prepare`` wrote for a method: a document of this kind and version; ConfigError otherwise."""
    found = read_json(name, path, f"give {forms}", NOT_JSON)
    if not isinstance(found, dict) or found.get("effref") != kind:
        raise ConfigError(f"{name}='{path}' holds no {kind}: make one with 'effref prepare --method {method}'")
    if found.get("version") != version:
        raise ConfigError(f"{name}='{path}' has version {reprlib.repr(found.get('version'))}; {version} can be read")
    return found


P = TypeVar("P")


def make(cls: type[P], method: str, given: Mapping[str, Any] | None) -> P:
    """An instance of `cls` from names and values; an unknown name raises ConfigError with the known ones."""
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in given or {}:
        if name not in known:
            if not known:
                raise ConfigError(f"method '{method}' has no parameters; '{name}' was given")
            raise unknown(f"parameter of {method}", name, known)
    return cls(**(given or {}))
