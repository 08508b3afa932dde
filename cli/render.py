"""The one place where numbers become text: tables, Markdown, CSV and JSON; `render_fidelity` puts its pieces together.

Tables scale each column and name the unit in its header; CSV and JSON keep raw SI numbers.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .layout import Block, Row, Table
from .results import flat, length_of, place_of

if TYPE_CHECKING:
    from costmodel.hardware import Hardware, RecordedModel

    from .explanation import Explanation, Layer

SUFFIXES = {".json": "json", ".csv": "csv", ".md": "md"}  # of --output, where --format is not given

Unit = tuple[str, float]
SECONDS: tuple[Unit, ...] = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
FLOPS: tuple[Unit, ...] = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
BYTES: tuple[Unit, ...] = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
FLOP_RATES: tuple[Unit, ...] = (("TFLOP/s", 1e12), ("GFLOP/s", 1e9))
BYTE_RATES: tuple[Unit, ...] = (("TB/s", 1e12), ("GB/s", 1e9))
JOULES: tuple[Unit, ...] = (("J", 1.0), ("mJ", 1e-3), ("µJ", 1e-6), ("nJ", 1e-9))
WATTS: tuple[Unit, ...] = (("W", 1.0), ("mW", 1e-3), ("µW", 1e-6))
CAPACITIES: tuple[Unit, ...] = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
NONE = "-"


# --- numbers to text ------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three significant digits, but never an exponent; whole above 100."""
    if value is None:
        return NONE
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.0005:
        return "<0.001"
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3}f}"


def percent(value: float | None, signed: bool = False) -> str:
    """A ratio in percent, whole from 10 on."""
    if value is None:
        return NONE
    return f"{100 * value:{'+' if signed else ''}.{0 if abs(value) >= 0.0995 else 1}f}"


def small(value: float | None) -> str:
    """A number that may be tiny, as 1.2e-07."""
    return NONE if value is None else "0" if value == 0 else f"{value:.1e}"


def cosine(value: float | None) -> str:
    """Six digits."""
    return NONE if value is None else f"{value:.6f}"


def times(value: float | None) -> str:
    """A speed-up."""
    return NONE if value is None else f"{value:.2f}"


def unit_for(units: Sequence[Unit], value: float) -> Unit:
    """The largest unit in which `value` is at least 1; the smallest where there is none."""
    return next((unit for unit in units if value >= unit[1]), units[-1])


def quantity(value: float, units: Sequence[Unit]) -> str:
    """A number with its unit."""
    name, factor = unit_for(units, value)
    return f"{number(value / factor)} {name}"


def column(
    name: str, units: Sequence[Unit], values: Sequence[float | None], typical: float | None = None
) -> tuple[str, list[str]]:
    """Header and cells of one column, scaled by its largest (or a typical) value."""
    unit, factor = unit_for(units, typical if typical is not None else max((v or 0.0 for v in values), default=0.0))
    return f"{name} {unit}".strip(), [number(None if v is None else v / factor) for v in values]


def columns_to_rows(columns: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows from columns."""
    headers = [header for header, _ in columns]
    return headers, [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]


# --- what estimate and measure share --------------------------------------------------------------------------------


def heading(document: Mapping[str, Any]) -> str:
    """What was asked for and on which hardware, in two lines."""
    config, model, hardware = document["config"], document["config"]["model"], document["hardware"]
    shape = f"{model['layers']} layers, d {model['d_model']}, {model['heads']} heads"
    kv = f" ({model['kv_heads']} of keys)" if model["kv_heads"] != model["heads"] else ""
    meaning = "lower bounds from a spec sheet" if hardware["level"] == "spec" else "forecasts"
    causal = ", causal" if config["causal"] else ""
    work = config["phase"]
    if "kv_len" in config:
        work = f"decode, {_steps_text(config)} a pass after S cached positions"
    if config.get("graph"):
        work += ", recorded"
    return (
        f"{model['name']}: {shape}{kv}, feed-forward {model['d_ff']}; batch {config['batch']}, {config['dtype']}, "
        f"{work}{causal}\n"
        f"hardware {hardware['name']} (level {hardware['level']}: {meaning})"
    )


def _steps_text(config: Mapping[str, Any]) -> str:
    """``3 tokens``, or ``1 chunk of 4 positions``."""
    chunk = config["model"]["chunk"]
    what, of = ("chunk", f" of {chunk} positions") if chunk else ("token", "")
    return f"{config['steps']} {what}{'s' if config['steps'] > 1 else ''}{of}"


def parameters_text(params: Mapping[str, Any]) -> str:
    """``group=2, share=probabilities``, leaving out what is not set; of several methods ``reuse.group=2``."""
    return ", ".join(f"{name}={_plain(value)}" for name, value in flat(params).items() if value is not None)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def method_title(result: Mapping[str, Any]) -> str:
    """The method with its parameters."""
    params = parameters_text(result["params"])
    return f"{result['method']} ({params})" if params else str(result["method"])


def by_method(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The results of each method, by rising length."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["method"], []).append(result)
    return found


def axis_of(results: Sequence[Mapping[str, Any]]) -> str:
    """The letter of the lengths: S cached positions in decoding, else T."""
    return place_of(results[0])[0]


def _decoding(results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Columns of the cache and of tokens per second, where there are any."""
    columns = []
    if any(result["cache_bytes"] for result in results):
        columns.append(column("cache", CAPACITIES, [result["cache_bytes"] for result in results]))
    if "tokens_per_s" in results[0]:
        rates = {kind: [number(result["tokens_per_s"][kind]) for result in results] for kind in kinds}
        columns += [(f"{kind} tokens/s", cells) for kind, cells in rates.items()]
    return columns


def component_grid(
    results: Sequence[Mapping[str, Any]],
    columns: Callable[[Mapping[str, Any], Mapping[str, Any], Unit], Row],
    headers: Callable[[str], Row],
    typical: Callable[[Mapping[str, Any]], float],
) -> Table:
    """One method: components down, lengths across, the same few columns for each length."""
    unit = unit_for(SECONDS, min(typical(result["total"]) for result in results))
    names = [row["component"] for row in results[-1]["components"]]
    rows = {name: [name] for name in names}
    total = ["total"]
    for result in results:
        for row in result["components"]:
            rows[row["component"]] += columns(row, result, unit)
        total += columns(result["total"], result, unit)
    heads = headers(unit[0])
    return Table(
        method_title(results[0]),
        ["component", *(head for _ in results for head in heads)],
        list(rows.values()),
        total,
        groups=[("", 1), *((place_of(result), len(heads)) for result in results)],
    )


# --- estimate -------------------------------------------------------------------------------------------------------

DETAILED = 3  # results up to which every column is shown


def estimate_blocks(document: Mapping[str, Any], baselines: Sequence[str]) -> list[Block]:
    """Every column for few results; for many one grid per method and a summary."""
    results = document["results"]
    blocks: list[Block] = [heading(document)]
    if len(results) <= DETAILED:
        for result in results:
            blocks += [_estimate_detail(result), _estimate_line(result, baselines)]
            blocks += energy_blocks(result, document.get("energy_model"), baselines)
        return [*blocks, *_unnamed(document, baselines, "computed")]
    for of_method in by_method(results).values():
        chunks = [of_method[start : start + 6] for start in range(0, len(of_method), 6)]
        blocks += [_estimate_grid(chunk) for chunk in chunks]
    more = "FLOPs and bytes per component: ask for one length of one method, or take --format csv or json."
    return [*blocks, _estimate_summary(results, baselines), more, *_unnamed(document, baselines, "computed")]


def _unnamed(document: Mapping[str, Any], baselines: Sequence[str], done: str) -> list[Block]:
    """Says which baselines are there for the ratios only."""
    unnamed = [name for name in baselines if name not in document["config"]["method"]]
    if not unnamed:
        return []
    return [f"Also {done}, for the ratios: {' and '.join(unnamed)}; name them in --method to see them."]


def _estimate_detail(result: Mapping[str, Any]) -> Table:
    rows = [*result["components"], result["total"]]
    whole = result["total"]["predicted_s"]
    columns = [
        ("component", [row.get("component", "total") for row in rows]),
        ("bound", [row["bound"] for row in rows]),
        ("calls", [str(row["calls"]) for row in rows]),
        column("matmul", FLOPS, [row["matmul_flops"] for row in rows]),
        column("vector", FLOPS, [row["vector_flops"] for row in rows]),
        column("read", BYTES, [row["bytes_read"] for row in rows]),
        column("written", BYTES, [row["bytes_written"] for row in rows]),
        column("predicted", SECONDS, [row["predicted_s"] for row in rows]),
        *_band(rows),
        ("share %", [percent(row["predicted_s"] / whole if whole else None) for row in rows]),
    ]
    headers, cells = columns_to_rows(columns)
    return Table(f"{method_title(result)} at {place_of(result)}", headers, cells[:-1], cells[-1], left=2)


def _band(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Low and high, where the hardware has a band."""
    if all(row["predicted_low_s"] == row["predicted_high_s"] for row in rows):
        return []
    typical = max(row["predicted_s"] for row in rows)
    return [
        column("low", SECONDS, [row["predicted_low_s"] for row in rows], typical),
        column("high", SECONDS, [row["predicted_high_s"] for row in rows], typical),
    ]


def _estimate_line(result: Mapping[str, Any], baselines: Sequence[str]) -> str:
    ratios = [f"{times(result['speedup'][name]['predicted'])} x the speed of {name}" for name in baselines]
    return (
        f"{result['method']} at {place_of(result)}: {', '.join(ratios)}\n"
        f"weights {_weights_text(result)}, peak memory {quantity(result['peak_bytes'], CAPACITIES)}"
        f"{_cache_text(result)}"
    )


def _weights_text(result: Mapping[str, Any]) -> str:
    """The weights, with those of the product's other parts, and how much less than dense they are."""
    text, change = quantity(result["params_bytes"], CAPACITIES), 100 * result["params_reduction"]
    less = f"{abs(change):.1f} % {'less' if change > 0 else 'more'} than dense"
    if result["companion_bytes"]:
        text += f" and {quantity(result['companion_bytes'], CAPACITIES)} in the product's other parts"
        less = f"together {less}"
    return f"{text} ({less})" if change else text


ENERGIES = ("weights", "activations", "arithmetic")


def energy_blocks(result: Mapping[str, Any], model: Mapping[str, Any] | None, baselines: Sequence[str]) -> list[Block]:
    """Joules per component, and the power at the rate of the input."""
    if model is None:
        return []
    found = result["energy"]
    rows = found["components"]
    columns = [
        ("component", [row["component"] for row in rows]),
        *(column(kind, JOULES, [row[f"{kind}_j"] for row in rows]) for kind in ENERGIES),
        column("together", JOULES, [row["total_j"] for row in rows]),
        ("share %", [percent(row["total_j"] / found["total_j"]) for row in rows]),
    ]
    headers, cells = columns_to_rows(columns)
    power = f", {quantity(found['power_w'], WATTS)} at the rate of the input" if found["power_w"] else ""
    savings = [f"{percent(found['saving'][name])} % less than {name}" for name in baselines if name != result["method"]]
    line = f"energy {quantity(found['total_j'], JOULES)} a pass{power}; {', '.join(savings)}"
    return [Table(f"energy: {model['title']}", headers, cells), line]


def _cache_text(result: Mapping[str, Any]) -> str:
    """The cache and its traffic, and the rate of tokens, where there are any."""
    if not result["cache_bytes"]:
        return ""
    traffic = result["cache_traffic"]
    text = (
        f"\ncache {quantity(result['cache_bytes'], CAPACITIES)} ({quantity(traffic['appended_bytes'], BYTES)} "
        f"appended, {quantity(traffic['read_bytes'], BYTES)} of keys and values read)"
    )
    rate = result.get("tokens_per_s")
    return f"{text}; {number(rate['predicted'])} tokens/s" if rate else text


def _estimate_grid(results: Sequence[Mapping[str, Any]]) -> Table:
    def columns(row: Mapping[str, Any], result: Mapping[str, Any], unit: Unit) -> Row:
        whole = result["total"]["predicted_s"]
        return [number(row["predicted_s"] / unit[1]), percent(row["predicted_s"] / whole if whole else None)]

    return component_grid(results, columns, lambda unit: [unit, "share %"], lambda total: total["predicted_s"])


def _estimate_summary(results: Sequence[Mapping[str, Any]], baselines: Sequence[str]) -> Table:
    totals = [result["total"] for result in results]
    columns = [
        ("method", [result["method"] for result in results]),
        ("bound", [total["bound"] for total in totals]),
        (axis_of(results), [str(length_of(result)) for result in results]),
        column("matmul", FLOPS, [total["matmul_flops"] for total in totals]),
        column("vector", FLOPS, [total["vector_flops"] for total in totals]),
        column("moved", BYTES, [total["bytes_read"] + total["bytes_written"] for total in totals]),
        column("predicted", SECONDS, [total["predicted_s"] for total in totals], min(t["predicted_s"] for t in totals)),
        *_band(totals),
        *((f"x {name}", [times(result["speedup"][name]["predicted"]) for result in results]) for name in baselines),
        column("peak", CAPACITIES, [result["peak_bytes"] for result in results]),
        *_decoding(results, ("predicted",)),
    ]
    headers, rows = columns_to_rows(columns)
    return Table("summary, predicted", headers, rows, left=2)


# --- measure --------------------------------------------------------------------------------------------------------

ACROSS = 4  # lengths side by side


def measure_blocks(document: Mapping[str, Any], baselines: Sequence[str]) -> list[Block]:
    """One grid per method, a summary, and how good the predictions were."""
    results = document["results"]
    blocks: list[Block] = [heading(document)]
    for of_method in by_method(results).values():
        chunks = [of_method[start : start + ACROSS] for start in range(0, len(of_method), ACROSS)]
        blocks += [_measure_grid(chunk) for chunk in chunks]
    kind = "recorded passes" if document["config"]["graph"] else "passes without instruments"
    blocks += [_measure_summary(results, baselines, kind), accuracy_table(document["accuracy"])]
    flags = [f"{result['method']} at {place_of(result)}, {flag}" for result in results for flag in result["flags"]]
    blocks += _unnamed(document, baselines, "run")
    return [*blocks, *(["Above the roof:\n" + "\n".join(flags)] if flags else [])]


def _measure_grid(results: Sequence[Mapping[str, Any]]) -> Table:
    def columns(row: Mapping[str, Any], result: Mapping[str, Any], unit: Unit) -> Row:
        median = row["measured_s"]["median"]
        return [
            number(None if median is None else median / unit[1]),
            number(row["predicted_s"] / unit[1]),
            percent(row["rel_error"], signed=True),
        ]

    return component_grid(
        results, columns, lambda unit: [f"meas. {unit}", "pred.", "err %"], lambda total: total["measured_s"]["median"]
    )


def _measure_summary(results: Sequence[Mapping[str, Any]], baselines: Sequence[str], kind: str) -> Table:
    totals = [result["total"] for result in results]
    medians = [total["measured_s"]["median"] for total in totals]
    shortest = min(medians)
    decoding = _decoding(results, ("measured", "predicted"))
    columns = [
        ("method", [result["method"] for result in results]),
        (axis_of(results), [str(length_of(result)) for result in results]),
        ("runs", [str(total["measured_s"]["n"]) for total in totals]),
        column("measured", SECONDS, medians, shortest),
        ("± %", [percent(spread(total["measured_s"])) for total in totals]),
        column("predicted", SECONDS, [total["predicted_s"] for total in totals], shortest),
        ("err %", [percent(total["rel_error"], signed=True) for total in totals]),
        *((name, [times(result["speedup"][name]["measured"]) for result in results]) for name in baselines),
        *((name, [times(result["speedup"][name]["predicted"]) for result in results]) for name in baselines),
        ("rel. L2", [small((result["fidelity"] or {}).get("rel_l2")) for result in results]),
        ("cosine", [cosine((result["fidelity"] or {}).get("cosine")) for result in results]),
        *decoding,
    ]
    headers, rows = columns_to_rows(columns)
    n = len(baselines)
    ratios = [("speed-up", n), ("predicted", n)] if n else []
    return Table(
        f"totals of {kind}, and fidelity against exact attention",
        headers,
        rows,
        groups=[("", 7), *ratios, ("fidelity", 2), *([("", len(decoding))] if decoding else [])],
    )


def spread(measured: Mapping[str, Any]) -> float | None:
    """Half the distance from the 10th to the 90th percentile, beside the median."""
    if measured["p10"] is None:
        return None
    return float((measured["p90"] - measured["p10"]) / 2 / measured["median"])


def accuracy_table(accuracy: Mapping[str, Any]) -> Table:
    """The errors of the cost model, beside those of simpler ones."""
    names = {"": "this cost model", "bare_roofline": "bare roofline", "global_efficiency": "roofline x one factor"}
    rows = []
    for key, name in names.items():
        errors = accuracy if not key else accuracy.get(key)
        if errors:
            rows.append([name, *(cell for part in ("components", "totals") for cell in _errors(errors[part]))])
    return Table(
        "error of predictions, (predicted - measured) / measured, in %; components of at least 2 % of a pass",
        ["", *(["median", "p90", "bias", "n"] * 2)],
        rows,
        groups=[("", 1), ("components", 4), ("totals", 4)],
    )


def _errors(errors: Mapping[str, Any]) -> list[str]:
    absolute = [percent(errors["median_abs"]), percent(errors["p90_abs"])]
    return [*absolute, percent(errors["bias"], signed=True), str(errors["n"])]


# --- calibrate ------------------------------------------------------------------------------------------------------

UNUSED_RATE = 1e29  # a profile's rate of FLOPs that an op does not have


def profile_blocks(hardware: Hardware) -> list[Block]:
    """The machine's figures, and per op its constants and held-out errors."""
    about = hardware.about
    peaks = [
        f"{what} {quantity(rate, FLOP_RATES)}"
        for what, rates in (("matrix", hardware.matmul_flops_per_s), ("vector", hardware.vector_flops_per_s))
        for rate in rates.values()
    ]
    levels = [f"{level.level} {quantity(level.bandwidth_bytes_per_s, BYTE_RATES)}" for level in hardware.memory]
    threads = f", {about.get('threads')} threads" if hardware.kind == "cpu" else ""
    head = (
        f"{about.get('engine')}{threads}, {about.get('dtype')}: "
        f"{about.get('passes', 0)} passes, {about.get('samples', 0)} samples\nsustained: {', '.join([*peaks, *levels])}"
    )
    residuals: Mapping[str, Mapping[str, Any]] = about.get("residuals", {})
    if hardware.recorded:
        head += f"\n{_recorded_text(hardware.recorded, residuals.get('recorded', {}))}"
    errors = [residuals.get(name, {}) for name in (*hardware.ops, "total")]
    models = list(hardware.ops.values())
    columns = [
        ("op", list(hardware.ops)),
        column("overhead", [("µs", 1e-6)], [model.overhead_s for model in models]),
        column("matrix", [("GFLOP/s", 1e9)], [_rate(model.matmul_flops_per_s) for model in models]),
        column("vector", [("GFLOP/s", 1e9)], [_rate(model.vector_flops_per_s) for model in models]),
        column("near", [("GB/s", 1e9)], [model.near_bytes_per_s for model in models]),
        column("far", [("GB/s", 1e9)], [model.far_bytes_per_s for model in models]),
        column("cache", [("MiB", 2.0**20)], [model.cache_bytes for model in models]),
    ]
    headers, rows = columns_to_rows(columns)
    cells = [[percent(one.get("median_abs")), percent(one.get("p90_abs")), str(one.get("n", NONE))] for one in errors]
    rows = [[*row, *cell] for row, cell in zip(rows, cells, strict=False)]
    return [
        head,
        Table(
            "fitted constants, and errors on shapes that were left out of the fit",
            [*headers, "median %", "p90 %", "n"],
            rows,
            ["whole passes", *[""] * 6, *cells[-1]],
            groups=[("", 1), ("constants", 6), ("held-out error %", 3)],
        ),
    ]


def _recorded_text(model: RecordedModel, residual: Mapping[str, Any]) -> str:
    return (
        f"recorded passes: {quantity(model.start_s, SECONDS)} to start, {quantity(model.call_s, SECONDS)} a call, "
        f"{model.work:.2f} of the work; held-out error median {percent(residual.get('median_abs'))} %, "
        f"p90 {percent(residual.get('p90_abs'))} % (n {residual.get('n', NONE)})"
    )


def _rate(value: float) -> float | None:
    return None if value > UNUSED_RATE else value


# --- list and explain -----------------------------------------------------------------------------------------------


def list_table(kind: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line each."""
    return LISTS[kind](rows)


def _methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            row["method"],
            "exact" if row["exact"] else "approximate",
            row["title"],
            row["paper"],
            parameters_text(row["parameters"]) or NONE,
        ]
        for row in rows
    ]
    engines = ", ".join(rows[0]["engines"])
    return Table(f"methods (engines: {engines})", ["method", "", "what", "paper", "parameters"], cells, left=5)


def _models_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            row["model"],
            row["reads"],
            row["positions"],
            "causal" if row["causal"] else "full",
            str(row["layers"]),
            str(row["d_model"]),
            str(row["heads"]) + (f"/{row['kv_heads']}" if row["kv_heads"] != row["heads"] else ""),
            str(row["d_ff"]),
            str(row["max_positions"] or "any"),
        ]
        for row in rows
    ]
    headers = ["model", "reads", "positions", "mask", "layers", "d", "heads", "d_ff", "max T"]
    return Table("models (seeded random weights unless fetched: effref models)", headers, cells, left=4)


def _hardware_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        ("hardware", [row["hardware"] for row in rows]),
        ("kind", [row["kind"] for row in rows]),
        ("level", [row["level"] for row in rows]),
        ("what", [row["title"] for row in rows]),
        ("cores", [str(row["cores"] or NONE) for row in rows]),
        column("float32", [("TFLOP/s", 1e12)], [row["matmul_flops_per_s"] for row in rows]),
        column("memory", [("GB/s", 1e9)], [row["bandwidth_bytes_per_s"] for row in rows]),
        column("holds", [("GiB", 2.0**30)], [row["capacity_bytes"] for row in rows]),
    ]
    headers, cells = columns_to_rows(columns)
    return Table("hardware", headers, cells, left=4)


def _components_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table("components", ["component", "what"], [[row["component"], row["about"]] for row in rows], left=2)


def _pretrained_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        ("model", [row["model"] for row in rows]),
        ("alias", [row["alias"] for row in rows]),
        ("here", ["yes" if row["cached"] else "no" for row in rows]),
        ("licence", [row["licence"] for row in rows]),
        ("from", [row["upstream"] for row in rows]),
        column("download", BYTES, [row["download_bytes"] for row in rows]),
    ]
    headers, cells = columns_to_rows(columns)
    return Table("", headers, cells, left=5)


LISTS: dict[str, Callable[[Sequence[Mapping[str, Any]]], Table]] = {
    "methods": _methods_table,
    "models": _models_table,
    "hardware": _hardware_table,
    "components": _components_table,
    "pretrained": _pretrained_table,
}


def explain_blocks(found: Explanation) -> list[Block]:
    """A method in words, its parameters, and the formulas of each kind of layer."""
    row = found.row
    blocks: list[Block] = [
        f"{found.name}: {row.title} ({'exact' if row.exact else 'approximate'})",
        f"equation   {row.equation}\nsource     {row.paper}\nour part   {row.reading}"
        + (f"\noff        {found.off}" if found.off else ""),
    ]
    blocks.append(f"replaces       {found.replaced_text}\ncombines with  {found.combines_with_text}")
    if found.parameters:
        cells = [[name, _plain(default), about] for name, default, about in found.parameters]
        of = "" if "+" in found.name else found.name + "."
        blocks.append(Table("parameters", ["--set " + of, "default", "meaning"], cells, left=3))
    mask = ", causal" if found.causal else ""
    chosen = f"; {parameters_text(found.chosen)}" if found.chosen else ""
    letters = ", ".join(f"{letter} {meaning}" for letter, meaning in found.symbols.items())
    model = f"{found.config.name}: {found.config.position} positions{mask}{chosen}"
    blocks.append(
        f"Cost of the attention sublayer of one layer ({model}).\n"
        f"{letters}. A multiply-add is 2 FLOPs; bytes are compulsory traffic."
    )
    for layer in found.layers:
        total = layer.total(layer.per_element())
        sums = [f"{head:17} {formula(total[name])}" for name, head in FIGURES.items()]
        blocks += [_layer_table(layer, found.config.layers), "together\n" + "\n".join(sums)]
    return blocks


FIGURES = {
    "matmul_flops": "matmul FLOPs",
    "vector_flops": "vector FLOPs",
    "bytes_read": "bytes read / b",
    "bytes_written": "bytes written / b",
}


def _layer_table(layer: Layer, layers: int) -> Table:
    rows = [[component, *(formula(row[name]) for name in FIGURES)] for component, row in layer.per_element().items()]
    return Table(f"{layer.kind} ({layer.count} of {layers})", ["component", *FIGURES.values()], rows, left=5)


def formula(expression: Any) -> str:
    """``2*B*T**2*d`` as 2 B T² d."""
    return str(expression).replace("**2", "²").replace("**3", "³").replace("*", " ")


# --- machine-readable -----------------------------------------------------------------------------------------------

CSV_FIELDS = (
    "method", "params", "seq", "kv_len", "steps", "batch", "phase", "device", "engine", "component", "calls",
    "matmul_flops", "vector_flops", "bytes_read", "bytes_written", "predicted_s", "predicted_low_s", "predicted_high_s",
    "bound", "measured_median_s", "measured_p10_s", "measured_p90_s", "measured_n", "rel_error",
)  # fmt: skip


def as_csv(document: Mapping[str, Any]) -> str:
    """One row per method, length and component, and one whose component is ``total``."""
    rows = []
    for result in document["results"]:
        for row in [*result["components"], {"component": "total", **result["total"]}]:
            timed = {f"measured_{name}_s": value for name, value in row.get("measured_s", {}).items()}
            n = {"measured_n": row["measured_s"]["n"]} if timed else {}
            rows.append({**result, "params": json.dumps(result["params"]), **row, **timed, **n})
    return csv_text(CSV_FIELDS, rows)


def csv_text(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A header, and a line per row; what is no field is left out."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(document: Any) -> str:
    """Indented; numbers in full precision."""
    return json.dumps(document, indent=1, allow_nan=False, default=str) + "\n"


# --- maps -----------------------------------------------------------------------------------------------------------


def maps_blocks(found: Mapping[str, Any]) -> list[Block]:
    """Diagonality and likeness per layer, likeness of all pairs, and the suggested grouping."""
    layers = found["layers"]
    rows = [
        [str(row["layer"]), ratio(max(row["cad"])), ratio(sum(row["cad"]) / len(row["cad"])), ratio(min(row["cad"])),
         ratio(row["similarity_to_previous"])]
        for row in layers
    ]  # fmt: skip
    pairs = [[str(index), *(ratio(value) for value in row)] for index, row in enumerate(found["similarity"])]
    groups = json.dumps(found["groups"], separators=(",", ":"))
    return [
        f"{found['model']} ({found['weights']})\ninput {found['input']}: {found['positions']} positions of "
        f"{found['length']}, {found['query_rows']} of them as query rows",
        Table(
            "cumulative attention diagonality (CAD: identity 1, uniform 0.667), and likeness to the layer before",
            ["layer", "most", "mean", "least", "cosine"], rows, groups=[("", 1), ("CAD of heads", 3), ("", 1)],
        ),
        Table("likeness of maps, cosine, mean over heads", ["layer", *(str(row["layer"]) for row in layers)], pairs),
        f"{len(found['groups'])} compute layers, most similar neighbours first: --set reuse.groups={groups}",
    ]  # fmt: skip


def ratio(value: float | None) -> str:
    """A figure between 0 and 1."""
    return NONE if value is None else f"{value:.3f}"


# --- prepare --------------------------------------------------------------------------------------------------------


def guideline_blocks(document: Mapping[str, Any]) -> list[Block]:
    """Each window with its candidates and their price, and the cheapest as what --set takes."""
    config, rows, chosen = document["config"], document["rows"], document["chosen"]
    columns = [
        ("window", [str(row["window"]) for row in rows]),
        ("candidates", [str(row["candidates"]) for row in rows]),
        (f"top-{config['top']} %", [f"{100 * row['agreement']:.1f}" for row in rows]),
        ("KL nats", [small(row["kl_nats"]) for row in rows]),
        ("multiplications %", [percent(row["multiplications"]) for row in rows]),
        ("weight bytes %", [percent(row["weight_bytes"]) for row in rows]),
        column("predicted", SECONDS, [row["predicted_s"] for row in rows]),
        ("x exact head", [times(row["exact_s"] / row["predicted_s"]) for row in rows]),
    ]
    headers, cells = columns_to_rows(columns)
    wish = f"top-{config['top']} agreement of {100 * config['agreement']:g} % or more"
    where = f"weights {config['weights']}\ninput {config['input']}"
    return [
        f"{heading(document)}\n{where}",
        Table(f"{wish} over {config['positions']} positions; cost of the head at one position", headers, cells, left=0),
        f"fewest multiplications: --set svd-softmax.window={chosen['window']} "
        f"--set svd-softmax.candidates={chosen['candidates']}",
    ]


def document_blocks(document: Mapping[str, Any]) -> list[Block]:
    """What a method found: its settings in one line, and each list of records as a table."""
    lists = {name: value for name, value in document.items() if isinstance(value, list)}
    settings = {name: value for name, value in document.items() if name not in (*lists, "effref", "version")}
    counts = ", ".join(f"{len(value)} {name}" for name, value in lists.items())
    blocks: list[Block] = [f"{document['effref']}: {counts}\n{parameters_text(settings)}"]
    for name, rows in lists.items():
        if rows and isinstance(rows[0], dict):
            cells = [[_cell(value) for value in row.values()] for row in rows]
            blocks.append(Table(name, list(rows[0]), cells, left=0))
    return blocks


def thresholds_blocks(document: Mapping[str, Any]) -> list[Block]:
    """Trained thresholds: what was trained, how the layers come out, and what it does to held-out windows."""
    training, layers = document["training"], range(document["layers"])
    blocks: list[Block] = [
        f"latte thresholds of {document['model']}, {document['layers']} layers of {document['heads']} heads, "
        f"{document['target_kept']:g} of the visible pairs to keep\n"
        f"{training['steps']} steps on {training['windows']} windows, {training['held_out_windows']} held out"
    ]
    rows = []
    for layer in layers:
        thresholds, kept = document["thresholds"][layer], document["kept"][layer]
        cells = [min(thresholds), sum(thresholds) / len(thresholds), max(thresholds)]
        shares = [f"{100 * share:.1f}" for share in (min(kept), sum(kept) / len(kept), max(kept))]
        rows.append([str(layer), *map(number, cells), *shares])
    headers = ["layer", "least", "mean", "most", "least %", "mean %", "most %"]
    blocks.append(Table("thresholds and kept shares of the heads, on training windows", headers, rows))
    measures = [name for name in ("loss", "perplexity", "cosine") if name in document["held_out"]["all"]]
    judged = [
        [name, f"{100 * one['kept']:.1f}", *(cosine(one[m]) if m == "cosine" else f"{one[m]:.4g}" for m in measures)]
        for name, one in document["held_out"].items()
    ]
    blocks.append(Table("held-out windows", ["thresholds", "kept %", *measures], judged))
    return blocks


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else str(value)
