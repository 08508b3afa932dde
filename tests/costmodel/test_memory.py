"""Peak live memory in closed form, against what the numba engine's allocator has seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from strategies import fits

import costmodel
from refimpl import load_model
from refimpl.config import Workload, preset
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.inputs import random_inputs
from refimpl.model import Runner, position_tables

ENGINE = NumbaEngine()
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "flash": [{}],
    "reuse": [{}, {"group": 3, "heads": 2}, {"groups": [[0, 2], [1, 3]]}, {"share": "scores", "group": 4}],
    "folding": [
        {},
        {"fold": 3, "mask": "subtoken"},
        {"fold": 2, "heads": "keep-count", "fold_ffn": False},
        {"fold": [1, 2, 1, 3], "fold_ffn": 4, "layers": [0, 1, 3], "fused": True},
        {"fold": 1, "fold_ffn": 2, "ffn_hidden": 700},
    ],
    "svd-softmax": [{}, {"full_view": "replace", "candidates": 200, "fused": False}],
    "attmemo": [{"epochs": 0}],
    "latte": [{"kept": 1}, {"gamma": 0.1}, {"gamma": 0.1, "stage2": "float"}],
    "kvsharer": [
        {"layers": 0},
        {"strategy": [[3, 1]]},
        {"strategy": [[2, 0], [3, 1]]},
        {"strategy": [[1, 0], [3, 1]], "drop_projections": False},
        {"strategy": [[2, 0], [3, 1]], "fused": True},
    ],
    "headshare": [{}, {"ratio": 0.75, "share_output": False}],
    "efficientasr": [
        {},
        {"group": 1, "ffn_chunks": 1},
        {"group": 1, "band": 40, "band_penalty": 2.0},
        {"score_residual": 0, "band": 40, "ffn_tied": True},
        {"group": 3, "score_residual": 0.5, "band": 40, "ffn_chunks": 4},
        {"group": 4, "band": 40, "band_penalty": 2.0},
        {"group": 1, "score_residual": 0, "fused": True},
    ],
    "fewer-heads": [{}],
    "narrow": [{"width": 20, "fused": True}],
    "local": [{}],
    "linformer": [{"length": 40}],
    "linear": [{}],
}


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize("name", ["conformer-m", "whisper-tiny-en", "minilm-l6", "smollm2-135m", "dinov2-s"])
def test_peak_is_an_upper_bound_within_a_tenth(name: str, method: str) -> None:
    config = replace(preset(name), layers=4, vocab=min(preset(name).vocab, 500))
    for seq, batch in ((220, 2), (600, 1)):
        for params in PARAMETERS[method]:
            if not fits(method, params, config):
                continue
            runner, inputs = Runner(load_model(config, positions=seq), ENGINE), random_inputs(config, seq, batch)
            ready = runner.prepare(method, params, inputs)
            ENGINE.buffers.release()
            ENGINE.buffers.reset_high_water()
            runner(inputs, ready)
            cost = costmodel.estimate(method, config, Workload(seq, batch), params)
            tables = sum(table.nbytes for table in position_tables(config, seq, "float32"))
            seen = ENGINE.buffers.high_water_bytes + tables + cost.resident_bytes
            assert seen <= cost.peak_bytes <= seen + 0.1 * ENGINE.buffers.high_water_bytes, (seq, params)


def test_maps_dominate_long_sequences_and_flash_has_none() -> None:
    config = preset("conformer-m")
    dense, flash = (costmodel.estimate(method, config, Workload(16384)).peak_bytes for method in ("dense", "flash"))
    one_map = 4 * 16384**2 * 4
    assert dense > 3 * one_map
    assert flash < one_map / 4


def test_reuse_holds_one_map_per_group_under_way() -> None:
    config = preset("minilm-l6")
    work = Workload(4096)
    one_map = 12 * 4096**2 * 4
    nested = costmodel.estimate("reuse", config, work, {"groups": [[0, 5], [1, 4], [2, 3]]}).peak_bytes
    plain = costmodel.estimate("reuse", config, work, {"group": 2}).peak_bytes
    assert nested - plain == 2 * one_map


@pytest.mark.parametrize(
    ("name", "method", "params"),
    [
        ("smollm2-135m", "dense", {}),
        ("conformer-m", "flash", {}),
        ("whisper-tiny-en", "linformer", {"length": 40}),
        ("minilm-l6", "linformer", {"length": 200, "fused": True}),
    ],
)
def test_all_memory_is_in_the_precision_of_the_pass(name: str, method: str, params: dict[str, Any]) -> None:
    """Position tables, and what methods make of the length, too: twice the bytes a number, twice the peak."""
    peaks = [
        costmodel.estimate(method, preset(name), Workload(500, 2, dtype=dtype), params).peak_bytes
        for dtype in ("float16", "float32", "float64")
    ]
    assert peaks[2] == 2 * peaks[1] == 4 * peaks[0]
