"""The invariants of folding attention."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import prefilled_and_decoded
from strategies import RECIPES, configs, decoders, divisors, inputs_for, workloads

import costmodel
from costmodel.methods.folding import Folding as FoldingCost
from costmodel.methods.steps import Setting
from costmodel.ops import Cost
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, preset
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.methods.folding import Folding, fold, unfold
from refimpl.methods.steps import Layer
from refimpl.model import LAYERS, position_tables
from refimpl.parameters.folding import SETTINGS, FoldingParameters
from refimpl.weights.layout import Weights

ENGINE = NumpyEngine()
EMFORMER = preset("emformer-rnnt-base")


def at(component: str) -> Any:
    return ENGINE


def _config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": 3, "d_model": 16, "heads": 4, "d_ff": 24, "vocab": 30, "recipe": "pre-norm"}
    return ModelConfig(name="tiny", **{**sizes, **changes})


def _stream(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "layers": 3, "d_model": 16, "heads": 4, "d_ff": 24, "features": 3, "chunk": 4, "left_context": 6, "d_out": 8,
    }  # fmt: skip
    return replace(EMFORMER, **{**sizes, "head_dim": 0, "kv_heads": 0, "companions": (), **changes})


def _frames(config: ModelConfig, positions: int, batch: int = 1, seed: int = 0) -> Any:
    return inputs_for(config, Workload(positions, batch), seed)


# --- n = 1 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_off_knob_equals_dense_bit_for_bit(recipe: str, data: st.DataObject) -> None:
    """Invariant 1: n = 1, in whichever words."""
    config = data.draw(configs(recipe))
    workload, ones = data.draw(workloads(config)), [1] * config.layers
    words = [{"fold": 1}, {"fold": ones, "fold_ffn": ones}, {"layers": []}, {"fold": 1, "fold_ffn": False}]
    off = data.draw(st.sampled_from(words))
    model, inputs = load_model(config), inputs_for(config, workload)
    for fused, name in ((False, "dense"), (True, "flash")):
        exact = forward(model, inputs, name, causal=workload.causal)
        folded = forward(model, inputs, "folding", {**off, "fused": fused}, causal=workload.causal)
        np.testing.assert_array_equal(folded.output, exact.output)


@settings(max_examples=30, deadline=None)
@given(config=decoders())
def test_off_knob_equals_dense_bit_for_bit_with_a_cache(config: ModelConfig) -> None:
    """Invariant 1 for a prefill and the decoding after it."""
    exact = prefilled_and_decoded(config, "dense", {})
    for found, wanted in zip(prefilled_and_decoded(config, "folding", {"fold": 1}), exact, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_off_knob_equals_dense_bit_for_bit_on_a_stream() -> None:
    config = _stream()
    model, inputs = load_model(config), _frames(config, 14, batch=2)
    dense = forward(model, inputs, "dense").output
    np.testing.assert_array_equal(forward(model, inputs, "folding", {"fold": 1}).output, dense)
    assert not np.allclose(forward(model, inputs, "folding", {"fold": 2, "fold_ffn": False}).output, dense)
    assert not np.allclose(forward(model, inputs, "folding", {"fold": 1, "fold_ffn": 2}).output, dense)


def test_off_keeps_the_weights_themselves() -> None:
    config = _config()
    weights = load_model(config).weights
    assert Folding.derive(weights, config, FoldingParameters(fold=1)) is weights
    some = Folding.derive(weights, config, FoldingParameters(layers=(1,)))
    assert some.layers[0].attention.qkv.weight is weights.layers[0].attention.qkv.weight
    assert some.layers[1].attention.qkv.weight.shape == (24, 8)
    assert some.layers[1].attention_norm is weights.layers[1].attention_norm


# --- the fold ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(batch=st.integers(0, 3), length=st.integers(1, 5), n=st.integers(1, 4), width=st.integers(1, 3))
def test_fold_is_a_view_and_part_j_of_position_t_is_row_t_n_plus_j(batch: int, length: int, n: int, width: int) -> None:
    """Invariant 2."""
    x = np.random.default_rng(0).standard_normal((batch, length, n * width))
    for engine in (ENGINE, NumbaEngine()):
        folded = fold(engine, x, n)
        assert folded.shape == (batch, length * n, width)
        assert np.shares_memory(unfold(engine, folded, n), x) or not x.size
        np.testing.assert_array_equal(unfold(engine, folded, n), x)
    for t in range(length):
        for j in range(n):
            np.testing.assert_array_equal(folded[:, t * n + j], x[:, t, j * width : (j + 1) * width])


def test_a_folded_linear_map_is_a_block_diagonal_one_with_equal_blocks() -> None:
    """Invariant 3: X (I_n (x) W), and so it does not mix parts."""
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((2, 5, 12)), rng.standard_normal((7, 4)), rng.standard_normal(7)
    folded = unfold(ENGINE, ENGINE.linear(fold(ENGINE, x, 3), weight, bias), 3)  # (B, T, 3 * 7)
    np.testing.assert_allclose(folded, x @ np.kron(np.eye(3), weight).T + np.tile(bias, 3), atol=1e-13)


# --- weights by projection ---------------------------------------------------------------------------------------


def _blocks(weights: Any, names: str, config: ModelConfig) -> list[tuple[Any, Any]]:
    """The maps of a layer as (weight, bias): Q, K, V, output, and the feed-forward's."""
    attention, ffn = weights.attention, getattr(weights, names)
    d, d_kv = config.d_attention, config.d_kv
    cuts = [0, d, d + d_kv, d + 2 * d_kv]
    found = [(attention.qkv.weight[a:b], attention.qkv.bias[a:b]) for a, b in pairwise(cuts)]
    ups = [slice(0, config.d_ff), slice(config.d_ff, None)] if config.gated else [slice(None)]
    found += [(ffn.up.weight[rows], ffn.up.bias[rows]) for rows in ups]
    return [*found, (attention.output.weight, attention.output.bias), (ffn.down.weight, ffn.down.bias)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heads", ["keep-width", "keep-count"])
def test_derived_weights_are_the_nearest_tied_block_diagonal_ones(heads: str, gated: bool) -> None:
    """What is left of W is orthogonal to every I_n (x) E: its diagonal blocks sum to 0, map by map."""
    config = _config(heads=8, kv_heads=4, d_model=32, gated=gated)
    parameters = FoldingParameters(fold=4, heads=heads)  # type: ignore[arg-type]
    whole = load_model(config, dtype="float64").weights
    folded = Folding.derive(whole, config, parameters)
    narrow = parameters.attention_shape(config, 4)
    assert (narrow.d_attention, narrow.d_kv) == (8, 4)
    narrow = replace(narrow, d_ff=6)
    maps = zip(
        _blocks(whole.layers[1], "feed_forward", config), _blocks(folded.layers[1], "feed_forward", narrow), strict=True
    )
    for (weight, bias), (small, small_bias) in maps:
        assert small.shape == (weight.shape[0] // 4, weight.shape[1] // 4)
        left = weight - np.kron(np.eye(4), small)
        rows, columns = small.shape
        over = sum(left[j * rows : (j + 1) * rows, j * columns : (j + 1) * columns] for j in range(4))
        np.testing.assert_allclose(over, 0, atol=1e-14)
        np.testing.assert_allclose(small_bias, bias.reshape(4, -1).mean(axis=0), atol=1e-14)


@pytest.mark.parametrize("hidden", [None, 3, 9])
@pytest.mark.parametrize("gated", [False, True])
def test_folding_a_feed_forward_of_tied_blocks_changes_nothing(gated: bool, hidden: int | None) -> None:
    """Conversion loses only what is outside the tied blocks; units beyond f / n are zero, and add nothing."""
    config = _config(gated=gated, activation="silu" if gated else "gelu")
    model = load_model(config, dtype="float64")
    folded = Folding.derive(model.weights, config, FoldingParameters(fold=1, fold_ffn=4))
    for layer, small in zip(model.weights.layers, folded.layers, strict=True):
        up, down = layer.feed_forward.up, layer.feed_forward.down
        parts = np.split(small.feed_forward.up.weight, 2 if gated else 1)
        biases = np.split(small.feed_forward.up.bias, 2 if gated else 1)
        if hidden == 3:  # half of the units: the other half must not matter
            parts = [np.concatenate([part[:3], 0 * part[3:]]) for part in parts]
            biases = [np.concatenate([bias[:3], 0 * bias[3:]]) for bias in biases]
        up.weight = np.concatenate([np.kron(np.eye(4), part) for part in parts])
        up.bias = np.concatenate([np.tile(bias, 4) for bias in biases])
        down.weight, down.bias = (
            np.kron(np.eye(4), small.feed_forward.down.weight),
            np.tile(small.feed_forward.down.bias, 4),
        )
    ids = np.arange(9)[None, :]
    params = {"fold": 1, "fold_ffn": 4, "ffn_hidden": hidden}
    dense = forward(model, ids, "dense").output
    np.testing.assert_allclose(forward(model, ids, "folding", params).output, dense, atol=1e-12)


# --- the attention sublayer, written out ---------------------------------------------------------------------------


def _sublayer(config: ModelConfig, params: dict[str, Any], length: int = 5) -> tuple[Folding, Layer, Any]:
    """A program, its one layer with random folded weights, and an input."""
    config, parameters = replace(config, layers=1), FoldingParameters(**params)
    parameters.check(config)
    weights = Folding.derive(load_model(config, dtype="float64").weights, config, parameters).layers[0]
    rng = np.random.default_rng(1)
    for linear in (weights.attention.qkv, weights.attention.output):
        linear.weight, linear.bias = rng.standard_normal(linear.weight.shape), rng.standard_normal(linear.bias.shape)
    tables = position_tables(config, length, "float64")
    return (
        Folding(config, parameters),
        Layer(0, config, weights, config.causal, None, tables),
        rng.standard_normal((2, length, config.d_model)),
    )


def _written_out(config: ModelConfig, params: dict[str, Any], layer: Layer, x: Any) -> Any:
    """Folding attention part by part: loops over positions t, parts j and heads, no reshape."""
    n, width = params["fold"], config.d_model // params["fold"]
    keep = params.get("heads", "keep-width") == "keep-width"
    heads, kv_heads = (config.heads // n, config.kv_heads // n) if keep else (config.heads, config.kv_heads)
    size = config.head_dim if keep else config.head_dim // n
    w, out = layer.weights.attention, np.zeros_like(x)
    bounds = np.cumsum([0, heads * size, kv_heads * size, kv_heads * size])

    def projected(b: int, t: int, j: int, which: int, head: int) -> Any:
        part = x[b, t, j * width : (j + 1) * width]
        row = bounds[which] + head * size
        made = w.qkv.weight[row : row + size] @ part + w.qkv.bias[row : row + size]
        if config.position == "rotary" and which < 2:  # by the angle of the position, whichever part it is
            half = size // 2
            angles = t * config.rope_base ** (-np.arange(half) / half)
            a, c = made[:half].copy(), made[half:].copy()
            made = np.concatenate([a * np.cos(angles) - c * np.sin(angles), a * np.sin(angles) + c * np.cos(angles)])
        return made

    for b, t, j in np.ndindex(x.shape[0], x.shape[1], n):
        context = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            query = projected(b, t, j, 0, head)
            seen = [
                (s, i) for s in range(x.shape[1]) for i in range(n)
                if not config.causal
                or (s <= t if params.get("mask", "frame") == "frame" else s * n + i <= t * n + j)
            ]  # fmt: skip
            scores = np.array([query @ projected(b, s, i, 1, group) / math.sqrt(size) for s, i in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            context.append(sum(p * projected(b, s, i, 2, group) for p, (s, i) in zip(weights, seen, strict=True)))
        out[b, t, j * width : (j + 1) * width] = w.output.weight @ np.concatenate(context) + w.output.bias
    return out


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", ["frame", "subtoken"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", ["keep-width", "keep-count"])
@pytest.mark.parametrize("position", ["none", "rotary"])
def test_attention_equals_its_definition(position: Any, heads: str, causal: bool, mask: str, fused: bool) -> None:
    """Sections 2 and 3 of the method's page, written out: order of parts, scale 1 / sqrt(D'), heads, mask, angles."""
    config = _config(d_model=64, heads=8, kv_heads=4, position=position, causal=causal)
    params = {"fold": 2, "fold_ffn": False, "heads": heads, "mask": mask, "fused": fused}
    program, layer, x = _sublayer(config, params)
    np.testing.assert_allclose(program.attention(at, x, layer), _written_out(config, params, layer, x), atol=1e-12)


def test_narrow_heads_are_scaled_by_their_own_width() -> None:
    """H' = H: the logits are divided by sqrt(d / (n H)), not by sqrt(d / H)."""
    config = _config()
    shape = FoldingParameters(fold=4, heads="keep-count").attention_shape(config, 4)
    assert (shape.d_model, shape.heads, shape.head_dim) == (4, 4, 1)
    assert Layer(0, shape, Weights(), False, None, ()).scale == 1.0
    shape = FoldingParameters(fold=4).attention_shape(config, 4)
    assert (shape.d_model, shape.heads, shape.head_dim) == (4, 1, 4)
    assert Layer(0, shape, Weights(), False, None, ()).scale == 0.5


@pytest.mark.parametrize("causal", [False, True])
def test_equal_scores_give_the_mean_of_the_visible_values(causal: bool) -> None:
    """Invariant 6."""
    program, layer, x = _sublayer(_config(causal=causal), {"fold": 2})
    w = layer.weights.attention
    w.qkv.weight[:8], w.qkv.bias[:8] = 0, 0  # queries
    folded = x.reshape(2, 10, 8)
    values = folded @ w.qkv.weight[16:].T + w.qkv.bias[16:]  # (B, T n, d / n)
    for t in range(5):
        mean = values[:, : 2 * (t + 1) if causal else 10].mean(axis=1)
        wanted = np.tile(mean @ w.output.weight.T + w.output.bias, 2)
        np.testing.assert_allclose(program.attention(at, x, layer)[:, t], wanted, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_permuting_the_parts_alike_in_all_positions_permutes_the_output(causal: bool) -> None:
    """Invariant 7: nothing but its content tells a part from another, under the frame mask."""
    program, layer, x = _sublayer(_config(causal=causal), {"fold": 4})
    order = [2, 0, 3, 1]

    def permuted(array: Any) -> Any:
        return array.reshape(2, 5, 4, 4)[:, :, order].reshape(2, 5, 16)

    found = program.attention(at, permuted(x), layer)
    np.testing.assert_allclose(found, permuted(program.attention(at, x, layer)), atol=1e-12)


def test_feed_forward_does_not_mix_parts_and_attention_does() -> None:
    config = _config()
    program, layer, x = _sublayer(config, {"fold": 4})
    changed = x.copy()
    changed[:, :, 4:8] += 1.0  # part 1
    w = layer.weights.feed_forward
    kept, other = program.feed_forward(at, x, w, layer), program.feed_forward(at, changed, w, layer)
    same = np.isclose(kept, other).reshape(2, 5, 4, 4).all(axis=(0, 1, 3))
    np.testing.assert_array_equal(same, [True, False, True, True])
    assert not np.isclose(program.attention(at, x, layer), program.attention(at, changed, layer)).any()


# --- what is seen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"fold": 4, "heads": "keep-count"}, {"mask": "subtoken"}, {"fused": True}])
@pytest.mark.parametrize("position", ["learned", "rotary", "none"])
def test_later_positions_change_nothing_before_them(position: Any, params: dict[str, Any]) -> None:
    """Invariant 4, bit for bit."""
    model = load_model(_config(d_model=32, position=position, max_positions=12))
    ids = np.arange(12)[None, :]
    changed = ids.copy()
    changed[0, 7:] = 29
    kept, other = (forward(model, x, "folding", params, causal=True).output for x in (ids, changed))
    np.testing.assert_array_equal(kept[:, :7], other[:, :7])
    assert not np.array_equal(kept[:, 7:], other[:, 7:])


@pytest.mark.parametrize(("mask", "first_sees_last"), [("frame", True), ("subtoken", False)])
def test_the_mask_decides_whether_a_part_sees_the_later_parts_of_its_position(mask: str, first_sees_last: bool) -> None:
    program, layer, x = _sublayer(_config(causal=True), {"fold": 2, "mask": mask})
    changed = x.copy()
    changed[:, 3, 8:] += 1.0  # the last part of position 3
    kept, other = (program.__class__(program.config, program.parameters).attention(at, y, layer) for y in (x, changed))
    np.testing.assert_array_equal(kept[:, :3], other[:, :3])
    assert np.array_equal(kept[:, 3, :8], other[:, 3, :8]) is not first_sees_last
    assert not np.isclose(kept[:, 3, 8:], other[:, 3, 8:]).any()


@pytest.mark.parametrize("params", [{"fold": 2}, {"fold": 4, "heads": "keep-count"}])
def test_later_chunks_change_nothing_before_them(params: dict[str, Any]) -> None:
    """Chunks of 4 with one position of right context: positions before the fourth do not see the ninth."""
    config = _stream()
    model, inputs = load_model(config), _frames(config, 16)
    changed = inputs.copy()
    changed[:, 8 * config.stack :] += 1.0
    kept, other = (forward(model, x, "folding", params).output for x in (inputs, changed))
    np.testing.assert_array_equal(kept[:, :4], other[:, :4])
    assert not np.isclose(kept[:, 4:], other[:, 4:]).all(axis=-1).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("params", [{"fold": 2}, {"fold": 4, "heads": "keep-count", "fused": True}])
def test_padded_positions_have_no_influence(params: dict[str, Any], causal: bool) -> None:
    model = load_model(_config(d_model=32))
    ids = np.arange(24).reshape(2, 12)
    changed = ids.copy()
    changed[0, 9:], changed[1, 5:] = 7, 8
    mask = np.arange(12) < np.array([9, 5])[:, None, None, None]  # (B, 1, 1, T)
    kept, other = (forward(model, x, "folding", params, mask=mask, causal=causal).output for x in (ids, changed))
    for row, length in enumerate((9, 5)):
        np.testing.assert_array_equal(kept[row, :length], other[row, :length])
        alone = forward(model, ids[row : row + 1, :length], "folding", params, causal=causal).output
        np.testing.assert_allclose(kept[row : row + 1, :length], alone, atol=1e-5)


def test_a_mask_for_each_head_needs_the_heads() -> None:
    model, ids = load_model(_config()), np.arange(6)[None, :]
    mask = np.ones((1, 4, 6, 6), bool)
    kept = forward(model, ids, "folding", {"heads": "keep-count"}).output
    np.testing.assert_array_equal(forward(model, ids, "folding", {"heads": "keep-count"}, mask=mask).output, kept)
    with pytest.raises(UnsupportedError, match="the mask is for 4 heads; a layer folded by 2 has 2"):
        forward(model, ids, "folding", {}, mask=mask)


# --- caches ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(config=decoders(), data=st.data())
def test_pieces_with_a_cache_equal_one_pass(config: ModelConfig, data: st.DataObject) -> None:
    """Invariant 5: a prefill, and pieces of any length after it, are one pass over all."""
    keep = data.draw(st.booleans())
    part = config.head_dim // 2 if config.position == "rotary" else config.head_dim
    fits = divisors(config.d_model, *((config.heads, config.kv_heads) if keep else (part,)))
    params = {
        "fold": data.draw(st.sampled_from(fits)),
        "fold_ffn": False,
        "heads": "keep-width" if keep else "keep-count",
        "mask": data.draw(st.sampled_from(["frame", "subtoken"])),
        "fused": data.draw(st.booleans()),
    }
    runner, ids = Runner(load_model(config, dtype="float64"), "numpy"), inputs_for(config, Workload(9, 2))
    whole = runner(ids, "folding", params).output
    cache = runner.new_cache(9, "folding", params, batch=2)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 8)))), 9]
    pieces = [runner(ids[:, a:b], "folding", params, cache=cache).output for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("params", [{"fold": 2}, {"fold": [4, 1, 2], "heads": "keep-count"}])
def test_a_stream_equals_one_pass_with_the_matching_mask(params: dict[str, Any]) -> None:
    """Invariant 5 of a streaming model: all chunks at once, each with a copy of its right context behind it."""
    config = _stream()
    model, inputs = load_model(config, dtype="float64"), _frames(config, 12)
    stem, (chunks, ahead) = model.weights.stem.frames, (3, config.right_context)
    whole = (inputs @ stem.weight.T).reshape(1, 13, 16)
    rows = [t for chunk in range(chunks) for t in range(4 * chunk, 4 * chunk + 4 + ahead)]  # position of each row
    owner, copied = np.repeat(np.arange(chunks), 4 + ahead), np.tile([False] * 4 + [True] * ahead, chunks)
    position = np.array(rows)
    same = owner[:, None] == owner
    earlier = (owner < owner[:, None]) & ~copied & (position >= 4 * owner[:, None] - config.left_context)
    parameters = FoldingParameters(**params)
    weights, program = Folding.derive(model.weights, config, parameters), Folding(config, parameters)
    x = whole[:, rows]
    for index, of_layer in enumerate(weights.layers):
        x = LAYERS["emformer"](at, x, Layer(index, config, of_layer, False, (same | earlier)[None, None], ()), program)
    kept = x[:, ~copied] @ weights.output.weight.T + weights.output.bias
    normed = ENGINE.layer_norm(kept, weights.output_norm.weight, weights.output_norm.bias, config.eps)
    np.testing.assert_allclose(forward(model, inputs, "folding", params).output, normed, atol=1e-10)


def test_cache_bytes_do_not_depend_on_the_factor() -> None:
    """Invariant 8: n rows of width d / n per position."""
    config = _config(d_model=64, heads=8, kv_heads=4, causal=True)
    runner = Runner(load_model(config), "numpy")
    for params in ({"fold": 1}, {"fold": 2}, {"fold": 4}, {"fold": [1, 4, 2]}, {"fold": 8, "heads": "keep-count"}):
        assert runner.new_cache(10, "folding", params).bytes == runner.new_cache(10).bytes
        estimate = costmodel.estimate("folding", config, Workload(10, fills_cache=True), params)
        assert estimate.cache_bytes == runner.new_cache(10).bytes
    stored = Folding(config, FoldingParameters(fold=4)).stored()[0]
    assert (stored.key_heads, stored.width, stored.rows) == (1, 8, 4)


# --- cost --------------------------------------------------------------------------------------------------------


def _layer_costs(n: int, config: ModelConfig = EMFORMER, keys: int = 35, **params: Any) -> dict[str, Cost]:
    """Costs per component of one folded layer on a chunk: T = 5 with the right context, left context 30."""
    parameters = FoldingParameters(fold=n, **params)
    program = FoldingCost(Setting(config, 1, 5, 0, past=keys - 5, cached=True), parameters)
    ((_, ops),) = program.layers().values()
    costs: dict[str, Cost] = {}
    for op in [*ops, *program.feed_forward()[:3]]:  # one feed-forward
        one = replace(op, calls=1).cost(1) if op.component == "feed-forward" else op.cost(1)
        costs[op.component] = costs.get(op.component, Cost()) + one
    return costs


@pytest.mark.parametrize(
    ("n", "projections", "scores", "together", "weights", "feed_forward"),
    [
        (1, 10_485_760, 358_400, 10_844_160, 1_048_576, 20_971_520),
        (2, 5_242_880, 716_800, 5_959_680, 262_144, 10_485_760),
        (4, 2_621_440, 1_433_600, 4_055_040, 65_536, 5_242_880),
        (8, 1_310_720, 2_867_200, 4_177_920, 16_384, 2_621_440),
    ],
)
def test_example_chunk(n: int, projections: int, scores: int, together: int, weights: int, feed_forward: int) -> None:
    """The example of the method's page: T = 5, S = 35, d = 512, f = 2048, one byte per weight, integers."""
    costs = _layer_costs(n)
    assert costs["qkv"].matmul_flops + costs["output"].matmul_flops == projections
    assert costs["scores"].matmul_flops + costs["weighted-sum"].matmul_flops == scores
    assert sum(costs[name].matmul_flops for name in ("qkv", "output", "scores", "weighted-sum")) == together
    biases = 4 * 512 // n
    assert costs["qkv"].weight_bytes + costs["output"].weight_bytes == weights + biases
    assert costs["feed-forward"].matmul_flops == feed_forward


@pytest.mark.parametrize("n", [2, 4, 8])
def test_cost_factors(n: int) -> None:
    """The cost table of the method's page, row by row."""
    one = _layer_costs(1)
    wide, narrow = _layer_costs(n), _layer_costs(n, heads="keep-count")
    for folded, exps in ((wide, n), (narrow, n * n)):
        assert n * n * folded["feed-forward"].weight_bytes == one["feed-forward"].weight_bytes + (n - 1) * (512 + 2048)
        assert n * folded["qkv"].matmul_flops == one["qkv"].matmul_flops
        assert folded["scores"].matmul_flops == n * one["scores"].matmul_flops
        assert folded["weighted-sum"].matmul_flops == n * one["weighted-sum"].matmul_flops
        assert folded["softmax"].vector_flops == exps * one["softmax"].vector_flops
        assert folded["scores"].bytes_written == exps * one["scores"].bytes_written
        assert folded["scores"].kv_bytes == one["scores"].kv_bytes
        assert folded["cache"] == one["cache"]
        assert folded["qkv"].activation_bytes == one["qkv"].activation_bytes
        assert folded["output"].bytes_written == one["output"].bytes_written


@pytest.mark.parametrize("n", [2, 4, 8])
def test_flops_fall_for_few_keys_only(n: int) -> None:
    """S < 2 d / n where attention folds, S < (2 d + f) / n where the feed-forward folds, too."""

    def matmul_flops(costs: dict[str, Cost], parts: tuple[str, ...]) -> int:
        return sum(costs[name].matmul_flops for name in parts)

    attention = ("qkv", "output", "scores", "weighted-sum")
    for parts, limit in ((attention, 2 * 512 // n), ((*attention, "feed-forward"), (2 * 512 + 2048) // n)):
        for keys in (5, limit - 1, limit, limit + 1):
            fall = matmul_flops(_layer_costs(1, keys=keys), parts) - matmul_flops(_layer_costs(n, keys=keys), parts)
            assert np.sign(fall) == np.sign(limit - keys)


# The sizes that the method's page prints, in percent of the whole product of 76,738,049 weights.
REDUCTIONS = {
    "attention-2": "20.5", "attention-4": "25.7", "attention-8": "26.9", "attention-2-first-12": "12",
    "attention-4-first-9": "12", "attention-8-first-9": "12", "both-2": "61.5", "both-2-first-4": "12.3",
    "both-2-first-8": "24.6", "ffn-2-first-6": "12.3", "ffn-2-first-12": "24.6",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reduce_the_whole_product_as_printed(name: str) -> None:
    assert set(REDUCTIONS) == set(SETTINGS)
    dense, folded = (
        costmodel.estimate(method, EMFORMER, Workload(4), params)
        for method, params in (("dense", {}), ("folding", {"setting": name}))
    )
    whole = (dense.params_bytes + dense.companion_bytes) // 4
    assert whole == 76_738_049
    printed = REDUCTIONS[name]
    saved = 100 * (dense.params_bytes - folded.params_bytes) / 4 / whole
    assert f"{saved:.{len(printed.partition('.')[2])}f}" == printed


def test_setting_is_the_same_as_its_parameters() -> None:
    for name, values in SETTINGS.items():
        made = FoldingParameters(setting=name)
        assert replace(made, setting=None) == FoldingParameters(**values)
        assert FoldingParameters(**asdict(made)) == made
        assert FoldingParameters(**{**asdict(made), "layers": made.layers and list(made.layers)}) == made
        made.check(EMFORMER)


def test_a_causal_mask_is_counted_in_the_peak() -> None:
    """Against the numba engine's allocator, beside which the mask of T n x T n bools lies."""
    engine = NumbaEngine()
    config = _config(d_model=384, heads=6, d_ff=1536, causal=True)
    for fused in (False, True):
        engine.buffers.release()
        engine.buffers.reset_high_water()
        params = {"fold": 2, "fused": fused}
        Runner(load_model(config), engine)(inputs_for(config, Workload(600)), "folding", params)
        cost = costmodel.estimate("folding", config, Workload(600), params)
        seen = engine.buffers.high_water_bytes + 1200 * 1200 + cost.params_bytes
        assert seen <= cost.peak_bytes <= seen + 0.1 * engine.buffers.high_water_bytes


# --- the fast engine ---------------------------------------------------------------------------------------------

FAST = [
    (_stream(d_model=64, heads=8, d_ff=128), {}),
    (_stream(d_model=64, heads=8, d_ff=128), {"fold": 4, "heads": "keep-count", "fused": True}),
    (_config(d_model=64, heads=8, d_ff=128, position="rotary", causal=True), {"fold": 4}),
    (_config(d_model=64, heads=8, kv_heads=4, gated=True, norm="rms", bias=False, causal=True), {"fused": True}),
    (_config(d_model=64, heads=8, d_ff=128, recipe="post-norm", causal=True), {"mask": "subtoken"}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "params"), FAST)
def test_numba_obeys_the_2x_rule(config: ModelConfig, params: dict[str, Any]) -> None:
    """float32 against float64, with twice the error of the NumPy engine in float32; floor: four roundings."""
    inputs = inputs_for(config, Workload(23, 2))
    truth = forward(load_model(config, dtype="float64"), inputs, "folding", params).output
    model = load_model(config, dtype="float32")
    honest, fast = (forward(model, inputs, "folding", params, engine).output for engine in ("numpy", "numba"))
    floor = 4 * float(np.finfo(np.float32).eps) * np.abs(truth).max()
    assert fast.dtype == honest.dtype == np.float32
    assert np.abs(fast - truth).max() <= 2 * np.abs(honest - truth).max() + floor


# --- parameters --------------------------------------------------------------------------------------------------


def test_plan() -> None:
    """Who folds by how much: one number, one for each layer, chosen layers, a feed-forward of its own."""
    assert FoldingParameters(fold=4).attention_folds(3) == (4, 4, 4)
    assert FoldingParameters(fold=(1, 2, 4)).feed_forward_folds(3) == (1, 2, 4)
    assert FoldingParameters(fold=(1, 2, 4), layers=(0, 2)).attention_folds(3) == (1, 1, 4)
    assert FoldingParameters(fold=4, layers=(1,), fold_ffn=2).feed_forward_folds(3) == (1, 2, 1)
    assert FoldingParameters(fold=4, fold_ffn=False).feed_forward_folds(2) == (1, 1)
    assert FoldingParameters(fold=4, fold_ffn=1).feed_forward_folds(2) == (1, 1)


def test_a_feed_forward_folded_by_1_is_not_one_that_follows_attention() -> None:
    """1 == True in Python: the two must not share prepared weights."""
    assert FoldingParameters(fold_ffn=1) != FoldingParameters(fold_ffn=True)
    runner = Runner(load_model(_config()), "numpy")
    shapes = [
        runner.prepare("folding", {"fold_ffn": x}).weights.layers[0].feed_forward.up.weight.shape for x in (True, 1)
    ]
    assert shapes == [(12, 8), (24, 16)]


def test_sweep_goes_from_off_as_far_as_the_model_divides() -> None:
    assert FoldingParameters.sweep(EMFORMER) == {"fold": (1, 2, 4, 8)}
    assert FoldingParameters.sweep(preset("whisper-tiny-en")) == {"fold": (1, 2)}
    assert FoldingParameters.sweep(preset("smollm2-135m")) == {"fold": (1,)}
    assert FoldingParameters.sweep(preset("conformer-m")) == {"fold": (1,)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fold": 0}, "fold=0; it must be a whole number"),
        ({"fold": True}, "fold=True; it must be a whole number"),
        ({"fold": "2"}, "fold='2'; it must be a whole number"),
        ({"fold": [2, 2]}, "fold lists 2 layers; the model has 3"),
        ({"fold": [2, 2, 0]}, r"fold\[2\]=0"),
        ({"fold": 3}, "fold=3 does not divide d_model=16; those that fit with heads=keep-width: 1, 2, 4$"),
        ({"fold": 8}, "fold=8 does not divide heads=4; those that fit with heads=keep-width: 1, 2, 4$"),
        ({"fold": 8, "heads": "keep-count"}, "fold=8 does not divide head_dim=4; .* heads=keep-count: 1, 2, 4$"),
        ({"fold": 1, "fold_ffn": 16}, "fold_ffn=16 does not divide d_ff=24; those that fit: 1, 2, 4, 8$"),
        ({"fold_ffn": [1, 2]}, "fold_ffn lists 2 layers; the model has 3"),
        ({"fold_ffn": "yes"}, "fold_ffn='yes'"),
        ({"layers": [0, 3]}, "layers names layer 3; the model has layers 0 to 2"),
        ({"layers": [1, 0]}, "must rise"),
        ({"layers": [1, 1]}, "must rise"),
        ({"layers": [-1]}, r"layers\[0\]=-1"),
        ({"layers": 2}, "list of layers"),
        ({"heads": 2}, "'keep-width', 'keep-count'"),
        ({"mask": "causal"}, "'frame', 'subtoken'"),
        ({"ffn_hidden": 0}, "ffn_hidden=0"),
        ({"fused": 1}, "fused=1; it must be true or false"),
        ({"setting": "attention-3"}, "did you mean 'attention-"),
        ({"setting": ["attention-2"]}, "unknown setting"),
        ({"setting": "attention-2", "fold": 4}, "fold=4; setting=attention-2 says 2: give one of the two"),
        ({"setting": "attention-2-first-12"}, "layer 11"),
        ({"foldd": 2}, "did you mean 'fold'"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as program:
        forward(load_model(_config()), np.arange(4)[None, :], "folding", params)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("folding", _config(), Workload(4), params)
    assert "\n" not in str(program.value)


@pytest.mark.parametrize(
    ("changes", "params", "message"),
    [
        ({"heads": 8, "kv_heads": 2}, {"fold": 4}, "fold=4 does not divide kv_heads=2; .*: 1, 2$"),
        ({"position": "rotary"}, {"fold": 4, "heads": "keep-count"}, "fold=4 does not divide head_dim / 2=2"),
        ({"d_ff": 25}, {}, "fold_ffn=2 does not divide d_ff=25"),
        ({"position": "relative"}, {}, "relative positions.*give fold=1"),
    ],
)
def test_models_that_do_not_fold_are_refused(changes: dict[str, Any], params: dict[str, Any], message: str) -> None:
    config = _config(**changes)
    with pytest.raises(ConfigError, match=message):
        Runner(load_model(config), "numpy").prepare("folding", params)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("folding", config, Workload(4), params)
