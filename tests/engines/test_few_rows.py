"""Decoding on the CPU engine: products of few rows, attention of few queries, the cache, under the 2x rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.predict import FEW_ROWS
from refimpl.engines.numba_kernels import layout
from refimpl.errors import ShapeError

from .test_numba_engine import ENGINE, assert_right, attention, linear, scores, softmax, weighted_sum

OTHERS = 32  # sequences beside the tested ones, on which the error of the formula is seen, too
PROPERTY = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)


def test_the_cost_model_knows_where_the_kernels_change() -> None:
    assert FEW_ROWS == layout.FEW_ROWS


@pytest.fixture
def numbers_of_threads() -> Iterator[tuple[int, ...]]:
    """One thread and all; the engine has its own number again afterwards."""
    threads = ENGINE.threads
    yield (1, threads)
    ENGINE.set_threads(threads)


@PROPERTY
@given(st.integers(1, FEW_ROWS), st.integers(1, 300), st.integers(1, 700), st.booleans(), st.booleans(), seeds)
def test_linear_maps_of_few_rows(rows: int, d_out: int, d_in: int, biased: bool, sliced: bool, seed: int) -> None:
    """Any sizes; weights that are rows of a larger matrix, inputs that are columns of a wider one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows + OTHERS, 1, d_in + 3), dtype=np.float32)[..., :d_in]
    weight = rng.standard_normal((d_out + 2, d_in), dtype=np.float32)
    weight = weight[1:-1] if sliced else weight[:d_out].copy()
    bias = rng.standard_normal(d_out, dtype=np.float32) if biased else None
    assert_right(ENGINE.linear(x[:rows], weight, bias), linear, x, weight, bias, rows=rows)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    """A sequence's numbers do not depend on the batch that it is decoded in."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((FEW_ROWS, 1, 576), np.float32), rng.standard_normal((960, 576), np.float32)
    together = ENGINE.linear(x, weight)
    for row in range(FEW_ROWS):
        np.testing.assert_array_equal(ENGINE.linear(x[row : row + 1], weight), together[row : row + 1])


def _cached(rng: Any, batch: int, kv_heads: int, length: int, width: int) -> Any:
    """The filled rows of a cache that has room for more."""
    return rng.standard_normal((batch, kv_heads, length + 5, width), dtype=np.float32)[:, :, :length, :]


@PROPERTY
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 600),
    st.sampled_from([1, 3, 8, 31, 64]), st.booleans(), st.sampled_from(["none", "some", "all"]), seeds,
)  # fmt: skip
def test_attention_of_few_queries_over_a_cache(
    batch: int, kv_heads: int, group: int, q_len: int, past: int, width: int, causal: bool, masked: str, seed: int
) -> None:
    """Grouped heads, more keys than queries, padding, rows that see nothing; fused and in steps."""
    rng = np.random.default_rng(seed)
    k_len, every = past + q_len, batch + OTHERS
    q = rng.standard_normal((every, kv_heads * group, q_len, width), dtype=np.float32)
    k, v = (_cached(rng, every, kv_heads, k_len, width) for _ in range(2))
    mask = None
    if masked != "none":
        mask = rng.random((every, 1, q_len, k_len)) > (0.3 if masked == "some" else 1.0)
    with np.errstate(invalid="ignore"):
        s = scores(q, k, 0.3, causal, mask)
        p = softmax(s, causal)
    own = slice(batch)
    seen = None if mask is None else mask[own]
    fused = ENGINE.attention(q[own], k[own], v[own], 0.3, causal, seen)
    assert_right(fused, attention, q, k, v, 0.3, causal, mask, rows=batch)
    assert_right(ENGINE.scores(q[own], k[own], 0.3, causal, seen), scores, q, k, 0.3, causal, mask, rows=batch)
    assert_right(ENGINE.softmax(s[own], causal), softmax, s, causal, rows=batch)
    assert_right(ENGINE.weighted_sum(p[own], v[own], causal), weighted_sum, p, v, causal, rows=batch)


@pytest.mark.parametrize("shift", [0.0, -200.0, 3e4])
def test_large_and_shifted_scores(shift: float) -> None:
    """Online softmax over ranges of keys: the maximum lies in one of them, or far below zero in one head."""
    rng = np.random.default_rng(1)
    q = 30 * rng.standard_normal((1, 9, 1, 64), dtype=np.float32)
    k, v = _cached(rng, 1, 3, 1500, 64), _cached(rng, 1, 3, 1500, 64)
    k = k.copy()
    k[:, 1] += np.float32(shift)
    assert_right(ENGINE.attention(q, k, v, 0.125, True), attention, q, k, v, 0.125, True)


def test_results_do_not_depend_on_the_number_of_threads(numbers_of_threads: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((3, 1, 576), np.float32), rng.standard_normal((3072, 576), np.float32)
    q = rng.standard_normal((3, 9, 1, 64), np.float32)
    k, v = _cached(rng, 3, 3, 700, 64), _cached(rng, 3, 3, 700, 64)
    found = []
    for threads in numbers_of_threads:
        ENGINE.set_threads(threads)
        p = ENGINE.softmax(ENGINE.scores(q, k, 0.125))
        results = (ENGINE.linear(x, weight), ENGINE.attention(q, k, v), p, ENGINE.weighted_sum(p, v))
        found.append([result.copy() for result in results])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_append_writes_rows_and_gives_a_view() -> None:
    store = np.zeros((2, 3, 7, 4), np.float32)
    new = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32).transpose(0, 2, 1, 3)
    seen = ENGINE.append(store, new, 3)
    assert np.shares_memory(seen, store)
    assert seen.shape == (2, 3, 5, 4)
    np.testing.assert_array_equal(store[:, :, 3:5], new)
    assert not store[:, :, :3].any()
    assert not store[:, :, 5:].any()


@pytest.mark.parametrize(
    ("shape", "start"), [((2, 3, 2, 4), 6), ((2, 3, 8, 4), 0), ((2, 2, 2, 4), 0), ((2, 3, 2, 5), 0), ((2, 3, 2, 4), -1)]
)
def test_append_refuses_what_does_not_fit(shape: tuple[int, ...], start: int) -> None:
    store = np.zeros((2, 3, 7, 4), np.float32)
    with pytest.raises(ShapeError, match="append"):
        ENGINE.append(store, np.ones(shape, np.float32), start)
    assert not store.any()


def test_append_refuses_another_dtype() -> None:
    with pytest.raises(ShapeError, match="append"):
        ENGINE.append(np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 1, 2)), 0)


def test_empty_batches_and_no_keys() -> None:
    q, k = np.zeros((1, 4, 1, 8), np.float32), np.zeros((1, 2, 0, 8), np.float32)
    assert not ENGINE.attention(q, k, k).any()
    assert ENGINE.attention(q[:0], k[:0], k[:0]).shape == (0, 4, 1, 8)
    assert ENGINE.linear(np.zeros((0, 1, 8), np.float32), np.zeros((5, 8), np.float32)).shape == (0, 1, 5)
