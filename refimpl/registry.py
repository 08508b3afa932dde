"""Tables of classes that are imported when they are first asked for, so that the command answers at once."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TypeVar

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Method name -> class; a string "module:class" stands for the class until it is read.

    Names joined by ``+``, as ``reuse+latte``, have one class together: `composed`.
    """

    def __init__(self, places: Mapping[str, str], composed: str) -> None:
        super().__init__()
        self.data.update(places)  # type: ignore[arg-type]
        self.composed = composed

    def __getitem__(self, name: str) -> T:
        if "+" in name:
            return resolve_name(self.composed)  # type: ignore[no-any-return]
        value: T | str = super().__getitem__(name)
        if isinstance(value, str):
            self.data[name] = value = resolve_name(value)
        return value  # type: ignore[return-value]
