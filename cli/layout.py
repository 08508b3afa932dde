"""Lays out tables for a terminal and for Markdown; the cells are already text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = Sequence[str]
WIDTH = 118  # columns that a table of words may take


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


# --- blocks to text -------------------------------------------------------------------------------------------------


def as_text(blocks: Iterable[Block]) -> str:
    """For a terminal."""
    return "\n\n".join(block if isinstance(block, str) else _text(block) for block in blocks) + "\n"


def as_markdown(blocks: Iterable[Block]) -> str:
    """For a page."""
    return "\n\n".join(block if isinstance(block, str) else _markdown(block) for block in blocks) + "\n"


def _text(table: Table) -> str:
    rows = _wrapped(table) if table.left == len(table.headers) and not table.total else table.rows
    body = [*rows, table.total] if table.total else rows
    widths = [max(map(len, column)) for column in zip(table.headers, *body, strict=True)]
    first = 0
    for label, span in table.groups:  # a label wider than its columns widens the last of them
        own = sum(widths[first : first + span]) + 2 * (span - 1)
        widths[first + span - 1] += max(len(label) - own, 0)
        first += span

    def line(cells: Row) -> str:
        padded = [
            cell.ljust(width) if column < table.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [table.title] if table.title else []
    if table.groups:
        lines.append(_group_line(table.groups, widths))
    lines += [line(table.headers), rule, *map(line, rows)]
    return "\n".join([*lines, rule, line(table.total)] if table.total else lines)


def _wrapped(table: Table) -> list[Row]:
    """Rows of words whose last column is broken where the table would be too wide."""
    before = sum(max(map(len, cells)) + 2 for cells in list(zip(table.headers, *table.rows, strict=True))[:-1])
    rows: list[Row] = []
    for *first, last in table.rows:
        parts = textwrap.wrap(last, max(WIDTH - before, 24)) or [""]
        rows += [[*first, parts[0]], *([*[""] * len(first), part] for part in parts[1:])]
    return rows


def _group_line(groups: Sequence[tuple[str, int]], widths: Sequence[int]) -> str:
    cells, first = [], 0
    for label, span in groups:
        own = sum(widths[first : first + span]) + 2 * (span - 1)
        cells.append(f" {label} ".center(own, "-") if label and span > 1 else label.rjust(own))
        first += span
    return "  ".join(cells).rstrip()


def _markdown(table: Table) -> str:
    headers = list(table.headers)
    labels = [label for label, span in table.groups for _ in range(span)]
    if labels:
        headers = [f"{label} {header}".strip() for label, header in zip(labels, headers, strict=True)]
    align = [":--" if column < table.left else "--:" for column in range(len(headers))]
    total = [f"**{cell}**" if cell else "" for cell in table.total]
    lines = [headers, align, *table.rows, *([total] if total else [])]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n{text}" if table.title else text
