"""The invariants of LATTE as a method, its calibration, its files, and its cost."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from passes import small_llama
from strategies import configs, decoders, fits, inputs_for, latte_parameters, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError
from refimpl.methods.latte import Latte
from refimpl.parameters.latte import LatteParameters, Thresholds
from refimpl.recorder import tally

OFF = ({"kept": 1}, {"gamma": 0}, {"gamma": 0.0, "kept": 0.3})
EXACT = {"gamma": 0, "stage2": "float"}


def _config(**changes: Any) -> ModelConfig:
    return small_llama(**{"layers": 3, **changes})


def _ids(batch: int = 2, length: int = 30, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 40, (batch, length))


def _kept(run: Any) -> list[int]:
    return [dict(call.sizes)["kept"] for call in run.calls if call.op == "filtered_attention"]


# --- the off knob, bit for bit ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(config=configs(), workload=workloads(), off=st.sampled_from(OFF))
def test_off_knob_with_float_scores_equals_dense_bit_for_bit(config: ModelConfig, workload: Any, off: Any) -> None:
    assume(config.position != "relative")
    model, inputs = load_model(config), inputs_for(config, workload)
    exact = forward(model, inputs, causal=workload.causal).output
    off_knob = forward(model, inputs, "latte", {**off, "stage2": "float"}, causal=workload.causal).output
    np.testing.assert_array_equal(off_knob, exact)


@settings(max_examples=30, deadline=None)
@given(config=decoders(), past=st.integers(1, 5), steps=st.integers(1, 3))
def test_off_knob_equals_dense_in_decoding_bit_for_bit(config: ModelConfig, past: int, steps: int) -> None:
    runner = Runner(load_model(config), "numpy")
    ids = inputs_for(config, Workload(past + steps))
    outputs = []
    for method, params in (("dense", None), ("latte", EXACT)):
        cache = runner.new_cache(past + steps, method, params)
        prefill = runner(ids[:, :past], method, params, cache=cache).output
        outputs.append([prefill, runner.decode(ids[:, past:], method, cache, params).output])
    for exact, off_knob in zip(*outputs, strict=True):
        np.testing.assert_array_equal(off_knob, exact)


def test_off_knob_equals_dense_on_a_stream_bit_for_bit() -> None:
    config = preset("emformer-rnnt-base")
    config = ModelConfig(**{**vars(config), "layers": 2, "d_model": 16, "heads": 2, "kv_heads": 2, "head_dim": 8,
                            "d_ff": 8, "d_out": 4})  # fmt: skip
    model, inputs = load_model(config), inputs_for(config, Workload(3 * config.chunk), dtype=np.float32)
    found = forward(model, inputs, "latte", EXACT).output
    np.testing.assert_array_equal(found, forward(model, inputs).output)


def test_the_knob_does_something_and_8_bits_are_near() -> None:
    model, ids = load_model(_config()), _ids()
    exact = forward(model, ids).output
    errors = []
    for params in ({"kept": 1}, {"gamma": 0.5}, {"gamma": 1}):
        found = forward(model, ids, "latte", params).output
        errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
    assert 0 < errors[0] < 0.03
    assert errors[0] < errors[1] < errors[2]


# --- counting ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data(), config=configs(), workload=workloads())
def test_measured_fractions_make_the_closed_form_equal_the_run(
    data: st.DataObject, config: ModelConfig, workload: Any
) -> None:
    """Layer by layer as whole numbers; layers that keep alike are one kind."""
    params = data.draw(latte_parameters(config))
    assume(fits("latte", params, config))
    run = forward(load_model(config), inputs_for(config, workload), "latte", params, causal=workload.causal)
    pairs = [Fraction(kept) for kept in _kept(run)]
    causal = config.causal if workload.causal is None else workload.causal
    visible = workload.batch * config.heads * costmodel.ops.visible_pairs(workload.seq, workload.seq, int(causal))
    rows = [[kept / visible] * config.heads for kept in pairs]
    cost = costmodel.estimate("latte", config, workload, {"kept": rows, "stage2": params["stage2"]})
    assert tally(run.calls) == cost.tally()
    assert all(isinstance(dict(op.sizes)["kept"], int) for op in cost.ops if op.name == "filtered_attention")


def test_kept_is_the_part_of_the_visible_pairs_that_is_expected() -> None:
    config = preset("minilm-l6")
    for kept, pairs in ((0.15, 18_000), (1, 120_000), (Fraction(1, 7), 17_143)):
        op = next(op for op in costmodel.estimate("latte", config, Workload(100), {"kept": kept}).ops
                  if op.name == "filtered_attention")  # fmt: skip
        assert op.sizes["kept"] == pairs
        assert op.calls == 6
    rows = [[0.1] * 12] * 5 + [[0.2] * 6 + [0.4] * 6]
    ops = [op for op in costmodel.estimate("latte", config, Workload(100), {"kept": rows}).ops if "kept" in op.sizes]
    assert [op.sizes["kept"] for op in ops] == [12_000] * 5 + [36_000]


def units(T: int, S: int, d: int, kept: int, heads: int) -> int:
    """4-bit multiply-adds of a layer's scores, one by one: 1 for every pair and element, 3 more for kept ones."""
    total = 0
    for pair in range(heads * T * S):
        products = ["high high"] + ["high low", "low high", "low low"] * (pair < kept)
        total += len(products) * (d // heads)
    return total


def test_unit_counter_equals_the_formula_of_the_page() -> None:
    """(1 + 3 rho) T S d with the measured rho; dense int8 has 4 T S d."""
    config = _config(causal=False)
    run = forward(load_model(config), _ids(1, 12), "latte", {"gamma": 0.3})
    for kept in _kept(run):
        rho = Fraction(kept, 6 * 12 * 12)
        assert 0 < rho < 1
        assert units(12, 12, 24, kept, 6) == (1 + 3 * rho) * 12 * 12 * 24
    assert units(12, 12, 24, 6 * 144, 6) == 4 * 12 * 12 * 24


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nibble", ["floor", "round"])
def test_calibration_keeps_what_is_asked_for_with_the_filter_in_the_loop(nibble: str, causal: bool) -> None:
    """On the samples themselves, head by head: as few as can be, not fewer."""
    config = _config(causal=causal)
    runner, ids = Runner(load_model(config), "numpy"), _ids(3, 40)
    ready = runner.prepare("latte", {"kept": 0.3, "nibble": nibble}, ids)
    document = ready.parameters.to_document()
    run = runner(ids, ready)
    pairs = 3 * (40 * 41 // 2 if causal else 1600)
    for kept, noted in zip(_kept(run), document["kept"], strict=True):
        assert kept == round(pairs * sum(noted))  # what calibration saw is what runs
    assert all(0.3 <= part < 0.34 for row in document["kept"] for part in row)  # ties of whole numbers
    cost = costmodel.estimate("latte", config, Workload(40, 3), ready.parameters)
    assert without_rounding(tally(run.calls)) == without_rounding(cost.tally())


def without_rounding(counts: Any) -> Any:
    """Kept pairs to three digits, as decimals of a file tell them."""
    return {
        (component, op, tuple((name, round(size, -2) if name == "kept" else size) for name, size in sizes)): count
        for (component, op, sizes), count in counts.items()
    }


def test_every_head_has_a_target_and_a_threshold_of_its_own() -> None:
    config = _config()
    targets = [[0.2, 0.4, 0.6, 0.8, 1.0, 0.3]] * 3
    ready = Runner(load_model(config), "numpy").prepare("latte", {"kept": targets}, _ids(2, 40))
    for row in ready.parameters.to_document()["kept"]:
        np.testing.assert_allclose(row, targets[0], atol=0.05)
    assert all(row[4] is None for row in ready.parameters.thresholds)
    assert len({theta for row in ready.parameters.thresholds for theta in row}) == 16


def test_a_layer_is_calibrated_behind_those_that_filter() -> None:
    """The thresholds of the second layer are those of the quantile on what the filtered first one gives."""
    config = _config(layers=2)
    model, ids = load_model(config), _ids(2, 40)
    runner = Runner(model, "numpy")
    few, all_of_first = (
        runner.prepare("latte", {"kept": [[first] * 6, [0.3] * 6]}, ids).parameters.thresholds for first in (0.1, 1)
    )
    assert few[1] != all_of_first[1]
    rows = [few[0], (math.inf,) * 6]
    seen: list[Any] = []

    class Watch(Latte):
        def thetas_of(self, at: Any, layer: Any, queries: Any, keys: Any) -> Any:
            if layer.index == 1:
                seen.extend((*queries, *keys))
            return super().thetas_of(at, layer, queries, keys)

    runner(ids, Watch(config, LatteParameters(thresholds=Thresholds(rows))))
    q, q_scale, k, k_scale = seen
    for head, theta in enumerate(few[1]):
        gaps = []
        for b, i in np.ndindex(2, 40):
            estimates = (q[b, head, i] >> 4).astype(int) @ (k[b, head // 2, : i + 1] >> 4).astype(int).T
            gaps += list((estimates.max() - estimates) * 128.0 * q_scale[b, head, 0, 0] * k_scale[b, head // 2, 0, 0])
        assert np.mean(np.array(gaps) <= theta) >= 0.3
        assert np.mean(np.array(gaps) < theta / (1 + 1e-6)) < 0.3


def test_calibration_needs_inputs_and_cuts_long_rows() -> None:
    runner = Runner(load_model(_config()), "numpy")
    with pytest.raises(ConfigError, match="give thresholds or gamma"):
        runner.prepare("latte")
    with pytest.raises(ConfigError, match="not known yet"):
        Latte(_config(), LatteParameters())
    ready = runner.prepare("latte", {"samples": 3, "sample_tokens": 20}, _ids(2, 50))
    assert (ready.parameters.to_document()["samples"], ready.parameters.to_document()["sample_length"]) == (3, 20)


# --- files and parameters ---------------------------------------------------------------------------------------------


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = _config()
    runner, ids = Runner(load_model(config), "numpy"), _ids()
    ready = runner.prepare("latte", {"kept": [[0.3] * 5 + [1.0]] * 3}, ids)
    document = ready.parameters.to_document()
    wanted = {
        "schema_version": 1, "method": "latte", "model": "tiny", "layers": 3, "heads": 6, "nibble": "floor",
        "source": "quantile",
    }  # fmt: skip
    assert {name: document[name] for name in wanted} == wanted
    assert len(document["weights_sha256"]) == 64
    place = tmp_path / "thresholds.json"
    place.write_text(json.dumps(document, allow_nan=False))
    again = runner.prepare("latte", {"thresholds": str(place)})
    assert again.parameters.to_document() == document
    np.testing.assert_array_equal(runner(ids, again).output, runner(ids, ready).output)
    fractions = costmodel.estimate("latte", config, Workload(9), {"thresholds": str(place)}).parameters.fractions(
        config
    )
    np.testing.assert_allclose([float(f) for f in fractions], np.mean(document["kept"], axis=1), atol=1e-6)


def test_a_document_of_a_trainer_needs_no_more_than_the_stated_keys(tmp_path: Path) -> None:
    place = tmp_path / "trained.json"
    place.write_text(json.dumps({
        "schema_version": 1, "method": "latte", "model": "tiny", "weights_sha256": "0" * 64, "layers": 3, "heads": 6,
        "nibble": "round", "source": "trained", "target_kept": 0.15, "kept": [[0.2] * 6] * 3,
        "thresholds": [[1, 0.5, None, 2, 0, 1.5]] * 3, "epochs": 4,
    }))  # fmt: skip
    made = LatteParameters(thresholds=str(place), nibble="round")
    assert made.thetas(_config())[1] == (1.0, 0.5, math.inf, 2.0, 0.0, 1.5)
    assert set(made.fractions(_config())) == {Fraction(1, 5)}
    with pytest.raises(ConfigError, match="nibble='round'; nibble is 'floor'"):
        LatteParameters(thresholds=str(place)).check(_config())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kept": 0}, "kept=0; it must be above 0"),
        ({"kept": 1.5}, "kept=1.5"),
        ({"kept": float("nan")}, "kept=nan"),
        ({"kept": True}, "kept=True"),
        ({"kept": "half"}, "kept='half'"),
        ({"kept": [[0.1] * 6] * 2}, "kept are for 2 layers of 6 heads; tiny has 3 of 6"),
        ({"gamma": 2}, "gamma=2"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"gamma": 0.1, "thresholds": [[1.0] * 6] * 3}, "give one"),
        ({"nibble": "ceil"}, "nibble='ceil'"),
        ({"stage2": "int4"}, "stage2='int4'"),
        ({"samples": 0}, "samples=0"),
        ({"sample_tokens": 1}, "sample_tokens=1"),
        ({"thresholds": []}, "thresholds="),
        ({"thresholds": [[1.0] * 5] * 3}, "thresholds are for 3 layers of 5 heads"),
        ({"thresholds": [[-1.0] * 6] * 3}, "at least 0"),
        ({"thresholds": [[float("nan")] * 6] * 3}, "at least 0"),
        ({"thresholds": "absent.json"}, "absent.json"),
        ({"treshold": 1}, "did you mean 'thresholds'"),
    ],
)
def test_bad_parameters_are_refused_by_program_and_closed_form(params: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forward(load_model(_config()), _ids(), "latte", params)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("latte", _config(), Workload(8), params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
        ("[]", "holds none of latte"),
        ('{"method": "latte", "schema_version": 2}', "schema_version 2; 1 can be read"),
        ('{"method": "latte", "schema_version": 1}', "nibble is None"),
        ('{"method": "latte", "schema_version": 1, "nibble": "floor"}', "thresholds=None"),
        ('{"method": "latte", "schema_version": 1, "nibble": "floor", "thresholds": [["1"]]}', "at least 0"),
        (
            '{"method": "latte", "schema_version": 1, "nibble": "floor", "thresholds": [[1]], "kept": [[2]]}',
            "kept must have",
        ),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    place = tmp_path / "thresholds.json"
    place.write_text(text)
    with pytest.raises(ConfigError, match=message):
        LatteParameters(thresholds=str(place))


def test_relative_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="relative positions, for which there is no estimate"):
        costmodel.estimate("latte", preset("conformer-m"), Workload(8))


# --- what a model may rely on -----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_with_float_scores_and_given_scales_the_future_does_not_matter(data: st.DataObject) -> None:
    """Scales are of whole heads, so a later input may change the rounding; with the same scales nothing else does."""
    engine, rng = NumpyEngine(), np.random.default_rng(data.draw(st.integers(0, 99)))
    q, k, v = (rng.standard_normal((1, 2, 12, 8)) for _ in range(3))
    (q_codes, q_scale), (k_codes, k_scale) = engine.quantize(q), engine.quantize(k)
    stage2 = data.draw(st.sampled_from(["int8", "float"]))

    def outputs(*given: Any) -> Any:
        return engine.filtered_attention(*given, q_scale, k_scale, np.ones(2), 0.35, True, None, "floor", stage2)[0]

    before = outputs(q, k, v, q_codes, k_codes)
    for array in (q, k, v, q_codes, k_codes):
        array[:, :, 7:] = 1
    np.testing.assert_array_equal(outputs(q, k, v, q_codes, k_codes)[:, :, :7], before[:, :, :7])


def test_decoding_sees_the_keys_of_the_cache() -> None:
    """A step after a prefill is the last row of one pass over everything, but for scales of fewer positions."""
    runner, ids = Runner(load_model(_config()), "numpy"), _ids(1, 20)
    params = {"gamma": 0.001, "stage2": "float"}
    whole = runner(ids, "latte", params).output[:, -1]
    cache = runner.new_cache(20, "latte", params)
    runner(ids[:, :19], "latte", params, cache=cache)
    step = runner.decode(ids[:, 19:], "latte", cache, params).output[:, -1]
    assert np.linalg.norm(step - whole) < 0.05 * np.linalg.norm(whole)
