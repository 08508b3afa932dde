"""Seconds from costs: spec presets, calibrated profiles, bands, and the fit that makes them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from strategies import fits

from costmodel import estimate
from costmodel.fit import HALVES, Pass, Sample, bare_roofline, fit
from costmodel.hardware import Band, MemoryLevel, OpModel, RecordedModel, load_hardware, presets
from costmodel.ops import FORMULAS
from costmodel.predict import Traffic, parts_of_call, predict, seconds_of_call, spec_bandwidth
from refimpl.config import ModelConfig, Workload, preset
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.methods import CATALOG

MINILM = preset("minilm-l6")
WANTED = {"h100-sxm", "h200-sxm", "a100-sxm-80gb", "l4", "rtx-4090", "xeon-8480", "epyc-9654"}


def test_presets_are_plausible() -> None:
    assert set(presets()) >= WANTED
    for hardware in presets().values():
        assert hardware.level == "spec"
        assert hardware.source
        sizes = [level.size_bytes for level in hardware.memory]
        rates = [level.bandwidth_bytes_per_s for level in hardware.memory]
        assert sizes == sorted(sizes)
        assert rates == sorted(rates, reverse=True)
        assert hardware.matmul_flops_per_s["float16"] >= hardware.matmul_flops_per_s["float32"]


@pytest.mark.parametrize("name", sorted(WANTED))
def test_spec_time_is_the_roofline(name: str) -> None:
    """One linear map by hand: max(FLOPs / peak, bytes / bandwidth), no overhead."""
    hardware = presets()[name]
    cost = estimate("dense", MINILM, Workload(512))
    op, seconds = next((op, s) for op, s in predict(cost, hardware).by_op if op.name == "project")
    one = op.cost_of_one(4)
    compute = max(
        one.matmul_flops / hardware.matmul_flops_per_s["float32"],
        one.vector_flops / hardware.vector_flops_per_s["float32"],
    )
    passed = one.bytes_moved - one.weight_bytes  # weights come from where the whole model fits
    memory = one.weight_bytes / float(spec_bandwidth(hardware, cost.params_bytes))
    memory += passed / float(spec_bandwidth(hardware, passed))
    assert float(seconds.seconds) == pytest.approx(6 * max(compute, memory))
    assert float(seconds.overhead) == 0.0


def test_bandwidth_is_that_of_the_level_which_holds_the_working_set() -> None:
    levels = (MemoryLevel("L1", 10.0, 9.0), MemoryLevel("L2", 100.0, 5.0), MemoryLevel("RAM", 1e9, 1.0))
    hardware = dataclasses.replace(presets()["l4"], memory=levels)
    np.testing.assert_array_equal(spec_bandwidth(hardware, np.array([1, 10, 11, 100, 101, 1e12])), [9, 9, 5, 5, 1, 1])


@pytest.mark.parametrize("method", CATALOG)
def test_time_rises_with_the_length(method: str) -> None:
    lengths = np.arange(8, 4000, 37)
    models = map(preset, ("conformer-m", "minilm-l6", "smollm2-135m"))
    model = next(model for model in models if fits(method, {}, model))
    for hardware in (presets()["h100-sxm"], presets()["xeon-8480"]):
        total = predict(estimate(method, model, Workload(lengths)), hardware).total.seconds
        steps = np.diff(np.broadcast_to(total, lengths.shape))
        drops = steps < 0  # only where a working set leaves a cache level may nothing be said of the next step
        assert not drops.any()


def test_quadratic_terms_grow_fourfold() -> None:
    one, two = (estimate("dense", MINILM, Workload(t)).by_component() for t in (1024, 2048))
    for name in ("scores", "softmax", "weighted-sum"):
        assert two[name].matmul_flops == 4 * one[name].matmul_flops
        assert two[name].vector_flops >= 3.9 * one[name].vector_flops or name != "softmax"


def test_fused_traffic_lies_between_compulsory_and_materialised() -> None:
    t = 2048
    dense, flash = (estimate(method, MINILM, Workload(t)).by_component() for method in ("dense", "flash"))
    materialised = sum(dense[name].bytes_moved for name in ("scores", "softmax", "weighted-sum"))
    compulsory = MINILM.layers * 4 * t * MINILM.d_model * 4  # Q, K, V read, O written
    assert flash["attention"].bytes_moved == compulsory
    assert materialised > 10 * compulsory


def test_grouped_heads_change_key_and_value_traffic_only() -> None:
    config = preset("llama-2-7b")
    grouped = dataclasses.replace(config, kv_heads=8)
    one, eight = (estimate("flash", c, Workload(512)).by_component()["attention"] for c in (config, grouped))
    assert one.flops == eight.flops
    assert one.bytes_written == eight.bytes_written
    assert one.bytes_read - eight.bytes_read == 32 * 2 * (32 - 8) * 512 * 128 * 4


def test_causal_attention_costs_about_half() -> None:
    full, causal = (
        estimate("dense", MINILM, Workload(1000, causal=c)).by_component()["scores"].matmul_flops for c in (False, True)
    )
    assert causal / full == pytest.approx(1001 / 2000)


# --- fit ----------------------------------------------------------------------------------------------------------


def _truth(op: str) -> OpModel:
    return OpModel(
        overhead_s=20e-6,
        matmul_flops_per_s=1.5e11,
        vector_flops_per_s=8e9,
        half=dict.fromkeys(HALVES.get(op, ()), 12.0),
        near_bytes_per_s=3e10,
        far_bytes_per_s=8e9,
        cache_bytes=4e6,
    )


def _true_seconds(cost: Any, op: Any) -> Any:
    one = op.cost_of_one(4)
    return seconds_of_call(_truth(op.name), op.sizes, one, Traffic.of(one, cost))


RECORDED = RecordedModel(start_s=3e-5, call_s=4e-6, work=0.8)


def _true_recorded_s(cost: Any) -> float:
    """Of a recorded pass: each op's work, with another overhead."""
    seconds = RECORDED.start_s
    for op in cost.ops:
        one = op.cost_of_one(4)
        _, compute, memory = parts_of_call(_truth(op.name), op.sizes, one, Traffic.of(one, cost))
        seconds += op.calls * (RECORDED.call_s + RECORDED.work * float(np.maximum(compute, memory)))
    return seconds


def _passes(noise: float, seed: int = 0) -> list[Pass]:
    """Synthetic passes of a machine whose constants are known."""
    rng = np.random.default_rng(seed)
    passes = []
    for layers, d_model, seq in [
        (2, 64, 40), (2, 128, 900), (2, 192, 200), (2, 320, 1500), (2, 256, 60), (2, 448, 480), (2, 96, 2200),
        (10, 128, 50), (2, 512, 128),
    ]:  # fmt: skip
        config = ModelConfig("synthetic", "post-norm", layers, d_model, d_model // 32, 4 * d_model, vocab=50)
        for method in ("dense", "flash"):
            cost = estimate(method, config, Workload(seq))
            times = {
                (op.name, *op.sizes.values()): float(_true_seconds(cost, op))
                * float(np.exp(noise * rng.standard_normal()))
                for op in cost.ops
            }
            samples = [Sample(op.name, op.sizes, times[op.name, *op.sizes.values()]) for op in cost.ops]
            total = sum(times[op.name, *op.sizes.values()] * op.calls for op in cost.ops)
            recorded = _true_recorded_s(cost) * float(np.exp(noise * rng.standard_normal()))
            passes.append(Pass(cost, samples, total, recorded))
    return passes


ABOUT = {"dtype": "float32", "engine": "numba", "threads": 2}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.03), (0.1, 0.12)])
def test_fit_recovers_the_time_of_a_known_machine(noise: float, tolerance: float) -> None:
    hardware = fit(_passes(noise), 4, kind="cpu", about=ABOUT)
    for seq in (100, 700, 3000):
        config = ModelConfig("other", "post-norm", 3, 384, 12, 1536, vocab=50)
        for method in ("dense", "flash"):
            cost = estimate(method, config, Workload(seq))
            expected = sum(float(_true_seconds(cost, op)) * op.calls for op in cost.ops)
            total = predict(cost, hardware).total
            assert float(total.seconds) == pytest.approx(expected, rel=tolerance)
            assert total.low <= total.seconds * 1.05
            assert total.high >= total.seconds * 0.95
    assert hardware.about["residuals"]["total"]["median_abs"] < tolerance
    assert set(hardware.ops) == set(hardware.bands) - {"total", "recorded"}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.06), (0.03, 0.12)])
def test_fit_recovers_the_time_of_recorded_passes(noise: float, tolerance: float) -> None:
    """Where ordinary passes take up to 2.7 times as long, and on no model that was fitted."""
    hardware = fit(_passes(noise), 4, kind="cpu", about=ABOUT)
    for layers, d_model, seq in ((3, 384, 700), (6, 224, 300), (12, 64, 40)):
        config = ModelConfig("other", "post-norm", layers, d_model, d_model // 32, 4 * d_model, vocab=50)
        cost = estimate("flash", config, Workload(seq))
        found = predict(cost, hardware, recorded=True)
        assert float(found.total.seconds) == pytest.approx(_true_recorded_s(cost), rel=tolerance)
        assert found.total.low == pytest.approx(found.total.seconds * hardware.bands["recorded"].low)
        parts = sum(float(seconds.seconds) for seconds in found.by_component().values())
        assert parts + hardware.recorded.start_s == pytest.approx(float(found.total.seconds))
    ordinary = float(predict(cost, hardware).total.seconds)
    assert ordinary > 2.5 * float(found.total.seconds)
    assert hardware.about["residuals"]["recorded"]["median_abs"] < tolerance


def test_without_recorded_passes_none_are_predicted() -> None:
    passes = [dataclasses.replace(one, recorded_s=None) for one in _passes(0.0)]
    hardware = fit(passes, 4, kind="cpu", about=ABOUT)
    assert hardware.recorded is None
    assert "recorded" not in {**hardware.bands, **hardware.about["residuals"]}
    cost = estimate("dense", MINILM, Workload(64))
    with pytest.raises(UnsupportedError, match="knows no recorded passes; run 'effref calibrate' again"):
        predict(cost, hardware, recorded=True)
    for preset_ in (presets()["l4"], bare_roofline(fit(_passes(0.0), 4, kind="cpu", about=ABOUT))):
        again, once = (predict(cost, preset_, recorded=recorded).total for recorded in (True, False))
        assert again == once  # no overheads, the same bound


def test_a_bias_seen_on_few_rows_does_not_take_the_whole_time() -> None:
    """Beside its matrix a bias is nothing, and no time may be laid to it that the matrix takes."""
    few = OpModel(20e-6, 3e10, 8e9, {}, 3e10, 8e9, 4e6)
    passes = _passes(0.0)
    for batch, bias in ((1, False), (3, True)):
        for d_model in (96, 192, 320, 512):
            config = dataclasses.replace(
                preset("smollm2-135m"), layers=2, d_model=d_model, heads=4, kv_heads=4, d_ff=3 * d_model, bias=bias
            )
            cost = estimate("flash", config, Workload(1, batch, "decode", kv_len=64))
            samples, total = [], 0.0
            for op in cost.ops:
                one = op.cost_of_one(4)
                seconds = float(seconds_of_call(few, op.sizes, one, Traffic.of(one, cost)))
                samples.append(Sample(op.name, op.sizes, seconds))
                total += seconds * op.calls
            passes.append(Pass(cost, samples, total))
    found = fit(passes, 4, kind="cpu", about=ABOUT).ops["linear, few rows"]
    assert found.vector_flops_per_s == pytest.approx(few.vector_flops_per_s, rel=0.9)


def test_fit_needs_passes() -> None:
    with pytest.raises(ConfigError, match="at least two passes"):
        fit([], 4, kind="cpu", about=ABOUT)


def test_profile_survives_the_file_and_refuses_others(tmp_path: Any) -> None:
    hardware = fit(_passes(0.05), 4, kind="cpu", about=ABOUT)
    path = tmp_path / "profile.json"
    path.write_text(hardware.to_json())
    assert load_hardware(str(path)) == hardware
    assert hardware.recorded is not None
    before = json.loads(hardware.to_json())
    del before["recorded"]  # as profiles were written before there were recorded passes
    path.write_text(json.dumps(before))
    assert load_hardware(str(path)) == dataclasses.replace(hardware, recorded=None)
    path.write_text(hardware.to_json())
    for text in ("", "[]", "{}", "null", path.read_text()[:-40], path.read_text().replace('"ops"', '"opz"')):
        path.write_text(text)
        with pytest.raises(ConfigError, match="calibrate"):
            load_hardware(str(path))
    for raw in (b"\x00\xff", b"[" * 100_000):
        path.write_bytes(raw)
        with pytest.raises(ConfigError, match="calibrate"):
            load_hardware(str(path))
    with pytest.raises(ConfigError, match="did you mean 'h100-sxm'"):
        load_hardware("h100-sx")
    with pytest.raises(ConfigError, match="cannot read"):
        load_hardware(str(tmp_path / "absent.json"))


def test_profile_of_another_dtype_or_without_an_op_is_refused() -> None:
    hardware = fit(_passes(0.0), 4, kind="cpu", about=ABOUT)
    with pytest.raises(UnsupportedError, match="float64"):
        predict(estimate("dense", MINILM, Workload(64, dtype="float64")), hardware)
    with pytest.raises(UnsupportedError, match="conv1d"):
        predict(estimate("dense", preset("conformer-m"), Workload(64)), hardware)
    with pytest.raises(UnsupportedError, match="float64"):
        predict(
            estimate("dense", MINILM, Workload(64, dtype="float64")),
            dataclasses.replace(presets()["l4"], matmul_flops_per_s={"float32": 1.0}),
        )


def test_sizes_of_any_length_have_a_time() -> None:
    """Products of two sizes are no whole numbers of NumPy any more."""
    hardware = fit(_passes(0.0), 4, kind="cpu", about=ABOUT)
    total = predict(estimate("dense", MINILM, Workload(2**40, 2**40)), hardware).total
    assert np.isfinite(total.seconds)


def test_bare_roofline_is_a_spec_of_the_measured_peaks() -> None:
    hardware = fit(_passes(0.0), 4, kind="cpu", about=ABOUT)
    roof = bare_roofline(hardware)
    cost = estimate("dense", MINILM, Workload(300))
    assert float(predict(cost, roof).total.seconds) < float(predict(cost, hardware).total.seconds)
    assert roof.bands == {}


def test_bands_scale_the_prediction() -> None:
    hardware = dataclasses.replace(presets()["l4"], bands={"total": Band(0.9, 1.2)})
    total = predict(estimate("dense", MINILM, Workload(300)), hardware).total
    assert total.low == pytest.approx(0.9 * total.seconds)
    assert total.high == pytest.approx(1.2 * total.seconds)


def test_every_formula_is_priced() -> None:
    """No op without a formula, no formula without an op."""
    from refimpl.engines.protocol import SIZES

    assert set(FORMULAS) == set(SIZES)
