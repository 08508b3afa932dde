"""The roofs of the hardware with the components under them: rate against arithmetic intensity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel.hardware import presets

from ..render import BYTE_RATES, FLOP_RATES, number, quantity, unit_for
from .breakdown import components_of
from .card import Card, Row, Table, component_entry, plain_entry
from .drawing import Panel, hint
from .grouping import Group, Series
from .markup import Markup, joined, tag
from .palette import component_class, hatched, shape
from .reading import Document, Result, Work
from .scales import around

GIGA = 1e9


@dataclass(frozen=True)
class Roofs:
    """What bounds a rate.

    Attributes
    ----------
    matmul_flops_per_s, vector_flops_per_s : float
    levels : tuple of (str, float)
        Memory level and its bytes per second, from the fastest outward.
    origin : str
        Where they are from, in words.
    """

    matmul_flops_per_s: float
    vector_flops_per_s: float
    levels: tuple[tuple[str, float], ...]
    origin: str


def roofs_of(document: Document) -> Roofs | None:
    """From the file where its constants are there, else from the preset that it names; None where neither is known."""
    hardware, dtype = document.part("hardware"), str(document.part("config").get("dtype"))
    name = str(hardware.get("name"))
    own = _roofs(
        hardware.get("matmul_flops_per_s"), hardware.get("vector_flops_per_s"), hardware.get("memory"), dtype,
        f"the constants of {name} in the file",
    )  # fmt: skip
    if own or name not in presets():
        return own
    preset = presets()[name]
    levels = [{"level": level.level, "bandwidth_bytes_per_s": level.bandwidth_bytes_per_s} for level in preset.memory]
    return _roofs(preset.matmul_flops_per_s, preset.vector_flops_per_s, levels, dtype, f"effref's preset {name}")


def _roofs(matmul: Any, vector: Any, memory: Any, dtype: str, origin: str) -> Roofs | None:
    if not isinstance(matmul, Mapping) or not isinstance(vector, Mapping) or not isinstance(memory, list):
        return None
    peaks: list[Any] = [matmul.get(dtype), vector.get(dtype)]
    levels: list[tuple[str, Any]] = [
        (str(level.get("level")), level.get("bandwidth_bytes_per_s")) for level in memory if isinstance(level, Mapping)
    ]
    if not levels or not all(_rate(value) for value in (*peaks, *(bandwidth for _, bandwidth in levels))):
        return None
    return Roofs(float(peaks[0]), float(peaks[1]), tuple((name, float(value)) for name, value in levels), origin)


def _rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


@dataclass(frozen=True)
class _Place:
    """A component under the roofs."""

    name: str
    work: Work

    @property
    def intensity(self) -> float:
        return self.work.flops / self.work.bytes_moved

    def rate(self, seconds: float | None) -> float | None:
        return self.work.flops / seconds if seconds else None

    @property
    def rates(self) -> tuple[float | None, float | None]:
        """Predicted and measured."""
        return self.rate(self.work.predicted_s), self.rate(self.work.measured_s)


def places(result: Result) -> list[_Place]:
    """The components that compute something and move something."""
    return [
        _Place(name, work) for name, work in result.components.items() if work.flops and work.bytes_moved
        and (work.predicted_s or work.measured_s)
    ]  # fmt: skip


def card(group: Group, key: str) -> Card | None:
    """None where no file has components; without panels where the roofs are not known."""
    lines = [line for line in group.lines if places(line.longest)]
    if not lines:
        return None
    roofs = roofs_of(next(document for document in group.documents if document.kind != "fidelity"))
    title = "Roofline"
    if roofs is None:
        name = group.first.part("hardware").get("name")
        about = (
            f"Left out: the file holds no peaks and bandwidths of its hardware ({name or 'not named'}) for its dtype, "
            "and no preset of effref has this name."
        )
        return Card(key, title, about, [], [])
    measured = any(place.work.measured_s for line in lines for place in places(line.longest))
    spots = [
        (place.intensity, rate) for line in lines for place in places(line.longest) for rate in place.rates if rate
    ]
    panels = [_panel(line, roofs, spots, f"{key}-{number_}") for number_, line in enumerate(lines)]
    return Card(
        key,
        title,
        "Each component of the longest pass: FLOPs per byte moved to the right, FLOPs per second upwards. Near a slope "
        "bandwidth is what bounds it, near a flat roof arithmetic, far below both what calls cost beside their work; "
        f"above a slope its bytes came from a nearer memory. Roofs: {roofs.origin}.",
        [*(component_entry(name) for name in components_of(lines)), *_kinds(measured)],
        panels,
        _table(lines, group),
        _left_out(lines),
    )


def _kinds(measured: bool) -> list[Markup]:
    hollow = tag("path", d=shape("circle", 7, 7, 4), class_="mark p sample")
    filled = tag("path", d=shape("circle", 7, 7, 4), class_="mark sample")
    both = [plain_entry(hollow, "hollow: predicted")]
    return [*both, plain_entry(filled, "filled: measured")] if measured else both


def _left_out(lines: Sequence[Series]) -> list[Row]:
    names = dict.fromkeys(
        name for line in lines for name in line.longest.components
        if name not in {place.name for place in places(line.longest)}
    )  # fmt: skip
    return [Row([f"Without arithmetic, and so not shown: {', '.join(names)}"])] if names else []


def _panel(line: Series, roofs: Roofs, spots: Sequence[tuple[float, float]], key: str) -> Markup:
    where = f"{line.longest.axis}={line.longest.length}"
    parts = [
        f"{place.name}: {number(place.intensity)} FLOP per byte, "
        + ", ".join(
            f"{quantity(rate, FLOP_RATES)} {kind}"
            for rate, kind in zip(place.rates, ("predicted", "measured"), strict=True)
            if rate
        )
        for place in places(line.longest)
    ]
    panel = Panel(key, f"{line.label}, {where}", f"Roofline of {line.label} at {where}", "; ".join(parts) + ".",
                  f"m{line.method_number}")  # fmt: skip
    ridges = [roofs.matmul_flops_per_s / bandwidth for _, bandwidth in roofs.levels]
    low, high = around([*(intensity for intensity, _ in spots), max(ridges)], 0.08)
    panel.log_x(low, high)
    panel.log_y(*around([*(rate for _, rate in spots), roofs.matmul_flops_per_s, roofs.vector_flops_per_s], 0.08))
    panel.x_axis("FLOP per byte", panel.x.ticks(6), lambda value: f"{value:g}")
    name, factor = unit_for(FLOP_RATES, roofs.matmul_flops_per_s)
    panel.y_axis(name, panel.y.ticks(6), lambda value: f"{value / factor:g}")
    for name, bandwidth in roofs.levels:
        panel.add(_slope(panel, name, bandwidth, roofs.matmul_flops_per_s))
    fastest = max(bandwidth for _, bandwidth in roofs.levels)
    matrix, vector = roofs.matmul_flops_per_s, roofs.vector_flops_per_s
    if matrix == vector:
        panel.add(_flat(panel, matrix, matrix / fastest, "matrix and vector peak"))
    else:
        panel.add(_flat(panel, matrix, matrix / fastest, "matrix peak"))
        panel.add(_flat(panel, vector, vector / fastest, "vector peak"))
    panel.add(*(_spot(panel, place) for place in places(line.longest)))
    return panel.svg()


def _slope(panel: Panel, name: str, bandwidth: float, peak: float) -> Markup:
    """From the left or lower edge up to the peak, its name along it."""
    first = max(panel.x.low, panel.y.low / bandwidth)
    ends = [(first, first * bandwidth), (peak / bandwidth, peak)]
    words = f"{name}, {quantity(bandwidth, BYTE_RATES)}"
    (x, y), (right, top) = ((panel.x(one), panel.y(two)) for one, two in ends)
    angle = math.atan2(top - y, right - x)
    along, off = 12.0, 4.0  # pixels from the lower end, and to the upper left of the line
    x += along * math.cos(angle) + off * math.sin(angle)
    y += along * math.sin(angle) - off * math.cos(angle)
    turned = f"rotate({math.degrees(angle):.1f} {x:.1f} {y:.1f})"
    label = tag("text", words, x=x, y=y, class_="roof-name halo", transform=turned)
    return joined(panel.line(ends, "roof"), label)


def _flat(panel: Panel, rate: float, first: float, name: str) -> Markup:
    ends = [(max(first, panel.x.low), rate), (panel.x.high, rate)]
    words = f"{name}, {quantity(rate, FLOP_RATES)}"
    label = panel.text(panel.right - 2, panel.y(rate) - 4, words, "roof-name end halo")
    return joined(panel.line(ends, "roof"), label)


def _spot(panel: Panel, place: _Place) -> Markup:
    """Predicted and measured, joined."""
    form = "square" if hatched(place.name) else "circle"
    x, marks = panel.x(place.intensity), []
    predicted, seen = place.rates
    if predicted and seen:
        marks.append(tag("path", d=f"M{x:.1f} {panel.y(predicted):.1f}V{panel.y(seen):.1f}", class_="stem"))
    for rate, kind, classes in ((predicted, "predicted", "mark p"), (seen, "measured", "mark")):
        if rate:
            text = f"{place.name}, {kind}: {quantity(rate, FLOP_RATES)} at {number(place.intensity)} FLOP per byte"
            marks.append(tag("path", hint(text), d=shape(form, x, panel.y(rate), 3.6), class_=classes))
    return tag("g", marks, class_=component_class(place.name))


def _table(lines: Sequence[Series], group: Group) -> Table:
    rows = [
        Row(
            [
                line.label, f"{line.longest.axis}={line.longest.length}", place.name, number(place.intensity),
                *("-" if rate is None else number(rate / GIGA) for rate in place.rates), place.work.bound,
            ],
            f"m{line.method_number}",
        )
        for line in lines
        for place in places(line.longest)
    ]  # fmt: skip
    headers = ["method", "at", "component", "FLOP / byte", "predicted GFLOP/s", "measured GFLOP/s", "bound by"]
    return Table(headers, rows, 3, f"Arithmetic intensity and rates, {group.model}")
