"""Writes the tables of the stored audit into ``audit.md``: ``python docs/audited.py``."""

from __future__ import annotations

import json
from pathlib import Path

from effref.auditing.render import blocks
from effref.layout import as_markdown

DOCS = Path(__file__).parent
PAGE, RESULT = DOCS / "audit.md", DOCS / "results" / "audit-xeon-2-cores-numba-float32.json"
BEGIN = f"<!-- begin audit: filled from docs/results/{RESULT.name} -->\n"
END = "<!-- end audit -->"


def filled(text: str) -> str:
    """The page with the tables between its markers."""
    before, rest = text.split(BEGIN)
    tables = as_markdown(blocks(json.loads(RESULT.read_text("utf-8"))))
    return before + BEGIN + "\n" + tables + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
