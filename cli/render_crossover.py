"""Words and tables of a crossover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from costmodel.crossover import STEPS_PER_OCTAVE

from .layout import Block, Table
from .render import NONE, columns_to_rows, heading, percent, times

SHOWN = 11  # places of a predicted curve in a table


def blocks(document: Mapping[str, Any]) -> list[Block]:
    """A sentence for each method and baseline, the places, and the speed-up along the axis."""
    rows = document["results"]
    return [
        heading(document),
        "\n".join(words(document, row) for row in rows),
        _places(rows),
        *(_curve(document["config"], row) for row in rows),
    ]


def axis_words(config: Mapping[str, Any]) -> str:
    """What varies."""
    if config["over"] == "batch":
        return "sequences of a batch B"
    return "cached positions S" if "kv_len" in config else "length T"


def words(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """``reuse against flash: predicted from T=90 (60 to 130); measured from T=84 (80 to 88); 7.1 % apart``."""
    config, measured = document["config"], row.get("measured")
    letter = axis_words(config).split()[-1]
    parts = [f"predicted {_outcome_words(row['predicted'], config['range'], letter)}"]
    if measured:
        parts.append(f"measured {_outcome_words(measured, config['range'], letter)}")
        parts.append("they agree" if row["agree"] else "they do not agree")
    if "rel_error" in row:
        parts[-1] = f"{percent(row['rel_error'], signed=True)} % apart"
    return f"{row['method']} against {row['baseline']}: {'; '.join(parts)}"


def _outcome_words(found: Mapping[str, Any], limits: Sequence[int], letter: str) -> str:
    first, last = limits
    unsure = "" if found["clear"] else " (within the error it may not be)"
    if found["outcome"] == "from":
        low, high = (found[end] or "beyond" for end in ("low", "high"))
        return f"faster from {letter}={found['from']} on ({low} to {high}), up to {last}"
    return {
        "always": f"faster at all {letter} from {first} to {last}{unsure}",
        "never": f"slower at all {letter} from {first} to {last}{unsure}",
        "until": f"faster at small {letter} only, slower at {last}",
    }[found["outcome"]]


def _places(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for row in rows:
        own = [f"{row['method']} / {row['baseline']}"]
        for found in (row["predicted"], row.get("measured")):
            places = ("from", "low", "high")
            own += [found["outcome"], *(str(found[end] or NONE) for end in places)] if found else [NONE] * 4
        cells.append([*own, percent(row.get("rel_error"), signed=True)])
    ends = ["outcome", "from", "low", "high"]
    return Table(
        "", ["pair", *ends, *ends, "err %"], cells, groups=[("", 1), ("predicted", 4), ("measured", 4), ("", 1)]
    )


def _curve(config: Mapping[str, Any], row: Mapping[str, Any]) -> Table:
    letter = axis_words(config).split()[-1]
    probes = {probe["at"]: probe for probe in row.get("measured", {}).get("probes", [])}
    points = {point["at"]: point for point in row["curve"]}
    octave = STEPS_PER_OCTAVE if len(points) > SHOWN else 1
    shown = sorted({*(list(points)[:: octave * -(-len(points) // (octave * SHOWN))]), max(points), *probes})
    columns = [
        (letter, [str(at) for at in shown]),
        *(
            (name, [times(points[at][key]) if at in points else NONE for at in shown])
            for name, key in (("predicted", "speedup"), ("low", "low"), ("high", "high"))
        ),
    ]
    if probes:
        columns.append(("measured", [times(probes[at]["speedup"]) if at in probes else NONE for at in shown]))
        columns.append(("pairs", [str(probes[at]["n"]) if at in probes else NONE for at in shown]))
    return Table(f"speed-up of {row['method']} over {row['baseline']}", *columns_to_rows(columns))
