"""The parts of a Transformer, each with the way back: ``y, back = block(x, ...)`` and ``dx = back(dy)``.

Weights are frozen, so gradients are those of activations alone. Forward equations are those of the NumPy engine.
Letters: B batch, T positions, d width, D head width, H heads, V vocabulary; dy is the gradient of a number with respect
to y.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.engines.protocol import Array
from refimpl.weights.layout import Weights

Back = Callable[[Array], Array]

OPS = NumpyEngine()


# --- linear maps ----------------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Back]:
    """``y = x Wᵀ + b``; ``dx = dy W``."""
    return OPS.linear(x, weight, bias), lambda dy: dy @ weight


def project(
    x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]
) -> tuple[tuple[Array, ...], Callable[..., Array]]:
    """One linear map whose outputs are cut into parts; `back` takes the gradient of each."""
    return OPS.project(x, weight, bias, widths), lambda *dy: np.concatenate(dy, axis=-1) @ weight


# --- norms ----------------------------------------------------------------------------------------------------------


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Back]:
    """``n = (x - mean x) r`` with ``r = 1 / sqrt(var x + eps)``, ``y = n w + b``.

    With ``g = dy w``: ``dx = r (g - mean g - n mean(g n))``.
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1.0 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)  # (B, T, 1)
    n = centred * inverse  # (B, T, d)

    def back(dy: Array) -> Array:
        g = dy * weight
        return inverse * (g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True))

    return n * weight + bias, back


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Back]:
    """``n = x r``, ``r = 1 / sqrt(mean x^2 + eps)``, ``y = n w``; with ``g = dy w``, ``dx = r (g - n mean(g n))``."""
    inverse = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)  # (B, T, 1)
    n = x * inverse  # (B, T, d)

    def back(dy: Array) -> Array:
        g = dy * weight
        return inverse * (g - n * (g * n).mean(axis=-1, keepdims=True))

    return n * weight, back


def norm(x: Array, w: Weights, config: ModelConfig) -> tuple[Array, Back]:
    """The model's kind of norm."""
    if config.norm == "rms":
        return rms_norm(x, w.weight, config.eps)
    return layer_norm(x, w.weight, w.bias, config.eps)


# --- activations ----------------------------------------------------------------------------------------------------


def gelu(x: Array) -> tuple[Array, Back]:
    """``y = x Phi(x)``; ``dy/dx = Phi(x) + x phi(x)`` with the normal distribution Phi and its density phi."""

    def back(dy: Array) -> Array:
        density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
        return dy * (0.5 * (1.0 + OPS.erf(x / math.sqrt(2.0))) + x * density)

    return OPS.gelu(x), back


def gelu_tanh(x: Array) -> tuple[Array, Back]:
    """``y = x (1 + tanh u) / 2``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""

    def back(dy: Array) -> Array:
        c = math.sqrt(2.0 / math.pi)
        t = np.tanh(c * (x + 0.044715 * x * x * x))
        return dy * 0.5 * (1.0 + t + x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x))

    return OPS.gelu_tanh(x), back


def silu(x: Array) -> tuple[Array, Back]:
    """``y = x S(x)`` with the sigmoid S; ``dy/dx = S (1 + x (1 - S))``."""

    def back(dy: Array) -> Array:
        s = sigmoid(x)
        return dy * s * (1.0 + x * (1.0 - s))

    return OPS.silu(x), back


def relu(x: Array) -> tuple[Array, Back]:
    """``y = max(x, 0)``; the gradient at 0 is taken as 0."""
    return OPS.relu(x), lambda dy: dy * (x > 0)


def swiglu(gate: Array, up: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """``y = silu(gate) up``; `back` gives the gradients of both."""
    activated, gate_back = silu(gate)
    return activated * up, lambda dy: (gate_back(dy * up), dy * activated)


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))``; exp of a large number is inf and gives the right limit, 0."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "relu": relu}


def feed_forward(x: Array, w: Weights, config: ModelConfig) -> tuple[Array, Back]:
    """``activation(x W1ᵀ) W2ᵀ``, or with a gate ``(silu(x Wgᵀ) * (x Wuᵀ)) W2ᵀ``."""
    if config.gated:
        (gate, up), up_back = project(x, w.up.weight, w.up.bias, (config.d_ff, config.d_ff))
        hidden, gated_back = swiglu(gate, up)  # (B, T, f)
        y, down_back = linear(hidden, w.down.weight, w.down.bias)
        return y, lambda dy: up_back(*gated_back(down_back(dy)))
    raised, raised_back = linear(x, w.up.weight, w.up.bias)
    activated, activation_back = ACTIVATIONS[config.activation](raised)
    y, down_back = linear(activated, w.down.weight, w.down.bias)
    return y, lambda dy: raised_back(activation_back(down_back(dy)))


# --- heads ----------------------------------------------------------------------------------------------------------


def rotary(x: Array, cos: Array, sin: Array, interleaved: bool) -> tuple[Array, Back]:
    """Pairs of channels turned by an angle for each position; the way back turns by the same angle the other way."""
    return OPS.rotary(x, cos, sin, interleaved), lambda dy: OPS.rotary(dy, cos, -sin, interleaved)


def products(q: Array, k: Array, scale: float) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """``s = scale q kᵀ``, query head h on key head h // (H / Hkv): (B, H, T, D), (B, Hkv, S, D) -> (B, H, T, S)."""
    return OPS.scores(q, k, scale), lambda ds: products_back(q, k, scale, ds)


def products_back(q: Array, k: Array, scale: float, ds: Array) -> tuple[Array, Array]:
    """``dq = scale ds k``, ``dk = scale dsᵀ q``, the latter summed over the query heads of a key head."""
    return scale * OPS.weighted_sum(ds, k), scale * summed_groups(np.matrix_transpose(ds) @ q, k.shape[1])


def weighted_sum(p: Array, v: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """``o = P v`` with the same grouping: (B, H, T, S), (B, Hkv, S, D) -> (B, H, T, D)."""
    return OPS.weighted_sum(p, v), lambda do: weighted_sum_back(p, v, do)


def weighted_sum_back(p: Array, v: Array, do: Array) -> tuple[Array, Array]:
    """``dP = do vᵀ``, ``dv = Pᵀ do``."""
    return OPS.scores(do, v, 1.0), summed_groups(np.matrix_transpose(p) @ do, v.shape[1])


def summed_groups(x: Array, heads: int) -> Array:
    """The sum over the query heads of each key head: (B, H, S, D) -> (B, heads, S, D)."""
    batch, all_heads, length, width = x.shape
    if heads == all_heads:
        return x
    return x.reshape(batch, heads, all_heads // heads, length, width).sum(axis=2)


MOST = 30.0  # exponent of a dropped key beside the largest kept one, at most: e^30 is as good as infinite beside 1


def masked_softmax(s: Array, mask: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """``P = e m / Z``, ``e = exp(s - max over m > 0 of s)``, ``Z = sum(e m)``; `back` gives the gradients of s and m.

    With ``g = dP - sum(P dP)``: ``ds = P g`` and ``dm = g e / Z``. Where m is 0 the tangent says little, since e may be
    far above Z; there ``dm = g e / (Z + e)``, which is the change of ``sum(P dP)`` when the key is let in whole. Every
    row needs a key with m > 0.
    """
    top = np.where(mask > 0, s, -np.inf).max(axis=-1, keepdims=True)  # (B, H, T, 1)
    e = np.exp(np.minimum(s - top, MOST))
    kept = e * mask
    total = kept.sum(axis=-1, keepdims=True)
    p = kept / total  # (B, H, T, S)

    def back(dp: Array) -> tuple[Array, Array]:
        g = dp - (p * dp).sum(axis=-1, keepdims=True)
        return p * g, g * e / np.where(mask > 0, total, total + e)

    return p, back


# --- losses ---------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, ids: Array) -> tuple[float, Array]:
    """The mean of ``-ln softmax(logits)[id]`` over all positions, and its gradient ``(softmax - one-hot) / (B T)``.

    Parameters
    ----------
    logits : array, shape (B, T, V)
    ids : array of int, shape (B, T)
    """
    at = ids[..., None]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, at, axis=-1)  # (B, T, 1)
    gradient = np.exp(shifted)
    total = gradient.sum(axis=-1, keepdims=True)
    loss = float((np.log(total) - chosen).mean(dtype=np.float64))
    gradient /= total
    np.put_along_axis(gradient, at, np.take_along_axis(gradient, at, axis=-1) - 1.0, axis=-1)
    gradient /= ids.size
    return loss, gradient


def relative_squared_error(y: Array, target: Array) -> tuple[float, Array]:
    """``sum (y - target)^2 / sum target^2``, the mean squared error in units of the target, and its gradient."""
    difference = y - target
    size = float(np.sum(target * target, dtype=np.float64))
    return float(np.sum(difference * difference, dtype=np.float64)) / size, difference * (2.0 / size)
