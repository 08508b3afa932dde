"""The invariants of KVSharer, and its search against one in plain loops."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import small_llama
from strategies import configs, decoders, inputs_for, kvsharer_parameters, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, EffrefError, InputError
from refimpl.inputs import load_input, sample
from refimpl.methods.kvsharer import KVSharer
from refimpl.methods.steps import Layer
from refimpl.parameters.kvsharer import KVSharerParameters, Strategy, roots
from refimpl.preparation import kvsharer as preparation
from refimpl.recorder import tally

ENGINE = NumpyEngine()
PAIRS = [[2, 0], [4, 3], [5, 2]]  # layer 5 follows layer 2 to layer 0


def at(component: str) -> Any:
    return ENGINE


def _config(**changes: Any) -> ModelConfig:
    return small_llama(**{"layers": 6, **changes})


def _ids(batch: int = 1, length: int = 12, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 40, (batch, length))


@pytest.fixture(autouse=True)
def _no_search_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_SEARCHES", {})


# --- the off knob, bit for bit ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    config=configs(), workload=workloads(), fused=st.booleans(), off=st.sampled_from([{"layers": 0}, {"strategy": []}])
)
def test_off_knob_equals_the_exact_baselines_bit_for_bit(
    config: ModelConfig, workload: Any, fused: bool, off: dict[str, Any]
) -> None:
    """Invariant 1, C = 0: dense, and flash with the fused op."""
    model, inputs = load_model(config), inputs_for(config, workload)
    exact = forward(model, inputs, "flash" if fused else "dense", causal=workload.causal)
    off_knob = forward(model, inputs, "kvsharer", {**off, "fused": fused}, causal=workload.causal)
    np.testing.assert_array_equal(off_knob.output, exact.output)


@settings(max_examples=30, deadline=None)
@given(config=decoders(), past=st.integers(1, 5), steps=st.integers(1, 3))
def test_off_knob_equals_dense_in_decoding_bit_for_bit(config: ModelConfig, past: int, steps: int) -> None:
    runner = Runner(load_model(config), "numpy")
    ids = inputs_for(config, Workload(past + steps))
    outputs = []
    for method, params in (("dense", None), ("kvsharer", {"layers": 0})):
        cache = runner.new_cache(past + steps, method, params)
        outputs.append(
            [
                runner(ids[:, :past], method, params, cache=cache).output,
                runner.decode(ids[:, past:], method, cache, params).output,
            ]
        )
    for exact, off_knob in zip(*outputs, strict=True):
        np.testing.assert_array_equal(off_knob, exact)


# --- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["rotary", "relative", "none"])
@pytest.mark.parametrize("fused", [False, True])
def test_layers_with_equal_keys_and_values_may_share_them(position: str, fused: bool) -> None:
    """Invariant 2: given the same input and the same Wk and Wv, sharing changes nothing, bit for bit."""
    config = _config(layers=2, position=position, kv_heads=6 if position == "relative" else 3)
    weights = load_model(config).weights
    d, first, second = config.d_attention, *(layer.attention.qkv.weight for layer in weights.layers)
    second[d:] = first[d:]
    parameters = KVSharerParameters(strategy=[[1, 0]], fused=fused)
    x = np.random.default_rng(0).standard_normal((2, 9, 24)).astype(np.float32)
    runner = Runner(load_model(config), "numpy")
    tables = runner._tables_for(0, 9, 9)

    def last(program: Any, layers: Any) -> Any:
        return [program.attention(at, x, Layer(i, config, layers[i], True, None, tables)) for i in range(2)][1]

    exact = KVSharer(config, KVSharerParameters(layers=0, fused=fused))
    shared = KVSharer.derive(weights, config, parameters).layers
    np.testing.assert_array_equal(last(KVSharer(config, parameters), shared), last(exact, weights.layers))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), layers=st.integers(1, 12))
def test_every_source_is_an_earlier_layer_with_keys_and_values_of_its_own(data: st.DataObject, layers: int) -> None:
    """Invariant 3, for any pairs in any order and for the layers that stand for all in estimates."""
    config = replace(preset("smollm2-135m"), layers=layers)
    params = data.draw(kvsharer_parameters(config) | st.fixed_dictionaries({"layers": st.integers(0, layers - 1)}))
    parameters = KVSharerParameters(**params)
    parameters.check(config)
    sources = parameters.sources(config)
    shared = [layer for layer, source in enumerate(sources) if source != layer]
    assert len(sources) == layers
    assert all(source <= layer for layer, source in enumerate(sources))
    assert all(sources[source] == source for source in sources)
    assert 0 not in shared
    assert len(shared) == parameters.count(config)
    if params.get("strategy") is not None:
        assert sorted(shared) == sorted(layer for layer, _ in params["strategy"])


def test_chains_are_followed_to_their_end() -> None:
    """Whatever the order of the pairs: layer 5 takes those of layer 3, which takes those of layer 1."""
    assert roots([(3, 1), (5, 3)], 6) == roots([(5, 3), (3, 1)], 6) == (0, 1, 2, 1, 4, 1)
    model, ids = load_model(_config()), _ids()
    outputs = [
        forward(model, ids, "kvsharer", {"strategy": pairs}).output
        for pairs in ([[3, 1], [5, 3]], [[5, 3], [3, 1]], [[3, 1], [5, 1]])
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert not np.allclose(outputs[0], forward(model, ids, "kvsharer", {"strategy": [[3, 1], [5, 4]]}).output)


@pytest.mark.parametrize("position", ["rotary", "relative", "learned"])
@pytest.mark.parametrize("drop", [True, False])
def test_key_and_value_weights_of_a_shared_layer_do_not_matter(position: str, drop: bool) -> None:
    """Invariant 4; those of its source do, and its query weights."""
    config = _config(position=position, kv_heads=6 if position == "relative" else 3, bias=True, max_positions=12)
    params = {"strategy": PAIRS, "drop_projections": drop}

    def output(layer: int | None, rows: slice) -> Any:
        model = load_model(config)
        if layer is not None:
            qkv = model.weights.layers[layer].attention.qkv
            qkv.weight[rows] += 1.0
            qkv.bias[rows] -= 1.0
        return forward(model, _ids(), "kvsharer", params).output

    queries, others = slice(0, config.d_attention), slice(config.d_attention, None)
    exact = output(None, others)
    for layer in (2, 4, 5):
        np.testing.assert_array_equal(output(layer, others), exact)
        assert not np.allclose(output(layer, queries), exact)
    assert not np.allclose(output(3, others), exact)


def test_dropped_projections_are_the_same_function_bit_for_bit() -> None:
    model, ids = load_model(_config(bias=True)), _ids()
    dropped, discarded = (
        forward(model, ids, "kvsharer", {"strategy": PAIRS, "drop_projections": drop}).output for drop in (True, False)
    )
    np.testing.assert_array_equal(dropped, discarded)


@pytest.mark.parametrize("engine", ["numpy", "numba"])
@pytest.mark.parametrize("fused", [False, True])
def test_decoding_equals_prefill(engine: str, fused: bool) -> None:
    """Invariant 5: token by token, and in two parts, within rounding of float64; shared layers read views."""
    params, ids = {"strategy": PAIRS, "fused": fused}, _ids(2)
    runner = Runner(load_model(_config(), dtype="float64"), engine)
    whole = runner(ids, "kvsharer", params).output
    cache = runner.new_cache(12, "kvsharer", params, batch=2)
    parts = [runner(ids[:, :5], "kvsharer", params, cache=cache), runner.decode(ids[:, 5:], "kvsharer", cache, params)]
    np.testing.assert_allclose(np.concatenate([part.output for part in parts], axis=1), whole, atol=1e-12)


def test_no_keys_and_values_outlive_their_last_use() -> None:
    config = _config()
    parameters = KVSharerParameters(strategy=PAIRS)
    program, model = KVSharer(config, parameters), load_model(config)
    Runner(replace(model, weights=KVSharer.derive(model.weights, config, parameters)), "numpy")(_ids(), program)
    assert program.kept == {}


@pytest.mark.parametrize("fused", [False, True])
def test_causal_sharing_does_not_see_the_future(fused: bool) -> None:
    model, ids = load_model(_config()), _ids()
    changed = ids.copy()
    changed[0, 7:] = 39 - changed[0, 7:]
    kept, other = (forward(model, x, "kvsharer", {"strategy": PAIRS, "fused": fused}).output for x in (ids, changed))
    np.testing.assert_array_equal(kept[:, :7], other[:, :7])
    assert not np.allclose(kept[:, 7:], other[:, 7:])


@pytest.mark.parametrize("fused", [False, True])
def test_padding_does_not_matter(fused: bool) -> None:
    model, ids = load_model(_config(causal=False)), _ids()
    changed, mask = ids.copy(), np.arange(12)[None, None, None, :] < 9
    changed[0, 9:] = 39 - changed[0, 9:]
    params = {"strategy": PAIRS, "fused": fused}
    kept, other = (forward(model, x, "kvsharer", params, mask=mask).output for x in (ids, changed))
    np.testing.assert_array_equal(kept[:, :9], other[:, :9])


@pytest.mark.parametrize("params", [{}, {"fused": True}, {"drop_projections": False}])
@pytest.mark.parametrize("recipe", ["pre-norm", "conformer"])
def test_fast_engine_within_twice_the_rounding_of_numpy(recipe: str, params: dict[str, Any]) -> None:
    config = _config() if recipe == "pre-norm" else preset("conformer-m")
    config = replace(config, layers=6)
    given = {"strategy": PAIRS, **params}
    inputs = _ids(2, 150) if recipe == "pre-norm" else inputs_for(config, Workload(70, 2), dtype=np.float32)
    exact = forward(load_model(config, dtype="float64"), inputs, "kvsharer", given).output
    single = load_model(config)
    honest = np.abs(forward(single, inputs, "kvsharer", given).output - exact).max()
    fast = np.abs(forward(single, inputs, "kvsharer", given, engine="numba").output - exact).max()
    assert fast <= 2 * honest + 1e-6 * np.abs(exact).max()


# --- the search -------------------------------------------------------------------------------------------------------


def plain_model(weights: Any, c: ModelConfig, ids: Any, sources: tuple[int, ...]) -> tuple[Any, list[Any], list[Any]]:
    """One sequence through the small Llama in loops over positions and heads: hidden states, keys, values by layer."""

    def norm(row: Any, gain: Any) -> Any:
        return row / math.sqrt(sum(v * v for v in row) / len(row) + c.eps) * gain

    def rotated(row: Any, position: int) -> Any:
        half, out = len(row) // 2, np.empty_like(row)
        for i in range(half):
            angle = position / c.rope_base ** (i / half)
            out[i] = row[i] * math.cos(angle) - row[half + i] * math.sin(angle)
            out[half + i] = row[i] * math.sin(angle) + row[half + i] * math.cos(angle)
        return out

    rows = [weights.stem.embedding[token].copy() for token in ids]
    width, keys, values = c.head_dim, [], []
    for index, layer in enumerate(weights.layers):
        normed = [norm(row, layer.attention_norm.weight) for row in rows]
        qkv = [layer.attention.qkv.weight @ row for row in normed]
        cut = [[row[start : start + width] for start in range(0, len(row), width)] for row in qkv]
        k = [[rotated(head, t) for head in cut[t][c.heads : c.heads + c.kv_heads]] for t in range(len(rows))]
        keys.append(np.array(k))  # (T, Hkv, D)
        values.append(np.array([cut[t][c.heads + c.kv_heads :] for t in range(len(rows))]))
        k, v = keys[sources[index]], values[sources[index]]
        for t in range(len(rows)):
            heads = []
            for h in range(c.heads):
                query, group = rotated(cut[t][h], t), h // (c.heads // c.kv_heads)
                raw = [math.exp(float(query @ k[s, group]) / math.sqrt(width)) for s in range(t + 1)]
                heads.append(sum(weight * v[s, group] for s, weight in enumerate(raw)) / sum(raw))
            rows[t] = rows[t] + layer.attention.output.weight @ np.concatenate(heads)
        for t, row in enumerate(rows):
            gate, up = np.split(layer.feed_forward.up.weight @ norm(row, layer.feed_forward_norm.weight), 2)
            rows[t] = row + layer.feed_forward.down.weight @ (gate / (1 + np.exp(-gate)) * up)
    return np.array([norm(row, weights.final_norm.weight) for row in rows]), keys, values


@pytest.mark.parametrize("params", [{}, {"fused": True}, {"drop_projections": False}])
@pytest.mark.parametrize("pairs", [[[2, 1], [4, 0], [5, 1]], [[5, 4], [4, 2], [3, 0]]])
def test_program_equals_plain_loops(pairs: list[list[int]], params: dict[str, Any]) -> None:
    """Interleaved sources, and a chain: hidden states, and logits by the tied head."""
    model, ids = load_model(_config(), dtype="float64"), _ids(2, 7)
    sources = {(5, 1): (0, 1, 1, 3, 0, 1), (3, 0): (0, 1, 2, 0, 2, 2)}[tuple(pairs[-1])]
    expected = np.array([plain_model(model.weights, model.config, one, sources)[0] for one in ids])  # (B, T, d)
    found = forward(model, ids, "kvsharer", {"strategy": pairs, **params}).output
    np.testing.assert_allclose(found, expected @ model.weights.stem.embedding.T, atol=1e-12)


def plain_search(
    model: Any, samples: Any, count: int, distance: str, similarity: str, order: str, t: float
) -> list[Any]:
    """Algorithm 1 in loops: (layer, source, distance, similarity, accepted) of every pair that is tried."""
    c, everything = model.config, range(model.config.layers)
    runs = [plain_model(model.weights, c, ids, tuple(everything)) for ids in samples]
    exact = [hidden for hidden, _, _ in runs]

    def apart(which: int, i: int, j: int) -> float:
        means = [sum(run[which][layer] for run in runs) / len(runs) for layer in (i, j)]  # (T, Hkv, D)
        squares = [[float(sum((a - b) ** 2)) for a, b in zip(*rows, strict=True)] for rows in zip(*means, strict=True)]
        flat = [square for row in squares for square in row]
        return math.sqrt(sum(flat)) if distance == "flattened" else sum(map(math.sqrt, flat)) / len(flat)

    def cosine(x: Any, y: Any) -> float:
        x, y = x.ravel().tolist(), y.ravel().tolist()
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))

    apart_of = {(i, j): (apart(1, i, j) + apart(2, i, j)) / 2 for i in everything for j in range(i)}
    left = sorted(apart_of, key=lambda pair: -apart_of[pair] if order == "dissimilar" else apart_of[pair])
    tried, source_of = [], {}
    for i, j in left:
        if len(source_of) == count:
            break
        if i in source_of:
            continue
        trial = {**source_of, i: j}
        sources = []
        for layer in everything:
            while layer in trial:
                layer = trial[layer]
            sources.append(layer)
        hidden = [plain_model(model.weights, c, ids, tuple(sources))[0] for ids in samples]
        if similarity == "per_sample_mean":
            alike = sum(cosine(x, y) for x, y in zip(hidden, exact, strict=True)) / len(samples)
        else:
            alike = cosine(sum(hidden) / len(samples), sum(exact) / len(samples))
        tried.append((i, j, apart_of[i, j], alike, alike > t))
        if alike > t:
            source_of[i] = j
    return tried


@pytest.mark.parametrize("order", ["dissimilar", "similar"])
@pytest.mark.parametrize("similarity", ["per_sample_mean", "of_mean"])
@pytest.mark.parametrize("distance", ["flattened", "per_position"])
def test_search_equals_plain_loops(distance: str, similarity: str, order: str) -> None:
    """Every pair that is tried, its distance, its similarity and whether it is accepted; some are not."""
    config = _config(layers=5, d_model=8, heads=2, kv_heads=1, d_ff=6)
    model, samples = load_model(config, seed=1, dtype="float64"), _ids(3, 6)
    scaled_layers(model)
    expected = plain_search(model, samples, 3, distance, similarity, order, 0.5)
    given = {"layers": 3, "distance": distance, "similarity": similarity, "order": order}
    strategy = Runner(model, "numpy").prepare("kvsharer", given, samples).parameters.strategy
    tried = [tuple(row.values()) for row in strategy.record["tried"]]
    assert [row[:2] + row[4:] for row in tried] == [row[:2] + row[4:] for row in expected]
    np.testing.assert_allclose([row[2:4] for row in tried], [row[2:4] for row in expected], rtol=1e-9)
    assert not all(row[4] for row in tried)
    assert list(strategy) == [row[:2] for row in expected if row[4]]


def scaled_layers(model: Any) -> None:
    """Make layers differ in size: random weights of one scale have keys that are all alike."""
    for index, layer in enumerate(model.weights.layers):
        layer.attention.qkv.weight[:] *= 1.5 + 0.7 * ((3 * index) % 5)
        layer.attention.output.weight[:] *= 2.0


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_pairs_are_tried_with_falling_distance(engine: str) -> None:
    """Invariant 7, and the same search on both engines."""
    model, ids = load_model(_config()), _ids(3, 40)
    params = {"layers": 4, "threshold": 0.2}
    ready = Runner(model, engine).prepare("kvsharer", params, ids)
    tried = ready.parameters.strategy.record["tried"]
    distances = [row["distance"] for row in tried]
    assert distances == sorted(distances, reverse=True)
    assert all(row["source"] < row["layer"] for row in tried)
    exact = Runner(load_model(_config(), dtype="float64"), "numpy").prepare("kvsharer", params, ids)
    for found, expected in zip(tried, exact.parameters.strategy.record["tried"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", ["flattened", "per_position"])
def test_distances_are_symmetric_with_a_zero_diagonal_and_do_not_feel_rotation(distance: str) -> None:
    """Invariant 7; the same rotation of both layers' keys changes no distance: either kind of keys may be taken."""
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 7, 3, 10, 4))  # (L, Hkv, T, D)
    found = preparation.layer_distances(list(keys), list(values), distance)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(np.diag(found), 0)
    angles = rng.standard_normal((10, 2))
    turned = [ENGINE.rotary(k[None], np.cos(angles), np.sin(angles), False)[0] for k in keys]
    np.testing.assert_allclose(preparation.layer_distances(turned, list(values), distance), found, rtol=1e-12)


def test_thresholds_outside_of_the_cosine_accept_all_or_nothing() -> None:
    """Invariant 8: below -1 the first C pairs with different later layers, above 1 none, which raises."""
    runner, ids = Runner(load_model(_config(layers=4)), "numpy"), _ids(2)
    everything = runner.prepare("kvsharer", {"layers": 3, "threshold": -1.5}, ids).parameters.strategy
    assert sorted(layer for layer, _ in everything) == [1, 2, 3]
    assert all(row["accepted"] for row in everything.record["tried"])
    with pytest.raises(ConfigError, match="only 0 of 6 pairs"):
        runner.prepare("kvsharer", {"layers": 1, "threshold": 1.5}, ids)


def test_one_search_serves_all_smaller_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy acceptance: a search for C begins with that for fewer, and goes on where that stopped."""
    passes: list[int] = []
    run = Runner.__call__

    def counted(self: Runner, *args: Any, **given: Any) -> Any:
        passes.append(1)
        return run(self, *args, **given)

    monkeypatch.setattr(Runner, "__call__", counted)
    model, ids = load_model(_config()), _ids(2, 20)
    found = {c: Runner(model, "numpy").prepare("kvsharer", {"layers": c}, ids).parameters.strategy for c in (2, 3, 1)}
    assert len(passes) == 1 + len(found[3].record["tried"])
    for count, strategy in found.items():
        assert strategy == found[3][:count]
        assert sum(row["accepted"] for row in strategy.record["tried"]) == count
        assert strategy.record["tried"][-1]["accepted"]


def test_other_weights_or_samples_are_searched_anew() -> None:
    model, ids = load_model(_config()), _ids(2, 20)

    def distance(ids: Any, **given: Any) -> float:
        ready = Runner(model, "numpy").prepare("kvsharer", {"layers": 1, **given}, ids)
        return ready.parameters.strategy.record["tried"][0]["distance"]

    first = distance(ids)
    assert distance(ids) == first
    assert distance(ids[:, ::-1]) != first
    assert distance(ids, distance="per_position") != first
    for layer in model.weights.layers:
        layer.attention.qkv.weight[:] *= 2
    assert distance(ids) > 1.5 * first


def test_random_order_is_seeded() -> None:
    orders = [preparation.ranked_pairs(np.zeros((6, 6)), "random", seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == sorted(preparation.ranked_pairs(np.zeros((6, 6)), "dissimilar", 0))


def test_equal_distances_are_tried_in_the_order_of_layers() -> None:
    expected = [(1, 0), (2, 0), (2, 1)]
    assert preparation.ranked_pairs(np.ones((3, 3)), "dissimilar", 0) == expected
    assert preparation.ranked_pairs(np.ones((3, 3)), "similar", 0) == expected


@pytest.mark.parametrize(
    ("shape", "given", "samples", "left_out"),
    [
        ((1, 200), {}, (3, 64), 8),
        ((1, 40), {}, (1, 40), 0),
        ((5, 10), {"sample_tokens": 4}, (10, 4), 10),
        ((2, 64), {"samples": 1}, (1, 64), 64),
        ((1, 3000), {}, (30, 64), 1080),
    ],
)
def test_rows_are_cut_into_samples_and_the_rest_is_counted(
    shape: tuple[int, int], given: dict[str, Any], samples: tuple[int, int], left_out: int
) -> None:
    ids = np.arange(math.prod(shape)).reshape(shape) % 40
    found, rest = preparation.calibration_samples(KVSharerParameters(**given), _config(), ids)
    assert (found.shape, rest) == (samples, left_out)
    np.testing.assert_array_equal(found[0], ids[0, : samples[1]])
    assert found.size + rest == ids.size


@pytest.mark.parametrize("recipe", ["post-norm", "pre-norm", "conformer"])
def test_search_runs_on_frames_and_patches(recipe: str) -> None:
    config = ModelConfig(
        "tiny", recipe, 4, 16, 2, 8, stem="patches" if recipe == "pre-norm" else "frames", features=3, conv_kernel=3,
        strides=() if recipe == "pre-norm" else (2,), position="none",
    )  # fmt: skip
    runner, inputs = Runner(load_model(config), "numpy"), inputs_for(config, Workload(9, 2), dtype=np.float32)
    ready = runner.prepare("kvsharer", {"layers": 2}, inputs)
    record = ready.parameters.strategy.record
    assert (record["samples"], record["sample_length"], record["left_out"]) == (2, 9, 0)
    run = runner(inputs, ready)
    assert tally(run.calls) == costmodel.estimate("kvsharer", config, Workload(9, 2), {"layers": 2}).tally()


def test_search_cuts_the_rows_of_a_streaming_model_into_chunks() -> None:
    """Twelve positions are three chunks of four, each with its right context; then all run as a stream."""
    config = ModelConfig(
        "tiny", "emformer", 4, 16, 2, 8, stem="stacked", features=3, stack=2, chunk=4, left_context=6, right_context=1
    )
    runner, inputs = Runner(load_model(config), "numpy"), inputs_for(config, Workload(12), dtype=np.float32)
    samples, left_out = preparation.calibration_samples(KVSharerParameters(), config, inputs)
    assert (samples.shape, left_out) == ((3, 10, 3), 0)
    np.testing.assert_array_equal(samples[1], inputs[0, 8:18])
    ready = runner.prepare("kvsharer", {"layers": 2, "threshold": -1.5}, inputs)
    run = runner(inputs, ready)
    assert tally(run.calls) == costmodel.estimate("kvsharer", config, Workload(12), ready.parameters).tally()


def test_progress_is_told_with_the_pair_and_the_time() -> None:
    told: list[tuple[str, float]] = []
    Runner(load_model(_config()), "numpy").prepare(
        "kvsharer", {"layers": 3}, _ids(2), lambda message, fraction: told.append((message, fraction))
    )
    assert told[0][0].startswith("kvsharer: calibrating on 2 samples of 12 positions")
    assert any("1 of 3 layers share, trying pair" in message for message, _ in told)
    assert told[-1][1] == 1.0
    assert [fraction for _, fraction in told] == sorted(fraction for _, fraction in told)


@pytest.mark.models
@pytest.mark.slow
def test_search_on_real_weights_and_text() -> None:
    """SmolLM2 on 30 samples of 64 tokens: far from random layers, and better than sharing the most similar pairs."""
    from refimpl.weights import pretrained

    if pretrained.folder("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not on this machine: effref models fetch smollm2-135m")
    model = load_model("smollm2-135m", weights="pretrained")
    ids = load_input(model, sample("moby-dick")).array
    strategy = Runner(model, "numba").prepare("kvsharer", {"layers": 4}, ids).parameters.strategy
    record = strategy.record
    assert (record["samples"], record["sample_length"]) == (30, 64)
    assert list(strategy) == [(27, 11), (28, 27), (19, 11), (21, 11)]
    similarities = [row["similarity"] for row in record["tried"]]
    np.testing.assert_allclose(similarities, [0.97180, 0.94016, 0.90170, 0.85645], atol=2e-4)


@pytest.mark.models
@pytest.mark.slow
def test_perplexity_of_real_weights_with_three_shared_layers() -> None:
    """The figures of the page: similar pairs hurt this model less than dissimilar ones, unlike those of the paper."""
    from refimpl.language import negative_log_likelihood, windows
    from refimpl.weights import pretrained

    if pretrained.folder("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not on this machine: effref models fetch smollm2-135m")
    model = load_model("smollm2-135m", weights="pretrained")
    runner, calibration = Runner(model, "numba"), load_input(model, sample("moby-dick")).array
    text = windows(model, sample("union").read_text("utf-8"), 512, 4)

    def perplexity(params: dict[str, Any]) -> float:
        ready = runner.prepare("kvsharer", {**params, "fused": True}, calibration)
        runs = [runner(ids[None, :-1], ready, record=False).output for ids in text]
        losses = [negative_log_likelihood(run, ids[None, 1:]) for run, ids in zip(runs, text, strict=True)]
        return float(np.exp(np.mean(losses)))

    found = [perplexity(params) for params in ({"layers": 0}, {"layers": 3}, {"layers": 3, "order": "similar"})]
    assert found == pytest.approx([22.4536, 38.2292, 25.4997], rel=1e-3)


# --- costs ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), config=decoders(), past=st.integers(0, 9), batch=st.integers(1, 2), prefill=st.booleans())
def test_costs_are_those_of_the_paper_notes(
    data: st.DataObject, config: ModelConfig, past: int, batch: int, prefill: bool
) -> None:
    """Per shared layer: projections less 4 T d d_kv FLOPs, no append, no cache; reads of keys and values as ever."""
    count, drop = data.draw(st.integers(0, config.layers - 1)), data.draw(st.booleans())
    work = Workload(5, batch, fills_cache=True) if prefill else Workload(1, batch, "decode", kv_len=past)
    rows, keys = batch * work.seq, past * (not prefill) + work.seq
    params = {"layers": count, "drop_projections": drop}
    dense, shared = (costmodel.estimate(m, config, work, p) for m, p in (("dense", None), ("kvsharer", params)))
    before, after = dense.by_component(), shared.by_component()
    d, d_kv, bias = config.d_model, config.d_kv, int(config.bias)
    for component in ("scores", "softmax", "weighted-sum", "output", "feed-forward", "norm", "residual"):
        assert after[component] == before[component]
    gone = count if drop else 0
    assert before["qkv"].matmul_flops - after["qkv"].matmul_flops == gone * 4 * rows * d * d_kv
    assert before["qkv"].bytes_written - after["qkv"].bytes_written == gone * 4 * 2 * rows * d_kv
    assert before["qkv"].bytes_read - after["qkv"].bytes_read == gone * 4 * 2 * (d + bias) * d_kv
    assert dense.params_bytes - shared.params_bytes == gone * 4 * 2 * (d + bias) * d_kv
    assert shared.appended_bytes == 4 * (config.layers - count) * 2 * rows * d_kv
    assert shared.cache_bytes == 4 * (config.layers - count) * 2 * batch * keys * d_kv
    assert shared.total.kv_bytes == dense.total.kv_bytes


@settings(max_examples=60, deadline=None)
@given(data=st.data(), config=configs())
def test_costs_depend_on_the_number_of_shared_layers_alone(data: st.DataObject, config: ModelConfig) -> None:
    """All but memory without a cache, of which an unsearched strategy takes the most that any of its size can."""
    params = data.draw(kvsharer_parameters(config))
    known = costmodel.estimate("kvsharer", config, Workload(6), params)
    count = len(params.pop("strategy"))
    unknown = costmodel.estimate("kvsharer", config, Workload(6), {**params, "layers": count})
    assert (known.tally(), known.params_bytes) == (unknown.tally(), unknown.params_bytes)
    assert known.peak_bytes <= unknown.peak_bytes


def test_key_and_value_weights_of_llama_2_7b_are_a_sixth_of_a_layer() -> None:
    """16.6 % of a layer's weights; a quarter of the layers saves 4.1 % of all layers' and nothing as the code runs."""
    config = preset("llama-2-7b")
    table = costmodel.estimate("dense", replace(config, layers=1), Workload(1)).params_bytes
    layers = costmodel.estimate("dense", config, Workload(1)).params_bytes - table
    layers = layers * 32 // 31  # those of 32 layers
    saved = [
        costmodel.estimate("dense", config, Workload(1)).params_bytes
        - costmodel.estimate("kvsharer", config, Workload(1), {"layers": 8, "drop_projections": drop}).params_bytes
        for drop in (True, False)
    ]
    assert saved[0] / 8 / (layers / 32) == pytest.approx(0.166, abs=0.0005)
    assert saved[0] / layers == pytest.approx(0.041, abs=0.0005)
    assert saved[1] == 0


def test_decoding_cache_holds_own_layers_only() -> None:
    """Invariant 6, of the arrays themselves."""
    config = _config()
    runner, ids = Runner(load_model(config), "numpy"), _ids(2)
    ready = runner.prepare("kvsharer", {"layers": 4, "threshold": -1.5}, ids)
    cache = runner.new_cache(9, ready, batch=2)
    assert cache.bytes == 4 * (6 - 4) * 2 * 2 * 9 * config.d_kv
    run = runner(ids[:, :9], ready, cache=cache)
    assert sum(call.op == "append" for call in run.calls) == 2 * (6 - 4)


# --- refusals and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": -1}, "layers=-1"),
        ({"layers": 1.5}, "whole number"),
        ({"layers": 6}, "at most 5 can share"),
        ({"strategy": [[6, 1]]}, "layers 0 to 5"),
        ({"strategy": [[0, 0]]}, "layer 0"),
        ({"strategy": [[2, 3]]}, "must be earlier"),
        ({"strategy": [[2, 2]]}, "must be earlier"),
        ({"strategy": [[3, 1], [3, 2]]}, "twice"),
        ({"strategy": [[3]]}, "pairs"),
        ({"strategy": [3, 1]}, "pairs"),
        ({"strategy": [[3, -1]]}, "pairs"),
        ({"strategy": [[3, True]]}, "pairs"),
        ({"strategy": [[3, 1.0]]}, "pairs"),
        ({"strategy": {"3": 1}}, "pairs"),
        ({"strategy": 7}, "pairs"),
        ({"strategy": "absent.json"}, "absent.json' cannot be read"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": "high"}, "number"),
        ({"distance": "cosine"}, "flattened"),
        ({"similarity": "mean"}, "per_sample_mean"),
        ({"order": "ascending"}, "dissimilar"),
        ({"samples": 0}, "samples=0"),
        ({"sample_tokens": 0}, "sample_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"drop_projections": "no"}, "drop_projections"),
        ({"fused": 2}, "fused"),
        ({"stratgy": []}, "did you mean 'strategy'"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        forward(load_model(_config()), _ids(), "kvsharer", params)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("kvsharer", _config(), Workload(4), params)


def test_nothing_runs_with_layers_that_stand_for_others() -> None:
    """A number of layers is enough for an estimate and not for a program."""
    config = _config()
    assert costmodel.estimate("kvsharer", config, Workload(4), {"layers": 2}).total.flops
    with pytest.raises(ConfigError, match="which 2 layers share is not known"):
        KVSharer(config, KVSharerParameters(layers=2))
    with pytest.raises(ConfigError, match="there are none: prepare it with inputs"):
        Runner(load_model(config), "numpy").new_cache(9, "kvsharer", {"layers": 2})


def test_search_on_nothing_is_refused() -> None:
    runner = Runner(load_model(_config()), "numpy")
    with pytest.raises(InputError, match="at least one row"):
        runner.prepare("kvsharer", {"layers": 1}, np.zeros((0, 9), int))
    with pytest.raises(EffrefError, match="reads tokens"):
        runner.prepare("kvsharer", {"layers": 1}, np.arange(9))


@pytest.fixture
def document() -> dict[str, Any]:
    """What a search writes."""
    ready = Runner(load_model(_config()), "numpy").prepare("kvsharer", {"layers": 3}, _ids(2, 20))
    return ready.parameters.to_document()


def _written(folder: Path, text: str | bytes) -> str:
    path = folder / "strategy.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_gives_the_strategy_back(document: dict[str, Any], tmp_path: Path) -> None:
    """As a path, in parameters that print their pairs, and in the same document again."""
    assert document["effref"] == "kvsharer strategy"
    assert (document["version"], document["model"], document["layers"]) == (1, "tiny", 6)
    path = _written(tmp_path, json.dumps(document))
    for form in (path, Path(path)):
        parameters = KVSharerParameters(strategy=form)
        assert [list(pair) for pair in parameters.strategy] == document["pairs"]
        assert parameters.to_document() == document
    assert json.loads(json.dumps(asdict(parameters)))["strategy"] == document["pairs"]
    assert parameters == KVSharerParameters(strategy=document["pairs"])
    assert hash(parameters) == hash(KVSharerParameters(strategy=document["pairs"]))
    model, ids = load_model(_config()), _ids()
    np.testing.assert_array_equal(
        forward(model, ids, "kvsharer", {"strategy": path}).output,
        forward(model, ids, "kvsharer", {"strategy": document["pairs"]}).output,
    )


def test_a_strategy_for_another_number_of_layers_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    path = _written(tmp_path, json.dumps(document))
    for config in (_config(layers=7), _config(layers=5)):
        with pytest.raises(ConfigError, match=f"for a model of 6 layers; tiny has {config.layers}"):
            costmodel.estimate("kvsharer", config, Workload(4), {"strategy": path})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effref": "headshare matches"}, "no kvsharer strategy"),
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"layers": None}, "layers is None"),
        ({"layers": "6"}, "layers is '6'"),
        ({"layers": True}, "layers is True"),
        ({"pairs": None}, "pairs"),
        ({"pairs": [[1, 0, 2]]}, "pairs"),
        ({"pairs": [[1, 3]]}, "must be earlier"),
        ({"pairs": [[0, 0]]}, "layer 0"),
        ({"pairs": [[9, 0]]}, "layers 0 to 5"),
        ({"pairs": "[[1, 0]]"}, "pairs"),
    ],
)
def test_changed_files_are_refused(
    document: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = _written(tmp_path, json.dumps({**document, **changes}))
    with pytest.raises(ConfigError, match=message) as refused:
        costmodel.estimate("kvsharer", _config(), Workload(4), {"strategy": path})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, b"\xff\xfe\x00", '{"pairs": [[1, 0]]}'])
def test_damaged_files_are_refused(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"JSON file|no kvsharer strategy") as refused:
        KVSharerParameters(strategy=_written(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_a_document_cut_anywhere_is_refused_or_whole(document: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(document)
    for length in range(0, len(text), 7):
        with pytest.raises(ConfigError):
            KVSharerParameters(strategy=_written(tmp_path, text[:length]))


def test_folder_or_forbidden_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KVSharerParameters(strategy=str(tmp_path))


def test_parameters_without_a_strategy_have_no_document() -> None:
    with pytest.raises(ConfigError, match="no strategy yet"):
        KVSharerParameters().to_document()
    assert KVSharerParameters(strategy=[[2, 1]]).to_document()["pairs"] == [[2, 1]]


def test_sweep_is_that_of_the_paper_and_half_of_the_layers() -> None:
    """12.5, 25 and 37.5 % of 32 layers."""
    assert KVSharerParameters.sweep(preset("llama-2-7b")) == {"layers": (0, 4, 8, 12, 16)}
    assert KVSharerParameters.sweep(_config(layers=1)) == {"layers": (0,)}
    assert KVSharerParameters().count(preset("llama-2-7b")) == 8


def test_a_strategy_is_a_tuple_that_survives_copies() -> None:
    import copy
    import pickle

    strategy = Strategy([(2, 1)], {"layers": 6})
    for copied in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert copied == strategy == ((2, 1),)
        assert copied.record == {"layers": 6}


def test_exact_layers_below_the_first_shared_one_are_untouched() -> None:
    """Sharing only the last layer of two leaves the first as it is, so that its output is that of one layer."""
    config = _config(layers=2, head=False, final_norm=False)
    model, ids = load_model(config), _ids()
    seen: list[Any] = []

    class Spy(KVSharer):
        def attention(self, at: Any, x: Any, layer: Layer) -> Any:
            seen.append(x.copy())
            return super().attention(at, x, layer)

    parameters = KVSharerParameters(strategy=[[1, 0]], drop_projections=False)
    Runner(model, "numpy")(ids, Spy(config, parameters))
    shared = list(seen)
    seen.clear()
    Runner(model, "numpy")(ids, Spy(config, KVSharerParameters(layers=0)))
    for x, y in zip(shared, seen, strict=True):
        np.testing.assert_array_equal(x, y)
