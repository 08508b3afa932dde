"""The errors that effref raises on purpose. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class EffrefError(Exception):
    """The request cannot be served; the command line prints the message as one line and exits with 2."""


class ConfigError(EffrefError, ValueError):
    """A model, workload or parameter value is outside what is allowed."""


class ShapeError(EffrefError, ValueError):
    """Array sizes or dtypes disagree; the message names both arrays."""


class InputError(EffrefError, ValueError):
    """An input (text, recording, array) cannot be used as it is."""


class WeightsError(EffrefError):
    """Weights are missing, truncated, of the wrong shape, or fail their checksum."""


class DatabaseError(EffrefError):
    """A database of attention maps is missing, damaged, of another model, or cannot be written."""


class UnsupportedError(EffrefError):
    """The engine or method cannot run this request; the message lists the reasons."""


class MissingDependencyError(EffrefError, ImportError):
    """An optional package or a device is missing; the message says how to get it."""


def unknown(kind: str, given: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a list: the nearest name is suggested and all are shown."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ConfigError(f"unknown {kind} '{given}': {hint}known: {', '.join(names)}")
