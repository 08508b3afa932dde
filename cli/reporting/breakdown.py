"""Time against length, stacked by component, predicted beside measured: one panel for each method."""

from __future__ import annotations

from refimpl.components import COMPONENTS

from ..render import SECONDS, Unit, number, percent, unit_for
from .card import Card, Row, Table, bar_entries, component_entry
from .drawing import Panel, hint
from .grouping import Group, Series
from .markup import Markup, joined, tag
from .palette import component_class
from .reading import Result, Work
from .scales import Linear

HALF = 0.38  # width of a bar of two, in steps between lengths
NARROW = 40.0  # pixels for a length from which on bars have whiskers


def card(group: Group, key: str) -> Card | None:
    """None where no file has components."""
    lines = [line for line in group.lines if any(result.components for result in line.results)]
    if not lines:
        return None
    lengths = sorted({result.length for line in lines for result in line.results})
    measured = any(result.total.measured_s for line in lines for result in line.results)
    highest = max(_highest(result) for line in lines for result in line.results)
    unit = unit_for(SECONDS, highest)
    panels: list[Markup] = []
    for place, line in enumerate(lines):
        for share in (False, True):
            drawn = _Drawn(group, line, lengths, measured, unit, 1.0 if share else highest * 1.03, share)
            panels.append(drawn.panel(f"{key}-{place}{'s' if share else 'a'}"))
    names = components_of(lines)
    pair = "the left bar is predicted, the right one measured" if measured else "bars are predicted"
    spread = ", and of measured passes: dots are totals without instruments, or of recorded passes" if measured else ""
    return Card(
        key,
        "Where the time goes",
        f"Time of one pass by component, stacked, at each {group.axis_label}; {pair}. "
        f"Whiskers are the spread of the predicted total{spread}. All panels have the same scale.",
        [*(component_entry(name) for name in names), *bar_entries(measured)],
        panels,
        _table(lines, group, unit),
    )


def components_of(lines: list[Series]) -> list[str]:
    """All components, in the order in which a layer meets them; unknown ones last."""
    used = dict.fromkeys(name for line in lines for result in line.results for name in result.components)
    return [*(name for name in COMPONENTS if name in used), *(name for name in used if name not in COMPONENTS)]


def _highest(result: Result) -> float:
    predicted = sum(work.predicted_s for work in result.components.values())
    seen = sum(work.measured_s or 0.0 for work in result.components.values())
    total = result.total
    return max(predicted, seen, total.high_s, total.p90_s or 0.0, total.measured_s or 0.0, 1e-12)


class _Drawn:
    """One method's panel, in seconds or in shares of the pass."""

    def __init__(
        self, group: Group, line: Series, lengths: list[int], measured: bool, unit: Unit, top: float, share: bool
    ) -> None:
        self.group, self.line, self.lengths, self.measured = group, line, lengths, measured
        self.unit, self.top, self.share = unit, top, share

    def panel(self, key: str) -> Markup:
        kind = "share of the pass" if self.share else "seconds of a pass"
        panel = Panel(
            key, self.line.label, f"{self.line.label}: {kind} by component against {self.group.axis_label}",
            self._description(), f"m{self.line.method_number} {'share' if self.share else 'absolute'}",
        )  # fmt: skip
        panel.linear_x(-0.5, len(self.lengths) - 0.5)
        panel.linear_y(0.0, self.top)
        factor = 0.01 if self.share else self.unit[1]
        in_unit = Linear(0.0, self.top / factor, 0, 1)
        panel.y_axis("%" if self.share else self.unit[0], [tick * factor for tick in in_unit.ticks(5)],
                     lambda value: f"{value / factor:.6g}")  # fmt: skip
        panel.x_axis(
            self.group.axis_label, range(len(self.lengths)), lambda place: str(self.lengths[int(place)]), False
        )
        for result in self.line.results:
            self._pair(panel, self.lengths.index(result.length), result)
        return panel.svg()

    def _description(self) -> str:
        parts = []
        for result in self.line.results:
            seen = f", measured {number(result.total.measured_s / self.unit[1])}" if result.total.measured_s else ""
            parts.append(
                f"{result.axis}={result.length}: predicted {number(result.total.predicted_s / self.unit[1])}{seen}"
            )
        return f"Totals in {self.unit[0]}. " + "; ".join(parts) + "."

    def _pair(self, panel: Panel, place: int, result: Result) -> None:
        predicted = {name: work.predicted_s for name, work in result.components.items()}
        seen = {name: work.measured_s or 0.0 for name, work in result.components.items()}
        left, right = (place - HALF, place) if self.measured else (place - HALF * 0.75, place + HALF * 0.75)
        panel.add(self._stack(panel, left + 0.02, right - 0.01, predicted, result, "p" if self.measured else ""))
        if any(seen.values()):
            panel.add(self._stack(panel, place + 0.01, place + HALF - 0.02, seen, result, "m"))
        if not self.share and panel.x(1) - panel.x(0) > NARROW:
            total = result.total
            panel.add(_whisker(panel, (left + right) / 2, total.low_s, total.high_s, total.predicted_s))
            if total.measured_s:
                middle, low, high = total.measured_s, total.p10_s, total.p90_s
                panel.add(_whisker(panel, place + HALF / 2, low or middle, high or middle, middle))

    def _stack(
        self, panel: Panel, left: float, right: float, seconds: dict[str, float], result: Result, kind: str
    ) -> Markup:
        whole = sum(seconds.values()) or 1.0
        scale = 1.0 / whole if self.share else 1.0
        x, width = panel.x(left), panel.x(right) - panel.x(left)
        bars, below = [], 0.0
        words = {"p": "predicted", "m": "measured", "": "predicted"}[kind]
        for name, value in seconds.items():
            y, base = panel.y((below + value) * scale), panel.y(below * scale)
            below += value
            if base - y < 0.05:
                continue
            text = f"{name}, {words}: {number(value / self.unit[1])} {self.unit[0]}, {percent(value / whole)} %"
            bars.append(
                tag("rect", hint(text), x=x, y=y, width=width, height=base - y,
                    class_=f"bar {kind} {component_class(name)}".replace("  ", " "))
            )  # fmt: skip
        return joined(bars)


def _whisker(panel: Panel, x: float, low: float, high: float, middle: float) -> Markup:
    at, bottom, top = panel.x(x), panel.y(low), panel.y(high)
    return joined(
        tag(
            "path",
            d=f"M{at:.1f} {bottom:.1f}V{top:.1f}M{at - 3:.1f} {top:.1f}h6M{at - 3:.1f} {bottom:.1f}h6",
            class_="whisker",
        ),
        tag("circle", cx=at, cy=panel.y(middle), r=1.8, class_="dot"),
    )


def _table(lines: list[Series], group: Group, unit: Unit) -> Table:
    name, factor = unit
    rows = []
    for line in lines:
        for result in line.results:
            where = [line.label, str(result.length)]
            works = [*result.components.items(), ("total", result.total)]
            rows += [Row([*where, *_cells(what, work, factor)], f"m{line.method_number}") for what, work in works]
    headers = ["method", group.axis, "component", f"predicted {name}", f"measured {name}", "error %", "bound by"]
    return Table(headers, rows, 3, f"Seconds by component, {group.model}")


def _cells(name: str, work: Work, factor: float) -> list[str]:
    seen = None if work.measured_s is None else work.measured_s / factor
    return [name, number(work.predicted_s / factor), number(seen), percent(work.rel_error, signed=True), work.bound]
