"""Writes the tables of what combines with what into ``composition.md``: ``python docs/combinations.py``."""

from __future__ import annotations

from pathlib import Path

from refimpl.methods import CATALOG
from refimpl.parameters.composition import combines, declared
from refimpl.parameters.parts import PARTS

PAGE = Path(__file__).parent / "composition.md"
BEGIN, END = "<!-- begin combinations: filled from refimpl/parameters/parts.py -->\n", "<!-- end combinations -->"
WORDS = {"yes": "yes", "in part": "in part", "no": "-"}


def tables() -> str:
    """What each method replaces, and which two can be combined."""
    names = [name for name in CATALOG if name != "dense"]
    replaced = [[f"`{name}`", *("x" if part in declared(name) else "" for part in PARTS)] for name in names]
    pairs = [[f"`{one}`", *("" if one == other else WORDS[combines(one, other)] for other in names)] for one in names]
    return written(["replaces", *PARTS], replaced) + "\n" + written(["with", *(f"`{name}`" for name in names)], pairs)


def written(headers: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def filled(text: str) -> str:
    """The page with the tables between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
