"""A card: a chart with how to read it, its legend, what it says in words, and its figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .grouping import Series
from .markup import Markup, joined, tag
from .palette import component_class, outline, series_class

SWATCH = 14.0


@dataclass(frozen=True)
class Row:
    """A row of a table; `classes` lets the filter find it. The first `Table.words` cells are words."""

    cells: Sequence[str]
    classes: str = ""


@dataclass(frozen=True)
class Table:
    """Figures under headers; `groups` are labels above them, each over so many columns."""

    headers: Sequence[str]
    rows: Sequence[Row]
    words: int = 1
    caption: str = ""
    groups: Sequence[tuple[str, int]] = ()

    def html(self) -> Markup:
        """In a box that scrolls by itself where it is too wide, by keyboard too."""
        heads = [tag("th", head, scope="col", class_=self._kind(place)) for place, head in enumerate(self.headers)]
        rows = [
            tag("tr", [tag("td", cell, class_=self._kind(place)) for place, cell in enumerate(row.cells)],
                class_=row.classes or None)
            for row in self.rows
        ]  # fmt: skip
        over = [tag("th", label, scope="colgroup", colspan=span, class_="over") for label, span in self.groups]
        caption = tag("caption", self.caption) if self.caption else None
        table = tag(
            "table", caption, tag("thead", tag("tr", over) if over else None, tag("tr", heads)), tag("tbody", rows)
        )
        return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=self.caption or "table")

    def _kind(self, place: int) -> str | None:
        return None if place < self.words else "n"


@dataclass(frozen=True)
class Card:
    """One chart of a group.

    Attributes
    ----------
    reading : str
        How to read it.
    notes : list of Row
        Sentences about what it says.
    """

    key: str
    title: str
    reading: str
    legend: Sequence[Markup]
    panels: Sequence[Markup]
    table: Table | None = None
    notes: Sequence[Row] = field(default_factory=list)

    def html(self) -> Markup:
        """The whole card."""
        notes = [tag("li", row.cells[0], class_=row.classes or None) for row in self.notes]
        name = f"Legend of {self.title.lower()}"
        legend = tag("ul", self.legend, class_="legend", aria_label=name) if self.legend else None
        said = tag("ul", notes, class_="notes") if notes else None
        return tag(
            "figure",
            tag(
                "figcaption",
                tag("div", tag("h3", self.title), tag("p", self.reading, class_="reading")),
                tag("div", legend, said) if legend or said else None,
            ),
            tag("div", self.panels, class_="panels") if self.panels else None,
            tag("details", tag("summary", "Figures as a table"), self.table.html(), class_="figures")
            if self.table and self.table.rows else None,
            class_="card" if len(self.panels) in (1, 2, 4) else "card stacked", id=self.key,
        )  # fmt: skip


# --- legends --------------------------------------------------------------------------------------------------------


def _entry(drawn: Markup, text: str, classes: str | None = None, wide: float = SWATCH) -> Markup:
    swatch = tag(
        "svg", drawn, viewBox=f"0 0 {wide:g} {SWATCH:g}", width=wide, height=SWATCH, aria_hidden="true", class_="swatch"
    )
    return tag("li", swatch, tag("span", text), class_=classes)


def component_entry(name: str) -> Markup:
    """A component's colour."""
    return _entry(tag("rect", x=1, y=1, width=12, height=12, rx=2, class_=f"bar {component_class(name)}"), name)


def bar_entries(measured: bool) -> list[Markup]:
    """How predicted bars differ from measured ones."""
    if not measured:
        return []
    pale = tag("rect", x=1, y=1, width=12, height=12, class_="bar p sample")
    full = tag("rect", x=1, y=1, width=12, height=12, class_="bar sample")
    return [_entry(pale, "left, outlined: predicted"), _entry(full, "right, filled: measured")]


def series_entry(series: Series) -> Markup:
    """A series' colour and mark."""
    mark = tag("path", d=outline(series.number, 7, 7, 4.5), class_=f"mark {series_class(series.number)}")
    return _entry(mark, series.label, f"m{series.method_number}")


def line_entries(measured: bool) -> list[Markup]:
    """How predicted lines differ from measured ones."""
    dashed = joined(
        tag("path", d="M0 7H26", class_="line p sample"), tag("path", d=outline(0, 13, 7, 3.5), class_="mark p sample")
    )
    solid = joined(
        tag("path", d="M0 7H26", class_="line sample"), tag("path", d=outline(0, 13, 7, 3.5), class_="mark sample")
    )
    both = [_entry(dashed, "hollow, dashed: predicted", wide=26)]
    return [*both, _entry(solid, "filled, solid: measured", wide=26)] if measured else both


def plain_entry(drawn: Markup, text: str, wide: float = SWATCH) -> Markup:
    """Anything else."""
    return _entry(drawn, text, wide=wide)
