"""Total variation of attention maps, against plain loops and the properties of a distance."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.errors import ShapeError
from refimpl.memo.similarity import map_distance, pair_distances, similarity


def random_maps(seed: int, count: int, heads: int, length: int, sharpness: float = 1.0) -> np.ndarray:
    """Softmax of random logits: (count, H, T, T)."""
    logits = sharpness * np.random.default_rng(seed).standard_normal((count, heads, length, length))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_loops(a: np.ndarray, b: np.ndarray, lengths: tuple[int, int] | None) -> float:
    """Row by row: half of the sum of differences; 1 where one row is padding; nothing where both are."""
    heads, length, _ = a.shape
    found = []
    for head in range(heads):
        for row in range(length):
            padding = [row >= n for n in lengths or (length, length)]
            if all(padding):
                continue
            total = sum(abs(x - y) for x, y in zip(a[head, row], b[head, row], strict=True))
            found.append(1.0 if any(padding) else 0.5 * total)
    return sum(found) / len(found)


sizes = st.tuples(
    st.integers(0, 99), st.integers(2, 5), st.integers(1, 3), st.integers(1, 6), st.sampled_from([0.1, 1, 9])
)


@settings(max_examples=50, deadline=None)
@given(sizes, st.data())
def test_pair_distances_equal_plain_loops(drawn: tuple[int, int, int, int, float], data: st.DataObject) -> None:
    maps = random_maps(*drawn)
    given = st.none() | st.lists(st.integers(1, drawn[3]), min_size=drawn[1], max_size=drawn[1])
    lengths = data.draw(given)
    for n, one in enumerate(maps):
        one[:, (lengths or [drawn[3]] * drawn[1])[n] :] = 1 / drawn[3]  # padding looks like anything
    found = pair_distances(maps, lengths)
    for (i, j), distance in zip(combinations(range(len(maps)), 2), found, strict=True):
        pair = (lengths[i], lengths[j]) if lengths else None
        assert distance == pytest.approx(by_loops(maps[i], maps[j], pair), rel=1e-12, abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(sizes)
def test_it_is_a_distance_between_0_and_1(drawn: tuple[int, int, int, int, float]) -> None:
    a, b, c = random_maps(drawn[0], 3, *drawn[2:])
    assert similarity(a, a) == 1.0
    assert similarity(a, b) == similarity(b, a)
    assert 0.0 <= similarity(a, b) <= 1.0
    assert map_distance(a, c) <= map_distance(a, b) + map_distance(b, c) + 1e-15


def test_disjoint_rows_have_no_similarity() -> None:
    one = np.broadcast_to(np.eye(6), (2, 6, 6))
    assert similarity(one, np.roll(one, 1, axis=2)) == 0.0
    half = np.where(np.arange(6)[:, None] < 3, one, np.roll(one, 1, axis=2))
    assert similarity(one, half) == 0.5


def test_padding_raises_the_similarity_unless_it_is_left_out() -> None:
    """Two maps of 2 real rows that share nothing, and 6 rows of padding that are alike."""
    one = np.full((1, 8, 8), 1 / 8)
    one[0, :2] = np.eye(8)[:2]
    other = one.copy()
    other[0, :2] = np.eye(8)[2:4]
    assert similarity(one, other) == 0.75
    assert similarity(one, other, (2, 2)) == 0.0
    assert similarity(one, one, (2, 4)) == 0.5


def test_maps_of_other_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 4, 4\) and \(1, 5, 5\)"):
        map_distance(random_maps(0, 1, 1, 4)[0], random_maps(0, 1, 1, 5)[0])
