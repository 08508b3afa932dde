"""What the parameters of all methods have in common: fields with a meaning, checks, and construction by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, unknown


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
