"""Speed-up against length, against dense and against flash, with the lengths at which a curve passes 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..render import times
from ..request import BASELINES
from .card import Card, Row, Table, line_entries, plain_entry, series_entry
from .drawing import Panel, hint
from .grouping import Group, Series
from .markup import Markup, tag
from .palette import outline, series_class
from .scales import around

KINDS = ("predicted", "measured")
Points = list[tuple[float, float]]  # length, ratio


@dataclass(frozen=True)
class Crossover:
    """Where a curve passes 1.

    Attributes
    ----------
    length : float
        Between two lengths, on a straight line between their logarithms.
    rises : bool
        Faster above it.
    """

    length: float
    rises: bool


def points(series: Series, baseline: str, kind: str) -> Points:
    """The lengths at which the ratio is known, rising."""
    place = KINDS.index(kind)
    found = [(float(result.length), result.speedup.get(baseline, (None, None))[place]) for result in series.results]
    return [(length, ratio) for length, ratio in found if ratio]


def crossovers(curve: Points) -> list[Crossover]:
    """Every place at which a curve goes from below 1 to above it, or back; a curve that stays at 1 has none."""
    found = []
    away = [(length, math.log(ratio)) for length, ratio in curve if ratio != 1.0]
    for (before, low), (after, high) in itertools.pairwise(away):
        if (low < 0) != (high < 0) and before < after:
            share = low / (low - high)
            found.append(Crossover(before * (after / before) ** share, high > 0))
    return found


def card(group: Group, key: str) -> Card | None:
    """None where no file says anything of a baseline."""
    panels, notes, rows = [], [], []
    shown: dict[str, Series] = {}
    for baseline in BASELINES:
        lines = [
            line for line in group.lines
            if line.method != baseline and any(points(line, baseline, kind) for kind in KINDS)
        ]  # fmt: skip
        if lines:
            panels.append(_panel(group, lines, baseline, f"{key}-{baseline}"))
            notes += [note for line in lines for note in sentences(line, baseline, group.axis)]
            shown |= {line.label: line for line in lines}
    if not panels:
        return None
    for line in group.lines:
        for place, result in enumerate(line.results):
            ratios = [result.speedup.get(baseline, (None, None)) for baseline in BASELINES]
            cells = [times(ratio[kind]) for ratio in ratios for kind in (0, 1)]
            rows.append(Row([line.label, str(line.results[place].length), *cells], f"m{line.method_number}"))
    measured = any(points(line, baseline, "measured") for line in shown.values() for baseline in BASELINES)
    ring = plain_entry(tag("circle", cx=7, cy=7, r=5, class_="crossing sample"), "passes 1")
    headers = ["method", group.axis, *(f"{kind} / {name}" for name in BASELINES for kind in KINDS)]
    return Card(
        key,
        "Speed-up",
        f"How many times as fast as exact attention, against {group.axis_label}: dense materialises the attention map, "
        "flash is the fused form that one would run. Below 1 a method is slower.",
        [*(series_entry(line) for line in shown.values()), *line_entries(measured), ring],
        panels,
        Table(headers, rows, 1, f"Speed-up, {group.model}"),
        notes,
    )


def sentences(line: Series, baseline: str, axis: str) -> list[Row]:
    """Where the curve passes 1, or on which side of it it stays; of measurements where there are any."""
    kind = next(kind for kind in ("measured", "predicted") if points(line, baseline, kind))
    curve = points(line, baseline, kind)
    found = crossovers(curve)
    if found:
        places = " and ".join(
            f"{'faster' if one.rises else 'slower'} above {axis} ≈ {_length(one.length)}" for one in found
        )
        return [Row([f"{line.label} against {baseline}: {places} ({kind})"], f"m{line.method_number}")]
    ratios = [ratio for _, ratio in curve]
    side = (
        "faster"
        if min(ratios) > 1
        else "slower"
        if max(ratios) < 1
        else "as fast or faster"
        if min(ratios) == 1
        else "no faster"
    )
    where = f"at all {len(curve)} lengths" if len(curve) > 1 else f"at {axis}={curve[0][0]:.0f}"
    low, high = min(ratios), max(ratios)
    span = times(low) if times(low) == times(high) else f"{times(low)} to {times(high)}"
    return [Row([f"{line.label} against {baseline}: {side} {where}, {span} times ({kind})"], f"m{line.method_number}")]


def _length(value: float) -> str:
    return f"{value:.0f}" if value < 100 else f"{float(f'{value:.2g}'):.0f}"


def _panel(group: Group, lines: Sequence[Series], baseline: str, key: str) -> Markup:
    curves = {(line.label, kind): points(line, baseline, kind) for line in lines for kind in KINDS}
    ratios = [ratio for curve in curves.values() for _, ratio in curve]
    lengths = [length for curve in curves.values() for length, _ in curve]
    panel = Panel(
        key, f"against {baseline}", f"Speed-up against {baseline} over {group.axis_label}, {group.model}",
        " ".join(row.cells[0] + "." for line in lines for row in sentences(line, baseline, group.axis)),
    )  # fmt: skip
    panel.log_x(*around(lengths))
    panel.log_y(*around([*ratios, 1.0], 0.1))
    ticks = sorted(set(lengths))
    panel.x_axis(group.axis_label, ticks, lambda length: f"{length:.0f}")
    panel.y_axis("times as fast", panel.y.ticks(6), lambda ratio: f"{ratio:.4g}")
    ends = [panel.x.low, panel.x.high]
    panel.add(panel.line([(end, 1.0) for end in ends], "one"))
    for line in lines:
        for kind in KINDS:
            _draw(panel, line, kind, curves[line.label, kind], group.axis)
    return panel.svg()


def _draw(panel: Panel, line: Series, kind: str, curve: Points, axis: str) -> None:
    if not curve:
        return
    pale = " p" if kind == "predicted" else ""
    marks = [panel.line(curve, f"line{pale}")]
    for length, ratio in curve:
        text = f"{line.label}, {axis}={length:.0f}: {times(ratio)} times as fast, {kind}"
        marks.append(
            tag("path", hint(text), d=outline(line.number, panel.x(length), panel.y(ratio), 3.6), class_=f"mark{pale}")
        )
    for one in crossovers(curve):
        x, y = panel.x(one.length), panel.y(1.0)
        text = f"{line.label} passes 1 at {axis} ≈ {_length(one.length)}, {kind}"
        marks.append(tag("circle", hint(text), cx=x, cy=y, r=6, class_=f"crossing{pale}"))
        marks.append(panel.text(x, y + (18 if pale else -10), f"≈ {_length(one.length)}", "tick middle halo"))
    panel.add(tag("g", marks, class_=f"{series_class(line.number)} m{line.method_number}"))
