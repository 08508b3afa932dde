"""Each block's way back against central differences in float64, and against values that PyTorch's autograd gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gradients import assert_gradient

from refimpl.config import ModelConfig
from refimpl.model import position_tables
from refimpl.training import blocks
from refimpl.weights.layout import Weights


def draw(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def assert_way_back(block: Callable[..., Any], *inputs: Any) -> None:
    """``back(dy)`` is the gradient of ``sum(y dy)`` with respect to each of the block's inputs."""
    y, back = block(*inputs)
    dy = draw(99, *y.shape)
    found = back(dy)
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(inputs)
    for at, gradient in enumerate(found):

        def loss(x: Any, at: int = at) -> float:
            return float(np.sum(block(*inputs[:at], x, *inputs[at + 1 :])[0] * dy))

        assert_gradient(gradient, loss, inputs[at], f"input {at}")


W, B = draw(1, 6), draw(2, 6)

ELEMENTWISE = {
    "linear": lambda x: blocks.linear(x, draw(3, 4, 6), draw(4, 4)),
    "linear without bias": lambda x: blocks.linear(x, draw(3, 4, 6)),
    "layer_norm": lambda x: blocks.layer_norm(x, W, B, 1e-5),
    "rms_norm": lambda x: blocks.rms_norm(x, W, 1e-5),
    "gelu": blocks.gelu,
    "gelu_tanh": blocks.gelu_tanh,
    "silu": blocks.silu,
    "relu": blocks.relu,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_way_back_equals_central_differences(name: str) -> None:
    assert_way_back(ELEMENTWISE[name], 2.0 * draw(0, 2, 3, 6) + 0.3)


def test_project_takes_the_gradient_of_every_part() -> None:
    weight, bias, x = draw(1, 7, 6), draw(2, 7), draw(3, 2, 3, 6)
    parts, back = blocks.project(x, weight, bias, (4, 1, 2))
    gradients = [draw(10 + at, *part.shape) for at, part in enumerate(parts)]

    def loss(x: Any) -> float:
        found = blocks.project(x, weight, bias, (4, 1, 2))[0]
        return float(sum(np.sum(a * b) for a, b in zip(found, gradients, strict=True)))

    assert_gradient(back(*gradients), loss, x)


def test_swiglu_gives_both_gradients() -> None:
    assert_way_back(blocks.swiglu, draw(0, 2, 3, 5), draw(1, 2, 3, 5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_back(interleaved: bool) -> None:
    config = ModelConfig("m", "pre-norm", 1, 16, 2, 8, vocab=9, position="rotary")
    cos, sin = position_tables(config, 5, np.float64)
    assert_way_back(lambda x: blocks.rotary(x, cos, sin, interleaved), draw(0, 2, 2, 5, 8))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_products_and_sums(kv_heads: int) -> None:
    q, kv, p = draw(0, 2, 4, 3, 5), draw(1, 2, kv_heads, 4, 5), draw(2, 2, 4, 3, 4)
    assert_way_back(lambda q, k: blocks.products(q, k, 0.3), q, kv)
    assert_way_back(blocks.weighted_sum, p, kv)


def test_masked_softmax_gives_the_gradients_of_scores_and_mask() -> None:
    mask = np.random.default_rng(1).uniform(0.1, 1.0, (2, 2, 3, 5))
    assert_way_back(blocks.masked_softmax, 3.0 * draw(0, 2, 2, 3, 5), mask)


def test_masked_softmax_of_hard_masks() -> None:
    """Kept probabilities are those of a softmax over the kept keys, and the rest is 0.

    The gradient of the mask of a dropped key is the change that letting it in whole makes.
    """
    s = np.array([[[[1.0, 2.0, 500.0, 3.0]]]])
    mask = np.array([[[[1.0, 1.0, 0.0, 0.0]]]])
    p, back = blocks.masked_softmax(s, mask)
    e = np.exp(-1.0)
    np.testing.assert_allclose(p[0, 0, 0], [e / (1 + e), 1 / (1 + e), 0, 0], rtol=1e-15)
    dp = draw(0, 1, 1, 1, 4)
    ds, dm = back(dp)
    assert ds[..., 2:].max() == ds[..., 2:].min() == 0.0
    for key in (2, 3):
        more = mask.copy()
        more[..., key] = 1.0
        change = float(np.sum((blocks.masked_softmax(s, more)[0] - p) * dp))
        assert dm[0, 0, 0, key] == pytest.approx(change, rel=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(gated: bool) -> None:
    config = ModelConfig("m", "pre-norm", 1, 6, 2, 5, vocab=9, gated=gated, activation="silu" if gated else "gelu")
    w = Weights(
        up=Weights(weight=draw(1, 10 if gated else 5, 6), bias=draw(2, 10 if gated else 5)),
        down=Weights(weight=draw(3, 6, 5), bias=draw(4, 6)),
    )
    assert_way_back(lambda x: blocks.feed_forward(x, w, config), draw(0, 2, 3, 6))


def test_losses_and_their_gradients() -> None:
    ids = np.array([[4, 0, 2], [1, 1, 3]])
    logits, y, target = 5.0 * draw(0, 2, 3, 5), draw(1, 2, 3, 5), draw(2, 2, 3, 5)
    loss, gradient = blocks.cross_entropy(logits, ids)
    expected = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    assert loss == pytest.approx(np.take_along_axis(expected, ids[..., None], -1).mean(), rel=1e-13)
    assert_gradient(gradient, lambda x: blocks.cross_entropy(x, ids)[0], logits)
    loss, gradient = blocks.relative_squared_error(y, target)
    assert loss == pytest.approx(np.linalg.norm(y - target) ** 2 / np.linalg.norm(target) ** 2, rel=1e-13)
    assert_gradient(gradient, lambda x: blocks.relative_squared_error(x, target)[0], y)


def test_large_logits_overflow_nothing() -> None:
    loss, gradient = blocks.cross_entropy(np.array([[[3e4, -3e4, 0.0]]], np.float32), np.array([[1]]))
    assert loss == 6e4
    np.testing.assert_array_equal(gradient, np.array([[[1.0, -1.0, 0.0]]], np.float32))
    y, back = blocks.silu(np.array([-2000.0, 2000.0]))
    np.testing.assert_array_equal(back(np.ones(2)), [0.0, 1.0])
    np.testing.assert_array_equal(y, [0.0, 2000.0])


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "linear" not in name])
def test_float32_stays_float32(name: str) -> None:
    w, b = W.astype(np.float32), B.astype(np.float32)
    norms = {
        "layer_norm": lambda x: blocks.layer_norm(x, w, b, 1e-5),
        "rms_norm": lambda x: blocks.rms_norm(x, w, 1e-5),
    }
    y, back = norms.get(name, ELEMENTWISE[name])(draw(0, 2, 3, 6).astype(np.float32))
    assert y.dtype == back(y).dtype == np.float32


# torch.autograd.grad of torch.nn.functional's layer_norm, rms_norm, gelu, silu and scaled_dot_product_attention (with
# is_causal and enable_gqa) in float64, PyTorch 2.13
X, DY = np.array([0.5, -1.0, 2.0, 0.25]), np.array([1.0, -0.5, 0.25, 2.0])
SCALE, SHIFT = np.array([1.0, 2.0, -1.0, 0.5]), np.array([0.1, 0.2, 0.3, 0.4])
TORCH: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "layer_norm": (
        lambda x: blocks.layer_norm(x, SCALE, SHIFT, 1e-5),
        [0.750184935942575, -0.840435035464481, -0.70747566959025, 0.797725769112156],
    ),
    "rms_norm": (
        lambda x: blocks.rms_norm(x, SCALE, 1e-5),
        [0.765634796197423, -0.663551027819257, -0.625264714656563, 0.816676680386506],
    ),
    "gelu": (blocks.gelu, [0.867495124656163, 0.0416577352938432, 0.271307950269549, 1.39074670976727]),
    "gelu_tanh": (blocks.gelu_tanh, [0.867369903534642, 0.0414820419228913, 0.271524814155905, 1.39070819030212]),
    "silu": (blocks.silu, [0.739961187302652, -0.0361647440642566, 0.272696062196224, 1.2474200431404]),
}


@pytest.mark.parametrize("name", TORCH)
def test_gradient_equals_that_of_pytorch(name: str) -> None:
    block, expected = TORCH[name]
    np.testing.assert_allclose(block(X)[1](DY), expected, rtol=1e-13)


def test_attention_gradient_equals_that_of_pytorch() -> None:
    q = np.array([[[[1.0, 2.0], [0.5, -1.0]], [[0.0, 1.0], [2.0, 0.3]]]])
    k, v = np.array([[[[0.3, -0.7], [1.1, 0.4]]]]), np.array([[[[1.0, 0.0], [0.5, 2.0]]]])
    do = np.array([[[[1.0, 2.0], [3.0, 4.0]], [[-1.0, 1.0], [2.0, 1.5]]]])
    s, products_back = blocks.products(q, k, 2.0**-0.5)
    p, softmax_back = blocks.masked_softmax(s, np.tri(2))
    _, sum_back = blocks.weighted_sum(p, v)
    dp, dv = sum_back(do)
    dq, dk = products_back(softmax_back(dp)[0])
    expected = [0.0, 0.0, 0.865157167704885, 1.18959110559422, 0.0, 0.0, 0.183364504038264, 0.252126193052613]
    np.testing.assert_allclose(dq.ravel(), expected, rtol=1e-13)
    expected = [-0.999134489911214, 1.01268477061676, 0.999134489911213, -1.01268477061676]
    np.testing.assert_allclose(dk.ravel(), expected, rtol=1e-13)
    expected = [2.27078272706995, 5.79032293866028, 2.72921727293005, 2.70967706133972]
    np.testing.assert_allclose(dv.ravel(), expected, rtol=1e-13)
