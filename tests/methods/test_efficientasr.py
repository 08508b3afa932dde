"""The invariants of EfficientASR, our reading: shared residual attention, and the feed-forward in chunks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, decoders, efficientasr_parameters, inputs_for, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, override, preset
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError
from refimpl.methods.dense import Dense
from refimpl.methods.efficientasr import EfficientASR
from refimpl.methods.steps import Layer
from refimpl.parameters.efficientasr import EfficientASRParameters
from refimpl.recorder import tally
from refimpl.weights.layout import Weights

OFF: dict[str, Any] = {"group": 1, "score_residual": 0, "ffn_chunks": 1}
ENGINE = NumpyEngine()


def at(component: str) -> Any:
    return ENGINE


class Watching(NumpyEngine):
    """Keeps what goes into every softmax and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Any] = []
        self.maps: list[Any] = []

    def softmax(self, scores: Any, causal: bool = False) -> Any:
        found = super().softmax(scores, causal)
        if scores.shape[2] > 1:  # not the single rows that a causal softmax is made of
            self.logits.append(scores)
            self.maps.append(found)
        return found


def _config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": 4, "d_model": 16, "heads": 4, "d_ff": 24, "vocab": 30, "recipe": "pre-norm"}
    return ModelConfig(name="tiny", **{**sizes, **changes})


LLAMA = {
    "gated": True, "activation": "silu", "norm": "rms", "bias": False, "causal": True, "position": "rotary",
    "kv_heads": 2, "head": True,
}  # fmt: skip


def _layers(config: ModelConfig, params: Any, seed: int = 0) -> Any:
    """The layers as the method reads them, in float64."""
    return EfficientASR.derive(load_model(config, dtype="float64", seed=seed).weights, config, params).layers


def _normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def _attend(
    config: ModelConfig, params: Any, xs: list[Any], layers: Any = None, mask: Any = None, engine: Any = ENGINE
):
    """The attention sublayers of all layers, each on an input of its own."""
    method, length = EfficientASR(config, params), xs[0].shape[1]
    tables = Runner(load_model(config, dtype="float64"), "numpy")._tables_for(0, length, length)
    layers = _layers(config, params) if layers is None else layers
    return [
        method.attention(lambda component: engine, x, Layer(i, config, layers[i], config.causal, mask, tables))
        for i, x in enumerate(xs)
    ]


# --- off is exact, bit for bit ----------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data(), recipe=st.sampled_from(["post-norm", "pre-norm", "conformer", "emformer"]), tied=st.booleans())
def test_off_equals_dense_bit_for_bit(data: st.DataObject, recipe: str, tied: bool) -> None:
    """Invariant 1."""
    config = data.draw(configs(recipe))
    workload = data.draw(workloads(config))
    model, inputs = load_model(config), inputs_for(config, workload)
    dense = forward(model, inputs, "dense", causal=workload.causal)
    off = forward(model, inputs, "efficientasr", {**OFF, "ffn_tied": tied}, causal=workload.causal)
    np.testing.assert_array_equal(off.output, dense.output)
    assert tally(off.calls) == tally(dense.calls)


@settings(max_examples=30, deadline=None)
@given(config=decoders(), past=st.integers(1, 5), steps=st.integers(1, 3))
def test_off_equals_dense_in_decoding_bit_for_bit(config: ModelConfig, past: int, steps: int) -> None:
    runner, ids = Runner(load_model(config), "numpy"), inputs_for(config, Workload(past + steps))
    outputs = []
    for method, params in (("dense", None), ("efficientasr", OFF)):
        cache = runner.new_cache(past + steps, method, params)
        prefill = runner(ids[:, :past], method, params, cache=cache).output
        outputs.append((prefill, runner.decode(ids[:, past:], method, cache, params).output))
    for dense, off in zip(*outputs, strict=True):
        np.testing.assert_array_equal(off, dense)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), config=configs())
def test_each_module_alone(data: st.DataObject, config: ModelConfig) -> None:
    """Shared maps alone are ``reuse``; a residual needs two compute layers; chunks alone leave attention as it is."""
    workload = data.draw(workloads())
    model, inputs = load_model(config), inputs_for(config, workload)
    group = data.draw(st.integers(1, config.layers))

    def run(method: str, params: dict[str, Any]) -> Any:
        return forward(model, inputs, method, params, causal=workload.causal)

    shared = run("efficientasr", {**OFF, "group": group})
    np.testing.assert_array_equal(shared.output, run("reuse", {"group": group}).output)
    alone = run("efficientasr", {**OFF, "group": config.layers, "score_residual": 1.0})
    np.testing.assert_array_equal(alone.output, run("reuse", {"group": config.layers}).output)
    if config.d_ff % 2 == 0:
        chunked = run("efficientasr", {**OFF, "ffn_chunks": 2})
        ops = [call for call in run("dense", {}).calls if call.component != "feed-forward"]
        assert tally(ops) == tally([call for call in chunked.calls if call.component != "feed-forward"])


def test_on_is_different() -> None:
    model, ids = load_model(_config()), np.arange(9)[None, :]
    dense = forward(model, ids, "dense").output
    settings = [
        {"group": 2}, {"score_residual": 1.0}, {"score_residual": 0.5}, {"band": 2}, {"band": 2, "band_penalty": 3.0},
        {"ffn_chunks": 2}, {"ffn_chunks": 2, "ffn_tied": True},
    ]  # fmt: skip
    outputs = [dense, *(forward(model, ids, "efficientasr", {**OFF, **one}).output for one in settings)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert not np.allclose(one, other)


# --- the page's equations, number by number ---------------------------------------------------------------------------


def page_attention(
    config: ModelConfig, weights: Any, xs: list[Any], params: EfficientASRParameters, mask: Any = None
) -> list[Any]:
    """Section 2 of the contract, read aloud: R stays unmasked, mask and band are added to it and never kept."""
    out: list[Any] = []
    residual = weighted = None
    length, kv = xs[0].shape[1], config.kv_heads
    i, j = np.arange(length)[:, None], np.arange(length)
    added = np.zeros((1, 1, length, length)) if mask is None else np.where(mask, 0.0, -np.inf)
    if config.causal:
        added = added + np.where(j <= i, 0.0, -np.inf)
    if params.band is not None:
        beta = math.inf if params.band_penalty is None else params.band_penalty
        added = added + np.where(abs(i - j) <= params.band, 0.0, -beta)
    for layer, x in enumerate(xs):
        w = weights[layer].attention
        qkv = x @ w.qkv.weight.T + w.qkv.bias

        def heads(part: Any, count: int) -> Any:
            return np.repeat(part.reshape(*part.shape[:2], count, -1), config.heads // count, 2).transpose(0, 2, 1, 3)

        width = config.d_attention
        q, k = heads(qkv[..., :width], config.heads), heads(qkv[..., width : width + config.d_kv], kv)
        v = heads(qkv[..., width + config.d_kv :], kv)
        if layer % params.group == 0:
            raw = np.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(config.head_dim)
            residual = raw if residual is None or params.score_residual == 0 else raw + params.score_residual * residual
            z = residual + added
            shown = np.where(np.isneginf(z).all(-1, keepdims=True), 0.0, scipy.special.softmax(z + 0.0, axis=-1))
            weighted = np.nan_to_num(shown)
        context = np.einsum("bhij,bhjd->bihd", weighted, v).reshape(*x.shape[:2], width)
        out.append(context @ w.output.weight.T + w.output.bias)
    return out


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_attention_is_that_of_the_page(data: st.DataObject) -> None:
    config = _config(
        layers=data.draw(st.integers(1, 5)), kv_heads=data.draw(st.sampled_from([1, 2, 4])),
        causal=data.draw(st.booleans()),
    )  # fmt: skip
    params = EfficientASRParameters(**data.draw(efficientasr_parameters(config)))
    length = data.draw(st.integers(1, 7))
    xs = [3 * _normal(2, length, 16, seed=layer) for layer in range(config.layers)]
    valid = data.draw(st.integers(1, length))
    mask = np.arange(length)[None, None, None, :] < np.array([valid, length])[:, None, None, None]
    mask = mask if data.draw(st.booleans()) else None
    ours = _attend(config, params, xs, mask=mask)
    with np.errstate(invalid="ignore"):  # rows that see nothing, in SciPy's softmax
        truth = page_attention(config, load_model(config, dtype="float64").weights.layers, xs, params, mask)
    for layer, (mine, page) in enumerate(zip(ours, truth, strict=True)):
        np.testing.assert_allclose(mine, page, atol=1e-11, err_msg=f"layer {layer} {params}")


@pytest.mark.parametrize("position", ["none", "rotary", "relative"])
def test_two_compute_layers_with_equal_input_and_weights_double_the_scores(position: str) -> None:
    """Invariant 4: the second map is softmax(2 S), and S holds the term of relative positions."""
    config, engine = _config(layers=2, position=position), Watching()
    params, x = EfficientASRParameters(group=1), _normal(2, 9, 16)
    layers = [_layers(config, params)[0]] * 2
    _attend(config, params, [x, x], layers, engine=engine)
    exact = Watching()
    tables = Runner(load_model(config, dtype="float64"), "numpy")._tables_for(0, 9, 9)
    Dense(config, None).attention(lambda component: exact, x, Layer(0, config, layers[0], False, None, tables))
    np.testing.assert_array_equal(engine.logits[0], exact.logits[0])
    np.testing.assert_array_equal(engine.logits[1], 2 * exact.logits[0])
    np.testing.assert_allclose(engine.maps[1], scipy.special.softmax(2 * exact.logits[0], axis=-1), atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_a_zero_residual_is_none_bit_for_bit(causal: bool) -> None:
    """Invariant 2: alpha = 1 with an all-zero R_p equals alpha = 0."""
    config, x = _config(layers=2, causal=causal), _normal(2, 9, 16)
    plain = EfficientASRParameters(group=2, score_residual=0)
    layers = _layers(config, plain)
    method, none = EfficientASR(config, replace(plain, score_residual=1.0)), EfficientASR(config, plain)
    method.residual = np.zeros((2, 4, 9, 9))
    for index in range(2):
        layer = Layer(index, config, layers[index], causal, None, ())
        np.testing.assert_array_equal(method.attention(at, x, layer), none.attention(at, x, layer))


@pytest.mark.parametrize("penalty", [None, 5.0])
@pytest.mark.parametrize("config", [_config(), _config(causal=True), _config(position="relative"), _config(**LLAMA)])
def test_a_band_as_wide_as_the_sequence_is_none_bit_for_bit(config: ModelConfig, penalty: float | None) -> None:
    """Invariant 2: w >= T - 1; and w = T - 2 is a band."""
    model, ids = load_model(config), np.arange(9)[None, :]
    plain = forward(model, ids, "efficientasr").output

    def banded(w: int) -> Any:
        return forward(model, ids, "efficientasr", {"band": w, "band_penalty": penalty}).output

    for w in (8, 9, 10**30):
        np.testing.assert_array_equal(banded(w), plain)
    assert not np.array_equal(banded(7), plain)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", ["none", "relative"])
def test_a_band_of_width_0_makes_the_map_the_identity(position: str, causal: bool) -> None:
    """Invariant 3: Y = (X Wv) Wo, in compute and reuse layers."""
    config, engine = _config(position=position, causal=causal), Watching()
    params, xs = EfficientASRParameters(group=2, band=0), [_normal(2, 9, 16, seed=layer) for layer in range(4)]
    found = _attend(config, params, xs, engine=engine)
    for weights in engine.maps:
        np.testing.assert_array_equal(weights, np.broadcast_to(np.eye(9), weights.shape))
    for layer, x, y in zip(load_model(config, dtype="float64").weights.layers, xs, found, strict=True):
        w = layer.attention
        v = x @ w.qkv.weight[32:].T + w.qkv.bias[32:]
        np.testing.assert_allclose(y, v @ w.output.weight.T + w.output.bias, atol=1e-13)


@pytest.mark.parametrize(
    "params", [{}, {"score_residual": 0.5}, {"band": 2}, {"band": 1, "band_penalty": 2.0}], ids=str
)
def test_reuse_layer_with_the_compute_layers_input_and_weights_repeats_it_bit_for_bit(params: dict[str, Any]) -> None:
    """Invariant 5, in the second group, where alpha and w matter to the compute layer."""
    config, chosen = _config(), EfficientASRParameters(group=2, **params)
    exact = load_model(config, dtype="float64").weights
    exact.layers[3].attention = exact.layers[2].attention
    layers, x = EfficientASR.derive(exact, config, chosen).layers, _normal(2, 9, 16)
    found = _attend(config, chosen, [_normal(2, 9, 16, seed=5), _normal(2, 9, 16, seed=6), x, x], layers)
    np.testing.assert_array_equal(found[3], found[2])
    assert not np.allclose(found[2], _attend(config, replace(chosen, score_residual=0.0), [x, x, x, x], layers)[2])


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_a_soft_band_takes_beta_off_the_log_weights_outside(penalty: float) -> None:
    """Each map is that without the band, times exp(-beta) outside, with its rows summing to 1 again; R has no band."""
    config, bare, banded = _config(layers=3), Watching(), Watching()
    xs = [_normal(1, 9, 16, seed=layer) for layer in range(3)]
    params = EfficientASRParameters(group=1, score_residual=0.5)
    _attend(config, params, xs, engine=bare)
    _attend(config, replace(params, band=2, band_penalty=penalty), xs, engine=banded)
    near = abs(np.arange(9)[:, None] - np.arange(9)) <= 2
    for plain, found in zip(bare.maps, banded.maps, strict=True):
        lowered = plain * np.where(near, 1.0, math.exp(-penalty))
        np.testing.assert_allclose(found, lowered / lowered.sum(-1, keepdims=True), atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config", [_config(), _config(position="relative"), _config(**LLAMA)], ids=lambda c: c.position
)
def test_fused_attention_is_the_same_function(config: ModelConfig, causal: bool) -> None:
    """Without a band that of ``flash``, bit for bit; with one that of the materialised map under it."""
    model, ids = load_model(config, dtype="float64"), np.arange(9)[None, :]

    def run(method: str, **params: Any) -> Any:
        return forward(model, ids, method, params, causal=causal).output

    np.testing.assert_array_equal(run("efficientasr", **OFF, fused=True), run("flash"))
    fused, held = (run("efficientasr", **OFF, band=2, fused=fused) for fused in (True, False))
    np.testing.assert_allclose(fused, held, atol=1e-12)


def test_a_strong_penalty_approaches_the_hard_band() -> None:
    model, ids = load_model(_config(), dtype="float64"), np.arange(9)[None, :]
    hard = forward(model, ids, "efficientasr", {"band": 2}).output
    soft = forward(model, ids, "efficientasr", {"band": 2, "band_penalty": 2.0**15}).output
    np.testing.assert_allclose(soft, hard, atol=1e-12)


# --- chunked feed-forward ---------------------------------------------------------------------------------------------


def _block_diagonal(model: Any, chunks: int, tied: bool) -> Any:
    """The dense model whose W1 and W2, gate and up apart, are what the chunks leave of them."""
    config = model.config

    def kept(weight: Any) -> Any:
        blocks = [np.split(rows, chunks, axis=1)[c] for c, rows in enumerate(np.split(weight, chunks))]
        return scipy.linalg.block_diag(*([sum(blocks) / chunks] * chunks if tied else blocks))

    def averaged(bias: Any) -> Any:
        return np.tile(bias.reshape(chunks, -1).mean(0), chunks) if tied else bias

    for layer in model.weights.layers:
        for name in ("first_feed_forward", "feed_forward"):
            sublayer = getattr(layer, name, None)
            for linear, maps in ((sublayer.up, 1 + config.gated), (sublayer.down, 1)) if sublayer else ():
                linear.weight = np.concatenate([kept(part) for part in np.split(linear.weight, maps)])
                if linear.bias is not None:
                    linear.bias = np.concatenate([averaged(part) for part in np.split(linear.bias, maps)])
    return model


@settings(max_examples=80, deadline=None)
@given(data=st.data(), tied=st.booleans(), chunks=st.sampled_from([2, 3, 4]))
def test_chunks_are_the_dense_model_with_block_diagonal_matrices(data: st.DataObject, tied: bool, chunks: int) -> None:
    """Invariant 6, whole models of every recipe, gated and not, with and without bias."""
    config = data.draw(configs(data.draw(st.sampled_from(["post-norm", "pre-norm", "conformer", "emformer"]))))
    kv_heads = 6 if config.position == "relative" else 3
    config = replace(config, d_model=12, d_ff=12, heads=6, kv_heads=kv_heads, head_dim=2, stack=min(config.stack, 1))
    workload = data.draw(workloads(config))
    inputs = inputs_for(config, workload)
    params = {**OFF, "ffn_chunks": chunks, "ffn_tied": tied}
    ours = forward(load_model(config, dtype="float64"), inputs, "efficientasr", params, causal=workload.causal)
    model = _block_diagonal(load_model(config, dtype="float64"), chunks, tied)
    dense = forward(model, inputs, "dense", causal=workload.causal)
    np.testing.assert_allclose(ours.output, dense.output, atol=1e-9, rtol=1e-9)


def _feed_forward(config: ModelConfig, params: dict[str, Any], x: Any, engine: Any = ENGINE) -> Any:
    chosen = EfficientASRParameters(**{**OFF, **params})
    weights = EfficientASR.derive(load_model(config, dtype=str(x.dtype)).weights, config, chosen).layers[0]
    layer = Layer(0, config, weights, False, None, ())
    return EfficientASR(config, chosen).feed_forward(lambda component: engine, x, weights.feed_forward, layer)


@pytest.mark.parametrize("engine", [ENGINE, NumbaEngine()], ids=["numpy", "numba"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [_config(), _config(**LLAMA)], ids=["gelu", "gated"])
def test_a_chunk_does_not_see_the_others(config: ModelConfig, tied: bool, engine: Any) -> None:
    """Invariant 6: changing chunk m of the input leaves the others' output unchanged, bit for bit."""
    x = _normal(2, 9, 16).astype(np.float32)
    before = _feed_forward(config, {"ffn_chunks": 4, "ffn_tied": tied}, x, engine)
    for chunk in range(4):
        columns = slice(4 * chunk, 4 * chunk + 4)
        changed = x.copy()
        changed[..., columns] = 100.0
        after = _feed_forward(config, {"ffn_chunks": 4, "ffn_tied": tied}, changed, engine)
        assert (after[..., columns] != before[..., columns]).all()
        after[..., columns] = before[..., columns]
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("config", [_config(), _config(**LLAMA)], ids=["gelu", "gated"])
def test_tied_chunks_commute_with_their_permutation(config: ModelConfig) -> None:
    """Invariant 7; untied chunks do not."""
    x, order = _normal(2, 9, 16), [2, 0, 3, 1]

    def permuted(y: Any) -> Any:
        return np.concatenate([y[..., 4 * c : 4 * c + 4] for c in order], axis=-1)

    def run(tied: bool, value: Any) -> Any:
        return _feed_forward(config, {"ffn_chunks": 4, "ffn_tied": tied}, value)

    np.testing.assert_allclose(run(True, permuted(x)), permuted(run(True, x)), rtol=1e-13, atol=1e-13)
    assert not np.allclose(run(False, permuted(x)), permuted(run(False, x)))


def test_derived_matrices_are_the_nearest_in_the_frobenius_norm() -> None:
    """What is left out is at right angles to all block-diagonal matrices: its diagonal blocks are 0, or sum to 0."""
    config = _config(layers=1)
    whole = load_model(config, dtype="float64").weights.layers[0].feed_forward
    for tied in (False, True):
        params = EfficientASRParameters(**{**OFF, "ffn_chunks": 4, "ffn_tied": tied})
        found = _layers(config, params)[0].feed_forward
        for name in ("up", "down"):
            weight, chunks = getattr(whole, name).weight, getattr(found, name).weight
            if tied:
                chunks = np.stack([chunks] * 4)
            left = weight - scipy.linalg.block_diag(*chunks)
            blocks = [np.split(rows, 4, axis=1)[c] for c, rows in enumerate(np.split(left, 4))]
            for block in [sum(blocks)] if tied else blocks:
                np.testing.assert_allclose(block, 0.0, atol=1e-15)
        if not tied:
            np.testing.assert_array_equal(found.up.bias, whole.up.bias)


# --- masks, decoding, engines -----------------------------------------------------------------------------------------

SETTINGS = [
    {}, {"group": 1, "score_residual": 0.5}, {"group": 3, "band": 2}, {"group": 1, "band": 0},
    {"group": 1, "band": 3, "band_penalty": 2.0}, {"ffn_chunks": 4, "ffn_tied": True, "score_residual": 3.0, "band": 5},
]  # fmt: skip


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "config", [_config(), _config(position="relative"), _config(**LLAMA)], ids=lambda c: c.position
)
def test_causal_passes_do_not_see_the_future(config: ModelConfig, params: dict[str, Any]) -> None:
    model, ids = load_model(config), np.arange(12)[None, :]
    changed = ids.copy()
    changed[0, 7:] = 29
    kept, other = (forward(model, given, "efficientasr", params, causal=True).output for given in (ids, changed))
    np.testing.assert_array_equal(kept[:, :7], other[:, :7])
    assert not np.array_equal(kept[:, 7:], other[:, 7:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("recipe", ["post-norm", "pre-norm"])
def test_padding_has_no_influence(recipe: str, params: dict[str, Any], causal: bool) -> None:
    """On valid positions; bit for bit, though the hidden entries of R add up."""
    config = _config(recipe=recipe, position="learned", max_positions=16)
    model, ids = load_model(config), np.arange(12)[None, :]
    changed = ids.copy()
    changed[0, 8:] = [29, 3, 3, 17]
    mask = (np.arange(12) < 8)[None, None, None, :]
    kept, other = (
        forward(model, given, "efficientasr", params, mask=mask, causal=causal).output for given in (ids, changed)
    )
    assert np.isfinite(kept).all()
    np.testing.assert_array_equal(kept[:, :8], other[:, :8])


@pytest.mark.parametrize("engine", [ENGINE, NumbaEngine()], ids=["numpy", "numba"])
def test_padded_queries_whose_band_holds_only_padding_attend_to_nothing(engine: Any) -> None:
    """Their context is 0, so that the output is Wo's bias, in compute and reuse layers; no valid row is empty."""
    config, params = _config(), EfficientASRParameters(group=2, band=2)
    mask = (np.arange(12) < 7)[None, None, None, :]
    xs = [_normal(1, 12, 16, seed=layer).astype(np.float32) for layer in range(4)]
    layers = EfficientASR.derive(load_model(config).weights, config, params).layers
    for layer, y in zip(layers, _attend(config, params, xs, layers, mask, engine), strict=True):
        bias = layer.attention.output.bias
        np.testing.assert_array_equal(y[0, 9:], np.broadcast_to(bias, (3, 16)))
        assert (abs(y[0, :9] - bias).max(-1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), config=decoders(), past=st.integers(1, 6), steps=st.integers(1, 5))
def test_decoding_equals_prefill(data: st.DataObject, config: ModelConfig, past: int, steps: int) -> None:
    """Step by step behind a cache as in one pass: residual scores of the new row alone, band at absolute positions."""
    params = data.draw(efficientasr_parameters(config))
    runner = Runner(load_model(config, dtype="float64"), "numpy")
    ids = inputs_for(config, Workload(past + steps, batch=2))
    whole = runner(ids, "efficientasr", params).output
    cache = runner.new_cache(past + steps, "efficientasr", params, batch=2)
    first = runner(ids[:, :past], "efficientasr", params, cache=cache).output
    rest = runner.decode(ids[:, past:], "efficientasr", cache, params).output
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=1e-9, rtol=1e-9)


def test_decoding_in_pieces_of_several_positions_equals_prefill() -> None:
    config, params = _config(**LLAMA), {"group": 1, "score_residual": 0.5, "band": 2}
    runner, ids = Runner(load_model(config, dtype="float64"), "numpy"), np.arange(13)[None, :]
    cache = runner.new_cache(13, "efficientasr", params)
    pieces = [runner(ids[:, a:b], "efficientasr", params, cache=cache).output for a, b in [(0, 5), (5, 9), (9, 13)]]
    whole = runner(ids, "efficientasr", params).output
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-12)


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_decoding_on_numba_is_the_prefill_on_numpy(params: dict[str, Any]) -> None:
    """Over the kernels for few rows and few queries, masked and not."""
    model, ids = load_model(_config(**LLAMA), dtype="float64"), np.arange(11)[None, :] + np.arange(2)[:, None]
    runner = Runner(model, NumbaEngine())
    cache = runner.new_cache(11, "efficientasr", params, batch=2)
    runner(ids[:, :4], "efficientasr", params, cache=cache)
    steps = runner.decode(ids[:, 4:], "efficientasr", cache, params).output
    np.testing.assert_allclose(steps, forward(model, ids, "efficientasr", params).output[:, 4:], atol=1e-12)


def test_reuse_layers_keep_values_only() -> None:
    config = _config(**LLAMA)
    runner = Runner(load_model(config), "numpy")
    bytes_of = {group: runner.new_cache(10, "efficientasr", {"group": group}).bytes for group in (1, 2, 4)}
    one = 10 * config.d_kv * 4
    assert bytes_of == {1: 8 * one, 2: 6 * one, 4: 5 * one}


ENGINES = {
    "post-norm": _config(recipe="post-norm", position="learned", max_positions=70, final_norm=False),
    "pre-norm": _config(layers=6),
    "llama": _config(**LLAMA),
    "conformer": _config(
        recipe="conformer", stem="frames", vocab=0, features=5, strides=(2,), position="relative", conv_kernel=5,
        activation="silu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("config", ENGINES.values(), ids=ENGINES)
def test_numba_is_as_right_as_numpy_in_the_same_precision(
    config: ModelConfig, params: dict[str, Any], causal: bool
) -> None:
    """max|fast - truth| <= 2 max|honest - truth| + floor, over a whole pass."""
    inputs = inputs_for(config, Workload(60, 2), dtype=np.float32)

    def run(dtype: str, engine: Any) -> Any:
        model = load_model(config, dtype=dtype)
        given = inputs if inputs.dtype.kind == "i" else inputs.astype(dtype)
        return forward(model, given, "efficientasr", params, engine, causal=causal).output.astype(np.float64)

    truth, honest, fast = run("float64", "numpy"), run("float32", "numpy"), run("float32", "numba")
    allowed = 2 * np.abs(honest - truth).max() + 16 * np.finfo(np.float32).eps * np.abs(truth).max()
    assert np.abs(fast - truth).max() <= allowed


def test_scores_that_outgrow_float16_show() -> None:
    """With alpha = 1 scores grow with depth. R has the dtype of the pass: beyond 65504 rows are NaN, not numbers."""
    config, params, engine = _config(layers=2, bias=False), EfficientASRParameters(group=1), Watching()
    layer = _layers(config, params)[0]
    layer.attention.qkv.weight[16:32] = layer.attention.qkv.weight[:16]  # q = k: each key's own score is positive
    x = _normal(1, 9, 16)
    _attend(config, params, [x], [layer], engine=engine)
    x *= math.sqrt(40_000 / engine.logits[0].max())
    for dtype, finite in (("float32", True), ("float16", False)):
        maps = {name: Weights(weight=w.weight.astype(dtype)) for name, w in vars(layer.attention).items()}
        narrow = Weights(attention=Weights(**maps))
        with np.errstate(over="ignore", invalid="ignore"):
            first, second = _attend(config, params, [x.astype(dtype)] * 2, [narrow] * 2)
        assert np.isfinite(first).all()
        assert np.isfinite(second).all() == finite


@settings(max_examples=40, deadline=None)
@given(data=st.data(), config=configs())
def test_nothing_outlives_a_pass(data: st.DataObject, config: ModelConfig) -> None:
    """No map after the last layer of its group, and no scores after the last compute layer."""
    params = data.draw(efficientasr_parameters(config))
    runner = Runner(load_model(config), "numpy")
    program = runner.prepare("efficientasr", params).program()
    weights = runner.prepare("efficientasr", params).weights
    held = []
    for index, layer in enumerate(weights.layers):
        tables = runner._tables_for(0, 4, 4)
        program.attention(at, _normal(1, 4, config.d_model), Layer(index, config, layer, False, None, tables))
        held.append((len(program.shared), program.residual is not None))
    last = (config.layers - 1) // params["group"] * params["group"]
    assert held[-1] == (0, False)
    for index, (maps, scores) in enumerate(held):
        assert maps == int((index + 1) % params["group"] != 0 and index + 1 < config.layers)
        assert scores == (params["score_residual"] > 0 and index < last)


# --- costs: section 5 of the contract ---------------------------------------------------------------------------------


def _by_component(method: str, config: ModelConfig, length: int, params: Any = None, dtype: str = "float32") -> Any:
    return costmodel.estimate(method, config, Workload(length, dtype=dtype), params).by_component()


ATTENTION = ("qkv", "scores", "softmax", "weighted-sum", "output")


def test_costs_of_a_layer_are_those_of_the_page() -> None:
    """One sequence, no biases, no positions; b = 4. Differences of models that differ by one layer."""
    t, d, h, b = 321, 384, 6, 4
    config = ModelConfig("page", "post-norm", layers=4, d_model=d, heads=h, d_ff=1000, vocab=9, bias=False)

    def layers(count: int, **params: Any) -> Any:
        found = _by_component("efficientasr", override(config, layers=count), t, params)
        return sum((found[name] for name in ATTENTION), costmodel.Cost())

    def less(a: Any, c: Any) -> dict[str, int]:
        return {
            name: getattr(a, name) - getattr(c, name)
            for name in ("matmul_flops", "vector_flops", "bytes_read", "bytes_written")
        }

    base = layers(1, group=1)
    assert base.matmul_flops == 8 * t * d * d + 4 * t * t * d
    assert base.bytes_read == (5 * t * d + 4 * d * d + 2 * h * t * t) * b
    assert base.bytes_written == (5 * t * d + 2 * h * t * t) * b
    reuse = less(layers(2, group=2), layers(1, group=2))
    assert reuse["matmul_flops"] == 4 * t * d * d + 2 * t * t * d
    assert reuse["vector_flops"] == 0
    assert reuse["bytes_read"] == (3 * t * d + 2 * d * d + h * t * t) * b
    assert reuse["bytes_written"] == 3 * t * d * b
    for alpha, flops in ((1.0, 1), (1, 1), (0.5, 2)):
        compute = less(layers(2, group=1, score_residual=alpha), layers(1, group=1))
        assert compute["matmul_flops"] == base.matmul_flops
        assert compute["vector_flops"] == base.vector_flops + flops * h * t * t
        # The page reads R_p where scores are made; here the sum is an op of its own: scores read, the sum written.
        assert compute["bytes_read"] == base.bytes_read + h * t * t * b + h * t * t * b
        assert compute["bytes_written"] == base.bytes_written + h * t * t * b
    assert less(layers(2, group=1, score_residual=0), layers(1, group=1)) == less(base, costmodel.Cost())
    banded = less(layers(1, group=1, band=4), base)
    assert banded == {
        "matmul_flops": 0,
        "vector_flops": 0,
        "bytes_read": t * t,
        "bytes_written": 0,
    }  # a mask: no saving
    soft = less(layers(1, group=1, band=4, band_penalty=1.0), base)
    assert soft["vector_flops"] == h * t * t
    assert soft["bytes_read"] == (h + 1) * t * t * b


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_costs_of_the_feed_forward_are_those_of_the_page(chunks: int, tied: bool) -> None:
    t, d, f, b = 321, 384, 1000, 4
    config = ModelConfig("page", "post-norm", layers=1, d_model=d, heads=6, d_ff=f, vocab=9, bias=False)
    params = {**OFF, "ffn_chunks": chunks, "ffn_tied": tied}
    found = _by_component("efficientasr", config, t, params)["feed-forward"]
    weights = 2 * d * f // (chunks**2 if tied else chunks)
    assert found.matmul_flops == 4 * t * d * f // chunks
    assert found.weight_bytes == weights * b
    assert found.bytes_read == (t * d + t * f + weights) * b + t * f * b  # and the activation, an op of its own
    assert found.bytes_written == (t * f + t * d) * b + t * f * b

    def parameters(**changes: Any) -> int:
        changed = replace(config, **changes)
        return costmodel.estimate("efficientasr", changed, Workload(t), params).params_bytes // b

    projections, norms = 4 * d * d, 2 * 2 * d + 2 * d + 9 * d
    assert parameters() == projections + norms + weights
    assert parameters(bias=True) - parameters() == 4 * d + (f + d) // (chunks if tied else 1)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 30), group=st.integers(1, 31), chunks=st.sampled_from([1, 2, 4, 8]),
    d=st.sampled_from([64, 256]), f=st.sampled_from([64, 2048]),
)  # fmt: skip
def test_parameters_of_an_encoder_are_those_of_the_page(layers: int, group: int, chunks: int, d: int, f: int) -> None:
    """L (4 d^2 + 2 d f / n) - (L - g) 2 d^2, without biases, norms and stem."""
    config = ModelConfig("page", "pre-norm", layers=layers, d_model=d, heads=4, d_ff=f, vocab=7, bias=False)
    params = {"group": group, "ffn_chunks": chunks}
    rest = layers * 4 * d + 2 * d + 7 * d
    found = costmodel.estimate("efficientasr", config, Workload(9), params).params_bytes // 4 - rest
    assert found == layers * (4 * d * d + 2 * d * f // chunks) - (layers - -(-layers // group)) * 2 * d * d


def test_plausibility_of_36_percent() -> None:
    """The page's illustration: 12 encoder and 6 decoder layers, d = 256, f = 2048. Not a claim about the paper.

    Feed-forwards and shared maps are estimates of an encoder of 12 layers and of one of 6; what the 6 decoder layers
    have beyond these, their cross-attention, is 4 d^2 a layer and the same under every setting.
    """
    d, f = 256, 2048

    def weights(layers: int, **params: Any) -> int:
        config = ModelConfig("part", "pre-norm", layers=layers, d_model=d, heads=4, d_ff=f, vocab=1, bias=False)
        found = costmodel.estimate("efficientasr", config, Workload(9), {**OFF, **params})
        return found.params_bytes // 4 - layers * 4 * d - 3 * d  # without norms and stem

    def model(group: int, chunks: int) -> int:
        return weights(12, group=group, ffn_chunks=chunks) + weights(6, ffn_chunks=chunks) + 6 * 4 * d * d

    dense, assumed = model(1, 1), 30e6  # with front end and embeddings: an assumption of the page
    assert f"{dense / 1e6:.2f}" == "25.17"
    saved = {setting: dense - model(*setting) for setting in [(1, 2), (1, 4), (2, 1), (2, 2)]}
    assert {name: f"{value / 1e6:.2f}" for name, value in saved.items()} == {
        (1, 2): "9.44", (1, 4): "14.16", (2, 1): "0.79", (2, 2): "10.22",
    }  # fmt: skip
    assert [round(100 * saved[name] / assumed) for name in [(1, 2), (1, 4), (2, 2)]] == [31, 47, 34]


def test_two_sets_of_maps_are_alive_at_once() -> None:
    """R and A: with a residual the peak is one set of maps higher, whatever the group."""
    config, work = preset("minilm-l6"), Workload(4096)
    one = 12 * 4096**2 * 4

    def peak(**params: Any) -> int:
        return costmodel.estimate("efficientasr", config, work, {"ffn_chunks": 1, **params}).peak_bytes

    for group in (1, 2, 3):
        assert peak(group=group) - peak(group=group, score_residual=0) == one
    assert peak(group=6) == peak(group=6, score_residual=0)  # one compute layer hands nothing on
    assert peak(group=2, band=64) - peak(group=2) == 4096**2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"group": 0}, "group=0"),
        ({"group": 1.5}, "whole number"),
        ({"score_residual": -0.5}, "score_residual=-0.5"),
        ({"score_residual": 1e-30}, "must be 0 or a number from"),  # times -inf: NaN in float32
        ({"score_residual": 1e30}, "score_residual=1e"),
        ({"score_residual": math.nan}, "score_residual=nan"),
        ({"score_residual": False}, "score_residual=False"),
        ({"score_residual": "1"}, "score_residual='1'"),
        ({"band": -1}, "band=-1"),
        ({"band": 2.0}, "whole number"),
        ({"band": 2, "band_penalty": math.nan}, "band_penalty=nan"),
        ({"band": 2, "band_penalty": math.inf}, "leave it out"),
        ({"band": 2, "band_penalty": -1.0}, "band_penalty=-1.0"),
        ({"band_penalty": 1.0}, "give band, too"),
        ({"ffn_chunks": 0}, "ffn_chunks=0"),
        ({"ffn_chunks": 3}, "d_model=16"),
        ({"ffn_chunks": 16}, "d_ff=24"),
        ({"ffn_tied": "yes"}, "ffn_tied='yes'"),
        ({"fused": 1.5}, "fused=1.5"),
        ({"fused": True}, "needs group=1, score_residual=0"),
        ({**OFF, "fused": True, "band": 2, "band_penalty": 1.0}, "no band_penalty"),
        ({"group_size": 2}, "group"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    """In one line, by the program and by the closed form."""
    for refused in (
        lambda: forward(load_model(_config()), np.arange(4)[None, :], "efficientasr", params),
        lambda: costmodel.estimate("efficientasr", _config(), Workload(4), params),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_the_sweep_starts_with_no_sharing() -> None:
    assert EfficientASRParameters.sweep(_config()) == {"group": (1, 2, 3, 4)}
    assert EfficientASRParameters() == EfficientASRParameters(2, 1.0, None, None, 2, False, False)
