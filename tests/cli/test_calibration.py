"""What a calibration is fitted on: every kind of op, and no size of a preset."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from effref.calibration import CELLS, LARGE_CELLS, Cell, _measure, _model
from strategies import fits

import costmodel
from costmodel.fit import HALVES, Pass, Sample, fit
from costmodel.hardware import OpModel, RecordedModel
from costmodel.predict import Traffic, kind_of, parts_of_call, predict, seconds_of_call
from refimpl.config import Workload, preset, presets
from refimpl.engines import engine
from refimpl.methods import CATALOG

WIDTHS = {config.d_model for config in presets().values()}


def _kinds(method: str, config, work: Workload, params=None) -> set[str]:
    return {kind_of(op.name, op.sizes) for op in costmodel.estimate(method, config, work, params).ops}


def test_no_calibration_model_has_the_width_of_a_preset() -> None:
    assert not WIDTHS & {cell.config.d_model for cell in CELLS + LARGE_CELLS}
    assert not {config.d_ff for config in presets().values()} & {cell.config.d_ff for cell in CELLS + LARGE_CELLS}


def test_every_op_of_every_preset_and_method_is_calibrated() -> None:
    calibrated = {
        kind
        for cell in CELLS
        for name, params in cell.methods
        for kind in _kinds(name, cell.config, cell.workload(), params)
    }
    for config in presets().values():
        for work in _workloads(config):
            for method in (name for name in CATALOG if fits(name, {}, config)):
                given = work
                if method in ("attmemo", "linear"):  # they take no cache
                    given = replace(work, fills_cache=False, phase="prefill", kv_len=0)
                assert _kinds(method, config, given) <= calibrated, (config.name, method)


def _workloads(config) -> list[Workload]:
    """Long and short prefills, and decoding where the model can."""
    prefills = [Workload(length, fills_cache=config.generates) for length in (4, 32)]
    return [*prefills, Workload(phase="decode", kv_len=32)] if config.generates else prefills


# --- a GPU whose constants are known ----------------------------------------------------------------------------------

LAUNCH_S, MATMUL, VECTOR, NEAR, FAR, CACHE = 12e-6, 4e14, 2e13, 6e12, 2.8e12, 4e7


def _gpu(op: str) -> OpModel:
    return OpModel(LAUNCH_S, MATMUL, VECTOR, dict.fromkeys(HALVES.get(op, ()), 96.0), NEAR, FAR, CACHE, overlaps=True)


GRAPH = RecordedModel(start_s=9e-6, call_s=1.6e-6, work=0.95)


def _seconds(op, cost) -> float:
    one = op.cost_of_one(2)
    return float(seconds_of_call(_gpu(op.name), op.sizes, one, Traffic.of(one, cost)))


def _graph_seconds(cost) -> float:
    """Of a pass replayed as a CUDA graph."""
    seconds = GRAPH.start_s
    for op in cost.ops:
        one = op.cost_of_one(2)
        _, compute, memory = parts_of_call(_gpu(op.name), op.sizes, one, Traffic.of(one, cost))
        seconds += op.calls * (GRAPH.call_s + GRAPH.work * max(float(compute), float(memory)))
    return seconds


def _passes(cells: tuple[Cell, ...], noise: float) -> list[Pass]:
    rng, found = np.random.default_rng(0), []
    for cell in cells:
        for method, params in cell.methods:
            cost = costmodel.estimate(method, cell.config, cell.workload("float16"), params)
            times = {
                (op.name, *op.sizes.values()): (op, _seconds(op, cost) * float(np.exp(noise * rng.standard_normal())))
                for op in cost.ops
            }
            total = sum(times[op.name, *op.sizes.values()][1] * op.calls for op in cost.ops)
            found.append(
                Pass(
                    cost,
                    [Sample(op.name, op.sizes, seconds) for op, seconds in times.values()],
                    total,
                    _graph_seconds(cost) * float(np.exp(noise * rng.standard_normal())),
                )
            )
    return found


@cache
def _fitted(large: bool):
    about = {"dtype": "float16", "cache_bytes": 5e7, "near_bytes_per_s": NEAR * 1.01, "far_bytes_per_s": FAR * 0.99}
    return fit(_passes(CELLS + LARGE_CELLS if large else CELLS, 0.03), 2, kind="gpu", about=about)


def _ratio(hardware, model: str, work: Workload) -> float:
    """Predicted over true seconds of a model that the fit never saw."""
    cost = costmodel.estimate("dense", preset(model), work)
    return float(predict(cost, hardware).total.seconds) / sum(_seconds(op, cost) * op.calls for op in cost.ops)


UNSEEN = [
    ("bert-base", Workload(512, 8, dtype="float16")),
    ("bert-base", Workload(2048, 16, dtype="float16")),
    ("conformer-m", Workload(1024, dtype="float16")),
    ("smollm2-135m", Workload(1, 1, "decode", dtype="float16", kv_len=1024)),
]


def test_the_constants_of_a_gpu_are_recovered() -> None:
    hardware = _fitted(large=True)
    linear, stream = hardware.ops["linear"], hardware.ops["add"]
    for found, true in (
        (linear.overhead_s, LAUNCH_S), (stream.overhead_s, LAUNCH_S), (linear.matmul_flops_per_s, MATMUL),
        (stream.near_bytes_per_s, NEAR), (stream.far_bytes_per_s, FAR),
    ):  # fmt: skip
        assert found == pytest.approx(true, rel=0.05)
    for model, work in UNSEEN:
        assert _ratio(hardware, model, work) == pytest.approx(1.0, abs=0.05)
    assert hardware.about["residuals"]["total"]["median_abs"] < 0.03


@pytest.mark.parametrize(("model", "work"), UNSEEN)
def test_graphs_of_a_gpu_are_predicted(model, work) -> None:
    """Short passes, too, of which launches were most."""
    cost = costmodel.estimate("dense", preset(model), work)
    found = float(predict(cost, _fitted(large=True), recorded=True).total.seconds)
    assert found == pytest.approx(_graph_seconds(cost), rel=0.08)


def test_the_large_cells_are_needed(monkeypatch) -> None:
    """Without them a GPU is never full, and its rates are guessed."""
    monkeypatch.setattr("costmodel.fit.FOLDS", 0)  # no bands
    assert _ratio(_fitted(large=False), *UNSEEN[0]) > 1.3


def test_launches_overlap_with_work() -> None:
    """An op that takes longer than its launch takes no overhead; a shorter one takes its launch and no more."""
    cost = costmodel.estimate("dense", preset("bert-base"), Workload(4096, 16, dtype="float16"))
    hardware = _fitted(large=True)
    assert float(predict(cost, hardware).total.overhead) == pytest.approx(0.0, abs=1e-6)
    cost = costmodel.estimate("dense", preset("bert-base"), Workload(8, dtype="float16"))
    total = predict(cost, hardware).total
    calls = sum(op.calls for op in cost.ops)
    assert float(total.seconds) == pytest.approx(calls * LAUNCH_S, rel=0.05)
    assert str(total.bound) == "overhead"


# --- recorded passes --------------------------------------------------------------------------------------------------


def test_steps_are_timed_as_recorded_ones_where_they_can_be() -> None:
    """Beside an ordinary step in turn; neither a prefill nor a method without instructions is recorded."""
    methods = (("flash", {}), ("svd-softmax", {"decomposition": "gram"}))
    sizes = {"d_model": 24, "heads": 3, "d_ff": 40, "vocab": 30}
    cells = (Cell(_model("decoder", **sizes), kv_len=9, methods=methods), Cell(_model("decoder", **sizes), 9))
    passes = _measure(cells, engine("numba"), "float32", 1e-9, lambda message, done: None)
    recorded, *others = passes
    assert recorded.estimate.method == "flash"
    assert recorded.recorded_s > 0
    assert [one.recorded_s for one in others] == [None] * len(others)
