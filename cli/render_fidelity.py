"""The results of ``effref fidelity`` as tables and CSV; numbers become text as in `render`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .curves import plain
from .layout import Block, Table
from .render import (
    BYTES,
    CAPACITIES,
    NONE,
    SECONDS,
    Unit,
    column,
    columns_to_rows,
    cosine,
    csv_text,
    heading,
    number,
    percent,
    small,
    spread,
    times,
    unit_for,
)

Results = Sequence[Mapping[str, Any]]
Columns = list[tuple[str, list[str]]]


def blocks(document: Mapping[str, Any], baselines: Sequence[str]) -> list[Block]:
    """Fidelity beside the chief cost, the costs in full, and each curve in a sentence."""
    config, results = document["config"], document["results"]
    where = f"weights {config['weights']}\ninput {config['input']}"
    found: list[Block] = [f"{heading(document)}\n{where}", _fidelity(results, baselines)]
    if "decode" in results[0]:
        found.append(_step(results, baselines))
    if "decode" in results[0] or measured(results):  # else it is in the first table
        found.append(_pass(results, baselines))
    sentences = [sentence(curve) for curve in curves(results).values() if len(curve) > 1]
    return [*found, *(["\n".join(sentences)] if sentences else [])]


def curves(results: Results) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The results of each curve, in the order of its knob; baselines are in none."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        if result["knob"]:
            found.setdefault((result["curve"], result["knob"]), []).append(result)
    return found


def baselines_of(results: Results) -> list[Mapping[str, Any]]:
    """The results that lie on no curve for lack of a knob: the exact methods, and settings that stand alone."""
    return [result for result in results if not result["knob"]]


def setting(result: Mapping[str, Any]) -> str:
    """``layers=6``, or nothing where there is no knob."""
    return f"{result['knob']}={plain(result['value'])}" if result["knob"] else ""


# --- which cost stands beside the error -----------------------------------------------------------------------------


def chief(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The timed work that counts: a decoding step of a language model, else the whole pass."""
    return result["decode"] if "decode" in result else {**result["total"], "speedup": result["speedup"]}


def chief_words(result: Mapping[str, Any]) -> str:
    """What `chief` is."""
    if "decode" in result:
        return f"a decoding step after S={result['decode']['kv_len']}"
    return f"a pass over T={result['seq']}"


def measured(results: Results) -> bool:
    """Whether every result was timed, in full."""
    return all("measured_s" in chief(result) for result in results)


def seconds(work: Mapping[str, Any], timed: bool) -> float:
    """The measured median, or the prediction."""
    return float(work["measured_s"]["median"] if timed else work["predicted_s"])


def memory(result: Mapping[str, Any]) -> tuple[str, int]:
    """The bytes that count: those of the cache of a language model, else those of the weights."""
    return ("cache", result["cache_bytes"]) if "decode" in result else ("weights", result["params_bytes"])


def metric(result: Mapping[str, Any]) -> tuple[str, float | None]:
    """The figure of fidelity that counts: perplexity, else the relative error."""
    fidelity = result["fidelity"]
    return ("perplexity", fidelity["perplexity"]) if "perplexity" in fidelity else ("rel. L2", fidelity["rel_l2"])


def metric_text(result: Mapping[str, Any]) -> str:
    """`metric` in digits."""
    name, value = metric(result)
    return perplexity(value) if name == "perplexity" else small(value)


def sentence(curve: Results) -> str:
    """How error and cost change together from the first value of a knob to the last."""
    first, last, timed = curve[0], curve[-1], measured(curve)
    work = "step" if "decode" in first else "pass"
    error = f"{metric(first)[0]} {metric_text(first)} to {metric_text(last)}"
    time = _change([seconds(chief(end), timed) for end in (first, last)], SECONDS)
    space = _change([memory(end)[1] for end in (first, last)], CAPACITIES)
    knob = f"{setting(first)} to {plain(last['value'])}"
    return f"{first['curve']}, {knob}: {error}, {work} {time}, {memory(first)[0]} {space}"


def _change(ends: Sequence[float], units: Sequence[Unit]) -> str:
    """``22.5 to 16.5 MiB``."""
    name, factor = unit_for(units, min(ends))
    first, last = (number(end / factor) for end in ends)
    return f"{first} to {last} {name}"


# --- tables ---------------------------------------------------------------------------------------------------------


def _fidelity(results: Results, baselines: Sequence[str]) -> Table:
    """The figures of fidelity, and beside them the time and the memory that count."""
    timed = measured(results)
    works = [chief(result) for result in results]
    values = [seconds(work, timed) for work in works]
    kind = "measured" if timed else "predicted"
    figures = _figures(results)
    cost = [
        column(kind, SECONDS, values, min(values)),
        *_ratios(works, baselines, kind),
        column(memory(results[0])[0], CAPACITIES, [memory(result)[1] for result in results]),
    ]
    headers, rows = columns_to_rows([*_names(results), *figures, *cost])
    positions = results[0]["fidelity"]["positions"]
    return Table(
        f"fidelity against dense over {positions} positions, beside {chief_words(results[0])}",
        headers, rows, left=2, groups=[("", 2), ("fidelity", len(figures)), ("cost", len(cost))],
    )  # fmt: skip


def _names(results: Results) -> Columns:
    """Curve and setting; where there is one knob only, it is the header."""
    knobs = {result["knob"] for result in results if result["knob"]}
    if len(knobs) != 1:
        return [("method", [result["curve"] for result in results]), ("knob", [setting(result) for result in results])]
    values = [plain(result["value"]) if result["knob"] else "" for result in results]
    return [("method", [result["curve"] for result in results]), (knobs.pop(), values)]


def perplexity(value: float | None) -> str:
    """Two decimals; above 10 000 three digits and an exponent."""
    return NONE if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.2e}"


FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "perplexity": ("perplexity", perplexity),
    "kl_nats": ("KL nats", small),
    "top1_agreement": ("top-1 %", lambda value: f"{100 * value:.1f}"),
    "rel_l2": ("rel. L2", small),
    "cosine": ("cosine", cosine),
    "max_abs": ("max abs", small),
    "kept": ("kept %", lambda value: NONE if value is None else f"{100 * value:.1f}"),
}
OF_LOGITS, OF_HIDDEN_STATES = ("perplexity", "kl_nats", "top1_agreement", "rel_l2"), ("rel_l2", "cosine", "max_abs")


def _figures(results: Results) -> Columns:
    """Those that say most of this model's output."""
    first = results[0]["fidelity"]
    shown = [name for name in (OF_LOGITS if "kl_nats" in first else OF_HIDDEN_STATES) if name in first]
    if any("kept" in result["fidelity"] for result in results):
        shown = ["kept", *shown]
    return [
        (FIGURES[name][0], [FIGURES[name][1](result["fidelity"].get(name)) for result in results]) for name in shown
    ]


def _pass(results: Results, baselines: Sequence[str]) -> Table:
    """Time of a pass over one sequence, and the weights."""
    works = [{**result["total"], "speedup": result["speedup"]} for result in results]
    weights = column("weights", CAPACITIES, [result["params_bytes"] for result in results])
    return _work(f"a pass over T={results[0]['seq']}", results, works, baselines, weights)


def _step(results: Results, baselines: Sequence[str]) -> Table:
    """Time of a decoding step, and the keys and values that it reads."""
    works = [result["decode"] for result in results]
    traffic = column("KV read", BYTES, [work["cache_traffic"]["read_bytes"] for work in works])
    return _work(chief_words(results[0]), results, works, baselines, traffic)


def _work(
    title: str, results: Results, works: Results, baselines: Sequence[str], last: tuple[str, list[str]]
) -> Table:  # fmt: skip
    """Measured beside predicted time, and how many times faster than the baselines."""
    shortest = min(work["predicted_s"] for work in works)
    predicted = column("predicted", SECONDS, [work["predicted_s"] for work in works], shortest)
    if not measured(results):
        headers, rows = columns_to_rows([*_names(results), predicted, *_ratios(works, baselines, "predicted"), last])
        return Table(f"{title}, predicted", headers, rows, left=2)
    seen = [work["measured_s"] for work in works]
    columns = [
        *_names(results),
        ("runs", [str(one["n"]) for one in seen]),
        column("measured", SECONDS, [one["median"] for one in seen], shortest),
        ("± %", [percent(spread(one)) for one in seen]),
        predicted,
        ("err %", [percent(work["rel_error"], signed=True) for work in works]),
        *_ratios(works, baselines, "measured"),
        last,
    ]
    headers, rows = columns_to_rows(columns)
    return Table(title, headers, rows, left=2)


def _ratios(works: Results, baselines: Sequence[str], kind: str) -> Columns:
    return [(f"x {name}", [times(work["speedup"][name][kind]) for work in works]) for name in baselines]


# --- machine-readable -----------------------------------------------------------------------------------------------

_TIMES = ("predicted_s", "predicted_low_s", "predicted_high_s", "bound", "rel_error")
_WORK = (
    *_TIMES, "measured_median_s", "measured_p10_s", "measured_p90_s", "measured_n",
    "speedup_dense_predicted", "speedup_dense_measured", "speedup_flash_predicted", "speedup_flash_measured",
)  # fmt: skip
_FIDELITY = (
    "reference", "positions", "rel_l2", "cosine", "max_abs", "kl_nats", "top1_agreement", "perplexity",
    "perplexity_exact", "kept",
)  # fmt: skip
CSV_FIELDS = (
    "method", "curve", "knob", "value", "params", "seq", "batch", "phase", "device", "engine",
    *_FIDELITY, "params_bytes", "cache_bytes", "peak_bytes", *_WORK, "kv_len", *(f"decode_{name}" for name in _WORK),
)  # fmt: skip


def as_csv(document: Mapping[str, Any]) -> str:
    """One row per point: its fidelity, memory, pass and decoding step."""
    rows = []
    for result in document["results"]:
        step = result.get("decode", {})
        rows.append({
            **result,
            "params": json.dumps(result["params"]),
            "value": plain(result["value"]) if result["knob"] else "",
            **result["fidelity"],
            **_flat({**result["total"], "speedup": result["speedup"]}),
            **{f"decode_{name}": value for name, value in (_flat(step) if step else {}).items()},
            "kv_len": step.get("kv_len", ""),
        })  # fmt: skip
    return csv_text(CSV_FIELDS, rows)


def _flat(work: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: work.get(name) for name in _TIMES}
    found |= {f"measured_{name}_s": value for name, value in work.get("measured_s", {}).items() if name != "n"}
    found["measured_n"] = work.get("measured_s", {}).get("n")
    for baseline, ratios in work["speedup"].items():
        found |= {f"speedup_{baseline}_{kind}": value for kind, value in ratios.items()}
    return found
