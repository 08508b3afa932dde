"""Rows of a sweep as tables for people and as JSON; rows as CSV are written block by block in `sweep_rows`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .layout import Block, Table, as_markdown, as_text
from .render import as_json, number
from .sweep_rows import MEASURE_COLUMNS, line
from .sweeping import OBJECTIVES, Summary

REASONS = 5  # that are shown
# objective -> header and factor
UNITS = {"time": ("ms", 1e3), "memory": ("MiB", 2.0**-20), "fidelity": ("error, rel. L2", 1.0)}


def notes(summary: Summary) -> list[str]:
    """What the rows do not say: points that were left out, and why; an interruption."""
    found = []
    left_out = summary.skipped.total()
    if left_out:
        found.append(f"left out {left_out} of {summary.points} points, which cannot be served:")
        found += [f"  {count}: {reason}" for reason, count in summary.skipped.most_common(REASONS)]
        if len(summary.skipped) > REASONS:
            found.append(f"  and {len(summary.skipped) - REASONS} other reasons")
    if summary.interrupted:
        found.append(f"interrupted: {summary.written} of {summary.points} points are kept")
    return found


def as_form(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str], mode: str, form: str) -> str:
    """Rows as a table with these objectives, or with all their columns as JSON or CSV."""
    if form == "json":
        return as_json([{name: row[name] for name in MEASURE_COLUMNS if name in row} for row in rows])
    if form == "csv":
        names = [name for name in MEASURE_COLUMNS if any(name in row for row in rows)]
        return ",".join(names) + "\n" + "".join(line(row, names) for row in rows)
    blocks = [_table(rows, objectives, mode)]
    return as_markdown(blocks) if form == "md" else as_text(blocks)


def _table(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str], mode: str) -> Block:
    if not rows:
        return "no designs to compare"
    columns = OBJECTIVES[mode]
    headers = ["work", "model", "method", "dtype", "hardware", *(UNITS[name][0] for name in objectives)]
    cells = [
        [
            _work(row), _model(row), _method(row), row["dtype"], row["hardware"],
            *(number(UNITS[name][1] * row[columns[name]]) for name in objectives),
        ]
        for row in rows
    ]  # fmt: skip
    return Table("", headers, cells, left=5)


def _work(row: Mapping[str, Any]) -> str:
    place = f"S={row['kv_len']}" if row.get("kv_len") else f"T={row['seq']}"
    return f"{row['phase']} {place} B={row['batch']}"


def _model(row: Mapping[str, Any]) -> str:
    return f"{row['model']} L={row['layers']} d={row['d_model']} H={row['heads']} f={row['d_ff']}"


def _method(row: Mapping[str, Any]) -> str:
    """With the parameters that the method is not without by default."""
    from refimpl.parameters import PARAMETERS
    from refimpl.parameters.base import make

    usual = vars(make(PARAMETERS[row["method"]], row["method"], None))
    given = {name: value for name, value in json.loads(row["params"]).items() if value != usual.get(name)}
    return " ".join([row["method"], *(f"{name}={json.dumps(value)}" for name, value in given.items())])
