"""The invariants of SVD-softmax, and the table of what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import small_llama
from scipy.special import softmax
from strategies import configs, decoders, inputs_for, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, preset
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, InputError
from refimpl.methods.subject import Subject
from refimpl.methods.svd_softmax import SVDSoftmax, mixed_logits
from refimpl.parameters.svd_softmax import Basis, SVDSoftmaxParameters
from refimpl.preparation import svd_softmax as preparation

Array = Any
NUMPY, NUMBA = NumpyEngine(), NumbaEngine()


def _config(**changes: Any) -> ModelConfig:
    return small_llama(**{"layers": 2, "vocab": 300, **changes})


def _head(words: int, width: int, rank: int | None = None, dtype: Any = np.float64, seed: int = 0) -> Array:
    """A matrix A (V, D) with falling singular values and a mean row that is not zero."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, width + 1) ** -0.7
    if rank is not None:
        scale[rank:] = 0
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return ((rng.standard_normal((words, width)) + 0.5) * scale @ turn).astype(dtype)


def _turned(head: Array, **params: Any) -> tuple[Any, ModelConfig, SVDSoftmaxParameters]:
    """The head as the method reads it."""
    config = _config(
        vocab=head.shape[0], d_model=head.shape[1], heads=1, kv_heads=1, head_dim=head.shape[1], position="none"
    )
    weights = SimpleNamespace(stem=SimpleNamespace(embedding=head))
    subject = Subject(SimpleNamespace(config=config, weights=weights), NUMPY)
    parameters = SVDSoftmax.complete(SVDSoftmaxParameters(**params), subject)
    return preparation.turned_head(head, config, parameters), config, parameters


def _logits(head: Array, h: Array, engine: Any = NUMPY, **params: Any) -> Array:
    turned, config, parameters = _turned(head, **params)
    return mixed_logits(engine, h, turned, parameters.full_views(config), parameters.full_view == "replace")


SHAPES = st.tuples(st.integers(2, 80), st.integers(1, 20), st.integers(1, 4))


# --- the decomposition ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(["svd", "gram"]))
def test_the_head_is_turned_and_nothing_is_lost(shape: tuple[int, int, int], decomposition: str) -> None:
    """Invariant 4: R Qᵀ = A, Q is a rotation, and columns of R do not grow."""
    words, width, _ = shape
    head = _head(words, width)
    turned, _, parameters = _turned(head, window=width, decomposition=decomposition)
    np.testing.assert_allclose(turned.preview @ turned.rotation, head, atol=1e-10)
    np.testing.assert_allclose(turned.rotation @ turned.rotation.T, np.eye(width), atol=1e-10)
    norms = np.linalg.norm(turned.preview, axis=0)
    assert (np.diff(norms) <= 1e-7 * norms[0]).all()
    assert parameters.basis.record["decomposition"] == decomposition


def test_svd_and_gram_find_the_same_directions() -> None:
    head = _head(200, 12)
    one, other = (_turned(head, window=12, decomposition=name)[0] for name in ("svd", "gram"))
    np.testing.assert_allclose(np.abs(one.preview), np.abs(other.preview), atol=1e-9)
    assert _turned(head)[2].basis.record["decomposition"] == "svd"
    huge = SimpleNamespace(size=2**24 + 1)
    assert preparation.decomposition_of(SVDSoftmaxParameters(), huge) == "gram"


# --- exactness ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans(), st.data())
def test_a_full_window_or_all_words_is_the_exact_head(
    shape: tuple[int, int, int], all_words: bool, data: st.DataObject
) -> None:
    """Invariant 1, and in float32 on both engines the 2x rule against the exact head in float32."""
    words, width, rows = shape
    head, h = _head(words, width, dtype=np.float32), _head(rows, width, dtype=np.float32, seed=1)
    params = {
        "window": data.draw(st.integers(1, width)) if all_words else width,
        "candidates": words if all_words else data.draw(st.integers(1, words)),
        "full_view": data.draw(st.sampled_from(["incremental", "replace"])),
    }
    exact = h.astype(np.float64) @ head.astype(np.float64).T
    np.testing.assert_allclose(_logits(head.astype(float), h.astype(float), **params), exact, atol=1e-10)
    floor = 16 * np.finfo(np.float32).eps * np.abs(h).sum(-1).max() * np.abs(head).max()
    honest = np.abs(h @ head.T - exact).max()
    for engine in (NUMPY, NUMBA):
        assert np.abs(_logits(head, h, engine, **params) - exact).max() <= 2 * honest + floor


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.data())
def test_candidates_are_exact_and_the_others_within_their_bound(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    """Invariants 2, 3 and 7: both full views agree, N distinct words are exact, the certificate holds for all."""
    words, width, rows = shape
    window, n = data.draw(st.integers(1, width)), data.draw(st.integers(1, words))
    head, h = _head(words, width), _head(rows, width, seed=1)
    exact = h @ head.T
    added, replaced = (
        _logits(head, h, window=window, candidates=n, full_view=name) for name in ("incremental", "replace")
    )
    np.testing.assert_allclose(added, replaced, atol=1e-10)
    turned, _, _ = _turned(head, window=window, candidates=n)
    g = h @ turned.rotation.T
    preview = g[:, :window] @ turned.preview.T
    bounds = preparation.error_bounds(preparation.tail_norms(turned.full_view), g[:, window:])
    assert (np.abs(preview - exact) <= bounds + 1e-12).all()
    if window < width:
        ids = NUMPY.top(preview, n)
        assert all(len(set(row)) == n for row in ids.tolist())
        here = np.arange(rows)[:, None], ids
        np.testing.assert_allclose(added[here], exact[here], atol=1e-10)
        apart = np.ones_like(added, bool)
        apart[here] = False
        np.testing.assert_array_equal(added[apart], preview[apart])
        for k in range(1, n + 1):
            for row in np.flatnonzero(preparation.is_certain(added, ids, bounds, k)):
                assert set(np.argsort(-added[row])[:k]) == set(np.argsort(-exact[row])[:k])


def test_certificate_is_given_where_it_can_be() -> None:
    head, h = _head(400, 16), _head(30, 16, seed=1)
    turned, _, _ = _turned(head, window=14, candidates=100)
    g = h @ turned.rotation.T
    logits = g[:, :14] @ turned.preview.T
    ids = NUMPY.top(logits, 100)
    bounds = preparation.error_bounds(preparation.tail_norms(turned.full_view), g[:, 14:])
    certain = preparation.is_certain(NUMPY.refine(logits, ids, turned.full_view, g[:, 14:]), ids, bounds, 1)
    assert certain.sum() > 20
    assert not preparation.is_certain(logits, ids, bounds, 101).any()


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.data())
def test_a_head_of_low_rank_needs_no_full_view(shape: tuple[int, int, int], data: st.DataObject) -> None:
    """Invariant 6."""
    words, width, rows = shape
    window = data.draw(st.integers(1, width))
    head, h = _head(words, width, rank=window), _head(rows, width, seed=1)
    decomposition = data.draw(st.sampled_from(["svd", "gram"]))
    found = _logits(head, h, window=window, candidates=1, decomposition=decomposition)
    np.testing.assert_allclose(found, h @ head.T, atol=1e-6)


def test_probabilities_are_positive_and_sum_to_one_even_with_one_candidate() -> None:
    """Invariants 4, 7 and 8: a constant on all logits changes no probability and no candidate."""
    z = _logits(_head(300, 24), _head(5, 24, seed=1), window=3, candidates=1)
    y = softmax(z, axis=-1)
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-12)
    assert (y > 0).all()
    np.testing.assert_allclose(softmax(z + 64.0, axis=-1), y, rtol=1e-9)
    np.testing.assert_array_equal(NUMPY.top(np.round(z, 3) + 64.0, 7), NUMPY.top(np.round(z, 3), 7))


# --- in a model -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), fused=st.booleans())
def test_off_knob_equals_the_exact_baselines(data: st.DataObject, fused: bool) -> None:
    """Attention is that of dense or flash; the head differs by the rounding of a rotated basis."""
    config = data.draw(configs(head=True))
    workload = data.draw(workloads(config))
    model, inputs = load_model(config, dtype="float64"), inputs_for(config, workload)
    exact = forward(model, inputs, "flash" if fused else "dense", causal=workload.causal).output
    for off in ({"window": config.d_model}, {"candidates": config.vocab}):
        found = forward(model, inputs, "svd-softmax", {**off, "fused": fused}, causal=workload.causal).output
        np.testing.assert_allclose(found, exact, atol=1e-12)
    on = forward(model, inputs, "svd-softmax", {"window": 1, "candidates": 1, "fused": fused}, causal=workload.causal)
    if config.d_model > 1 and config.vocab > 2:
        assert not np.allclose(on.output, exact, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(config=decoders(head=True), past=st.integers(1, 5), steps=st.integers(1, 3))
def test_decoding_equals_prefill(config: ModelConfig, past: int, steps: int) -> None:
    runner, ids = Runner(load_model(config, dtype="float64"), "numpy"), inputs_for(config, Workload(past + steps))
    ready = runner.prepare("svd-softmax")
    cache = runner.new_cache(past + steps, ready)
    parts = [runner(ids[:, :past], ready, cache=cache).output, runner.decode(ids[:, past:], ready, cache).output]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), runner(ids, ready).output, atol=1e-12)


@pytest.mark.parametrize("params", [{}, {"full_view": "replace"}, {"fused": False, "window": 7, "candidates": 29}])
def test_fast_engine_within_twice_the_rounding_of_numpy(params: dict[str, Any]) -> None:
    """Where both pick the same candidates: rounding may swap the last of them for the next word."""
    ids = np.random.default_rng(0).integers(0, 300, (2, 40))
    basis = Runner(load_model(_config()), "numpy").prepare("svd-softmax").parameters.basis
    given = {**params, "basis": basis}
    exact = forward(load_model(_config(), dtype="float64"), ids, "svd-softmax", given).output
    single = load_model(_config())
    honest = np.abs(forward(single, ids, "svd-softmax", given).output - exact)
    fast = np.abs(forward(single, ids, "svd-softmax", given, engine="numba").output - exact)
    assert np.median(fast) <= 2 * np.median(honest)
    assert (fast > 1e-4).sum() <= 2 * ((honest > 1e-4).sum() + 1)


def test_rows_do_not_see_each_other() -> None:
    """Batches and positions: what is computed together equals what is computed alone."""
    head, h = _head(90, 12), _head(6, 12, seed=1).reshape(2, 3, 12)
    for engine in (NUMPY, NUMBA):
        together = _logits(head, h, engine, window=2, candidates=9)
        for at in np.ndindex(2, 3):
            alone = _logits(head, h[at][None, None], engine, window=2, candidates=9)[0, 0]
            np.testing.assert_allclose(together[at], alone, atol=1e-13)


# --- weighting by activations ---------------------------------------------------------------------------------------


def test_weighted_directions_are_still_exact_at_full_width_and_better_before() -> None:
    """R g = A h for any hidden state; and for such as those that were seen the preview's error is smaller."""
    config = _config(vocab=300)
    model = load_model(config, dtype="float64")
    embedding = model.weights.stem.embedding
    embedding[:] = _head(300, 24)
    ids = np.random.default_rng(0).integers(0, 300, (4, 60))
    subject = Subject(model, NUMPY, ids)
    states = preparation.hidden_states(subject)
    assert states.shape == (240, 24)
    errors = {}
    for weighting in ("none", "activations"):
        ready = Runner(model, NUMPY).prepare("svd-softmax", {"window": 6, "weighting": weighting}, ids)
        head = ready.weights.head
        g = states @ head.rotation.T
        np.testing.assert_allclose(
            g[:, :6] @ head.preview.T + g[:, 6:] @ head.full_view.T, states @ embedding.T, atol=1e-9
        )
        errors[weighting] = np.linalg.norm(g[:, 6:] @ head.full_view.T)
        assert ready.parameters.basis.record["weighting"] == weighting
    assert errors["activations"] < 0.98 * errors["none"]


def test_weighting_needs_inputs_with_something_in_them() -> None:
    with pytest.raises(ConfigError, match="needs inputs"):
        Runner(load_model(_config()), "numpy").prepare("svd-softmax", {"weighting": "activations"})
    model = load_model(_config())
    model.weights.final_norm.weight[:] = 0
    with pytest.raises(InputError, match="all zero"):
        Runner(model, "numpy").prepare("svd-softmax", {"weighting": "activations"}, np.zeros((1, 4), int))


def test_the_mean_row_is_left_out_of_the_second_spectrum() -> None:
    head = _head(300, 16)
    moved = head + 100 * np.linspace(-1, 1, 16)
    before, after = (preparation.spectrum(a, preparation.gram_matrix(a)) for a in (head, moved))
    assert after["shares"]["D/16"] > 0.99 > before["shares"]["D/16"]
    assert after["centred_shares"] == pytest.approx(before["centred_shares"], abs=1e-3)
    values = np.linalg.svd(head - head.mean(0), compute_uv=False) ** 2
    assert before["centred_shares"]["D/4"] == pytest.approx(values[:4].sum() / values.sum(), abs=1e-4)


# --- cost -----------------------------------------------------------------------------------------------------------

# V, D, W, N: multiplications and weights, in percent and MB, and break-even batches, of "replace" and "incremental"
TABLE = [
    (800_000, 256, 32, 50_000, 18.78, 18.00, 819.2, 153.9, 147.5, 14.0, 16.0),
    (800_000, 256, 32, 40_000, 17.53, 16.91, 819.2, 143.6, 138.5, 17.5, 20.0),
    (262_144, 2048, 256, 16_384, 19.53, 18.75, 2147.5, 419.4, 402.7, 13.9, 15.9),
    (50_000, 500, 100, 5_000, 31.00, 29.00, 100.0, 31.0, 29.0, 7.9, 9.9),
    (50_000, 500, 50, 2_500, 16.00, 15.50, 100.0, 16.0, 15.5, 17.8, 19.8),
    (33_278, 1024, 128, 3_328, 25.58, 24.33, 136.3, 34.9, 33.2, 8.4, 9.6),
    (8_000, 256, 32, 400, 20.70, 20.07, 8.2, 1.7, 1.6, 16.9, 19.3),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(map(str, row[:4])))
def test_multiplications_bytes_and_break_even_batches(row: tuple[Any, ...]) -> None:
    """Invariant 5: the closed form of the head, at one position and at a batch, against formulas and figures."""
    V, D, W, N, *printed = row
    config = _config(vocab=V, d_model=D, heads=1, kv_heads=1, head_dim=D, layers=1)
    costs = {}
    for batch in (1, 3):
        costs["dense", batch] = _head_cost("dense", config, batch)
        for view in ("replace", "incremental"):
            cost = _head_cost("svd-softmax", config, batch, {"window": W, "candidates": N, "full_view": view})
            depth = D if view == "replace" else D - W
            assert cost.matmul_flops == 2 * batch * (D * D + V * W + N * depth)
            assert cost.weight_bytes == 4 * (D * D + V * W + batch * N * depth)
            costs[view, batch] = cost
    full, replaced, added = (costs[name, 1] for name in ("dense", "replace", "incremental"))
    found = [
        *(100 * cost.matmul_flops / full.matmul_flops for cost in (replaced, added)),
        *(cost.weight_bytes / 1e6 for cost in (full, replaced, added)),
        *(float(Fraction(V * (D - W) - D * D, N * depth)) for depth in (D, D - W)),
    ]
    assert found == pytest.approx(printed, abs=0.051)
    assert found[:2] == pytest.approx(printed[:2], abs=0.0051)


def _head_cost(method: str, config: ModelConfig, batch: int, params: Any = None) -> Any:
    workload = Workload(1, batch, phase="decode", kv_len=1)
    return costmodel.estimate(method, config, workload, params).by_component()["head"]


def test_weights_are_those_of_the_model_and_a_second_head() -> None:
    """The table of tokens stays, so the turned head is extra: V D + D^2, and V W more to replace."""
    config = preset("smollm2-135m")
    V, D, W = config.vocab, config.d_model, 72
    dense = costmodel.estimate("dense", config, Workload(8)).params_bytes
    for view, extra in (("incremental", V * D), ("replace", V * (D + W))):
        cost = costmodel.estimate("svd-softmax", config, Workload(8), {"window": W, "full_view": view})
        assert cost.params_bytes - dense == 4 * (extra + D * D)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"window": 25}, "window=25; the head of tiny is 24 wide"),
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"candidates": 301}, "candidates=301; the head of tiny is 300 words high"),
        ({"candidates": 0}, "candidates=0"),
        ({"candidates": True}, "candidates=True"),
        ({"full_view": "both"}, "full_view='both'"),
        ({"decomposition": "qr"}, "decomposition='qr'"),
        ({"decomposition": "svd", "weighting": "activations"}, "goes by the Gram matrix: leave out one"),
        ({"weighting": 1}, "weighting=1"),
        ({"fused": "yes"}, "fused='yes'"),
        ({"basis": 3}, "basis=3"),
        ({"basis": Basis(np.eye(5))}, "basis has 5 directions; tiny is 24 wide"),
        ({"basis": "no such file.json"}, "cannot be read"),
        ({"windw": 3}, "did you mean 'window'"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], words: str) -> None:
    for run in (
        lambda: forward(load_model(_config()), np.zeros((1, 3), int), "svd-softmax", params),
        lambda: costmodel.estimate("svd-softmax", _config(), Workload(3), params),
    ):
        with pytest.raises(ConfigError) as caught:
            run()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["minilm-l6", "whisper-tiny-en", "emformer-rnnt-base"])
def test_a_model_without_a_head_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has none: take a model with one"):
        costmodel.estimate("svd-softmax", preset(name), Workload(64))


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_basis_is_written_and_read_bit_for_bit(tmp_path: Path) -> None:
    runner = Runner(load_model(_config()), "numpy")
    found = runner.prepare("svd-softmax").parameters
    path = tmp_path / "basis.json"
    path.write_text(json.dumps(found.to_document()), "utf-8")
    read = SVDSoftmaxParameters(basis=path).basis
    np.testing.assert_array_equal(read.into, found.basis.into)
    assert read == found.basis
    assert read.record["shares"] == found.basis.record["shares"]
    ids = np.arange(30)[None]
    np.testing.assert_array_equal(
        runner(ids, "svd-softmax", {"basis": str(path)}).output, runner(ids, "svd-softmax").output
    )
    with pytest.raises(ConfigError, match="no basis yet"):
        SVDSoftmaxParameters().to_document()
    with pytest.raises(ConfigError, match="not decomposed yet"):
        SVDSoftmax.derive(runner.model.weights, _config(), SVDSoftmaxParameters())


def _flipped(document: dict[str, Any]) -> str:
    line = document["directions"][0]
    document["directions"] = [("B" if line[0] == "A" else "A") + line[1:]]
    return json.dumps(document)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_flipped, "is damaged"),
        (lambda d: json.dumps(d)[:-40], "damaged or not a JSON file"),
        (lambda d: json.dumps({**d, "directions": ["%%%"]}), "is damaged"),
        (lambda d: json.dumps({**d, "directions": 7}), "is damaged"),
        (lambda d: json.dumps({**d, "width": 10**9}), "is damaged"),
        (lambda d: json.dumps({**d, "sha256": "0"}), "is damaged"),
        (lambda d: json.dumps({**d, "version": 9}), "version 9"),
        (lambda d: json.dumps({"effref": "kvsharer strategy"}), "holds no svd-softmax basis"),
        (lambda d: "[]", "holds no svd-softmax basis"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(spoil: Any, words: str, tmp_path: Path) -> None:
    document = SVDSoftmaxParameters(basis=Basis(np.eye(24))).to_document()
    path = tmp_path / "basis.json"
    path.write_text(spoil(document), "utf-8")
    with pytest.raises(ConfigError) as caught:
        SVDSoftmaxParameters(basis=str(path)).check(replace(_config()))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
