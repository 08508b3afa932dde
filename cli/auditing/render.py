"""The table of an audit, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .. import render
from ..layout import Block, Table
from .verdicts import HOLDS, HOLDS_UNDER, NOT_HERE

Row = Mapping[str, Any]
BRACKETS = "in brackets: decides nothing, as another quantity or without what must hold besides"
LEADS = {HOLDS: "holds", HOLDS_UNDER: "holds under", NOT_HERE: "not reproducible here:"}


def blocks(document: Mapping[str, Any]) -> list[Block]:
    """Every claim beside its numbers and its verdict, and where the claims and the numbers are from."""
    rows = document["results"]
    headers = ["claim", "the paper", "tag", "closed form", "measured here", "verdict"]
    cells = [
        [
            row["claim"], _value(row["value"], row["form"], 4), row["tag"], _cell(row, "closed_form"),
            _cell(row, "measured"), f"{LEADS[row['verdict']['kind']]} {row['verdict']['why']}".strip(),
        ]
        for row in rows
    ]  # fmt: skip
    where = [[row["claim"], f"{row['says']}; {row['conditions']}", row["source"]] for row in rows]
    numbers = [
        [row["claim"], side.replace("_", " "), _bracketed(row, side, one), _words(row, one)]
        for row in rows
        for side, one in _listed(row)
    ]
    notes = [[row["claim"], note] for row in rows for note in row["measured"]["notes"]]
    found: list[Block] = [
        _heading(document),
        Table("", headers, cells, left=len(headers)),
        Table("what the numbers are", ["claim", "side", "number", "of what, where"], numbers, left=4),
        Table("what was claimed", ["claim", "what, and under which conditions", "source"], where, left=3),
    ]
    return [*found, Table("said while measuring", ["claim", "note"], notes, left=2)] if notes else found


def _heading(document: Mapping[str, Any]) -> str:
    config = document["config"]
    if not config["measure"]:
        return f"closed forms of the cost model; nothing was run; {BRACKETS}"
    threads = f"{config['threads']} thread{'' if config['threads'] == 1 else 's'}"
    ran = f"measured on the {config['device'].upper()}, engine {config['engine']}, {threads}, float32"
    stopped = "; interrupted" if "interrupted" in document else ""
    return f"{ran}{stopped}; {BRACKETS}"


def _listed(row: Row) -> Iterator[tuple[str, Row]]:
    """The closed form that is shown, and all that was measured."""
    if row["closed_form"]["shown"]:
        yield "closed_form", row["closed_form"]["shown"]
    for one in row["measured"]["readings"]:
        yield "measured", one


def _words(row: Row, reading: Row) -> str:
    """What a number is, under which condition, and what must hold besides."""
    figures, text = reading["figures"], f"{reading['of']}: {reading['condition']}"
    if row["besides"] and row["besides"]["figure"] in figures:
        name = row["besides"]["figure"]
        text += f"; {name.replace('_', ' ')} {render.number(figures[name])}"
    if "speedup_flash" in figures:
        text += f"; against flash {figures['speedup_flash']:.2f}x"
    return text


def _cell(row: Row, side: str) -> str:
    shown = row[side]["shown"]
    return render.NONE if shown is None else _bracketed(row, side, shown)


def _bracketed(row: Row, side: str, reading: Row) -> str:
    """A number; in brackets where it is of another quantity, or does not count on the side that decides."""
    decides = row["judged_by"] == side.replace("_", " ")
    counts = reading["counts"] if decides else reading["comparable"]
    return _number(reading) if counts else f"[{_number(reading)}]"


def _number(reading: Row) -> str:
    """A number, with how many passes or positions it is of."""
    number = _value(reading["value"], reading["form"])
    low = "" if reading["low"] is None else f", at least {_value(reading['low'], reading['form'])}"
    return f"{number} ({reading['passes']} {reading['counted']}{low})" if reading["passes"] else number


def _value(value: float, form: str, digits: int = 3) -> str:
    if form == "ratio":
        return f"{value:.2f}x"
    return f"{100 * value:.{digits}g} %" if form == "share" else f"{value:.{digits}g}"
