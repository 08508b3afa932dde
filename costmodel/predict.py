"""Seconds from FLOPs and bytes: ``overhead + max(compute, memory)`` per call of an op.

On a spec-sheet preset the overhead is nothing and the rates are the peaks: a lower bound. On a calibrated profile each
op has its own few constants (`costmodel.hardware.OpModel`), and a prediction carries a band. In a recorded pass calls
have another overhead, the same for all ops (`costmodel.hardware.RecordedModel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodel.closed_form import Estimate
from costmodel.hardware import Band, Hardware, OpModel, RecordedModel
from costmodel.ops import Cost, Op, Quantity
from refimpl.components import COMPONENTS
from refimpl.errors import UnsupportedError

BOUNDS = ("compute", "memory", "overhead")
FEW_ROWS = 8  # up to so many a product takes the time of reading its large operand, and engines have other kernels


@dataclass(frozen=True)
class Seconds:
    """Predicted time, its band, and how it is made up; numbers, or arrays over lengths."""

    seconds: Quantity = 0.0
    low: Quantity = 0.0
    high: Quantity = 0.0
    compute: Quantity = 0.0
    memory: Quantity = 0.0
    overhead: Quantity = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def where(self, condition: Any, other: Seconds) -> Seconds:
        """These where a condition holds, and others elsewhere."""
        return Seconds(
            *(np.where(condition, a, b) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def bound(self) -> Any:
        """What most of the time goes to: "compute", "memory" or "overhead"."""
        parts = np.broadcast_arrays(self.compute, self.memory, self.overhead)
        return np.array(BOUNDS)[np.argmax(parts, axis=0)]


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one forward pass."""

    estimate: Estimate
    hardware: Hardware
    by_op: list[tuple[Op, Seconds]]
    total: Seconds

    def by_component(self) -> dict[str, Seconds]:
        """Seconds per component, in the order of ``refimpl.components``."""
        times: dict[str, Seconds] = {}
        for op, seconds in self.by_op:
            times[op.component] = times.get(op.component, Seconds()) + seconds
        return {name: times[name] for name in COMPONENTS if name in times}


def predict(estimate: Estimate, hardware: Hardware, *, recorded: bool = False) -> Prediction:
    """The time of `estimate` on `hardware`.

    Parameters
    ----------
    estimate : Estimate
        From `costmodel.estimate`; over arrays of lengths the times are arrays.
    hardware : Hardware
        A preset or a calibrated profile.
    recorded : bool
        Of a recorded pass, a CUDA graph or a decoding step in one compiled call; what starting it takes is in the total
        alone. A preset has no overheads, and the same lower bound for both.

    Raises
    ------
    UnsupportedError
        If a preset has no peak for the dtype, or a profile was fitted on another dtype or lacks an op or recorded
        passes.
    """
    dtype = estimate.workload.dtype
    again = _recorded_model(hardware) if recorded and hardware.level == "calibrated" else None
    by_op = []
    for op in estimate.ops:
        one = op.cost_of_one(estimate.itemsize)
        traffic = Traffic.of(one, estimate)
        found: list[Seconds] = []
        few, kinds = kinds_of(op)
        for kind in kinds:
            if hardware.level == "spec":
                parts = _spec(one, traffic, hardware, dtype)
            else:
                parts = _calibrated(kind, op, one, traffic, hardware, dtype)
            if again:
                _, compute, memory = parts
                parts = again.call_s, again.work * compute, again.work * memory
            found.append(_times(op.calls, *parts, hardware.bands.get(kind)))
        by_op.append((op, found[0] if len(found) == 1 else found[0].where(few, found[1])))
    start_s = again.start_s if again else 0.0
    total = sum((seconds for _, seconds in by_op), Seconds(start_s, start_s, start_s, overhead=start_s))
    return Prediction(estimate, hardware, by_op, _banded(total, hardware.bands.get("recorded" if again else "total")))


# Ops that do what another one does: they copy sequences of a batch, compare features, or multiply matrices of heads.
SAME_KERNEL = {"take_rows": "fetch", "scatter": "fetch", "search_graph": "nearest", "project_length": "weighted_sum"}
# Ops that run the loops of another one: within a band, its tiles with other bounds; or all but the last, over values.
SAME_LOOPS = {
    "local_attention": "attention",
    "local_relative_attention": "relative_attention",
    "filtered_map": "filtered_attention",
}


def kind_of(op: str, sizes: Mapping[str, Quantity]) -> str:
    """The name under which an op's constants are kept: few rows, few queries or a causal mask make other kernels of it.

    Arrays of sizes count as their largest.
    """
    return _kind(op, sizes, bool(np.all(_are_few(op, sizes))))


def kinds_of(op: Op) -> tuple[Quantity, list[str]]:
    """Where an op over arrays of sizes is of few rows or queries; its kinds there and elsewhere, if they are called."""
    few = _are_few(op.name, op.sizes)
    called = np.asarray(op.calls) > 0
    if np.any(few & called) and np.any(~np.asarray(few) & called):
        return few, [_kind(op.name, op.sizes, True), _kind(op.name, op.sizes, False)]
    return few, [_kind(op.name, op.sizes, bool(np.all(few | ~called)))]


def _are_few(op: str, sizes: Mapping[str, Quantity]) -> Any:
    """Whether a product has few rows; queries that share keys are rows of one product."""
    op = SAME_LOOPS.get(op, op)
    if op in ("linear", "project", "block_linear"):
        return sizes["rows"] <= FEW_ROWS
    if op in ("scores", "weighted_sum", "attention", "filtered_attention"):
        kv_maps = sizes["kv_maps"]
        return sizes["maps"] // (kv_maps + (kv_maps == 0)) * sizes["q_len"] <= FEW_ROWS  # arrays may have empty batches
    return False


def _kind(op: str, sizes: Mapping[str, Quantity], few: bool) -> str:
    op = SAME_LOOPS.get(op, op)
    if few:
        return f"{op}, few {'rows' if 'rows' in sizes else 'queries'}"
    if op == "fetch" and not np.any(sizes["copied"]):
        return "fetch, mapped"
    return f"{op}, causal" if sizes.get("causal") else SAME_KERNEL.get(op, op)


@dataclass(frozen=True)
class Traffic:
    """The bytes of one call by where they lie.

    Attributes
    ----------
    streamed : number
        Parameters, tables and, in decoding, cached keys and values. Each is touched once a pass, so it comes from the
        level of memory that holds all of them.
    resident : number
        All that is touched once a pass: the working set of `streamed`.
    passed : number
        What ops hand to each other, with a working set of its own.
    """

    streamed: Quantity
    resident: Quantity
    passed: Quantity

    @classmethod
    def of(cls, one: Cost, estimate: Estimate) -> Traffic:
        """That of a call within a pass."""
        streamed = one.weight_bytes + one.table_bytes
        if estimate.workload.phase == "decode":
            streamed = streamed + one.kv_bytes
        held, passed = estimate.resident_bytes + estimate.cache_bytes, one.bytes_moved - streamed
        # as floats, because Python's whole numbers may exceed those of NumPy
        return cls(streamed * 1.0, np.maximum(held * 1.0, streamed * 1.0), passed * 1.0)


def _times(calls: Quantity, overhead: Quantity, compute: Quantity, memory: Quantity, band: Band | None) -> Seconds:
    busy = np.maximum(compute, memory) * calls
    waits_for_memory = np.asarray(memory) > compute
    seconds = overhead * calls + busy
    return Seconds(
        seconds=seconds,
        low=seconds * (band.low if band else 1.0),
        high=seconds * (band.high if band else 1.0),
        compute=np.where(waits_for_memory, 0.0, busy),
        memory=np.where(waits_for_memory, busy, 0.0),
        overhead=overhead * calls,
    )


def _recorded_model(hardware: Hardware) -> RecordedModel:
    if hardware.recorded is None:
        raise UnsupportedError(f"the profile '{hardware.name}' knows no recorded passes; run 'effref calibrate' again")
    return hardware.recorded


def _banded(total: Seconds, band: Band | None) -> Seconds:
    """The total's own band, from whole passes; errors of single ops partly cancel in it."""
    if not band:
        return total
    return Seconds(
        total.seconds, total.seconds * band.low, total.seconds * band.high,
        total.compute, total.memory, total.overhead,
    )  # fmt: skip


# --- spec ---------------------------------------------------------------------------------------------------------


def _spec(one: Cost, traffic: Traffic, hardware: Hardware, dtype: str) -> tuple[Quantity, Quantity, Quantity]:
    if dtype not in hardware.matmul_flops_per_s:
        known = ", ".join(hardware.matmul_flops_per_s)
        raise UnsupportedError(f"hardware '{hardware.name}' has no peak for {dtype}; it has {known}")
    matmul = one.matmul_flops / hardware.matmul_flops_per_s[dtype]
    vector = one.vector_flops / hardware.vector_flops_per_s[dtype]
    memory = traffic.streamed / spec_bandwidth(hardware, traffic.resident)
    memory = memory + traffic.passed / spec_bandwidth(hardware, traffic.passed)
    return 0.0, np.maximum(matmul, vector), memory


def spec_bandwidth(hardware: Hardware, working_set: Quantity) -> Quantity:
    """Bandwidth of the fastest level that holds the working set; of the last one where none does."""
    bandwidth: Quantity = np.full(np.shape(working_set), hardware.memory[-1].bandwidth_bytes_per_s)
    for level in reversed(hardware.memory[:-1]):
        bandwidth = np.where(np.asarray(working_set) <= level.size_bytes, level.bandwidth_bytes_per_s, bandwidth)
    return bandwidth


# --- calibrated ---------------------------------------------------------------------------------------------------


def _calibrated(
    kind: str, op: Op, one: Cost, traffic: Traffic, hardware: Hardware, dtype: str
) -> tuple[Quantity, Quantity, Quantity]:
    fitted = hardware.about.get("dtype")
    if fitted != dtype:
        raise UnsupportedError(
            f"the profile '{hardware.name}' was calibrated for {fitted}; run 'effref calibrate --dtype {dtype}'"
        )
    if kind not in hardware.ops:
        raise UnsupportedError(f"the profile '{hardware.name}' lacks the op '{kind}'; run 'effref calibrate' again")
    return parts_of_call(hardware.ops[kind], op.sizes, one, traffic)


def parts_of_call(
    model: OpModel, sizes: Mapping[str, Quantity], one: Cost, traffic: Traffic
) -> tuple[Quantity, Quantity, Quantity]:
    """Overhead, compute and memory seconds of one call.

    compute = matmul_flops / (rate * prod n / (n + n_half)) + vector_flops / rate
    memory  = streamed bytes / bandwidth(all that is streamed in a pass) + other bytes / bandwidth(other bytes)

    Where calls overlap, a launch goes on while the device does what was launched before: only what the launch takes
    longer than the work is overhead.
    """
    slowdown: Quantity = 1.0
    for name, half in model.half.items():
        slowdown = slowdown * (1.0 + half / np.maximum(np.asarray(sizes[name], float), 1.0))
    compute = one.matmul_flops / model.matmul_flops_per_s * slowdown + one.vector_flops / model.vector_flops_per_s
    memory = traffic.streamed / bandwidth(model, traffic.resident) + traffic.passed / bandwidth(model, traffic.passed)
    overhead: Quantity = model.overhead_s
    if model.overlaps:
        overhead = np.maximum(overhead - np.maximum(compute, memory), 0.0)
    return overhead, compute, memory


def seconds_of_call(model: OpModel, sizes: Mapping[str, Quantity], one: Cost, traffic: Traffic) -> Quantity:
    """``overhead + max(compute, memory)``; the larger of the two where calls overlap."""
    overhead, compute, memory = parts_of_call(model, sizes, one, traffic)
    return overhead + np.maximum(compute, memory)


def bandwidth(model: OpModel, working_set: Quantity) -> Quantity:
    """The cache's bandwidth for small working sets, the memory's for large ones; the turn is at the cache's size."""
    ratio = model.cache_bytes / np.maximum(working_set, 1.0)
    outside = 1.0 / (1.0 + ratio * ratio)  # not ratio ** 2, which rounds otherwise for one number than for an array
    return 1.0 / ((1.0 - outside) / model.near_bytes_per_s + outside / model.far_bytes_per_s)
