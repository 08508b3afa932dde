"""Linformer: projections along time, their masks, and where they make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, inputs_for, workloads

import costmodel
from refimpl import Workload, forward, load_model
from refimpl.config import ModelConfig, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.methods.linformer import projection
from refimpl.recorder import Recorder

TINY = ModelConfig("tiny", "post-norm", 1, 24, 4, 8, vocab=30, norm="layer", final_norm=False)
Array = np.ndarray


def layer_of(model: Any, ids: Array, mask: Array | None, params: dict[str, Any]) -> Array:
    """The attention sublayer of a model of one layer alone: (B, T, d)."""
    from refimpl.methods.linformer import Linformer
    from refimpl.methods.steps import Layer
    from refimpl.parameters.linformer import LinformerParameters

    x = model.weights.stem.embedding[ids]
    program = Linformer(model.config, LinformerParameters(**params))
    layer = Layer(0, model.config, model.weights.layers[0], False, mask, ())
    return np.asarray(program.attention(Recorder(NumpyEngine()).at, x, layer))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["average", "random"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_softmax_over_projected_keys(masked: bool, kind: str, fused: bool) -> None:
    """In plain products, head by head and sequence by sequence; hidden keys count as zeros."""
    model = load_model(TINY, dtype="float64")
    ids, length = np.random.default_rng(0).integers(0, 30, (2, 11)), 4
    seen = np.ones((2, 11), bool)
    seen[1, 5:] = not masked
    params = {"length": length, "projection": kind, "fused": fused}
    found = layer_of(model, ids, seen[:, None, None, :] if masked else None, params)
    w, e = model.weights.layers[0].attention, projection(length, 11, kind, 0, "float64")
    for b in range(2):
        x = model.weights.stem.embedding[ids[b]]
        q, k, v = np.split(x @ w.qkv.weight.T + w.qkv.bias, 3, axis=1)
        heads = []
        for h in range(4):
            columns = slice(6 * h, 6 * h + 6)
            keys, values = (e @ (part[:, columns] * seen[b][:, None]) for part in (k, v))
            scores = q[:, columns] @ keys.T / np.sqrt(6)
            some = [any(seen[b, t] for t in range(11) if e[r, t]) for r in range(length)]
            weights = np.where(some, np.exp(scores), 0)
            heads.append(weights / weights.sum(1, keepdims=True) @ values)
        truth = np.concatenate(heads, 1) @ w.output.weight.T + w.output.bias
        np.testing.assert_allclose(found[b], truth, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_means_are_of_neighbours_and_all_positions_count(length: int, positions: int) -> None:
    length = min(length, positions)
    e = projection(length, positions, "average", 0, "float64")
    np.testing.assert_allclose(e.sum(1), 1)
    assert ((e > 0).sum(0) == 1).all()
    assert set((e > 0).sum(1)) <= {positions // length, -(-positions // length)}
    assert np.array_equal(e, np.eye(positions)) == (length == positions)


def test_random_projections_have_variance_1_over_k_and_a_seed() -> None:
    e = projection(64, 900, "random", 0, "float32")
    assert e.dtype == np.float32
    assert abs(e.std() * 8 - 1) < 0.02
    assert np.array_equal(e, projection(64, 900, "random", 0, "float32"))
    assert not np.array_equal(e, projection(64, 900, "random", 1, "float32"))


def test_equal_neighbours_are_unchanged_by_their_means() -> None:
    """Without positions, k runs of equal tokens have k different keys: softmax over means has their weights."""
    model, ids = load_model(TINY, dtype="float64"), np.repeat([[3, 9, 4]], 4, axis=1)
    dense, found = forward(model, ids, "dense").output, forward(model, ids, "linformer", {"length": 3}).output
    np.testing.assert_allclose(found, dense, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), config=configs(), fused=st.booleans())
def test_as_many_keys_as_positions_are_exact_bit_for_bit(data: st.DataObject, config: ModelConfig, fused: bool) -> None:
    workload = data.draw(workloads(config))
    able = not (config.causal or workload.causal or config.position == "relative")
    length = data.draw(st.none() | st.integers(workload.seq, 9)) if able else None
    model, inputs = load_model(config), inputs_for(config, workload)
    base = forward(model, inputs, "flash" if fused else "dense", causal=workload.causal).output
    found = forward(model, inputs, "linformer", {"length": length, "fused": fused}, causal=workload.causal).output
    np.testing.assert_array_equal(found, base)


def test_a_sequence_that_is_hidden_altogether_is_finite() -> None:
    model, ids = load_model(TINY), np.arange(16).reshape(2, 8)
    mask = np.array([[True] * 8, [False] * 8])[:, None, None, :]
    found = forward(model, ids, "linformer", {"length": 3}, mask=mask).output
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], forward(model, ids, "dense", mask=mask).output[1])


def test_cost_grows_with_the_length_not_its_square() -> None:
    config = preset("minilm-l6")
    costs = [costmodel.estimate("linformer", config, Workload(T)).total for T in (1024, 2048, 3072)]
    assert costs[2].matmul_flops - costs[1].matmul_flops == costs[1].matmul_flops - costs[0].matmul_flops
    lengths = costmodel.estimate("linformer", config, Workload(np.array([100, 256, 257]))).total
    for i, T in enumerate((100, 256, 257)):
        assert lengths.matmul_flops[i] == costmodel.estimate("linformer", config, Workload(T)).total.matmul_flops


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("minilm-l6", {"length": 0}, "length=0"),
        ("minilm-l6", {"projection": "learned"}, "projection='learned'"),
        ("minilm-l6", {"seed": -1}, "seed=-1"),
        ("gpt2", {}, "gpt2 cannot be causal under it"),
        ("conformer-m", {}, "relative positions"),
        ("emformer-rnnt-base", {}, "sees chunks"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        costmodel.estimate("linformer", preset(name), Workload(4), params)
    assert "\n" not in str(caught.value)


def test_causal_passes_and_masks_of_queries_are_refused() -> None:
    model, ids = load_model(TINY), np.arange(6)[None, :]
    with pytest.raises(ConfigError, match="cannot be causal"):
        forward(model, ids, "linformer", {"length": 2}, causal=True)
    with pytest.raises(ConfigError, match="cannot be causal"):
        costmodel.estimate("linformer", TINY, Workload(6, causal=True), {"length": 2})
    with pytest.raises(UnsupportedError, match="give one of keys alone"):
        forward(model, ids, "linformer", {"length": 2}, mask=np.ones((1, 1, 6, 6), bool))
