"""Text of the command line to values; every error is one line that says what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from refimpl.config import LARGEST
from refimpl.errors import ConfigError, unknown


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths in rising order: ``512,1024``; ``2^9``; ``2^9:2^13`` is every power of two from one to the other."""
    lengths: set[int] = set()
    for item in text.split(","):
        first, colon, last = item.strip().partition(":")
        lengths.update(_powers(item, _length(first, item), _length(last, item)) if colon else [_length(first, item)])
    return tuple(sorted(lengths))


def _length(text: str, item: str) -> int:
    base, caret, exponent = text.strip().partition("^")
    parts = [base, exponent] if caret else [base]
    if not all(part.isdecimal() and len(part) < 16 for part in parts) or (
        caret and (base != "2" or int(exponent) > 40)
    ):
        raise ConfigError(
            f"length '{item.strip()}' is not a whole number of at least 1: give 512 or 512,1024 or 2^9:2^13"
        )
    length = 2 ** int(exponent) if caret else int(base)
    if not 1 <= length <= LARGEST:
        raise ConfigError(f"length {length} is outside 1 to 2^40")
    return length


def _powers(item: str, first: int, last: int) -> list[int]:
    if first & (first - 1) or last & (last - 1) or first > last:
        raise ConfigError(f"range '{item.strip()}': both ends must be powers of two, the smaller one first")
    return [2**power for power in range(first.bit_length() - 1, last.bit_length())]


def parse_range(text: str) -> tuple[int, int]:
    """``16:8192`` or ``2^4:2^13``: two rising whole numbers."""
    first, colon, last = text.partition(":")
    if not colon:
        raise ConfigError(f"range '{text}': give both ends, as 16:8192")
    return _length(first, text), _length(last, text)


def parse_names(text: str) -> tuple[str, ...]:
    """``a,b`` as names, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise ConfigError(f"'{text}' holds an empty name: give names separated by commas")
    return names


def parse_settings(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``reuse.group=4`` as ``{"reuse": {"group": 4}}``; values are JSON where they read as JSON, else text."""
    settings: dict[str, dict[str, Any]] = {}
    for item in items:
        method, key, value = _setting("--set", item, "reuse.group=4")
        settings.setdefault(method, {})[key] = _value(value)
    return settings


def parse_choices(option: str) -> Callable[[Iterable[str]], dict[str, dict[str, tuple[Any, ...]]]]:
    """For an option that takes several values: ``reuse.group=1,2`` as ``{"reuse": {"group": (1, 2)}}``."""

    def parse(items: Iterable[str]) -> dict[str, dict[str, tuple[Any, ...]]]:
        choices: dict[str, dict[str, tuple[Any, ...]]] = {}
        for item in items:
            method, key, values = _setting(option, item, "reuse.group=1,2,4")
            choices.setdefault(method, {})[key] = tuple(_value(value) for value in _split(values))
        return choices

    return parse


def _setting(option: str, item: str, example: str) -> tuple[str, str, str]:
    """Method, parameter and the text behind the equals sign."""
    from refimpl.methods import CATALOG

    name, equals, value = item.partition("=")
    method, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"{option} '{item}' is not METHOD.PARAMETER=VALUE, as in {option} {example}")
    if method not in CATALOG:
        raise unknown("method", method, CATALOG)
    return method, key, value


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside of brackets: ``1,[2,3]`` has two."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
