"""From timing samples to a calibrated `Hardware`.

Each op kind has its own constants (`costmodel.hardware.OpModel`): overhead, matrix rate with half-performance lengths,
vector rate, bandwidth inside and outside the cache. They are fitted in log space, so that a sample counts by its
relative error whether it takes microseconds or seconds, with a robust loss, because a shared machine has hiccups, and
with weak priors that hold a constant near the machine's own figures where the samples do not determine it. Recorded
passes are fitted after that, on their totals alone. Bands come from passes that were left out of the fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from costmodel.closed_form import Estimate
from costmodel.hardware import Band, Hardware, MemoryLevel, OpModel, RecordedModel
from costmodel.ops import FORMULAS, Cost
from costmodel.predict import Traffic, kind_of, predict, seconds_of_call
from refimpl.errors import ConfigError

STREAM = "add"  # the op that only moves data; its bandwidths are the machine's
PRODUCTS = ("linear", "project")  # the ops whose best rate is the machine's matrix peak
FOLDS = 4

# op -> sizes whose half-performance length is fitted; an op under a causal mask has the same, and constants of its own
HALVES: dict[str, tuple[str, ...]] = {
    "linear": ("rows", "d_in", "d_out"),
    "project": ("rows", "d_in", "d_out"),
    "conv1d": ("rows", "d_in", "d_out"),
    "block_linear": ("rows", "d_in", "d_out"),
    "scores": ("q_len", "k_len", "head_dim"),
    "weighted_sum": ("q_len", "k_len", "head_dim"),
    "attention": ("q_len", "k_len", "head_dim"),
    "filtered_attention": ("q_len", "k_len", "head_dim"),
    "relative_attention": ("length", "head_dim"),
    "linear_attention": ("q_len", "head_dim"),
    "refine": ("n", "d_in"),
}
HALF_PRIOR = {"cpu": 8.0, "gpu": 64.0}  # rows, columns: a few vector registers, half a tile of a product on a GPU
LEVELS = {"cpu": ("cache", "memory"), "gpu": ("L2", "memory")}
CACHE_PRIOR = 4e6  # bytes, where the machine does not say
MEASURED_ALONE = {"near": "near_bytes_per_s", "far": "far_bytes_per_s", "cache": "cache_bytes"}
KNOWN_SIGMA = 0.1  # in log units, of a bandwidth that was measured alone
PRIOR_SIGMA = {"overhead": 2.0, "half": 1.5, "vector": 1.5, "near": 0.7, "far": 0.7, "cache": 0.7}  # in log units
RECORDED_PRIOR = {"start_s": (1e-5, 2.0), "call_s": (2e-6, 2.0), "work": (1.0, 0.5)}  # and how far, in log units
ROBUST = 0.1  # in log units, the misfit from which a sample counts by less than its square


@dataclass(frozen=True)
class Sample:
    """The time of one call of an op, a median over `n` rounds."""

    op: str
    sizes: Mapping[str, int]
    seconds: float
    n: int = 1


@dataclass(frozen=True)
class Pass:
    """One timed forward pass: its closed form, its ops' samples, its time without instruments, and recorded."""

    estimate: Estimate
    samples: list[Sample]
    total_s: float
    recorded_s: float | None = None  # None where it cannot be recorded


@dataclass(frozen=True)
class _Placed:
    """A sample with the traffic that it has within its pass."""

    sample: Sample
    cost: Cost
    traffic: Traffic

    @property
    def kind(self) -> str:
        return kind_of(self.sample.op, self.sample.sizes)


def _placed(one: Pass, itemsize: int) -> list[_Placed]:
    costs = [FORMULAS[sample.op](itemsize, **sample.sizes) for sample in one.samples]
    return [
        _Placed(sample, cost, Traffic.of(cost, one.estimate)) for sample, cost in zip(one.samples, costs, strict=True)
    ]


def fit(passes: Sequence[Pass], itemsize: int, *, kind: Literal["cpu", "gpu"], about: Mapping[str, Any]) -> Hardware:
    """Fit a machine's constants.

    Parameters
    ----------
    passes : sequence of Pass
        Timed forward passes of models of several widths and lengths.
    itemsize : int
        Bytes per element.
    kind : {"cpu", "gpu"}
        On a GPU launches overlap with work.
    about : mapping
        Put into the profile. The fit begins at what it knows of the machine: ``cache_bytes``, and at the bandwidths
        ``near_bytes_per_s`` and ``far_bytes_per_s`` where they were measured alone; near these it stays.

    Returns
    -------
    hardware : Hardware
        Level "calibrated". `about` gains the residuals per op and of totals (on passes left out of the fit), the
        numbers of samples, and the factor of the one-efficiency baseline.

    Raises
    ------
    ConfigError
        If there are fewer than two passes or none holds the streaming op.
    """
    if len(passes) < 2 or not any(sample.op == STREAM for p in passes for sample in p.samples):
        raise ConfigError(
            f"calibration needs at least two passes that hold the op '{STREAM}'; {len(passes)} were given"
        )
    hardware = _fit_once(passes, itemsize, kind, about)
    ratios = _held_out(passes, itemsize, kind, about)
    bands = {name: _band(found) for name, found in ratios.items()}
    residuals = {name: _residual(found) for name, found in ratios.items()}
    found = {"residuals": residuals, "global_efficiency": _global_efficiency(passes, hardware)}
    return replace(hardware, bands=bands, about={**hardware.about, **found})


def _fit_once(passes: Sequence[Pass], itemsize: int, kind: Literal["cpu", "gpu"], about: Mapping[str, Any]) -> Hardware:
    samples: dict[str, list[_Placed]] = defaultdict(list)
    for one in passes:
        for placed in _placed(one, itemsize):
            samples[placed.kind].append(placed)
    known = {name: float(about[full]) for name, full in MEASURED_ALONE.items() if full in about}
    stream = _fit_op(samples[STREAM], None, kind, known)
    ops = {name: _fit_op(found, stream, kind) for name, found in samples.items()} | {STREAM: stream}
    dtype = str(about["dtype"])
    hardware = Hardware(
        name="local",
        title="this machine",
        kind=kind,
        level="calibrated",
        source="effref calibrate",
        capacity_bytes=float(about.get("capacity_bytes", 0)),
        matmul_flops_per_s={dtype: _best_rate(samples, "matmul_flops", PRODUCTS)},
        vector_flops_per_s={dtype: _best_rate(samples, "vector_flops", tuple(set(samples) - set(HALVES)))},
        memory=(
            MemoryLevel(LEVELS[kind][0], stream.cache_bytes, stream.near_bytes_per_s),
            MemoryLevel(LEVELS[kind][1], float(about.get("capacity_bytes", 0)), stream.far_bytes_per_s),
        ),
        ops=ops,
        about={**about, "passes": len(passes), "samples": sum(len(found) for found in samples.values())},
    )
    return replace(hardware, recorded=_fit_recorded(passes, hardware))


def _best_rate(samples: Mapping[str, list[_Placed]], flops: str, kinds: tuple[str, ...]) -> float:
    """The highest sustained rate seen."""
    return max(float(getattr(placed.cost, flops)) / placed.sample.seconds for kind in kinds for placed in samples[kind])


# --- one op -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Observed:
    """The samples of one op as arrays."""

    op: str
    sizes: Mapping[str, Any]
    cost: Cost
    traffic: Traffic
    seconds: Any

    @classmethod
    def of(cls, found: list[_Placed]) -> _Observed:
        sizes = _columns([placed.sample.sizes for placed in found])
        cost, traffic = (_columns([vars(getattr(placed, part)) for placed in found]) for part in ("cost", "traffic"))
        seconds = np.array([placed.sample.seconds for placed in found])
        return cls(found[0].sample.op, sizes, Cost(**cost), Traffic(**traffic), seconds)


def _columns(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: np.array([row[name] for row in rows], float) for name in rows[0]}


def _fit_op(
    found: list[_Placed], stream: OpModel | None, kind: str, known: Mapping[str, float] | None = None
) -> OpModel:
    """Least squares on the logarithm of time; the start is also the centre of the priors."""
    from scipy.optimize import least_squares

    seen = _Observed.of(found)
    names, start, sigma = _start(seen, stream, kind, known or {})

    def residuals(x: Any) -> Any:
        model = _model(names, x, seen.op, kind)
        misfit = np.log(seconds_of_call(model, seen.sizes, seen.cost, seen.traffic) / seen.seconds)
        return np.concatenate([_robust(misfit), (x - start) / sigma])

    return _model(names, least_squares(residuals, start, method="trf").x, seen.op, kind)


def _robust(misfit: Any) -> Any:
    """Roots of the pseudo-Huber loss: squares of small misfits, absolute values of large ones."""
    return np.sign(misfit) * np.sqrt(2.0 * (np.sqrt(1.0 + (misfit / ROBUST) ** 2) - 1.0))


def _start(
    seen: _Observed, stream: OpModel | None, kind: str, known: Mapping[str, float]
) -> tuple[list[str], Any, Any]:
    """The fitted constants by name, the logarithms they start from, and how far each may wander."""
    share = 1.0 if kind == "gpu" else 0.5  # of the shortest call: a launch that overlaps is all of it
    values: dict[str, tuple[float, float]] = {"overhead": (float(seen.seconds.min()) * share, PRIOR_SIGMA["overhead"])}
    if np.any(seen.cost.matmul_flops):
        values["matmul"] = (float((seen.cost.matmul_flops / seen.seconds).max()) * 1.1, 0.5)
        values |= dict.fromkeys(HALVES[seen.op], (HALF_PRIOR[kind], PRIOR_SIGMA["half"]))
    if np.any(seen.cost.vector_flops):
        rate = float((seen.cost.vector_flops / seen.seconds).max()) * 1.1
        if stream:  # a few FLOPs beside a product, or in short calls, do not tell their rate
            rate = max(rate, stream.vector_flops_per_s)
        values["vector"] = (rate, PRIOR_SIGMA["vector"])
    rate = float((seen.cost.bytes_moved / seen.seconds).max())
    near, far, cache = (
        (stream.near_bytes_per_s, stream.far_bytes_per_s, stream.cache_bytes)
        if stream
        else (known.get("near", rate), known.get("far", rate / 2), known.get("cache", CACHE_PRIOR))
    )
    values["near"] = (near, KNOWN_SIGMA if "near" in known else PRIOR_SIGMA["near"])
    values["far"] = (far, KNOWN_SIGMA if "far" in known else PRIOR_SIGMA["far"])
    values["cache"] = (cache, PRIOR_SIGMA["cache"] if stream or "cache" in known else 2.0)
    start = np.log([value for value, _ in values.values()])
    return list(values), start, np.array([spread for _, spread in values.values()])


def _model(names: list[str], x: Any, op: str, kind: str) -> OpModel:
    value = dict(zip(names, np.exp(x).tolist(), strict=True))
    return OpModel(
        overhead_s=value["overhead"],
        matmul_flops_per_s=value.get("matmul", 1e30),
        vector_flops_per_s=value.get("vector", 1e30),
        half={name: value[name] for name in HALVES.get(op, ()) if name in value},
        near_bytes_per_s=value["near"],
        far_bytes_per_s=value["far"],
        cache_bytes=value["cache"],
        overlaps=kind == "gpu",
    )


# --- recorded passes ----------------------------------------------------------------------------------------------


def _fit_recorded(passes: Sequence[Pass], hardware: Hardware) -> RecordedModel | None:
    """The constants of recorded passes, given those of the ops; None where nothing was recorded."""
    from scipy.optimize import least_squares

    seen = [one for one in passes if one.recorded_s is not None]
    if not seen:
        return None
    totals = [predict(one.estimate, hardware).total for one in seen]
    busy = np.array([float(total.compute + total.memory) for total in totals])
    calls = np.array([sum(float(op.calls) for op in one.estimate.ops) for one in seen])
    seconds = np.array([one.recorded_s for one in seen])
    start, sigma = np.log([value for value, _ in RECORDED_PRIOR.values()]), [by for _, by in RECORDED_PRIOR.values()]

    def residuals(x: Any) -> Any:
        start_s, call_s, work = np.exp(x)
        misfit = np.log((start_s + call_s * calls + work * busy) / seconds)
        return np.concatenate([_robust(misfit), (x - start) / sigma])

    return RecordedModel(*np.exp(least_squares(residuals, start, method="trf").x).tolist())


# --- bands and baselines ------------------------------------------------------------------------------------------


def _held_out(
    passes: Sequence[Pass], itemsize: int, kind: Literal["cpu", "gpu"], about: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Ratios measured / predicted of ops, of "total" and of "recorded", on passes left out in turn.

    All passes of one model and length leave together.
    """
    ratios: dict[str, list[float]] = defaultdict(list, total=[])
    models = list(dict.fromkeys(_model_of(one) for one in passes))
    for fold in range(FOLDS):
        left_out = set(models[fold::FOLDS])
        kept = [one for one in passes if _model_of(one) not in left_out]
        if len(kept) < 2:
            continue
        hardware = _fit_once(kept, itemsize, kind, about)
        for one in passes:
            placed = _placed(one, itemsize)
            if _model_of(one) in left_out and {each.kind for each in placed} <= set(hardware.ops):
                for each in placed:
                    model, sample = hardware.ops[each.kind], each.sample
                    expected = seconds_of_call(model, sample.sizes, each.cost, each.traffic)
                    ratios[each.kind].append(sample.seconds / float(expected))
                ratios["total"].append(one.total_s / float(predict(one.estimate, hardware).total.seconds))
                if one.recorded_s is not None and hardware.recorded:
                    recorded = predict(one.estimate, hardware, recorded=True)
                    ratios["recorded"].append(one.recorded_s / float(recorded.total.seconds))
    return ratios


def _model_of(one: Pass) -> tuple[Any, Any]:
    return one.estimate.config, one.estimate.workload


def _band(ratios: list[float]) -> Band:
    low, high = np.quantile(ratios, [0.1, 0.9]) if ratios else (1.0, 1.0)
    return Band(float(low), float(high))


def _residual(ratios: list[float]) -> dict[str, float]:
    """Errors (predicted - measured) / measured on shapes that were left out."""
    errors = 1.0 / np.array(ratios or [1.0]) - 1.0
    return {
        "median_abs": float(np.median(np.abs(errors))),
        "p90_abs": float(np.quantile(np.abs(errors), 0.9)),
        "bias": float(np.median(errors)),
        "n": len(ratios),
    }


def bare_roofline(hardware: Hardware) -> Hardware:
    """The same machine as peaks alone: its measured matrix and vector rates and bandwidths, no constants per op."""
    return replace(hardware, level="spec", ops={}, recorded=None, bands={})


def _global_efficiency(passes: Sequence[Pass], hardware: Hardware) -> float:
    """The one factor by which the bare roofline must be multiplied, as a median over passes."""
    roof = bare_roofline(hardware)
    return float(np.median([one.total_s / float(predict(one.estimate, roof).total.seconds) for one in passes]))
