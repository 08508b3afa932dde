"""Diagonality, similarity and the suggested grouping."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl import load_model
from refimpl.config import ModelConfig
from refimpl.diagnostics import attention_maps, diagonality, map_similarity, suggest_groups
from refimpl.errors import ConfigError


def test_diagonality_of_identity_and_uniform_maps() -> None:
    """CAD(identity) = 1, CAD(uniform) = 2/3 for large T."""
    assert diagonality(np.eye(50)[None, None]) == pytest.approx([1.0])
    assert diagonality(np.full((1, 1, 400, 400), 1 / 400)) == pytest.approx([2 / 3], abs=0.002)
    assert diagonality(np.ones((1, 1, 1, 1))) == pytest.approx([1.0])


def test_diagonality_is_the_integral_of_the_cumulative_mass() -> None:
    """Against the definition, integrated numerically."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(12), size=12)[None, None]  # (1, 1, 12, 12)
    distance = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    radii = (np.arange(20_000) + 0.5) / 20_000
    mass = np.array([weights[0, 0][distance <= r * 11].sum() / 12 for r in radii])
    assert diagonality(weights)[0] == pytest.approx(mass.mean(), abs=1e-3)


def test_rows_may_be_a_part() -> None:
    weights = np.eye(50)[None, None]
    rows = np.array([3, 20, 49])
    assert diagonality(weights[:, :, rows], rows) == pytest.approx([1.0])


def test_similarity_of_equal_and_of_disjoint_maps() -> None:
    eye, shifted = np.eye(6)[None, None], np.roll(np.eye(6), 1, axis=1)[None, None]
    np.testing.assert_allclose(map_similarity([eye, eye, shifted]), [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-12)


def test_suggestion_joins_the_most_similar_neighbours_first() -> None:
    similarity = np.full((5, 5), 0.1)
    similarity[1, 2] = 0.9
    similarity[3, 4] = 0.8
    assert suggest_groups(similarity, 5) == ((0,), (1,), (2,), (3,), (4,))
    assert suggest_groups(similarity, 4) == ((0,), (1, 2), (3,), (4,))
    assert suggest_groups(similarity, 3) == ((0,), (1, 2), (3, 4))
    assert suggest_groups(similarity, 1) == ((0, 1, 2, 3, 4),)
    with pytest.raises(ConfigError, match="5 layers"):
        suggest_groups(similarity, 6)


def test_maps_of_a_model_are_probabilities() -> None:
    config = ModelConfig("tiny", "post-norm", layers=3, d_model=16, heads=4, d_ff=24, vocab=30)
    maps = attention_maps(load_model(config), np.arange(9)[None, :], rows=np.array([0, 8]))
    assert [weights.shape for weights in maps] == [(1, 4, 2, 9)] * 3
    for weights in maps:
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-6)
        assert (weights >= 0).all()
