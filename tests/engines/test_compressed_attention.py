"""Ops of compressed attention against what they stand for: a band is a mask, linear attention the map of a kernel."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.engines import chunked
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ShapeError

NUMPY, NUMBA = NumpyEngine(), NumbaEngine()
Array = np.ndarray
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
needs_jit = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="vector code exists only compiled")


def heads(*shape: int, seed: int = 0) -> Array:
    """Random heads (B, H, T, D) as models have them: a transposed view of (B, T, H, D)."""
    B, H, T, D = shape
    return np.random.default_rng([seed, *shape]).standard_normal((B, T, H, D)).transpose(0, 2, 1, 3)


def band(q_len: int, k_len: int, window: int) -> Array:
    """True where a key is at most `window` positions away; queries have the last positions."""
    away = np.arange(k_len) - (np.arange(q_len)[:, None] + k_len - q_len)
    return (np.abs(away) <= window)[None, None]


def banded(q: Array, k: Array, v: Array, window: int, causal: bool, mask: Array | None) -> Array:
    """Exact attention under a mask that is the band."""
    seen = band(q.shape[2], k.shape[2], window) & (True if mask is None else mask)
    return NUMPY.attention(q, k, v, 0.5, causal, seen)


def masks(kind: str, shape: tuple[int, int, int, int]) -> Array | None:
    if kind == "none":
        return None
    drawn = np.random.default_rng(5).random((shape[0], 1, 1, shape[3]) if kind == "keys" else shape) < 0.7
    drawn[..., -1] = True
    return drawn


SHAPES = [(1, 1, 1), (2, 5, 5), (2, 70, 70), (1, 300, 300), (1, 33, 400), (2, 1, 90), (1, 6, 90)]  # B, Tq, Tk


@CAUSAL
@pytest.mark.parametrize("kind", ["none", "keys", "all"])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 130, 1000])
def test_local_attention_is_attention_under_a_band(window: int, kind: str, causal: bool) -> None:
    for B, Tq, Tk in SHAPES:
        q, k, v = heads(B, 4, Tq, 6), heads(B, 2, Tk, 6, seed=1), heads(B, 2, Tk, 6, seed=2)
        mask = masks(kind, (B, 4, Tq, Tk))
        found = NUMPY.local_attention(q, k, v, window, 0.5, causal, mask)
        np.testing.assert_allclose(found, banded(q, k, v, window, causal, mask), rtol=0, atol=1e-13)


def assert_right(fast: Array, truth: Array, honest: Array, what: str) -> None:
    """The 2x rule."""
    assert fast.dtype == honest.dtype
    error, allowed = (float(np.abs(x - truth).max(initial=0)) for x in (fast, honest))
    floor = 8 * np.finfo(fast.dtype).eps * float(np.abs(truth).max(initial=1))
    assert error <= 2 * allowed + floor, f"{what}: error {error:.2e}, honest {allowed:.2e}"


@needs_jit
@CAUSAL
@pytest.mark.parametrize("kind", ["none", "keys", "all"])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 130, 1000])
def test_the_banded_kernel_obeys_the_rule(window: int, kind: str, causal: bool) -> None:
    """Off the tile grid, few queries, and a head far from zero."""
    found = []  # of each shape: fast, truth, honest
    for B, Tq, Tk in SHAPES:
        q, k, v = heads(B, 4, Tq, 20), heads(B, 2, Tk, 20, seed=1), heads(B, 2, Tk, 20, seed=2)
        k[:, 1] -= 8
        mask, low = masks(kind, (B, 4, Tq, Tk)), [x.astype(np.float32) for x in (q, k, v)]
        fast = NUMBA.local_attention(*low, window, 0.5, causal, mask)
        truth = banded(*[x.astype(np.float64) for x in low], window, causal, mask)
        found.append([x.reshape(-1) for x in (fast, truth, banded(*low, window, causal, mask))])
        np.testing.assert_allclose(fast, truth, rtol=0, atol=1e-4, err_msg=str((B, Tq, Tk)))
    assert_right(*map(np.concatenate, zip(*found, strict=True)), "local_attention")


@needs_jit
@CAUSAL
@pytest.mark.parametrize("window", [0, 7, 130])
def test_the_banded_kernel_with_relative_positions_obeys_the_rule(window: int, causal: bool) -> None:
    for T in (1, 70, 300):
        q, r, k, v = (heads(2, 3, T, 20, seed=seed) for seed in range(4))
        p = np.random.default_rng(T).standard_normal((3, 2 * T - 1, 20))
        low = [x.astype(np.float32) for x in (q, r, k, v, p)]
        exact, mask = [x.astype(np.float64) for x in low], masks("keys", (2, 3, T, T))
        seen = band(T, T, window) & mask
        truth, honest = (NUMPY.relative_attention(*given, 0.5, causal, seen) for given in (exact, low))
        fast = NUMBA.local_relative_attention(*low, window, 0.5, causal, mask)
        assert_right(fast, truth, honest, f"local_relative_attention {T}")
        again = NUMPY.local_relative_attention(*exact, window, 0.5, causal, mask)
        np.testing.assert_allclose(again, truth, rtol=0, atol=1e-13)


@CAUSAL
@pytest.mark.parametrize("engine", [NUMPY, NUMBA], ids=["numpy", "numba"])
def test_keys_outside_of_the_band_are_never_read(engine: Any, causal: bool) -> None:
    """They may be NaN: of 500 keys the last 5 queries see 5 + window."""
    q, k, v = heads(1, 2, 5, 8), heads(1, 2, 500, 8, seed=1), heads(1, 2, 500, 8, seed=2)
    clean = engine.local_attention(q, k, v, 20, 0.5, causal)
    k[:, :, :475], v[:, :, :475] = np.nan, np.nan
    np.testing.assert_array_equal(engine.local_attention(q, k, v, 20, 0.5, causal), clean)


@pytest.mark.parametrize("engine", [NUMPY, NUMBA], ids=["numpy", "numba"])
def test_bands_and_masks_that_make_no_sense_are_refused(engine: Any) -> None:
    q, k = heads(1, 2, 5, 8), heads(1, 2, 4, 8)
    with pytest.raises(ShapeError, match=r"local_attention.*Tq <= Tk"):
        engine.local_attention(q, k, k, 2, 0.5)
    with pytest.raises(ShapeError, match="local_attention"):
        engine.local_attention(k, k, k, -1, 0.5)
    with pytest.raises(ShapeError, match=r"linear_attention: expected a mask"):
        engine.linear_attention(k, k, k, False, np.ones((1, 1, 4, 4), bool))


# --- linear attention and projections -------------------------------------------------------------------------------


def kernel_map(q: Array, k: Array, v: Array, causal: bool, mask: Array | None) -> Array:
    """The quadratic form: the map of phi(q) . phi(k), hidden pairs 0, its rows divided by their sum, times v."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    weights = q @ k.swapaxes(2, 3)  # (B, H, Tq, Tk)
    if causal:
        weights = weights * np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=q.dtype)
    weights = weights if mask is None else weights * mask
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


@CAUSAL
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_linear_attention_is_the_map_of_its_kernel(causal: bool, data: st.DataObject) -> None:
    B, kv_heads, group, T, past = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 9, 4))
    past = data.draw(st.sampled_from([0, past]))
    q, k, v = heads(B, kv_heads * group, T, 4), heads(B, kv_heads, T + past, 4, seed=1), heads(B, kv_heads, T + past, 4)
    q, k = NUMPY.elu_plus_one(q), NUMPY.elu_plus_one(k)
    mask = masks(data.draw(st.sampled_from(["none", "keys"])), (B, 1, 1, T + past))
    for engine in (NUMPY, NUMBA):
        found = engine.linear_attention(q, k, v, causal, mask)
        np.testing.assert_allclose(found, kernel_map(q, k, v, causal, mask), rtol=1e-11, atol=1e-12)


@CAUSAL
@pytest.mark.parametrize("length", [1, chunked.CHUNK - 1, chunked.CHUNK, 3 * chunked.CHUNK + 7])
def test_chunks_of_linear_attention_obey_the_rule(length: int, causal: bool) -> None:
    """Against the quadratic form of the same kernel, in float32; sums of long sequences and a shifted head."""
    q, k, v = heads(2, 4, length, 16), heads(2, 2, length, 16, seed=1), heads(2, 2, length, 16, seed=2)
    v[:, 1] += 200
    low = [x.astype(np.float32) for x in (NUMPY.elu_plus_one(q), NUMPY.elu_plus_one(k), v)]
    exact, mask = [x.astype(np.float64) for x in low], masks("keys", (2, 1, 1, length))
    truth, honest = (kernel_map(*given, causal, mask) for given in (exact, low))
    assert_right(NUMBA.linear_attention(*low, causal, mask), truth, honest.astype(np.float32), f"linear {length}")
    assert_right(NUMPY.linear_attention(*low, causal, mask), truth, honest.astype(np.float32), f"linear {length}")


@CAUSAL
@pytest.mark.parametrize("engine", [NUMPY, NUMBA], ids=["numpy", "numba"])
def test_a_row_without_features_or_keys_is_zero(engine: Any, causal: bool) -> None:
    q, k = np.abs(heads(1, 2, 5, 4)), np.abs(heads(1, 2, 5, 4, seed=1))
    q[:, :, 3] = 0
    none = np.zeros((1, 1, 1, 5), bool)
    assert not engine.linear_attention(q, k, k, causal)[:, :, 3].any()
    assert not engine.linear_attention(q, k, k, causal, none).any()


@pytest.mark.parametrize("engine", [NUMPY, NUMBA], ids=["numpy", "numba"])
def test_features_are_those_of_the_paper(engine: Any) -> None:
    x = np.array([[-800.0, -2.0, -0.0, 0.5, 3.0, np.nan, np.inf, -np.inf]])
    truth = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    np.testing.assert_allclose(engine.elu_plus_one(x), truth, rtol=1e-15)


@pytest.mark.parametrize("engine", [NUMPY, NUMBA], ids=["numpy", "numba"])
def test_projections_along_time_are_products_with_every_head(engine: Any) -> None:
    x, e = heads(2, 3, 7, 4), np.random.default_rng(0).standard_normal((3, 7))
    seen = np.ones((2, 1, 1, 7), bool)
    seen[0, ..., 5:] = False
    truth = np.einsum("kt,bhtd->bhkd", e, x * seen.swapaxes(2, 3))
    x[0, :, 5:] = np.nan  # hidden
    np.testing.assert_allclose(engine.project_length(x, e, seen), truth, rtol=1e-12, atol=1e-13)
