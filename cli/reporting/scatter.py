"""Predicted against measured time, of totals and of components, with the bands of 10 and 20 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..curves import plain
from ..render import SECONDS, percent, quantity, unit_for
from ..results import errors
from .card import Card, Row, Table, component_entry, plain_entry, series_entry
from .drawing import Panel, hint
from .grouping import Group, Series
from .markup import Markup, tag
from .palette import component_class, hatched, outline, series_class, shape
from .reading import Work
from .scales import around

BANDS = ((0.2, "band far"), (0.1, "band near"))


@dataclass(frozen=True)
class Point:
    """A prediction beside a measurement."""

    series: Series
    where: str
    what: str  # a component, "total" or "step"
    work: Work

    @property
    def predicted_s(self) -> float:
        return self.work.predicted_s

    @property
    def measured_s(self) -> float:
        assert self.work.measured_s is not None
        return self.work.measured_s


def totals(series: Series) -> list[Point]:
    """Passes, and decoding steps of files of ``fidelity``."""
    found = []
    for result in series.results:
        knob = f", {result.knob}={plain(result.value)}" if result.knob else ""
        found.append(Point(series, f"{result.axis}={result.length}{knob}", "total", result.total))
        if result.step:
            found.append(Point(series, f"S={result.step_length}{knob}", "step", result.step))
    return _both(found)


def components(series: Series) -> list[Point]:
    """The components that matter."""
    return _both([
        Point(series, f"{result.axis}={result.length}", name, work)
        for result in series.results
        for name, work in result.judged()
    ])  # fmt: skip


def _both(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.work.measured_s and point.work.predicted_s > 0]


def card(group: Group, key: str) -> Card | None:
    """None where nothing was measured."""
    whole = [point for series in group.series for point in totals(series)]
    parts = [point for series in group.series for point in components(series)]
    if not whole:
        return None
    panels = [_panel(whole, f"{key}-t", "totals", group)]
    if parts:
        panels.append(_panel(parts, f"{key}-c", "components", group))
    names = dict.fromkeys(point.what for point in parts)
    bands = [
        plain_entry(tag("rect", x=0, y=2, width=14, height=10, class_="band near solo"), "within 10 %"),
        plain_entry(tag("rect", x=0, y=2, width=14, height=10, class_="band far solo"), "within 20 %"),
    ]
    return Card(
        key,
        "Predicted against measured",
        "Each mark is one time. On the diagonal the prediction is right, above it too long, below it too short. "
        "Components that take less than 2 % of a pass are left out.",
        [*(series_entry(series) for series in group.series), *(component_entry(name) for name in names), *bands],
        panels,
        _table(whole, group),
        [_note("totals", whole), *([_note("components", parts)] if parts else [])],
    )


def _note(what: str, points: Sequence[Point]) -> Row:
    found = errors([point.work.rel_error for point in points if point.work.rel_error is not None])
    return Row([
        f"Error of {what}: median {percent(found['median_abs'])} %, 90th percentile {percent(found['p90_abs'])} %, "
        f"bias {percent(found['bias'], signed=True)} % (n {found['n']})"
    ])  # fmt: skip


def _panel(points: Sequence[Point], key: str, title: str, group: Group) -> Markup:
    values = [value for point in points for value in (point.predicted_s, point.measured_s)]
    low, high = around(values)
    panel = Panel(
        key, title, f"Predicted against measured seconds of {title}, {group.model}", _note(title, points).cells[0] + "."
    )
    panel.log_x(low, high)
    panel.log_y(low, high)
    ticks = panel.y.ticks(6)
    panel.y_axis("predicted", ticks, time_words)
    panel.x_axis("measured", ticks, time_words)
    for width, classes in BANDS:
        corners = [
            (low, low * (1 - width)),
            (high, high * (1 - width)),
            (high, high * (1 + width)),
            (low, low * (1 + width)),
        ]
        panel.add(panel.area(corners, classes))
    panel.add(panel.line([(low, low), (high, high)], "diagonal"))
    panel.add(*(_mark(panel, point) for point in points))
    return panel.svg()


def time_words(seconds: float) -> str:
    """``20 ms``."""
    name, factor = unit_for(SECONDS, seconds * (1 + 1e-9))
    return f"{seconds / factor:.3g} {name}"


def _mark(panel: Panel, point: Point) -> Markup:
    x, y = panel.x(point.measured_s), panel.y(point.predicted_s)
    classes = f"mark m{point.series.method_number} "
    if point.what in ("total", "step"):
        path, classes = outline(point.series.number, x, y, 4.2), classes + series_class(point.series.number)
    else:
        path = shape("square" if hatched(point.what) else "circle", x, y, 3.2)
        classes += component_class(point.what)
    text = (
        f"{point.series.label}, {point.where}, {point.what}: predicted {quantity(point.predicted_s, SECONDS)}, "
        f"measured {quantity(point.measured_s, SECONDS)}, {percent(point.work.rel_error, signed=True)} %"
    )
    return tag("path", hint(text), d=path, class_=classes)


def _table(points: Sequence[Point], group: Group) -> Table:
    rows = [
        Row(
            [
                point.series.label, point.where, point.what,
                quantity(point.predicted_s, SECONDS), quantity(point.measured_s, SECONDS),
                percent(point.work.rel_error, signed=True), str(point.work.samples),
            ],
            f"m{point.series.method_number}",
        )
        for point in points
    ]  # fmt: skip
    headers = ["method", "at", "what", "predicted", "measured", "error %", "passes"]
    return Table(headers, rows, 3, f"Predicted and measured totals, {group.model}")
