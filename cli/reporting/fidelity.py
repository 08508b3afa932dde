"""Fidelity against cost: how far outputs lie from exact attention, beside what a pass or a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..curves import plain
from ..render import CAPACITIES, number, percent, quantity, small, times, unit_for
from .card import Card, Row, Table, plain_entry, series_entry
from .drawing import Panel, hint
from .grouping import Group, Series
from .markup import Markup, tag
from .palette import outline, series_class
from .reading import Result
from .scales import Linear, around

EXACT = 1e-5  # relative error up to which an output differs by rounding alone; drawn on the lowest line
WIDE = 10  # largest figure over smallest from which an axis is logarithmic


@dataclass(frozen=True)
class Figure:
    """A figure of fidelity: its key in files, its name, and its digits."""

    key: str
    name: str
    text: Callable[[float], str]


FIGURES = (
    Figure("perplexity", "perplexity", number),
    Figure("rel_l2", "relative L2 error", small),
    Figure("top1_agreement", "top-1 agreement", lambda value: f"{value:.3f}"),
)


@dataclass(frozen=True)
class Point:
    """A setting: its cost over that of dense, and its figures."""

    series: Series
    result: Result
    cost: float
    timed: bool

    @property
    def setting(self) -> str:
        """What tells it from the others of its series."""
        if self.result.knob:
            return plain(self.result.value)
        return str(self.result.length)

    @property
    def short(self) -> str:
        """The same in few letters."""
        return elided(self.result) if self.result.knob else self.setting

    @property
    def words(self) -> str:
        knob = f"{self.result.knob}={plain(self.result.value)}" if self.result.knob else ""
        return ", ".join(filter(None, [self.series.label, knob or f"{self.result.axis}={self.result.length}"]))


def points(series: Series) -> list[Point]:
    """Those whose fidelity is known, with the time of a decoding step where there is one, else of the pass."""
    found = []
    for result in series.results:
        predicted, seen = (result.step_speedup if result.step else result.speedup).get("dense", (None, None))
        ratio = seen or predicted
        if result.fidelity and ratio:
            found.append(Point(series, result, 1.0 / ratio, seen is not None))
    return found


def cards(group: Group, key: str) -> list[Card]:
    """One for files of ``measure`` and one for those of ``fidelity``, where they have figures."""
    found = []
    lines = {line.label: points(line) for line in group.lines}
    shown = [line for line in group.lines if lines[line.label]]
    if any(one.result.fidelity.get("rel_l2", 0.0) > EXACT for some in lines.values() for one in some):
        found.append(_card(group, f"{key}-m", shown, [one for line in shown for one in lines[line.label]], False))
    curves = {curve.label: points(curve) for curve in group.curves}
    shown = [curve for curve in group.curves if curves[curve.label]]
    if shown:
        found.append(_card(group, f"{key}-f", shown, [one for curve in shown for one in curves[curve.label]], True))
    return found


def _card(group: Group, key: str, series: Sequence[Series], found: Sequence[Point], knobs: bool) -> Card:
    work = "decoding step" if found[0].result.step else "pass"
    timed = all(point.timed for point in found)
    kind = "measured" if timed else "predicted" if not any(point.timed for point in found) else "measured or predicted"
    label = f"{kind} time of a {work}, share of dense"
    panels = [
        _panel(group, series, found, figure, label, f"{key}-{figure.key.replace('_', '-')}", _time)
        for figure in FIGURES
        if any(figure.key in point.result.fidelity for point in found)
    ]
    if knobs and found[0].result.step and all(point.result.cache_bytes for point in found):
        chief = next((figure for figure in FIGURES if figure.key in found[0].result.fidelity), FIGURES[1])
        unit = unit_for(CAPACITIES, max(point.result.cache_bytes or 0.0 for point in found))[0]
        panels.append(_panel(group, series, found, chief, f"size of the cache, {unit}", f"{key}-cache", _cache))
    figures = "the value of the knob" if knobs else f"{group.axis}"
    ground = "exact attention and what differs from it by rounding alone are on the lowest line"
    return Card(
        key,
        "Fidelity against cost",
        f"Each mark is a setting: its time as a share of that of dense, and how far its output lies from that of "
        f"exact attention; the digits are {figures}. To the left is faster. On axes of the relative error {ground}.",
        [*(series_entry(one) for one in series),
         plain_entry(tag("path", d="M0 7H14", class_="one sample"), "as exact attention")],
        panels,
        _table(group, found, work),
        [note for one in series for note in sentence(one)],
    )  # fmt: skip


def _time(point: Point) -> float:
    return point.cost


def _cache(point: Point) -> float:
    return point.result.cache_bytes or 0.0


def _panel(
    group: Group, series: Sequence[Series], found: Sequence[Point], figure: Figure, label: str, key: str,
    cost: Callable[[Point], float],
) -> Markup:  # fmt: skip
    known = [point for point in found if figure.key in point.result.fidelity]
    values = [point.result.fidelity[figure.key] for point in known]
    parts = [
        f"{point.words}: {figure.text(value)} at {_cost_text(point, cost)}"
        for point, value in zip(known, values, strict=True)
    ]
    panel = Panel(key, "", f"{figure.name} against {label}, {group.model}", "; ".join(parts) + ".")
    exact = _axis(panel, figure, values)
    _cost_axis(panel, [cost(point) for point in known], label, cost is _cache)
    panel.add(panel.line([(panel.x.low, exact), (panel.x.high, exact)], "one"))
    for one in series:
        panel.add(_curve(panel, one, [point for point in known if point.series is one], figure, cost, exact))
    return panel.svg()


def _axis(panel: Panel, figure: Figure, values: Sequence[float]) -> float:
    """The scale of the figure; returns where exact attention stands on it."""
    if figure.key == "rel_l2":
        away = [value for value in values if value > EXACT] or [1.0]
        exact = 10.0 ** (math.floor(math.log10(min(away))) - 1)
        panel.log_y(*around([exact, max(away)], 0.1))
        ticks = [tick for tick in panel.y.ticks(6) if tick > exact * 1.5]
        panel.y_axis(figure.name, [exact, *ticks], lambda value: "exact" if value == exact else f"{value:.4g}")
        return exact
    if figure.key == "top1_agreement":
        low = min(values)
        room = max((1.0 - low) * 0.08, 0.01)
        panel.linear_y(low - room, 1.0 + room)
        panel.y_axis(
            figure.name, [tick for tick in panel.y.ticks(5) if tick <= 1.0 + 1e-9], lambda value: f"{value:.3g}"
        )
        return 1.0
    positive = [value for value in values if value > 0]
    if max(positive) > WIDE * min(positive):
        panel.log_y(*around(positive, 0.08))
    else:
        room = (max(values) - min(values)) * 0.08 or max(values) * 0.05
        panel.linear_y(min(values) - room, max(values) + room)
    panel.y_axis(figure.name, panel.y.ticks(5), lambda value: f"{value:.6g}")
    return min(values)


def _cost_axis(panel: Panel, costs: Sequence[float], label: str, of_cache: bool) -> None:
    low, high = min(costs), max(costs)
    factor = unit_for(CAPACITIES, high)[1] if of_cache else 1.0
    room = max((high - low) * 0.1, high * 0.03)
    panel.linear_x(low - room, high + room)
    in_unit = Linear((low - room) / factor, (high + room) / factor, 0, 1)
    panel.x_axis(label, [tick * factor for tick in in_unit.ticks(5)], lambda value: f"{value / factor:.4g}")


def _curve(
    panel: Panel, series: Series, found: Sequence[Point], figure: Figure, cost: Callable[[Point], float], exact: float
) -> Markup:
    """The marks of one series, joined where they lie on a curve; only those off the line of exact have digits."""

    def height(point: Point) -> float:
        value = point.result.fidelity[figure.key]
        return exact if figure.key == "rel_l2" and value <= EXACT else value

    spots = [(panel.x(cost(point)), panel.y(height(point))) for point in found]
    marks = []
    if len(spots) > 1 and found[0].result.knob:
        marks.append(tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots), class_="line thin"))
    for point, (x, y) in zip(found, spots, strict=True):
        text = (
            f"{point.words}: {figure.name} {figure.text(point.result.fidelity[figure.key])}, {_cost_text(point, cost)}"
        )
        marks.append(tag("path", hint(text), d=outline(series.number, x, y, 3.8), class_="mark"))
        if point.result.knob or (height(point) != exact and not point.result.curve):
            marks.append(panel.note(x, y, point.short, "tick halo own"))
    return tag("g", marks, class_=f"{series_class(series.number)} m{series.method_number}")


def elided(result: Result) -> str:
    """The value of a knob in few letters."""
    text = plain(result.value)
    return text if len(text) <= 8 else text[:7] + "…"


def _cost_text(point: Point, cost: Callable[[Point], float]) -> str:
    if cost is _cache:
        return quantity(point.result.cache_bytes or 0.0, CAPACITIES)
    return f"{times(point.cost)} of the time of dense, {'measured' if point.timed else 'predicted'}"


def _table(group: Group, found: Sequence[Point], work: str) -> Table:
    keys = [key for key in COLUMNS if any(key in point.result.fidelity for point in found)]
    headers = ["method", "setting", f"{work}, share of dense", "", "cache", *(COLUMNS[key] for key in keys)]
    rows = []
    for point in found:
        result = point.result
        where = f"{result.knob}={plain(result.value)}" if result.knob else f"{result.axis}={result.length}"
        cells = [_digits(key, result.fidelity.get(key)) for key in keys]
        cache = quantity(result.cache_bytes, CAPACITIES) if result.cache_bytes else "-"
        kind = "measured" if point.timed else "predicted"
        rows.append(
            Row([point.series.label, where, times(point.cost), kind, cache, *cells], f"m{point.series.method_number}")
        )
    return Table(headers, rows, 2, f"Fidelity and cost, {group.model}")


COLUMNS = {
    "rel_l2": "rel. L2",
    "cosine": "cosine",
    "max_abs": "max abs.",
    "kl_nats": "KL, nats",
    "top1_agreement": "top-1 %",
    "perplexity": "perplexity",
}


def sentence(series: Series) -> list[Row]:
    """How error and cost change together from the first value of a knob to the last."""
    found = points(series)
    if len(found) < 2 or not found[0].result.knob:
        return []
    first, last = found[0], found[-1]
    figure = next((one for one in FIGURES if all(one.key in end.result.fidelity for end in (first, last))), None)
    if figure is None:
        return []
    ends = [figure.text(end.result.fidelity[figure.key]) for end in (first, last)]
    knob = f"{first.result.knob}={first.setting} to {last.setting}"
    work = "step" if first.result.step else "pass"
    time = f"{work} {times(first.cost)} to {times(last.cost)} of dense"
    text = f"{series.label}, {knob}: {figure.name} {ends[0]} to {ends[1]}, {time}"
    return [Row([text], f"m{series.method_number}")]


def _digits(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "cosine":
        return f"{value:.6f}"
    if key == "top1_agreement":
        return percent(value)
    return number(value) if key == "perplexity" else small(value)
