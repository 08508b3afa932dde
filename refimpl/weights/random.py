"""Seeded random weights: the shape of any model, with activations of ordinary size."""

from __future__ import annotations

import math
import zlib

import numpy as np

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.weights.layout import Shape, shapes

SMALL = 0.05  # standard deviation of biases, and of norm weights about 1
_WAVELENGTH = 10_000.0  # longest wavelength of the sinusoids over 2 pi

Generator = np.random.Generator


def random_weights(config: ModelConfig, seed: int = 0, positions: int = 0) -> dict[str, np.ndarray]:
    """Random weights for every name of `refimpl.weights.layout.shapes`.

    Matrices are normal with variance 1 / fan-in, so that normalised inputs give outputs of size 1; norm weights are
    near 1, biases small, stored variances positive, and sinusoidal position tables are the sinusoids themselves.

    Parameters
    ----------
    config : ModelConfig
    seed : int, default 0
        Together with its own name it decides a weight, so a change of one size leaves the other weights alone.
    positions : int
        Rows of the position table; default the model's own. A longer table starts with the shorter one.

    Returns
    -------
    weights : dict of str to array, float32
        Dotted canonical name -> values.

    Raises
    ------
    ConfigError
        If `seed` is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or more")
    return {name: _weight(config, name, shape, seed) for name, shape in shapes(config, positions).items()}


def sinusoids(positions: int, width: int) -> np.ndarray:
    """Whisper's position table: sines in the first half of the columns, cosines in the second.

    Parameters
    ----------
    positions, width : int
        T and d; d is even and at least 4.

    Returns
    -------
    table : array, shape (T, d), float32
        ``sin(p w_i)`` and ``cos(p w_i)`` with ``w_i = 10000 ** (-i / (d / 2 - 1))``.
    """
    steps = np.arange(width // 2) / max(width // 2 - 1, 1)
    angles = np.arange(positions)[:, None] * _WAVELENGTH**-steps  # (T, d / 2)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (T, d)
    return np.pad(table, ((0, 0), (0, width % 2))).astype(np.float32)


def _weight(config: ModelConfig, name: str, shape: Shape, seed: int) -> np.ndarray:
    if name == "stem.positions" and config.position == "sinusoidal":
        return sinusoids(*shape)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    *_, part, leaf = name.split(".")
    if leaf == "variance":
        variance: np.ndarray = np.exp(_normal(rng, shape, SMALL))
        return variance
    if leaf == "weight" and part.endswith("norm"):
        return _normal(rng, shape, SMALL, mean=1)
    if leaf in ("bias", "mean"):
        return _normal(rng, shape, SMALL)
    return _normal(rng, shape, 1 / math.sqrt(_fan_in(part, shape)))


def _fan_in(part: str, shape: Shape) -> int:
    """How many inputs one output sums: of matrices (out, in) and convolutions (out, kernel, in) all but the first axis.

    Tables (rows, d) and vectors count their last axis.
    """
    if part == "depthwise":  # (kernel, d)
        return shape[0]
    return math.prod(shape[1:]) if len(shape) > 1 else shape[0]


def _normal(rng: Generator, shape: Shape, deviation: float, mean: float = 0) -> np.ndarray:
    values: np.ndarray = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(deviation)  # in place: the array may be large
    if mean:
        values += np.float32(mean)
    return values
