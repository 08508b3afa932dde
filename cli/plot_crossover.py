"""Draws a crossover: the speed-up over the axis, predicted with its band and measured, and where it passes 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import COLOURS, MARKERS, figure
from .render_crossover import axis_words, words


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the plot; see `figures.figure`."""
    config, rows = document["config"], document["results"]
    title = f"{config['model']['name']}, {config['dtype']}, {config['phase']}, {document['hardware']['name']}"
    with figure(path, (7.2, 4.6), title, ". ".join(words(document, row) for row in rows)) as drawn:
        axes = drawn.add_subplot()
        for place, row in enumerate(rows):
            _curve(axes, row, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(axis_words(config))
        axes.set_ylabel("speed-up (above 1 the method is faster)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)


def _curve(axes: Any, row: Mapping[str, Any], colour: str, marker: str) -> None:
    places = [point["at"] for point in row["curve"]]
    low, high, speedup = ([point[name] for point in row["curve"]] for name in ("low", "high", "speedup"))
    name = f"{row['method']} / {row['baseline']}"
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(places, speedup, color=colour, linewidth=1.4, label=f"{name}, predicted")
    measured = row.get("measured")
    if measured:
        at, seen = ([probe[name] for probe in measured["probes"]] for name in ("at", "speedup"))
        axes.plot(at, seen, color=colour, marker=marker, linestyle="none", label=f"{name}, measured")
    for found, style in ((row["predicted"], "--"), (measured, ":")):
        if found and found["from"]:
            axes.axvline(found["from"], color=colour, linestyle=style, linewidth=1.0)
            axes.annotate(
                str(found["from"]), (found["from"], 1.0), (3, 4 if style == "--" else -11),
                textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip
