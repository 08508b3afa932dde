"""Lays out tables for a terminal and for Markdown with tabulate; the cells are already text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = Sequence[str]
WIDTH = 118  # columns that a table of words may take
WIDEST_COLUMN = 31  # of words, but for the last column


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first `left` columns are words, the others numbers.

    Attributes
    ----------
    groups : sequence of (str, int)
        Labels above the headers, each over so many columns.
    total : sequence of str
        A last row, set apart.
    """

    title: str
    headers: Row
    rows: Sequence[Row]
    total: Row = ()
    groups: Sequence[tuple[str, int]] = ()
    left: int = 1


Block = Table | str


def as_text(blocks: Iterable[Block]) -> str:
    """For a terminal."""
    return "\n\n".join(block if isinstance(block, str) else _text(block) for block in blocks) + "\n"


def as_markdown(blocks: Iterable[Block]) -> str:
    """For a page."""
    return "\n\n".join(block if isinstance(block, str) else _markdown(block) for block in blocks) + "\n"


def _text(table: Table) -> str:
    from tabulate import SEPARATING_LINE

    rows = [*table.rows, SEPARATING_LINE, table.total] if table.total else [*table.rows]
    text = _tabulated(table, table.headers, rows, "simple", maxcolwidths=_widest(table))
    lines = [table.title] if table.title else []
    if table.groups:
        rule = next(line for line in text.splitlines() if line.startswith("-"))
        lines.append(_group_line(table.groups, [len(part) for part in rule.split()]))
    return "\n".join([*lines, *(line.rstrip() for line in text.splitlines())])


def _markdown(table: Table) -> str:
    labels = [label for label, span in table.groups for _ in range(span)] or [""] * len(table.headers)
    headers = [f"{label} {header}".strip() for label, header in zip(labels, table.headers, strict=True)]
    total = [[f"**{cell}**" if cell else "" for cell in table.total]] if table.total else []
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [*table.rows, *total]]
    text = _tabulated(table, headers, rows, "pipe")
    return f"**{table.title}**\n\n{text}" if table.title else text


def _tabulated(table: Table, headers: Row, rows: Sequence[Any], form: str, **options: Any) -> str:
    import tabulate

    tabulate.MIN_PADDING = 0  # by default every column is two wider than its header
    align = ["left" if column < table.left else "right" for column in range(len(headers))]
    return str(
        tabulate.tabulate(rows, headers, form, disable_numparse=True, colalign=align if rows else None, **options)
    )


def _widest(table: Table) -> list[int | None] | None:
    """In a table of words only, how wide the columns may be: the last one as what is left; longer cells are broken."""
    if table.left < len(table.headers) or not table.rows:
        return None
    columns = list(zip(table.headers, *table.rows, strict=True))[:-1]
    widths = [min(max(map(len, cells)), WIDEST_COLUMN) for cells in columns]
    return [*widths, max(WIDTH - sum(widths) - 2 * len(widths), 24)]


def _group_line(groups: Sequence[tuple[str, int]], widths: Sequence[int]) -> str:
    cells, first = [], 0
    for label, span in groups:
        own = sum(widths[first : first + span]) + 2 * (span - 1)
        cells.append(f" {label} ".center(own, "-") if label and span > 1 else label.rjust(own))
        first += span
    return "  ".join(cells).rstrip()
