"""Narrow heads: nearest matrices of a rank, and that nothing is lost where the rank is no higher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, inputs_for, workloads

import costmodel
from refimpl import Runner, Workload, forward, load_model
from refimpl.config import ModelConfig, preset
from refimpl.errors import ConfigError
from refimpl.methods.narrow import truncated
from refimpl.parameters.narrow import NarrowParameters
from refimpl.weights.layout import Weights

Array = np.ndarray


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_truncated_is_the_nearest_matrix_of_its_rank(m: int, n: int, inner: int, width: int, seed: int) -> None:
    """The distance is that of the singular values that are dropped, and no random matrix of that rank is nearer."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((m, inner)), rng.standard_normal((n, inner))
    a, b = truncated(left, right, min(width, inner))
    found, truth = left @ a @ b.T @ right.T, left @ right.T
    dropped = np.linalg.svd(truth, compute_uv=False)[min(width, inner) :]
    np.testing.assert_allclose(np.linalg.norm(found - truth), np.linalg.norm(dropped), rtol=1e-9, atol=1e-9)
    for _ in range(3):
        other = found + 0.1 * left @ rng.standard_normal(a.shape) @ b.T @ right.T
        assert np.linalg.norm(other - truth) >= np.linalg.norm(found - truth) - 1e-9


def test_truncated_has_no_weight_where_there_is_no_direction() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((9, 2)) @ rng.standard_normal((2, 5)), rng.standard_normal((7, 5))
    a, b = truncated(left, right, 4)
    np.testing.assert_allclose(left @ a @ b.T @ right.T, left @ right.T, atol=1e-10)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    a, b = truncated(np.zeros((3, 2)), np.zeros((3, 2)), 1)
    assert not a.any()
    assert not b.any()


def of_rank(weights: Weights, config: ModelConfig, rank: int) -> Weights:
    """The model with queries, keys, offsets and values that use `rank` directions of each head."""
    rng, layers = np.random.default_rng(1), []

    def reduced(array: Array, heads: int, bases: Array) -> Array:
        rows = array.reshape(heads, config.head_dim, -1)
        return (bases @ (bases.swapaxes(1, 2) @ rows)).reshape(array.shape)

    group = config.heads // config.kv_heads
    for layer in weights.layers:
        bases = np.linalg.qr(rng.standard_normal((config.kv_heads, config.head_dim, rank)))[0]  # (Hkv, D, r)
        parts = np.split(layer.attention.qkv.weight, [config.d_attention, config.d_attention + config.d_kv])
        counts = (config.heads, config.kv_heads, config.kv_heads)
        of_queries = np.repeat(bases, group, axis=0)
        each = [
            reduced(part, n, of_queries if n == config.heads else bases) for part, n in zip(parts, counts, strict=True)
        ]
        qkv = layer.attention.qkv.but(weight=np.concatenate(each))
        if config.bias:
            cuts = [config.d_attention, config.d_attention + config.d_kv]
            of_bias = zip(np.split(layer.attention.qkv.bias, cuts), counts, strict=True)
            qkv.bias = np.concatenate([reduced(b, n, of_queries if n == config.heads else bases) for b, n in of_bias])
        changed: dict[str, Any] = {"qkv": qkv}
        if config.position == "relative":
            vectors = {name: getattr(layer.attention, name) for name in ("content_bias", "position_bias")}
            changed |= {name: reduced(vector, config.heads, bases) for name, vector in vectors.items()}
        layers.append(layer.but(attention=layer.attention.but(**changed)))
    return weights.but(layers=layers)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), config=configs().filter(lambda config: config.position != "rotary"), fused=st.booleans())
def test_heads_of_a_lower_rank_are_unchanged(data: st.DataObject, config: ModelConfig, fused: bool) -> None:
    """For every recipe, grouping, bias and mask, relative positions among them."""
    workload, model = data.draw(workloads(config)), load_model(config, dtype="float64")
    rank = data.draw(st.integers(1, config.head_dim))
    model, inputs = replace(model, weights=of_rank(model.weights, config, rank)), inputs_for(config, workload)
    width = data.draw(st.integers(rank, config.head_dim))
    truth = forward(model, inputs, "dense", causal=workload.causal).output
    found = forward(model, inputs, "narrow", {"width": width, "fused": fused}, causal=workload.causal).output
    np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scores_and_values_are_the_nearest_of_their_rank(kv_heads: int) -> None:
    """Of every key head the matrices of its query heads together, biases among them, with the scale."""
    config = ModelConfig("tiny", "post-norm", 2, 20, 4, 8, kv_heads=kv_heads, vocab=9)
    model = load_model(config, dtype="float64")
    derived = Runner(model, "numpy").prepare("narrow", {"width": 2}).weights.layers[1].attention
    exact, group = model.weights.layers[1].attention, 4 // kv_heads

    def matrices(w: Weights, D: int) -> list[tuple[Array, Array]]:
        joined = np.concatenate([w.qkv.weight, w.qkv.bias[:, None]], 1)
        q, k, v = np.split(joined, [4 * D, (4 + kv_heads) * D])
        q, k, v = q.reshape(kv_heads, group, D, 21), k.reshape(kv_heads, D, 21), v.reshape(kv_heads, D, 21)
        o = w.output.weight.reshape(20, kv_heads, group, D)
        found = []
        for g in range(kv_heads):
            scores = np.concatenate([q[g, i].T @ k[g] for i in range(group)]) / np.sqrt(D)
            outputs = np.concatenate([o[:, g, i] @ v[g] for i in range(group)])
            found.append((scores, outputs))
        return found

    for ours, truth in zip(matrices(derived, 2), matrices(exact, 5), strict=True):
        for low, full in zip(ours, truth, strict=True):
            u, s, vt = np.linalg.svd(full)
            np.testing.assert_allclose(low, u[:, :2] * s[:2] @ vt[:2], rtol=1e-9, atol=1e-9)


def test_causal_decoding_equals_one_pass() -> None:
    config = ModelConfig("tiny", "pre-norm", 2, 20, 4, 8, kv_heads=2, vocab=9, causal=True)
    runner = Runner(load_model(config, dtype="float64"), "numpy")
    ready, ids = runner.prepare("narrow"), np.arange(8)[None, :]
    cache = runner.new_cache(8, ready)
    runner(ids[:, :5], ready, cache=cache)
    stepped = runner.decode(ids[:, 5:], ready, cache).output
    np.testing.assert_allclose(stepped, runner(ids, ready).output[:, 5:], rtol=1e-10, atol=1e-10)
    assert cache.bytes == 2 * 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, width, positions, bytes


def test_maps_stay_and_projections_fall() -> None:
    config = preset("conformer-m")
    dense, half = (costmodel.estimate(name, config, Workload(700)).by_component() for name in ("dense", "narrow"))
    assert half["softmax"] == dense["softmax"]
    assert 2 * half["qkv"].matmul_flops == dense["qkv"].matmul_flops
    assert 2 * half["scores"].matmul_flops == dense["scores"].matmul_flops


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("minilm-l6", {"width": 0}, "width=0"),
        ("minilm-l6", {"width": 33}, "width=33; the heads of minilm-l6 are 32 wide"),
        ("minilm-l6", {"fused": "yes"}, "fused='yes'"),
        ("smollm2-135m", {}, "narrow.width=64"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        costmodel.estimate("narrow", preset(name), Workload(4), params)
    assert "\n" not in str(caught.value)


def test_the_sweep_begins_at_the_full_width() -> None:
    assert NarrowParameters.sweep(preset("minilm-l6")) == {"width": (32, 24, 16, 8)}
    assert NarrowParameters.sweep(preset("smollm2-135m")) == {"width": (64,)}
