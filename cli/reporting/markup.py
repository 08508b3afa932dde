"""HTML and SVG as values: text is escaped unless its type says that it is markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"meta", "input", "br", "hr"}
SHAPES = {"path", "rect", "line", "circle", "use"}  # of SVG; closed at once where they hold nothing


class Markup(str):
    """Text that is HTML already; only `tag` and `joined` make it, and the stylesheet and script that come along."""

    __slots__ = ()


Child = str | None | Iterable[str]


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element; ``class_`` is the attribute class, ``stroke_width`` stroke-width; None and False are left out."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))
    if name in VOID:
        return Markup(f"<{name}{given}>")
    inside = joined(*children)
    if not inside and name in SHAPES:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{inside}</{name}>")


def joined(*children: Child) -> Markup:
    """Children one after another, escaped where they are text."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child, quote=True))
        elif child is not None:
            parts.append(joined(*child))
    return Markup("".join(parts))


def _attribute(name: str, value: object) -> str:
    key = name if name == "viewBox" else name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    text = digits(value) if isinstance(value, int | float) else str(value)
    return f' {key}="{escape(text, quote=True)}"'


def digits(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
