"""Draws a result: breakdown of each method at each length, and total time against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.components import COMPONENTS

from .figures import COLOURS, MARKERS, figure
from .render import SECONDS, by_method, unit_for
from .results import length_of, place_of

PANELS = 4  # lengths whose breakdown is drawn: the largest ones
HATCHES = ("", "///", "...")  # of components beyond the colours


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the plot; see `figure`."""
    results = document["results"]
    lengths = sorted({length_of(result) for result in results})[-PANELS:]
    columns = len(lengths) + 2
    with figure(path, (2.0 * columns + 2.5, 4.8), title(document), describe(document)) as drawn:
        grid = drawn.add_gridspec(1, columns)
        colours = _colours(results)
        for place, length in enumerate(lengths):
            at_length = [result for result in results if length_of(result) == length]
            _breakdown(drawn.add_subplot(grid[0, place]), at_length, colours, first=place == 0)
        _totals(drawn.add_subplot(grid[0, len(lengths) :]), results)
        drawn.legend(handles=_legend(colours), loc="outside lower center", ncols=6, frameon=False)


def describe(document: Mapping[str, Any]) -> str:
    """The plot in words, kept in the file for readers who do not see it."""
    parts = []
    for result in document["results"]:
        measured = result["total"].get("measured_s")
        seen = f", measured {measured['median']:.4g} s" if measured else ""
        expected = f"predicted {result['total']['predicted_s']:.4g} s{seen}"
        parts.append(f"{result['method']} at {place_of(result)}: {expected}")
    return "Seconds of one forward pass by component and in total. " + "; ".join(parts) + "."


def title(document: Mapping[str, Any]) -> str:
    """Model, dtype, batch and machine."""
    config, hardware = document["config"], document["hardware"]
    machine = f"{hardware['name']} ({hardware['level']})"
    return f"{config['model']['name']}, {config['dtype']}, batch {config['batch']}, {machine}"


def _colours(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Component -> colour and hatch, in the order in which components run."""
    used = {row["component"] for result in results for row in result["components"]}
    names = [name for name in COMPONENTS if name in used]
    return {name: (COLOURS[place % len(COLOURS)], HATCHES[place // len(COLOURS)]) for place, name in enumerate(names)}


def _breakdown(axes: Any, results: Sequence[Mapping[str, Any]], colours: Mapping[str, Any], first: bool) -> None:
    """Stacked bars at one length: predicted (pale) and measured beside it, for each method."""
    measured = "measured_s" in results[0]["total"]
    unit, factor = unit_for(SECONDS, max(result["total"]["predicted_s"] for result in results))

    def predicted(row: Mapping[str, Any]) -> float:
        return float(row["predicted_s"] / factor)

    def seen(row: Mapping[str, Any]) -> float:
        return float((row["measured_s"]["median"] or 0.0) / factor)

    for place, result in enumerate(results):
        if measured:
            _stack(axes, place - 0.2, 0.38, result, colours, predicted, 0.55)
            _stack(axes, place + 0.2, 0.38, result, colours, seen, 1.0)
        else:
            _stack(axes, place, 0.7, result, colours, predicted, 1.0)
    axes.set_xticks(range(len(results)), [result["method"] for result in results], rotation=30)
    axes.set_title(place_of(results[0]), fontsize=9)
    axes.set_ylabel(unit)
    if first:
        axes.set_xlabel("left predicted (pale), right measured" if measured else "predicted")


def _stack(
    axes: Any, x: float, width: float, result: Mapping[str, Any], colours: Any, value: Any, alpha: float
) -> None:
    bottom = 0.0
    for row in result["components"]:
        colour, hatch = colours[row["component"]]
        height = value(row)
        axes.bar(x, height, width, bottom, color=colour, hatch=hatch, alpha=alpha, edgecolor="white", linewidth=0.3)
        bottom += height


def _totals(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Total against length on logarithmic axes: predicted as a line with its band, measured as marks."""
    for place, (name, found) in enumerate(by_method(results).items()):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        lengths, totals = [length_of(result) for result in found], [result["total"] for result in found]
        low, high = ([total[f"predicted_{end}_s"] for total in totals] for end in ("low", "high"))
        axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        predicted = [total["predicted_s"] for total in totals]
        axes.plot(
            lengths, predicted, color=colour, marker=marker, markersize=3, linewidth=1.2, label=f"{name}, predicted"
        )
        if "measured_s" in totals[0]:
            medians = [total["measured_s"]["median"] for total in totals]
            axes.plot(lengths, medians, color=colour, marker=marker, linestyle="none", label=f"{name}, measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({length_of(result) for result in results})
    axes.set_xticks(lengths, [str(length) for length in lengths], rotation=30)
    axes.set_xlabel("cached positions S" if place_of(results[0]).startswith("S") else "length T")
    axes.set_ylabel("s")
    axes.set_title("total", fontsize=9)
    axes.grid(alpha=0.3, which="major")
    axes.legend(frameon=False, fontsize=8)


def _legend(colours: Mapping[str, tuple[str, str]]) -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name) for name, (colour, hatch) in colours.items()
    ]
