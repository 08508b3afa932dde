"""Writes the table of measured accuracy into ``accuracy.md`` from ``results/*.json``: ``python docs/measured.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE, RESULTS = DOCS / "accuracy.md", DOCS / "results"
BEGIN, END = "<!-- begin measured: filled from docs/results/*.json -->\n", "<!-- end measured -->"


def table() -> str:
    """One row per result file, and one over all of their figures."""
    documents = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    lines = [
        "| result | lengths | totals: median, p90, bias | components: median, p90, bias | bare roofline | one factor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, document in documents.items():
        found = document.get("accuracy")
        if found is None:  # not of predictions
            continue
        lengths = ", ".join(map(str, sorted({one.get("kv_len", one["seq"]) for one in document["results"]})))
        rivals = [percent(found[rival]["totals"]["median_abs"]) for rival in ("bare_roofline", "global_efficiency")]
        cells = [f"`{name}`", lengths, errors(found["totals"]), errors(found["components"]), *rivals]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def errors(found: dict[str, Any]) -> str:
    """Median and 90th percentile of the absolute error, and the signed median, in percent."""
    return f"{percent(found['median_abs'])}, {percent(found['p90_abs'])}, {100 * found['bias']:+.1f} (n {found['n']})"


def percent(value: float) -> str:
    """One digit."""
    return f"{100 * value:.1f}"


def filled(text: str) -> str:
    """The page with the table between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
