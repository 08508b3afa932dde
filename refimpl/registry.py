"""Tables of classes that are imported when they are first asked for, so that the command answers at once."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TypeVar

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Method name -> class; a string "module:class" stands for the class until it is read."""

    def __init__(self, places: Mapping[str, str]) -> None:
        super().__init__()
        self.data.update(places)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> T:
        value: T | str = super().__getitem__(name)
        if isinstance(value, str):
            self.data[name] = value = resolve_name(value)
        return value  # type: ignore[return-value]
