"""Local attention as a method; its ops are in tests/engines/test_compressed_attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, decoders, inputs_for, workloads

import costmodel
from costmodel.ops import band_pairs
from refimpl import Runner, Workload, forward, load_model
from refimpl.config import ModelConfig, preset
from refimpl.engines.protocol import visible_band
from refimpl.errors import ConfigError
from refimpl.recorder import tally


@settings(max_examples=30, deadline=None)
@given(data=st.data(), config=configs())
def test_a_window_is_exact_attention_under_a_mask_of_the_band(data: st.DataObject, config: ModelConfig) -> None:
    """In float64, for every recipe and kind of position; and bit for bit `flash` where the window covers all."""
    workload, model = data.draw(workloads(config)), load_model(config, dtype="float64")
    inputs, window = inputs_for(config, workload), data.draw(st.integers(0, 8))
    away = np.abs(np.arange(workload.seq) - np.arange(workload.seq)[:, None])
    mask = (away <= window)[None, None]
    found = forward(model, inputs, "local", {"window": window}, causal=workload.causal).output
    truth = forward(model, inputs, "flash", causal=workload.causal, mask=mask).output
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)
    flash = forward(model, inputs, "flash", causal=workload.causal).output
    for wide in (None, workload.seq - 1, 99):
        output = forward(model, inputs, "local", {"window": wide}, causal=workload.causal).output
        np.testing.assert_array_equal(output, flash)


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_of_the_band_in_closed_form(causal: bool) -> None:
    """Against counting them, for every small size; arrays of lengths as their elements."""
    for window in range(8):
        for past in range(4):
            for T in range(1, 8):
                counted = sum(stop - first for first, stop in visible_band(T, T + past, causal, window))
                assert band_pairs(T, T + past, causal, window) == counted, (window, past, T)
        T = np.arange(1, 8)
        each = [band_pairs(int(t), int(t), causal, window) for t in T]
        np.testing.assert_array_equal(band_pairs(T, T, causal, window), each)


@settings(max_examples=15, deadline=None)
@given(config=decoders(), past=st.integers(1, 6), steps=st.integers(1, 3), window=st.integers(0, 6))
def test_decoding_equals_one_pass(config: ModelConfig, past: int, steps: int, window: int) -> None:
    runner = Runner(load_model(config, dtype="float64"), "numpy")
    ids = inputs_for(config, Workload(past + steps))
    ready = runner.prepare("local", {"window": window})
    cache = runner.new_cache(past + steps, ready)
    runner(ids[:, :past], ready, cache=cache)
    stepped = runner.decode(ids[:, past:], ready, cache).output
    np.testing.assert_allclose(stepped, runner(ids, ready).output[:, past:], rtol=1e-9, atol=1e-9)


def test_a_step_reads_the_window_alone_of_a_long_cache() -> None:
    config = preset("smollm2-135m")
    near, far = (
        costmodel.estimate("local", config, Workload(1, phase="decode", kv_len=n), {"window": 50}).total.kv_bytes
        for n in (500, 5000)
    )
    assert near == far == 2 * config.layers * 51 * config.d_kv * 4
    assert costmodel.estimate("local", config, Workload(1, phase="decode", kv_len=20)).total.kv_bytes < near


def test_cost_grows_with_the_length_not_its_square() -> None:
    config = preset("conformer-m")
    flops = [
        costmodel.estimate("local", config, Workload(T)).by_component()["attention"].matmul_flops
        for T in (4096, 8192, 12288)
    ]
    assert flops[2] - flops[1] == flops[1] - flops[0]
    assert flops[0] < costmodel.estimate("flash", config, Workload(4096)).by_component()["attention"].matmul_flops / 30


def test_a_window_of_0_mixes_no_positions() -> None:
    config = ModelConfig("tiny", "pre-norm", 2, 16, 4, 8, vocab=9)
    model, ids = load_model(config), np.arange(9)[None, :]
    turned = forward(model, ids[:, ::-1], "local", {"window": 0}).output[:, ::-1]
    np.testing.assert_array_equal(forward(model, ids, "local", {"window": 0}).output, turned)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), st.integers(1, 3))
def test_a_stream_sees_its_left_context_within_the_window(window: int, chunks: int) -> None:
    """Of the rows of a chunk; in steps as in one pass, and with the ops of the closed form."""
    config = ModelConfig(
        "tiny", "emformer", 2, 16, 4, 8, stem="stacked", features=3, stack=2, chunk=4, left_context=6, right_context=1
    )
    model = load_model(config, dtype="float64")
    frames = inputs_for(config, Workload(4 * chunks))
    run = forward(model, frames, "local", {"window": window})
    assert tally(run.calls) == costmodel.estimate("local", config, Workload(4 * chunks), {"window": window}).tally()
    wide = forward(model, frames, "local", {"window": 11}).output
    np.testing.assert_array_equal(wide, forward(model, frames, "flash").output)


@pytest.mark.parametrize(("params", "message"), [({"window": -1}, "window=-1"), ({"window": 2.5}, "window=2.5")])
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("local", preset("conformer-m"), Workload(4), params)
