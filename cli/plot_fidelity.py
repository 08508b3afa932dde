"""Draws fidelity against cost: the chief figure over time, memory and knob, and time and memory over the knob.

Of a method that filters pairs, the measured share of them that it kept stands in the place of the knob, so that curves
of different knobs can be compared; memory, which a filter leaves alone, makes room for a second figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.parameters import PARAMETERS

from .curves import plain
from .figures import COLOURS, MARKERS, figure
from .plot import title
from .render import CAPACITIES, SECONDS, Unit, quantity, unit_for
from .render_fidelity import (
    FIGURES,
    baselines_of,
    chief,
    chief_words,
    curves,
    measured,
    memory,
    metric,
    metric_text,
    seconds,
    sentence,
    setting,
)

Results = Sequence[Mapping[str, Any]]
KEPT = "kept share of the visible pairs, %"
TICKS = (1, 2, 5, 10, 15, 20, 30, 50, 100)  # of that axis
WIDE = 30  # largest figure over smallest from which the axis is logarithmic
EXACT = "#555555"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the plot; see `figure`."""
    with figure(path, (11, 7.5), title(document), describe(document)) as drawn:
        panels = Panels(document["results"], drawn.subplots(2, 2))
        panels.draw()
        handles, labels = panels.grid[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)


def describe(document: Mapping[str, Any]) -> str:
    """The plot in words, kept in the file for readers who do not see it."""
    results = document["results"]
    timed = measured(results)
    kind = "measured" if timed else "predicted"
    points = [
        f"{' '.join([result['curve'], setting(result)]).strip()}: {metric_text(result)}, "
        f"{quantity(seconds(chief(result), timed), SECONDS)}, {quantity(memory(result)[1], CAPACITIES)}"
        + (f", {100 * result['fidelity']['kept']:.1f} % kept" if "kept" in result["fidelity"] else "")
        for result in results
    ]
    words = f"{metric(results[0])[0]} against {kind} time of {chief_words(results[0])} and {memory(results[0])[0]} size"
    changes = [sentence(curve) for curve in curves(results).values() if len(curve) > 1]
    return f"Fidelity of methods: {words}. " + "; ".join([*points, *changes]) + "."


class Panels:
    """Four panels: figure over time, figure over memory; figure over knob, time and memory over knob."""

    def __init__(self, results: Results, grid: Any) -> None:
        self.results, self.grid = results, grid
        self.curves = curves(results)
        self.alone = baselines_of(results)
        self.timed = measured(results)
        self.time_unit = unit_for(SECONDS, min(self._seconds(result) for result in results))
        self.memory_unit = unit_for(CAPACITIES, min(memory(result)[1] for result in results))
        self.metric = metric(results[0])[0]
        self.filters = all("kept" in result["fidelity"] for curve in self.curves.values() for result in curve)
        self.places = _places([result["value"] for curve in self.curves.values() for result in curve])

    def draw(self) -> None:
        """All of them."""
        (over_time, over_memory), (over_knob, costs) = self.grid
        kind = "measured" if self.timed else "predicted"
        self._against(over_time, self._seconds, self.time_unit, f"{kind} time of {chief_words(self.results[0])}")
        name = memory(self.results[0])[0]
        if self.filters:
            second = "kl_nats" if "kl_nats" in self.results[0]["fidelity"] else "cosine"
            self._over_knob(over_memory, lambda result: float(result["fidelity"][second]))
            over_memory.set_ylabel(FIGURES[second][0])
            over_memory.grid(alpha=0.3)
        else:
            self._against(over_memory, lambda result: memory(result)[1], self.memory_unit, f"size of the {name}")
            over_memory.set_ylabel(self.metric)
            self._scale(over_memory)
        self._over_knob(over_knob, self._value)
        self._costs(costs, kind, name)
        for axes in (over_time, over_knob):
            axes.set_ylabel(self.metric)
            self._scale(axes)

    def _seconds(self, result: Mapping[str, Any]) -> float:
        return seconds(chief(result), self.timed)

    def _value(self, result: Mapping[str, Any]) -> float:
        value = metric(result)[1]
        return float("nan") if value is None else value

    def _scale(self, axes: Any) -> None:
        values = [value for value in map(self._value, self.results) if value > 0]
        if self.metric == "perplexity" and max(values) > WIDE * min(values):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)

    def _against(self, axes: Any, cost: Any, unit: Unit, label: str) -> None:
        """The figure over a cost; every point carries the value of its knob, where no axis has it."""
        name, factor = unit
        for place, ((curve, knob), results) in enumerate(self.curves.items()):
            x, y = [cost(result) / factor for result in results], [self._value(result) for result in results]
            axes.plot(x, y, **_style(place), label=_label(results[0]["method"], curve, knob))
            marked = [] if self.filters else zip(results, zip(x, y, strict=True), strict=True)
            for result, at in marked:
                axes.annotate(
                    plain(result["value"]), at, xytext=(4, 4), textcoords="offset points", fontsize=8,
                    color=_style(place)["color"],
                )  # fmt: skip
        for place, result in enumerate(self.alone):
            at = cost(result) / factor, self._value(result)
            axes.plot(*at, "x+1234"[place % 6], color=EXACT, markersize=8, label=result["curve"], linestyle="none")
        axes.margins(0.08)
        axes.set_xlabel(f"{label}, {name}")

    def _over_knob(self, axes: Any, value: Callable[[Mapping[str, Any]], float]) -> None:
        for place, results in enumerate(self.curves.values()):
            ordered = self._in_order(results)
            axes.plot(self._knob(ordered), [value(result) for result in ordered], **_style(place))
        axes.axhline(value(self.results[0]), color=EXACT, linewidth=0.8, linestyle=":")
        x, side = (0.0, "left") if self.filters else (1.0, "right")  # all kept, at the right, is where curves end
        axes.annotate(
            "exact", (x, value(self.results[0])), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", horizontalalignment=side, color=EXACT,
        )  # fmt: skip
        self._knob_axis(axes)

    def _costs(self, axes: Any, kind: str, name: str) -> None:
        """Time (solid) and memory (dashed, hollow), both over those of exact attention."""
        exact = self.results[0]
        for place, results in enumerate(map(self._in_order, self.curves.values())):
            x, style = self._knob(results), _style(place)
            axes.plot(x, [self._seconds(result) / self._seconds(exact) for result in results], **style)
            if not self.filters:
                sizes = [memory(result)[1] / memory(exact)[1] for result in results]
                axes.plot(x, sizes, **{**style, "linestyle": "--", "markerfacecolor": "none"})
        axes.axhline(1.0, color=EXACT, linewidth=0.8, linestyle=":")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share of dense")
        both = f"solid, filled: {kind} time; dashed, hollow: size of the {name}"
        axes.set_title(f"{kind} time of {chief_words(exact)}" if self.filters else both, fontsize=9)
        axes.grid(alpha=0.3)
        self._knob_axis(axes)

    def _in_order(self, results: Results) -> Results:
        """As the knob was turned; by kept share where methods filter."""
        return sorted(results, key=lambda result: self._knob([result])) if self.filters else results

    def _knob(self, results: Results) -> list[float]:
        if self.filters:
            return [100 * result["fidelity"]["kept"] for result in results]
        return [self.places[plain(result["value"])] for result in results]

    def _knob_axis(self, axes: Any) -> None:
        if self.filters:
            shares = [share for results in self.curves.values() for share in self._knob(results)]
            ticks = [tick for tick in TICKS if min(shares) / 1.3 <= tick <= max(shares)]
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(KEPT)
            return
        axes.set_xticks(list(self.places.values()), list(self.places), fontsize=8)
        axes.set_xlabel(" or ".join(dict.fromkeys(knob for _, knob in self.curves)) or "no knob")


def _label(method: str, curve: str, knob: str) -> str:
    """A curve in the legend: by its knob, or by what a curve over that is of."""
    words = getattr(PARAMETERS[method], "CURVES", {})
    return f"{curve}: {words[knob]}" if knob in words else f"{curve}, by {knob}"


def _style(place: int) -> dict[str, Any]:
    """Colour and marker of a curve."""
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3}


def _places(values: Sequence[Any]) -> dict[str, float]:
    """Where values stand on the axis of the knob: numbers by their size, if all are; else evenly in order."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers:
        return {plain(value): float(value) for value in sorted(set(values))}
    return {text: float(place) for place, text in enumerate(dict.fromkeys(map(plain, values)))}
