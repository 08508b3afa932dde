"""Fewer heads: which remain, and that the others leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, decoders, inputs_for, workloads

import costmodel
from refimpl import Runner, Workload, forward, load_model
from refimpl.config import ModelConfig, preset
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.methods.fewer_heads import output_norms
from refimpl.parameters.fewer_heads import FewerHeadsParameters
from refimpl.weights.layout import Weights


def tiny(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": 2, "d_model": 24, "heads": 6, "d_ff": 10, "vocab": 17, "conv_kernel": 3}
    return ModelConfig(**{"name": "tiny", "recipe": "pre-norm", "position": "rotary", **sizes, **changes})


def silenced(weights: Weights, config: ModelConfig, kept: list[list[int]]) -> Weights:
    """The exact model with zeros in Wo for the query heads whose key head is not kept."""
    group, layers = config.heads // config.kv_heads, []
    for layer, of_layer in zip(weights.layers, kept, strict=True):
        output = layer.attention.output.weight.copy()
        for head in range(config.heads):
            if head // group not in of_layer:
                output[:, head * config.head_dim : (head + 1) * config.head_dim] = 0
        attention = layer.attention.but(output=layer.attention.output.but(weight=output))
        layers.append(layer.but(attention=attention))
    return weights.but(layers=layers)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), config=configs(), fused=st.booleans())
def test_a_head_that_left_is_one_whose_output_is_zero(data: st.DataObject, config: ModelConfig, fused: bool) -> None:
    """For every recipe, kind of position, grouping, bias and mask, in float64."""
    workload, model = data.draw(workloads(config)), load_model(config, dtype="float64")
    inputs = inputs_for(config, workload)
    count = data.draw(st.integers(1, config.kv_heads))
    params = {"heads": count * (config.heads // config.kv_heads), "fused": fused}
    found = forward(model, inputs, "fewer-heads", params, causal=workload.causal).output
    norms = [output_norms(layer.attention, config) for layer in model.weights.layers]
    kept = [sorted(sorted(range(config.kv_heads), key=lambda g: -of[g])[:count]) for of in norms]
    other = replace(model, weights=silenced(model.weights, config, kept))
    truth = forward(other, inputs, "dense", causal=workload.causal).output
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)


def test_norms_are_those_of_the_matrix_that_a_head_writes_through() -> None:
    """Summed over the query heads that share a key head, by plain products."""
    config = tiny(kv_heads=3)
    attention = load_model(config, dtype="float64").weights.layers[0].attention
    values = attention.qkv.weight[-config.d_kv :].reshape(3, 4, 24)
    outputs = attention.output.weight.reshape(24, 6, 4).swapaxes(0, 1)  # (H, d, D)
    truth = [sum(np.linalg.norm(outputs[2 * g + i] @ values[g]) ** 2 for i in (0, 1)) for g in range(3)]
    np.testing.assert_allclose(output_norms(attention, config), truth, rtol=1e-12)


def test_first_keeps_the_first_heads() -> None:
    model, ids = load_model(tiny(), dtype="float64"), np.arange(12)[None, :]
    truth = replace(model, weights=silenced(model.weights, model.config, [[0, 1], [0, 1]]))
    found = forward(model, ids, "fewer-heads", {"heads": 2, "keep": "first"}).output
    np.testing.assert_allclose(found, forward(truth, ids, "dense").output, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(config=decoders(), past=st.integers(1, 5), steps=st.integers(1, 3))
def test_decoding_equals_one_pass(config: ModelConfig, past: int, steps: int) -> None:
    runner = Runner(load_model(config, dtype="float64"), "numpy")
    ids = inputs_for(config, Workload(past + steps))
    ready = runner.prepare("fewer-heads")
    cache = runner.new_cache(past + steps, ready)
    runner(ids[:, :past], ready, cache=cache)
    stepped = runner.decode(ids[:, past:], ready, cache).output
    np.testing.assert_allclose(stepped, runner(ids, ready).output[:, past:], rtol=1e-9, atol=1e-9)


def test_every_part_of_attention_falls_by_the_same_factor() -> None:
    config = preset("conformer-m")
    dense, half = (costmodel.estimate(name, config, Workload(700)) for name in ("dense", "fewer-heads"))
    for part in ("scores", "softmax", "weighted-sum"):
        assert 2 * half.by_component()[part].flops == dense.by_component()[part].flops
        assert 2 * half.by_component()[part].bytes_moved == dense.by_component()[part].bytes_moved
    causal = tiny(causal=True)
    dense, half = (costmodel.estimate(name, causal, Workload(9, fills_cache=True)) for name in ("dense", "fewer-heads"))
    assert 2 * half.cache_bytes == dense.cache_bytes


def test_the_default_and_the_sweep_are_whole_groups() -> None:
    config = preset("smollm2-135m")  # 9 heads on 3
    assert FewerHeadsParameters().shape(config).heads == 3
    assert FewerHeadsParameters.sweep(config) == {"heads": (9, 6, 3)}
    assert FewerHeadsParameters().shape(tiny(heads=1, head_dim=4)).heads == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"heads": 8}, "heads=8; tiny has 6 heads"),
        ({"heads": 3}, "multiple of 2"),
        ({"keep": "last"}, "keep='last'"),
        ({"fused": 1.5}, "fused=1.5"),
        ({"head": 2}, "did you mean 'heads'"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    config = tiny(kv_heads=3)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("fewer-heads", config, Workload(4), params)
    with pytest.raises(ConfigError, match=message):
        forward(load_model(config), np.zeros((1, 4), int), "fewer-heads", params)


def test_a_mask_for_each_head_is_refused() -> None:
    mask = np.ones((1, 6, 4, 4), bool)
    with pytest.raises(UnsupportedError, match="mask is for 6 heads; 3 are left"):
        forward(load_model(tiny()), np.zeros((1, 4), int), "fewer-heads", mask=mask)
