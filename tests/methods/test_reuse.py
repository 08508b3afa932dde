"""The invariants of attention map reuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, inputs_for, reuse_parameters, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, override, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError
from refimpl.methods.dense import Dense
from refimpl.methods.reuse import Reuse
from refimpl.methods.steps import Layer
from refimpl.parameters.reuse import ReuseParameters

ENGINE = NumpyEngine()


def at(component: str) -> Any:
    return ENGINE


def _config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": 4, "d_model": 16, "heads": 4, "d_ff": 24, "vocab": 30, "recipe": "pre-norm"}
    return ModelConfig(name="tiny", **{**sizes, **changes})


def _layer(config: ModelConfig, index: int, weights: Any) -> Layer:
    return Layer(index, config, weights, False, None, ())


@settings(max_examples=60, deadline=None)
@given(config=configs(), workload=workloads(), off=st.sampled_from([{"group": 1}, {"heads": 0}, {"groups": [[0]]}]))
def test_off_knob_equals_dense_bit_for_bit(config: ModelConfig, workload: Any, off: dict[str, Any]) -> None:
    """Invariant 1: group 1, no reused head, or groups of one layer."""
    model, inputs = load_model(config), inputs_for(config, workload)
    dense = forward(model, inputs, "dense", causal=workload.causal)
    reuse = forward(model, inputs, "reuse", off, causal=workload.causal)
    np.testing.assert_array_equal(reuse.output, dense.output)


def test_all_heads_reused_equals_full_reuse() -> None:
    """Invariant 1: P = H."""
    config = _config()
    model, ids = load_model(config), np.arange(9)[None, :]
    full = forward(model, ids, "reuse", {"group": 3}).output
    np.testing.assert_array_equal(forward(model, ids, "reuse", {"group": 3, "heads": 4}).output, full)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_partial_reuse_gives_each_head_its_own_part_of_a_mask(engine: str, causal: bool) -> None:
    """Heads that take the maps of the same heads are exact heads, where all layers have the same queries and keys."""
    config = _config(layers=2, position="none")
    model = load_model(config, dtype="float64")
    first, second = model.weights.layers
    second.attention.qkv.weight[:32] = first.attention.qkv.weight[:32]
    second.attention.qkv.bias[:32] = first.attention.qkv.bias[:32]
    first.attention.output.weight[:], first.attention.output.bias[:] = 0.0, 0.0
    first.feed_forward.down.weight[:], first.feed_forward.down.bias[:] = 0.0, 0.0
    second.attention_norm = first.attention_norm  # so that the input of both sublayers is the same
    ids = np.arange(18).reshape(2, 9)
    mask = np.random.default_rng(0).random((2, 4, 9, 9)) < 0.6  # for each head another one
    exact = forward(model, ids, causal=causal, mask=mask).output
    params = {"heads": 2, "head_order": "keep"}
    partial = forward(model, ids, "reuse", params, engine, causal=causal, mask=mask).output
    np.testing.assert_allclose(partial, exact, atol=1e-12)
    other = forward(model, ids, causal=causal, mask=mask[:, [0, 1, 3, 2]]).output
    assert np.abs(other - exact).max() > 1e-3


def _reusing(weights: Any, config: ModelConfig) -> list[Any]:
    """The layers as reuse in groups of two keeps them."""
    return Reuse.derive(weights, config, ReuseParameters(group=2)).layers


def test_reuse_layer_with_the_compute_layers_input_and_weights_repeats_it_bit_for_bit() -> None:
    """Invariant 2."""
    config = _config(layers=2)
    weights = load_model(config).weights
    layers = _reusing(weights.but(layers=[weights.layers[0], weights.layers[0]]), config)
    x = np.random.default_rng(0).standard_normal((2, 9, 16)).astype(np.float32)
    method = Reuse(config, ReuseParameters(group=2))
    first = method.attention(at, x, _layer(config, 0, layers[0]))
    second = method.attention(at, x, _layer(config, 1, layers[1]))
    np.testing.assert_array_equal(second, first)


def test_identical_inputs_and_query_key_maps_give_the_vanilla_stack() -> None:
    """Invariant 3: where the maps would be equal anyway, reuse changes nothing."""
    config = _config(layers=2)
    weights = load_model(config).weights
    layers = weights.layers
    layers[1].attention.qkv.weight[:32] = layers[0].attention.qkv.weight[:32]
    layers[1].attention.qkv.bias[:32] = layers[0].attention.qkv.bias[:32]
    without = _reusing(weights, config)
    x = np.random.default_rng(0).standard_normal((1, 9, 16)).astype(np.float32)
    reuse, dense = Reuse(config, ReuseParameters(group=2)), Dense(config, None)
    reuse.attention(at, x, _layer(config, 0, layers[0]))
    np.testing.assert_array_equal(
        reuse.attention(at, x, _layer(config, 1, without[1])), dense.attention(at, x, _layer(config, 1, layers[1]))
    )


def test_reuse_layer_is_linear_in_its_input() -> None:
    """Invariant 4: f(a X + b Z) = a f(X) + b f(Z) with the map fixed and no bias."""
    config = _config(layers=2, bias=False)
    layers = _reusing(load_model(config, dtype="float64").weights, config)
    rng = np.random.default_rng(0)
    first, x, z = (rng.standard_normal((1, 9, 16)) for _ in range(3))

    def f(value: Any) -> Any:
        method = Reuse(config, ReuseParameters(group=2))
        method.attention(at, first, _layer(config, 0, layers[0]))
        return method.attention(at, value, _layer(config, 1, layers[1]))

    np.testing.assert_allclose(f(2.0 * x - 3.0 * z), 2.0 * f(x) - 3.0 * f(z), atol=1e-12)


def test_permuting_heads_with_their_weights_changes_nothing() -> None:
    """Invariant 5: map heads together with the head slices of Wv and Wo."""
    config = _config(layers=2)
    x = np.random.default_rng(0).standard_normal((1, 9, 16))
    order = np.array([2, 0, 3, 1])
    columns = (order[:, None] * 4 + np.arange(4)).ravel()

    def run(permuted: bool) -> Any:
        weights = load_model(config, dtype="float64").weights
        if permuted:
            for layer in weights.layers:
                qkv, output = layer.attention.qkv, layer.attention.output
                rows = np.concatenate([columns, 16 + columns, 32 + columns])
                qkv.weight, qkv.bias = qkv.weight[rows], qkv.bias[rows]
                output.weight = output.weight[:, columns]
        layers = _reusing(weights, config)
        method = Reuse(config, ReuseParameters(group=2))
        method.attention(at, x, _layer(config, 0, layers[0]))
        return method.attention(at, x, _layer(config, 1, layers[1]))

    np.testing.assert_allclose(run(True), run(False), atol=1e-12)


def test_reuse_layer_costs_half_of_a_compute_layer() -> None:
    """Invariant 6: matrix FLOPs 4 T d^2 + 2 T^2 d against 8 T d^2 + 4 T^2 d, and Q, K, scores and softmax are gone."""
    config, t, d = override(preset("minilm-l6"), layers=2), 321, 384
    dense = costmodel.estimate("dense", config, Workload(t)).by_component()
    reuse = costmodel.estimate("reuse", config, Workload(t)).by_component()
    saved = sum(dense[name].matmul_flops - reuse[name].matmul_flops for name in dense)
    assert saved == 4 * t * d * d + 2 * t * t * d
    assert 2 * reuse["scores"].matmul_flops == dense["scores"].matmul_flops
    assert 2 * reuse["softmax"].vector_flops == dense["softmax"].vector_flops
    assert reuse["weighted-sum"] == dense["weighted-sum"]


@pytest.mark.parametrize(("group", "bound"), [(2, 1.60), (3, 2.00), (4, 2.29), (8, 2.91), (16, 3.37)])
def test_long_sequences_with_relative_positions_approach_the_flop_bound(group: int, bound: float) -> None:
    """4 G / (G + 3) for T >> d, the derived table of the method's page."""
    config = override(preset("conformer-m"), layers=group)
    attention = ("qkv", "positions", "scores", "weighted-sum", "output")

    def flops(method: str, params: dict[str, Any]) -> int:
        costs = costmodel.estimate(method, config, Workload(2_000_000), params).by_component()
        return sum(costs[name].matmul_flops for name in attention)

    assert flops("dense", {}) / flops("reuse", {"group": group}) == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize("params", [{"group": 2}, {"group": 3, "heads": 2}, {"share": "scores"}])
def test_causal_reuse_does_not_see_the_future(params: dict[str, Any]) -> None:
    """Invariant 7."""
    model = load_model(_config())
    ids = np.arange(12)[None, :]
    changed = ids.copy()
    changed[0, 7:] = 29
    kept = forward(model, ids, "reuse", params, causal=True).output
    other = forward(model, changed, "reuse", params, causal=True).output
    np.testing.assert_array_equal(kept[:, :7], other[:, :7])


def test_sharing_scores_or_probabilities_is_the_same_function() -> None:
    model, ids = load_model(_config(), dtype="float64"), np.arange(12)[None, :]
    for heads in (None, 2):
        outputs = [
            forward(model, ids, "reuse", {"group": 4, "heads": heads, "share": share}).output
            for share in ("probabilities", "scores")
        ]
        np.testing.assert_array_equal(*outputs)


def test_head_order_rotates_from_layer_to_layer() -> None:
    """Partial reuse emits [new, reused] maps: after one reuse layer the two orders differ."""
    model, ids = load_model(_config(), dtype="float64"), np.arange(12)[None, :]
    rotate, keep = (
        forward(model, ids, "reuse", {"group": 4, "heads": 1, "head_order": order}).output
        for order in ("rotate", "keep")
    )
    assert not np.allclose(rotate, keep)
    rotate, keep = (
        forward(model, ids, "reuse", {"group": 2, "heads": 1, "head_order": order}).output
        for order in ("rotate", "keep")
    )
    np.testing.assert_array_equal(rotate, keep)  # groups of two: nothing is passed on


@settings(max_examples=40, deadline=None)
@given(data=st.data(), config=configs())
def test_no_map_outlives_its_group(data: st.DataObject, config: ModelConfig) -> None:
    params = data.draw(reuse_parameters(config))
    parameters, model = ReuseParameters(**params), load_model(config)
    method = Reuse(config, parameters)
    model = replace(model, weights=Reuse.derive(model.weights, config, parameters))
    Runner(model, "numpy")(inputs_for(config, Workload(4)), method)
    assert method.shared == {}


def test_layers_before_the_first_reuse_layer_are_untouched() -> None:
    config = _config()
    model, ids = load_model(config), np.arange(9)[None, :]
    dense = forward(model, ids, "dense").output
    assert not np.allclose(forward(model, ids, "reuse", {"groups": [[2, 3]]}).output, dense)
    one_layer = load_model(override(config, layers=1))
    np.testing.assert_array_equal(
        forward(one_layer, ids, "reuse", {"group": 2}).output, forward(one_layer, ids, "dense").output
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"group": 0}, "group=0"),
        ({"group": 1.5}, "whole number"),
        ({"groups": [[0, 9]]}, "layers 0 to 3"),
        ({"groups": [[1, 0]]}, "rise"),
        ({"groups": [[0, 1], [1, 2]]}, "two"),
        ({"groups": [[]]}, "empty"),
        ({"groups": 3}, "list of layer lists"),
        ({"groups": [[0, 1.5]]}, "list of layer lists"),
        ({"groups": [[False, True]]}, "list of layer lists"),
        ({"groups": ["01", "23"]}, "list of layer lists"),
        ({"heads": 5}, "4 heads"),
        ({"share": "logits"}, "probabilities"),
        ({"grup": 2}, "did you mean 'group'"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forward(load_model(_config()), np.arange(4)[None, :], "reuse", params)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("reuse", _config(), Workload(4), params)


def test_partial_reuse_refuses_grouped_heads() -> None:
    with pytest.raises(ConfigError, match="key heads"):
        costmodel.estimate("reuse", _config(kv_heads=2), Workload(4), {"heads": 1})
