"""The embedding of hidden states whose distances predict those of attention maps.

    x (B, T, d) -> max-pool 2 x 2 -> batch norm of the one channel -> flatten, n = (T / 2) (d / 2)
        -> linear (n, 128) -> batch norm -> linear (128, 128)                              no activation function

The layers are those of the published code of the authors' group. At inference all that follows the pooling is one
affine map: `fold`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from refimpl.engines.protocol import Array

WIDTH = 128  # of the features
EPS = 1e-5  # of both batch norms
MOMENTUM = 0.1  # of their running statistics: new = 0.9 old + 0.1 batch

Tensors = dict[str, Array]


def max_pool(x: Array) -> Array:
    """The largest of each 2 x 2 elements: (B, T, d) -> (B, T // 2, d // 2); an odd last row or column is left out."""
    rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :rows, :columns]
    return np.maximum(
        np.maximum(x[:, ::2, ::2], x[:, ::2, 1::2]), np.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2])
    )  # fmt: skip


def pooled(x: Array) -> Array:
    """What the first linear map reads, before its norm: (B, T, d) -> (B, n)."""
    return max_pool(x).reshape(len(x), inputs_of(*x.shape[1:]))


def inputs_of(length: int, d_model: int) -> int:
    """n, the width of `pooled`."""
    return (length // 2) * (d_model // 2)


@dataclass
class Network:
    """The part behind the pooling.

    Attributes
    ----------
    weights : dict of array
        What is trained: norm.weight and norm.bias (1,), first.weight (128, n), second.weight (128, 128); inner.weight,
        inner.bias, first.bias and second.bias (128,).
    statistics : dict of array
        Running mean and variance of both norms: norm.mean (1,), norm.variance (1,), inner.mean (128,), inner.variance.
    """

    weights: Tensors
    statistics: Tensors

    @classmethod
    def random(
        cls, inputs: int, rng: np.random.Generator, width: int = WIDTH, dtype: str = "float32"
    ) -> Network:  # fmt: skip
        """Uniform weights within 1 / sqrt(fan-in), the norms neutral: PyTorch's defaults."""

        def uniform(fan_in: int, *shape: int) -> Array:
            bound = 1 / math.sqrt(max(fan_in, 1))
            return rng.uniform(-bound, bound, shape).astype(dtype)

        def ones(n: int) -> Array:
            return np.ones(n, dtype)

        def zeros(n: int) -> Array:
            return np.zeros(n, dtype)

        weights = {
            "norm.weight": ones(1), "norm.bias": zeros(1),
            "first.weight": uniform(inputs, width, inputs), "first.bias": uniform(inputs, width),
            "inner.weight": ones(width), "inner.bias": zeros(width),
            "second.weight": uniform(width, width, width), "second.bias": uniform(width, width),
        }  # fmt: skip
        statistics = {
            "norm.mean": zeros(1), "norm.variance": ones(1),
            "inner.mean": zeros(width), "inner.variance": ones(width),
        }  # fmt: skip
        return cls(weights, statistics)

    def features(self, x: Array) -> Array:
        """The features in evaluation mode, layer by layer: (B, n) -> (B, 128)."""
        w, s = self.weights, self.statistics
        x = _normed(x, s["norm.mean"], s["norm.variance"]) * w["norm.weight"] + w["norm.bias"]
        h = x @ w["first.weight"].T + w["first.bias"]
        h = _normed(h, s["inner.mean"], s["inner.variance"]) * w["inner.weight"] + w["inner.bias"]
        return h @ w["second.weight"].T + w["second.bias"]

    def fold(self) -> tuple[Array, Array]:
        """Both norms and both linear maps as one: weight (128, n) and bias (128,), worked out in float64.

        With a norm as ``s x + t``:  ``W = s0 W2 diag(s1) W1``,  ``b = W2 (s1 (W1 1 t0 + b1) + t1) + b2``.
        """
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        scale, shift = self._affine("norm")  # (1,)
        inner_scale, inner_shift = self._affine("inner")  # (128,)
        second = w["second.weight"] * inner_scale
        weight = scale * (second @ w["first.weight"])
        behind = w["first.weight"].sum(axis=1) * shift + w["first.bias"]
        bias = second @ behind + w["second.weight"] @ inner_shift + w["second.bias"]
        dtype = self.weights["first.weight"].dtype
        return weight.astype(dtype), bias.astype(dtype)

    def _affine(self, norm: str) -> tuple[Array, Array]:
        """A norm in evaluation mode as scale and shift."""
        w, s = self.weights, self.statistics
        scale = w[f"{norm}.weight"].astype(np.float64) / np.sqrt(s[f"{norm}.variance"].astype(np.float64) + EPS)
        return scale, w[f"{norm}.bias"].astype(np.float64) - s[f"{norm}.mean"].astype(np.float64) * scale

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, x: Array, targets: Array) -> tuple[float, Tensors, Tensors]:
        """The loss of all pairs of a mini-batch, its gradient, and the statistics of the batch.

        ``mean over pairs of SmoothL1(|f(x_i) - f(x_j)|_2 - dist_ij)``, which is e^2 / 2 where |e| < 1, else |e| - 1/2.

        Parameters
        ----------
        x : array, shape (B, n)
        targets : array, shape (B (B - 1) / 2,)
            As `refimpl.memo.similarity.pair_distances` orders them.

        Returns
        -------
        loss : float
        gradient : dict of array
            Of every trained array.
        batch : dict of array
            Mean and variance (the unbiased one) that both norms met.
        """
        w = self.weights
        unit, mean, variance = _batch_normed(x, None)
        scaled = unit * w["norm.weight"] + w["norm.bias"]  # (B, n)
        h = scaled @ w["first.weight"].T + w["first.bias"]  # (B, 128)
        inner_unit, inner_mean, inner_variance = _batch_normed(h, 0)
        inner = inner_unit * w["inner.weight"] + w["inner.bias"]
        features = inner @ w["second.weight"].T + w["second.bias"]  # (B, 128)
        loss, d_features = _pair_loss(features, targets)

        d_inner = d_features @ w["second.weight"]
        d_h = _batch_norm_gradient(d_inner * w["inner.weight"], inner_unit, inner_variance, 0)
        d_scaled = d_h @ w["first.weight"]
        gradient = {
            "norm.weight": (d_scaled * unit).sum(keepdims=True)[0], "norm.bias": d_scaled.sum(keepdims=True)[0],
            "first.weight": d_h.T @ scaled, "first.bias": d_h.sum(axis=0),
            "inner.weight": (d_inner * inner_unit).sum(axis=0), "inner.bias": d_inner.sum(axis=0),
            "second.weight": d_features.T @ inner, "second.bias": d_features.sum(axis=0),
        }  # fmt: skip
        batch = {
            "norm.mean": mean, "norm.variance": _unbiased(variance, x.size),
            "inner.mean": inner_mean, "inner.variance": _unbiased(inner_variance, len(x)),
        }  # fmt: skip
        return loss, gradient, batch

    def follow(self, batch: Tensors) -> None:
        """Move the running statistics towards those of a batch."""
        for name, found in batch.items():
            running = self.statistics[name]
            running += MOMENTUM * (found.astype(running.dtype) - running)


def _normed(x: Array, mean: Array, variance: Array) -> Array:
    return (x - mean) / np.sqrt(variance + EPS)


def _batch_normed(x: Array, axis: int | None) -> tuple[Array, Array, Array]:
    """``(x - mean) / sqrt(variance + eps)`` with the statistics of the batch itself: over `axis`, None over all."""
    mean, variance = np.atleast_1d(x.mean(axis=axis)), np.atleast_1d(x.var(axis=axis))
    return _normed(x, mean, variance), mean, variance


def _batch_norm_gradient(d_unit: Array, unit: Array, variance: Array, axis: int) -> Array:
    """``(dy - mean(dy) - y mean(dy y)) / sqrt(variance + eps)`` for ``y = (x - mean) / sqrt(variance + eps)``."""
    return (d_unit - d_unit.mean(axis=axis) - unit * (d_unit * unit).mean(axis=axis)) / np.sqrt(variance + EPS)


def _unbiased(variance: Array, count: int) -> Array:
    return variance * (count / max(count - 1, 1))


def _pair_loss(features: Array, targets: Array) -> tuple[float, Array]:
    """The loss over all pairs and its gradient with respect to the features (B, 128)."""
    i, j = np.triu_indices(len(features), 1)
    difference = features[i] - features[j]  # (pairs, 128)
    distance = np.sqrt((difference * difference).sum(axis=1))
    error = distance - targets.astype(features.dtype)
    small = np.abs(error) < 1
    loss = np.where(small, error * error / 2, np.abs(error) - 0.5).mean()
    slope = np.where(small, error, np.sign(error)) / len(error)  # of SmoothL1
    slope = np.divide(slope, distance, out=np.zeros_like(slope), where=distance > 0)
    weights = np.zeros((len(features), len(features)), features.dtype)
    weights[i, j] = weights[j, i] = slope
    return float(loss), weights.sum(axis=1, keepdims=True) * features - weights @ features
