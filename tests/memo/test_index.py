"""The graph index and what counts as a hit: distances are not squared."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from refimpl.errors import DatabaseError, MissingDependencyError
from refimpl.memo.index import GraphIndex, is_hit

RNG = np.random.default_rng(0)


def test_hits_are_decided_on_the_distance_itself() -> None:
    """At a distance of 0.2 a threshold of 0.9 must miss; on squares, 0.04, it would hit."""
    assert list(is_hit(np.array([0.0, 0.09, 0.2, 0.31, 5.0]), 0.9)) == [True, True, False, False, False]
    assert is_hit(np.array([0.0, 0.5, 5.0]), 0).all()
    assert not is_hit(np.array([0.0, 0.5, 5.0]), 1.01).any()
    assert list(is_hit(np.array([0.0, 1e-6]), 1)) == [True, False]


def test_hits_do_not_increase_with_the_threshold() -> None:
    distances = RNG.random(200) * 1.5
    counts = [is_hit(distances, tau).sum() for tau in np.linspace(0, 1.1, 23)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 200
    assert counts[-1] == 0


def test_the_graph_gives_distances_that_are_not_squared() -> None:
    points = np.array([[0, 0, 0, 0], [3, 0, 0, 0], [0, 10, 0, 0]], np.float32)
    distances, rows = GraphIndex(points).search(np.array([[3, 0.5, 0, 0], [0, 0, 0, 4]], np.float32))
    assert list(rows) == [1, 0]
    assert distances == pytest.approx([0.5, 4.0])
    assert distances.dtype == np.float32


def test_the_graph_finds_nearly_all_nearest_points_with_fewer_comparisons() -> None:
    points, queries = RNG.random((4000, 16), np.float32), RNG.random((100, 16), np.float32)
    truth = ((queries[:, None] - points) ** 2).sum(-1)
    index = GraphIndex(points)
    distances, rows = index.search(queries)
    assert (rows == truth.argmin(1)).mean() >= 0.95
    np.testing.assert_allclose(distances, np.sqrt(truth[np.arange(100), rows]), rtol=1e-4)
    assert 100 < index.compared < 0.5 * truth.size


def test_the_graph_is_the_same_each_time_and_comes_back_from_its_bytes() -> None:
    points, queries = RNG.random((300, 16), np.float32), RNG.random((20, 16), np.float32)
    one = GraphIndex(points)
    again = GraphIndex(points, one.to_bytes())
    assert GraphIndex(points).to_bytes() == one.to_bytes() == again.to_bytes()
    for mine, theirs in zip(one.search(queries), again.search(queries), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_graph_of_other_points_or_a_damaged_one_is_refused() -> None:
    points = RNG.random((30, 16), np.float32)
    data = GraphIndex(points).to_bytes()
    with pytest.raises(DatabaseError, match="of 30 points of 16; there are 29"):
        GraphIndex(points[:29], data)
    with pytest.raises(DatabaseError, match="damaged"):
        GraphIndex(points, data[:100])


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'effref\[memo\]', or give index='flat'"):
        GraphIndex(RNG.random((3, 4), np.float32))
