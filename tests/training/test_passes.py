"""Whole models with thresholds: equal to dense without a filter, and their gradient equal to central differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradients import assert_gradient, central_differences

from refimpl import Model, forward, load_model
from refimpl.config import ModelConfig, override, preset
from refimpl.errors import ConfigError, InputError, ShapeError
from refimpl.inputs import random_inputs
from refimpl.training import filter as filters
from refimpl.training.filter import Rule, thresholded_attention
from refimpl.training.passes import TrainableModel

SIZES = {"layers": 2, "d_model": 12, "heads": 4, "d_ff": 10}
MODELS = {
    "post-norm": override(preset("minilm-l6"), **SIZES, vocab=30),
    "smollm2": override(preset("smollm2-135m"), **SIZES, kv_heads=2, head_dim=4, vocab=30),
    "gpt2": override(preset("gpt2"), **SIZES, vocab=30),
    "vit": replace(override(preset("deit-s"), **SIZES), features=5, max_positions=9),
    "dinov2": replace(override(preset("dinov2-s"), **SIZES), features=5, max_positions=9),
    "whisper": replace(override(preset("whisper-tiny-en"), **SIZES), features=5, max_positions=9),
}
EXACT = Rule(estimate="exact", stage2="float")
SOFT = Rule(estimate="exact", stage2="float", mask="soft", temperature=0.7)


def model_of(config: ModelConfig, dtype: str = "float64") -> Model:
    """Random weights with scores of a spread of several units."""
    model = load_model(config, weights="random", dtype=dtype, seed=3)
    for layer in model.weights.layers:
        layer.attention.qkv.weight *= 4.0
    return model


def thresholds_of(config: ModelConfig, seed: int = 0) -> Any:
    return np.random.default_rng(seed).uniform(0.2, 2.0, (config.layers, config.heads))


@pytest.mark.parametrize("estimate", ["exact", "ms4b"])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_filter_it_is_dense(name: str, estimate: Any) -> None:
    config = MODELS[name]
    model, inputs = model_of(config), random_inputs(config, 7, 2, dtype="float64")
    found = TrainableModel(model, replace(EXACT, estimate=estimate))(inputs, np.full((2, 4), math.inf))
    expected = forward(model, inputs, "dense", record=False).output
    np.testing.assert_allclose(found.output, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found.kept, 1.0)
    gradient = found.backward(np.ones_like(found.output), np.ones((2, 4)))
    np.testing.assert_array_equal(gradient, 0.0)  # of a threshold that nothing reaches


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_all_thresholds_equals_central_differences(name: str) -> None:
    """With the soft mask, in which the whole model is smooth."""
    config = MODELS[name]
    model = TrainableModel(model_of(config), SOFT)
    inputs, thresholds = random_inputs(config, 6, 2, dtype="float64"), thresholds_of(config)
    found = model(inputs, thresholds)
    rng = np.random.default_rng(1)
    doutput, dkept = rng.standard_normal(found.output.shape), rng.standard_normal(found.kept.shape)

    def loss(thresholds: Any) -> float:
        here = model(inputs, thresholds, gradient=False)
        return float(np.sum(here.output * doutput) + np.sum(here.kept * dkept))

    assert_gradient(found.backward(doutput, dkept), loss, thresholds, name)


@pytest.mark.parametrize("nibble", ["floor", "round"])
@pytest.mark.parametrize("name", ["post-norm", "smollm2"])
def test_gradient_with_the_low_precision_estimate(name: str, nibble: Any) -> None:
    """That of the last layer's thresholds passes no rounding and is exact; those of the others are not 0."""
    config = MODELS[name]
    rule = Rule(nibble=nibble, mask="soft", temperature=0.7)
    model = TrainableModel(model_of(config), rule)
    inputs, thresholds = random_inputs(config, 6, 2), thresholds_of(config)
    found = model(inputs, thresholds)
    doutput = np.random.default_rng(1).standard_normal(found.output.shape)
    gradient = found.backward(doutput, np.zeros((2, 4)))

    def loss(last: Any) -> float:
        here = model(inputs, np.concatenate([thresholds[:-1], last]), gradient=False)
        return float(np.sum(here.output * doutput))

    assert_gradient(gradient[-1:], loss, thresholds[-1:], name)
    assert np.abs(gradient[0]).min() > 0


def test_straight_through_is_exact_where_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way back through estimate and int8 scores, when both are made of unrounded numbers."""
    monkeypatch.setattr(filters, "quantised", lambda x: (x, np.ones((len(x), x.shape[1], 1, 1))))
    monkeypatch.setattr(filters, "upper_nibble", lambda x, nibble: x / 16.0)
    config = MODELS["smollm2"]
    model = TrainableModel(model_of(config), Rule(mask="soft", temperature=0.7))
    inputs, thresholds = random_inputs(config, 6, 2), thresholds_of(config)
    found = model(inputs, thresholds)
    doutput = np.random.default_rng(1).standard_normal(found.output.shape)

    def loss(thresholds: Any) -> float:
        return float(np.sum(model(inputs, thresholds, gradient=False).output * doutput))

    assert_gradient(found.backward(doutput, np.zeros((2, 4))), loss, thresholds)


def test_hard_mask_goes_back_as_the_soft_one_where_they_agree() -> None:
    """At a low temperature, with no distance near a threshold, the masks are equal and so are the ways back."""
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((2, 4, 5, 4)), rng.standard_normal((2, 2, 5, 4)), rng.standard_normal((2, 2, 5, 4))
    thresholds, do = np.full(4, 1.0), rng.standard_normal((2, 4, 5, 4))
    gradients = []
    for mask in ("hard", "soft"):
        rule = Rule("exact", stage2="float", temperature=1e-5, mask=mask)  # type: ignore[arg-type]
        _, back = thresholded_attention(q, k, v, 0.5, np.tri(5, dtype=bool), lambda _: thresholds, rule)
        gradients.append(back(do, np.zeros(4)))
    for hard, soft in zip(*gradients, strict=True):
        np.testing.assert_allclose(hard, soft, rtol=1e-9, atol=1e-12)


def test_straight_through_slope_of_the_hard_mask() -> None:
    """One query and two keys, by hand: dtheta = sum over keys of dL/dmask sigmoid'((theta - distance) / t) / t."""
    q, k = np.array([[[[1.0], [1.0]]]]), np.array([[[[2.0], [0.5]]]])
    v, do = np.array([[[[3.0], [7.0]]]]), np.array([[[[0.0], [1.0]]]])  # the second query counts
    rule = Rule("exact", stage2="float", temperature=0.5)
    attended, back = thresholded_attention(q, k, v, 1.0, np.tri(2, dtype=bool), lambda _: np.array([1.0]), rule)
    assert attended.output[0, 0, :, 0].tolist() == [3.0, 3.0]  # distance 1.5 is dropped
    assert attended.kept.tolist() == [2 / 3]
    slope = 0.25 / math.cosh((1.0 - 1.5) / 0.5 / 2) ** 2 / 0.5
    share = math.exp(0.5) / (math.exp(2.0) + math.exp(0.5))  # of the dropped key, were it let in
    expected = share * (7.0 - 3.0) * slope  # the kept key has g = 0
    assert back(do, np.zeros(1))[3][0] == pytest.approx(expected, rel=1e-12)
    kept_slopes = slope + 2 * 0.25 / math.cosh(1.0 / 0.5 / 2) ** 2 / 0.5  # the dropped pair, two row maxima
    assert back(np.zeros_like(do), np.ones(1))[3][0] == pytest.approx(kept_slopes / 3, rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stage2", ["int8", "float"])
@pytest.mark.parametrize("nibble", ["floor", "round"])
def test_filter_equals_integers_key_by_key(nibble: Any, stage2: Any, causal: bool) -> None:
    """Python integers with arithmetic shifts, one query after the other."""
    rng = np.random.default_rng(2)
    q, k = 2.0 * rng.standard_normal((1, 4, 9, 8)), rng.standard_normal((1, 2, 9, 8))
    v, thresholds, scale = rng.standard_normal((1, 2, 9, 8)), np.array([0.0, 0.7, 2.0, 5.0]), 8**-0.5
    visible = np.tri(9, dtype=bool) if causal else np.ones((9, 9), bool)
    found, _ = thresholded_attention(q, k, v, scale, visible, lambda _: thresholds, Rule(nibble=nibble, stage2=stage2))
    for head, theta in enumerate(thresholds):
        of_q, of_k, of_v = q[0, head], k[0, head // 2], v[0, head // 2]
        q_scale, k_scale = np.abs(of_q).max() / 127, np.abs(of_k).max() / 127
        q8, k8 = np.rint(of_q / q_scale).astype(int), np.rint(of_k / k_scale).astype(int)
        assert max(abs(q8).max(), abs(k8).max()) == 127
        halves = [np.clip((x8 + 8) >> 4, -8, 7) if nibble == "round" else x8 >> 4 for x8 in (q8, k8)]
        count = 0
        for i in range(9):
            keys = range(i + 1) if causal else range(9)
            estimate = {j: 256 * int(halves[0][i] @ halves[1][j]) for j in keys}
            least = max(estimate.values()) - theta / (q_scale * k_scale * scale)
            kept = [j for j in keys if estimate[j] >= least - 1e-9]
            count += len(kept)
            s = np.array([int(q8[i] @ k8[j]) * q_scale * k_scale for j in kept]) * scale
            if stage2 == "float":
                s = np.array([of_q[i] @ of_k[j] for j in kept]) * scale
            p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            np.testing.assert_allclose(found.output[0, head, i], p @ of_v[kept], rtol=1e-10, atol=1e-12)
        assert found.kept[head] == count / visible.sum()


def test_kept_share_grows_with_the_threshold_and_is_never_nothing() -> None:
    config = MODELS["smollm2"]
    model, inputs = TrainableModel(model_of(config, "float32"), Rule()), random_inputs(config, 9)
    kept = [model(inputs, np.full((2, 4), theta), gradient=False).kept[0] for theta in (0.0, 0.5, 2.0, 1e3)]
    assert (np.diff(kept, axis=0) >= 0).all()
    assert kept[0].min() >= 9 / 45  # a key of each query
    np.testing.assert_array_equal(kept[-1], 1.0)


def test_float32_gradient_is_that_of_float64() -> None:
    config = MODELS["smollm2"]
    inputs, thresholds = random_inputs(config, 8), thresholds_of(config)
    gradients = []
    for dtype in ("float32", "float64"):
        found = TrainableModel(model_of(config, dtype), SOFT)(inputs, thresholds)
        assert found.output.dtype == dtype
        gradients.append(found.backward(np.ones_like(found.output), np.ones((2, 4))))
    np.testing.assert_allclose(*gradients, rtol=1e-3, atol=1e-4 * np.abs(gradients[1]).max())


def test_an_extreme_input_gives_finite_gradients() -> None:
    """Scores of thousands, of which the estimate may rank another key first than the exact score."""
    rng = np.random.default_rng(0)
    q, k = (1e2 * rng.standard_normal((1, 4, 6, 4)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((1, 4, 6, 4)).astype(np.float32)
    for thresholds in (np.zeros(4), np.full(4, 1e4)):
        _, back = thresholded_attention(q, k, v, 0.5, np.tri(6, dtype=bool), lambda _, t=thresholds: t, Rule())
        assert all(np.isfinite(x).all() for x in back(np.ones_like(v), np.ones(4)))
    _, back = thresholded_attention(0 * q, k, v, 0.5, np.tri(6, dtype=bool), lambda _: np.zeros(4), Rule())
    assert all(np.isfinite(x).all() for x in back(np.ones_like(v), np.ones(4)))


@pytest.mark.parametrize("name", ["conformer-m", "emformer-rnnt-base"])
def test_other_recipes_are_refused(name: str) -> None:
    config = override(preset(name), layers=1)
    with pytest.raises(ConfigError, match="thresholds are trained for post-norm and pre-norm"):
        TrainableModel(load_model(config, weights="random"), Rule())


def test_wrong_arguments_are_refused() -> None:
    config = MODELS["smollm2"]
    model = TrainableModel(model_of(config), Rule())
    with pytest.raises(ShapeError, match=r"\(layers, heads\) = \(2, 4\)"):
        model(random_inputs(config, 4), np.zeros((4, 2)))
    with pytest.raises(InputError, match="token ids"):
        model(np.array([[40]]), np.zeros((2, 4)))
    with pytest.raises(ConfigError, match="nibble"):
        Rule(nibble="ceil")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature"):
        Rule(temperature=0.0)


def test_central_differences_find_a_known_gradient() -> None:
    """The truth of these tests, where it is known."""
    x = np.array([0.3, -1.2])
    np.testing.assert_allclose(central_differences(lambda x: float(np.sum(np.sin(x))), x), np.cos(x), rtol=1e-9)


@pytest.mark.models
@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m", "dinov2-s"])
def test_pretrained_models_without_a_filter_are_dense(name: str) -> None:
    from refimpl.weights import pretrained

    if pretrained.folder(name) is None:
        pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
    model = load_model(name, weights="pretrained")
    inputs = random_inputs(model.config, 24)
    everything = np.full((model.config.layers, model.config.heads), math.inf)
    found = TrainableModel(model, EXACT)(inputs, everything, gradient=False).output
    expected = forward(model, inputs, record=False).output
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
