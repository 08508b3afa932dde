"""The result of estimate and measure as one dictionary: the JSON schema of the command line, in SI units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import costmodel
from costmodel.closed_form import Estimate
from costmodel.hardware import Hardware
from costmodel.ops import Cost
from costmodel.predict import Prediction, Seconds
from refimpl.parameters.composition import as_dict

from .request import BASELINES, Request

if TYPE_CHECKING:
    from costmodel.energy import EnergyModel

SCHEMA_VERSION = 1
SMALL = 0.02  # components below this share of the measured time do not count for accuracy


@dataclass
class Samples:
    """Timed passes of one method at one length, in seconds."""

    components: dict[str, list[float]] = field(default_factory=dict)  # instrumented passes
    totals: list[float] = field(default_factory=list)  # passes without instruments

    @property
    def complete(self) -> bool:
        """At least one pass of each kind."""
        return bool(self.components and self.totals)


def document(
    request: Request, hardware: Hardware, results: list[dict[str, Any]], notes: Sequence[str]
) -> dict[str, Any]:
    """The result without its context, which takes a moment to collect."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": {**request.as_config(), "hardware": hardware.name},
        "hardware": describe(hardware),
        "results": results,
        "notes": list(notes),
    }


def describe(hardware: Hardware) -> dict[str, Any]:
    """The ``hardware`` of a result."""
    return {
        "name": hardware.name,
        "level": hardware.level,
        "source": hardware.source,
        "fitted_on": {name: value for name, value in hardware.about.items() if name != "residuals"} or None,
        "residuals": hardware.about.get("residuals"),
        "matmul_flops_per_s": dict(hardware.matmul_flops_per_s),
        "vector_flops_per_s": dict(hardware.vector_flops_per_s),
        "memory": [asdict(level) for level in hardware.memory],
    }


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as JSON has them: an opened database by its name."""
    return {name: _plain(value) for name, value in parameters.items()}


def flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name; those of several methods as ``reuse.group``."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # of a method among several
        return plain(value)
    return str(value) if hasattr(value, "records") else value


def length_of(result: Mapping[str, Any]) -> int:
    """Where a result stands on the axis of lengths: S of a decoding pass, T of a prefill."""
    return int(result.get("kv_len", result["seq"]))


def place_of(result: Mapping[str, Any]) -> str:
    """``T=512``, or ``S=512`` for a decoding pass after 512 cached positions."""
    return f"{'S' if 'kv_len' in result else 'T'}={length_of(result)}"


def entry(request: Request, method: str, prediction: Prediction, total: Seconds | None = None) -> dict[str, Any]:
    """One method at one length, as predicted; `total` is that of a recorded pass where components are not."""
    estimate, total = prediction.estimate, total or prediction.total
    workload = estimate.workload
    costs, calls, times = estimate.by_component(), estimate.calls(), prediction.by_component()
    return {
        "method": method,
        "params": plain(as_dict(estimate.parameters)),
        "seq": workload.seq,
        **({"kv_len": workload.kv_len, "steps": workload.steps} if request.decodes else {}),
        "batch": request.batch,
        "phase": request.phase,
        "device": request.device,
        "engine": request.engine,
        "components": [
            {"component": name, **_figures(calls[name], costs[name], times[name])} for name in costs
        ],
        "total": _figures(sum(calls.values()), estimate.total, total),
        **_weights(estimate),
        "cache_bytes": int(estimate.cache_bytes),
        "cache_traffic": {"appended_bytes": int(estimate.appended_bytes), "read_bytes": int(estimate.total.kv_bytes)},
        "peak_bytes": int(estimate.peak_bytes),
        **({"tokens_per_s": {"predicted": _per_second(estimate, total.seconds)}} if request.decodes else {}),
        "speedup": {},
    }  # fmt: skip


def _weights(estimate: Estimate) -> dict[str, Any]:
    """Bytes of the weights, and of the parts of the product that no pass runs; and what a method saves of both."""
    dense = costmodel.estimate("dense", estimate.config, estimate.workload).params_bytes + estimate.companion_bytes
    whole = estimate.params_bytes + estimate.companion_bytes
    return {
        "params_bytes": int(estimate.params_bytes),
        "companion_bytes": int(estimate.companion_bytes),
        "params_reduction": float(1 - whole / dense),
    }


def _per_second(estimate: Estimate, seconds: Any) -> float:
    return float(estimate.tokens / seconds) if seconds else 0.0


def _figures(calls: Any, cost: Cost, time: Seconds) -> dict[str, Any]:
    return {
        "calls": int(calls),
        "matmul_flops": int(cost.matmul_flops),
        "vector_flops": int(cost.vector_flops),
        "bytes_read": int(cost.bytes_read),
        "bytes_written": int(cost.bytes_written),
        "predicted_s": float(time.seconds),
        "predicted_low_s": float(time.low),
        "predicted_high_s": float(time.high),
        "bound": str(time.bound),
    }


def add_energy(result: dict[str, Any], predictions: Mapping[str, Prediction], model: EnergyModel) -> None:
    """Put joules beside the seconds, and how much less they are than those of each baseline."""
    from costmodel.energy import energy

    energies = {name: energy(prediction.estimate, model) for name, prediction in predictions.items()}
    own = energies[result["method"]]
    for row in result["components"]:
        row["energy_j"] = float(own.by_component[row["component"]].total)
    result["total"]["energy_j"] = float(own.total.total)
    result["energy"] = {
        "components": [
            {"component": name, "weights_j": float(part.weights), "activations_j": float(part.activations),
             "arithmetic_j": float(part.arithmetic), "total_j": float(part.total)}
            for name, part in own.by_component.items()
        ],
        "total_j": float(own.total.total),
        "power_w": None if own.power_w is None else float(own.power_w),
        "saving": {name: float(1 - own.total.total / energies[name].total.total) for name in BASELINES},
    }  # fmt: skip


def add_measured(result: dict[str, Any], samples: Samples) -> None:
    """Put measured seconds and signed errors beside the predictions."""
    for row in result["components"]:
        _add_measured(row, samples.components.get(row["component"], []))
    _add_measured(result["total"], samples.totals)
    if "tokens_per_s" in result:
        tokens = result["batch"] * result["steps"] * result["seq"]
        result["tokens_per_s"]["measured"] = tokens / result["total"]["measured_s"]["median"]


def _add_measured(row: dict[str, Any], seconds: list[float]) -> None:
    row["measured_s"] = statistics(seconds)
    row["rel_error"] = relative_error(row["predicted_s"], row["measured_s"]["median"])


def statistics(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread; with one sample there is no spread, with none nothing."""
    n = len(seconds)
    low, high = (float(np.quantile(seconds, p)) for p in (0.1, 0.9)) if n > 1 else (None, None)
    return {"median": float(np.median(seconds)) if n else None, "p10": low, "p90": high, "n": n}


def speedups(predicted: Mapping[str, float], measured: Mapping[str, float | None], method: str) -> dict[str, Any]:
    """How many times faster than each baseline; None where one of the two is missing."""
    return {
        baseline: {"predicted": _ratio(predicted, baseline, method), "measured": _ratio(measured, baseline, method)}
        for baseline in BASELINES
    }


def _ratio(seconds: Mapping[str, float | None], baseline: str, method: str) -> float | None:
    slow, fast = seconds.get(baseline), seconds.get(method)
    return slow / fast if slow and fast else None


def predicted_again(result: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """A measured result beside another prediction."""
    times = prediction.by_component()
    return {
        **result,
        "components": [_expected(row, float(times[row["component"]].seconds)) for row in result["components"]],
        "total": _expected(result["total"], float(prediction.total.seconds)),
    }


def slower(result: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A measured result whose predictions are multiplied by `factor`."""
    return {
        **result,
        "components": [_expected(row, factor * row["predicted_s"]) for row in result["components"]],
        "total": _expected(result["total"], factor * result["total"]["predicted_s"]),
    }


def _expected(row: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    return {**row, "predicted_s": seconds, "rel_error": relative_error(seconds, row["measured_s"]["median"])}


def relative_error(predicted: float, measured: float | None) -> float | None:
    """(predicted - measured) / measured."""
    return (predicted - measured) / measured if measured else None


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far predictions lie from measurements: components that matter, and totals."""
    components = [
        row["rel_error"]
        for result in results
        for row in result["components"]
        if row["rel_error"] is not None and matters(row, result)
    ]
    totals = [result["total"]["rel_error"] for result in results if result["total"]["rel_error"] is not None]
    return {"components": errors(components), "totals": errors(totals)}


def matters(row: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a component takes a share of the measured time worth judging."""
    whole = sum(other["measured_s"]["median"] or 0.0 for other in result["components"])
    return bool((row["measured_s"]["median"] or 0.0) >= SMALL * whole)


def errors(relative: Sequence[float]) -> dict[str, Any]:
    """Median and 90th percentile of the absolute errors, and the median signed one."""
    if not relative:
        return {"median_abs": None, "p90_abs": None, "bias": None, "n": 0}
    absolute = np.abs(relative)
    return {
        "median_abs": float(np.median(absolute)),
        "p90_abs": float(np.quantile(absolute, 0.9)),
        "bias": float(np.median(relative)),
        "n": len(relative),
    }
