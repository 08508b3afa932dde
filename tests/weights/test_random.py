"""Seeded random weights: which, how large, and what leaves them alone."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs

from refimpl.config import ModelConfig, preset
from refimpl.errors import ConfigError
from refimpl.weights.layout import shapes
from refimpl.weights.random import random_weights, sinusoids

SMALL = replace(preset("conformer-m"), layers=3, d_model=64, d_ff=128, head_dim=0)


@given(configs(), st.integers(0, 2**32))
def test_random_weights_have_every_name_and_are_finite_float32(config: ModelConfig, seed: int) -> None:
    weights = random_weights(config, seed)
    assert {name: values.shape for name, values in weights.items()} == shapes(config)
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in weights.values())


def test_random_weights_repeat_with_the_seed() -> None:
    first, again, other = random_weights(SMALL, 1), random_weights(SMALL, 1), random_weights(SMALL, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)


def test_random_weights_differ_between_names() -> None:
    weights = random_weights(SMALL)
    assert not np.array_equal(weights["layers.0.attention.qkv.weight"], weights["layers.1.attention.qkv.weight"])


def test_random_weights_of_more_layers_keep_the_first_ones() -> None:
    few, many = random_weights(SMALL), random_weights(replace(SMALL, layers=5))
    assert all(np.array_equal(few[name], many[name]) for name in few)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_random_weights_of_more_positions_keep_the_first_ones(position: str) -> None:
    config = replace(SMALL, position=position, max_positions=5)
    short, long = random_weights(config), random_weights(config, positions=9)
    assert long["stem.positions"].shape == (9, 64)
    assert np.array_equal(long["stem.positions"][:5], short["stem.positions"])


@pytest.mark.parametrize("name", ["layers.0.attention.qkv.weight", "layers.2.feed_forward.down.weight"])
def test_random_matrices_keep_the_size_of_their_input(name: str) -> None:
    weight = random_weights(SMALL)[name]
    x = np.random.default_rng(0).standard_normal((500, weight.shape[1]))
    assert (x @ weight.T).std() == pytest.approx(1, rel=0.05)


def test_random_norms_are_near_one_and_variances_positive() -> None:
    weights = random_weights(SMALL)
    assert abs(weights["layers.0.attention_norm.weight"] - 1).max() < 0.5
    assert weights["layers.0.convolution.batch_norm.variance"].min() > 0
    assert abs(weights["layers.0.attention.content_bias"]).max() < 1


def test_sinusoids_are_whispers() -> None:
    table = sinusoids(1500, 384)
    assert table[0].tolist() == [0] * 192 + [1] * 192
    assert table[1, 0] == pytest.approx(np.sin(1))
    assert table[1499, 191] == pytest.approx(np.sin(1499 / 10_000), abs=1e-6)
    assert np.array_equal(random_weights(preset("whisper-tiny-en"))["stem.positions"], table)


def test_random_weights_refuse_a_negative_seed() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        random_weights(SMALL, -1)


def test_random_weights_of_conformer_m_are_quick() -> None:
    start = time.perf_counter()
    weights = random_weights(preset("conformer-m"))
    assert sum(values.size for values in weights.values()) > 28_000_000
    assert time.perf_counter() - start < 5  # 0.5 s on two shared cores; the limit catches float64 or Python loops
