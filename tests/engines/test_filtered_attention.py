"""Filtered attention of LATTE as an op: the rule of which keys are kept, and the CPU kernel against the equation.

Which keys are kept is decided in whole numbers, so both engines keep the same ones; what they weigh obeys the 2x rule.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numba_kernels import codes as vectors
from refimpl.engines.numba_kernels.filtered import _first
from refimpl.engines.numpy_engine import NumpyEngine, upper_nibble
from refimpl.errors import ShapeError, UnsupportedError

NUMPY, NUMBA = NumpyEngine(), NumbaEngine()
BOTH = pytest.mark.parametrize("engine", [NUMPY, NUMBA], ids=["numpy", "numba"])
NIBBLES = pytest.mark.parametrize("nibble", ["floor", "round"])
EVERY = np.arange(-128, 128)  # all int8 numbers
Array = Any


def heads(B: int, H: int, T: int, D: int, dtype: Any = np.float64, seed: int = 0) -> Array:
    """Heads as models have them: a transposed view of (B, T, H, D)."""
    rng = np.random.default_rng([seed, B, H, T, D])
    return rng.standard_normal((B, T, H, D)).astype(dtype).transpose(0, 2, 1, 3)


def attend(
    engine: Any, q: Array, k: Array, v: Array, thetas: Any, *, causal: bool = False, mask: Array | None = None,
    nibble: str = "floor", stage2: str = "int8",
) -> tuple[Array, Array]:  # fmt: skip
    """Quantise and attend: context and kept counts."""
    (q_codes, q_scale), (k_codes, k_scale) = engine.quantize(q), engine.quantize(k)
    thetas = np.broadcast_to(np.asarray(thetas, np.float64), (q.shape[1],))
    return engine.filtered_attention(
        q, k, v, q_codes, k_codes, q_scale, k_scale, thetas, q.shape[3] ** -0.5, causal, mask, nibble, stage2
    )


def kept_sets(q: Array, k: Array, thetas: Any, **settings: Any) -> Array:
    """The kept pairs (B, H, Tq, Tk) of the kernel: weights of an identity for values are not zero."""
    v = np.broadcast_to(np.eye(k.shape[2], dtype=q.dtype), (*k.shape[:3], k.shape[2]))
    return attend(NUMBA, q, k, v, thetas, **settings)[0] != 0


# --- whole numbers, exhaustively --------------------------------------------------------------------------------------


@NIBBLES
def test_nibbles_make_up_the_product_of_all_pairs_of_codes(nibble: str) -> None:
    """q k = 256 q^h k^h + 16 (q^h k^l + q^l k^h) + q^l k^l for 65,536 pairs; q^h fits four bits with sign."""
    high = upper_nibble(np, EVERY.astype(np.int8), nibble).astype(np.int64)
    low = EVERY - 16 * high
    assert high.min() == -8
    assert high.max() == 7
    allowed = (0, 15) if nibble == "floor" else (-8, 15)  # 15 at 127, which cannot be rounded up to 128
    assert allowed == (low.min(), low.max())
    if nibble == "round":
        assert (low[EVERY < 120] <= 7).all()
    cross = np.multiply.outer(high, low)
    sums = 256 * np.multiply.outer(high, high) + 16 * (cross + cross.T) + np.multiply.outer(low, low)
    np.testing.assert_array_equal(sums, np.multiply.outer(EVERY, EVERY))


@BOTH
@NIBBLES
def test_kept_scores_are_the_exact_product_of_all_pairs_of_codes(engine: Any, nibble: str) -> None:
    """D = 1: one query and one key, 65,025 times; the softmax over two keys tells their difference."""
    codes = np.arange(-127, 128)
    q = codes.astype(np.float64).reshape(1, 1, -1, 1)
    k = np.concatenate([np.zeros(1), codes]).reshape(1, 1, -1, 1)
    q_codes, k_codes = q.astype(np.int8), k.astype(np.int8)
    ones, v = np.ones((1, 1, 1, 1)), np.broadcast_to(np.eye(256), (1, 1, 256, 256))
    step = 1e-4
    out, kept = engine.filtered_attention(
        q, k, v, q_codes, k_codes, ones, ones, np.array([math.inf]), step, False, None, nibble, "int8"
    )
    assert kept.tolist() == [[255 * 256]]
    found = np.log(out[0, 0, :, 1:] / out[0, 0, :, :1]) / step  # the score of key 0 is 0
    np.testing.assert_allclose(found, np.multiply.outer(codes, codes), atol=1e-6)


def test_the_score_rule_is_the_probability_rule_for_all_pairs_of_codes() -> None:
    """p_ij >= gamma max p iff s_ij >= max s - theta, theta = -ln gamma: the denominator cancels."""
    scores = np.multiply.outer(EVERY, EVERY) / 1000.0
    for gamma in (0.0, 0.01, 0.2, 0.7, 1.0):
        theta = -math.log(gamma) if gamma else math.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        p = weights / weights.sum(axis=1, keepdims=True)
        bar = gamma * p.max(axis=1, keepdims=True)
        by_score = scores >= scores.max(axis=1, keepdims=True) - theta
        at_the_bar = np.isclose(p, bar, rtol=1e-12)
        assert (by_score == (p >= bar))[~at_the_bar].all()
        assert by_score[p > bar * (1 + 1e-12)].all()


@NIBBLES
def test_the_kept_set_is_that_of_the_rule_in_plain_words(nibble: str) -> None:
    q, k = heads(2, 4, 33, 20), heads(2, 2, 70, 20)
    thetas = np.array([0.0, 0.4, 1.5, math.inf])
    (q_codes, q_scale), (k_codes, k_scale) = NUMPY.quantize(q), NUMPY.quantize(k)
    found = kept_sets(q, k, thetas, nibble=nibble)
    for b, h, i in np.ndindex(2, 4, 33):
        high_q, high_k = (upper_nibble(np, x, nibble).astype(int) for x in (q_codes[b, h, i], k_codes[b, h // 2]))
        estimates = [256 * int(high_q @ key) for key in high_k]
        margin = thetas[h] * math.sqrt(20) / (q_scale[b, h, 0, 0] * k_scale[b, h // 2, 0, 0])
        wanted = [estimate >= max(estimates) - margin for estimate in estimates]
        assert found[b, h, i].tolist() == wanted


# --- quantisation -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codes_are_the_nearest_whole_numbers(engine: Any, dtype: Any) -> None:
    x = heads(2, 3, 50, 7, dtype) * 5
    codes, sigma = engine.quantize(x)
    assert codes.dtype == np.int8
    assert sigma.dtype == dtype
    np.testing.assert_array_equal(sigma[:, :, 0, 0], np.abs(x).max(axis=(2, 3)) / dtype(127))
    assert np.abs(codes).max(axis=(2, 3)).tolist() == [[127] * 3] * 2
    assert np.abs(x - codes * sigma).max() <= 0.5001 * sigma.max()


@BOTH
def test_codes_of_heads_that_are_zero_tiny_or_not_finite(engine: Any) -> None:
    x = np.ones((1, 5, 2, 3), np.float32)
    x[0, 0], x[0, 1], x[0, 2, 1, 1], x[0, 3, 0, 0] = 0, 1e-44, np.nan, -np.inf
    codes, sigma = engine.quantize(x)
    assert (codes[0, :4] == 0).all()
    assert (codes[0, 4] == 127).all()
    assert sigma[0, :2, 0, 0].tolist() == [1, 1]
    assert np.isnan(sigma[0, 2, 0, 0])
    assert np.isinf(sigma[0, 3, 0, 0])
    empty = engine.quantize(x[:, :, :0])
    assert [part.shape for part in empty] == [(1, 5, 0, 3), (1, 5, 1, 1)]


# --- the kernel against the equation ----------------------------------------------------------------------------------


def orders(width: int) -> list[Any]:
    """Orders in which the terms of a product can be summed: with few logits the error of one of them is chance."""
    rng = np.random.default_rng(2)
    return [slice(None), *(rng.permutation(width) for _ in range(7))]


def check(q: Array, k: Array, v: Array, thetas: Any, dtype: Any, **settings: Any) -> None:
    """The same keys are kept, and the error is at most twice that of the equation in the same dtype."""
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    (q_codes, q_scale), (k_codes, k_scale) = NUMPY.quantize(q), NUMPY.quantize(k)
    for ours, theirs in zip(
        (*NUMBA.quantize(q), *NUMBA.quantize(k)), (q_codes, q_scale, k_codes, k_scale), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    fast, kept = attend(NUMBA, q, k, v, thetas, **settings)
    honest = [attend(NUMPY, q[..., order], k[..., order], v, thetas, **settings) for order in orders(q.shape[3])]
    np.testing.assert_array_equal(kept, honest[0][1])
    assert fast.dtype == dtype
    wide = [x.astype(np.float64) for x in (q, k, v, q_scale, k_scale)]
    truth, _ = NUMPY.filtered_attention(
        *wide[:3], q_codes, k_codes, *wide[3:], np.broadcast_to(np.asarray(thetas, float), (q.shape[1],)),
        q.shape[3] ** -0.5, settings.get("causal", False), settings.get("mask"), settings.get("nibble", "floor"),
        settings.get("stage2", "int8"),
    )  # fmt: skip
    error, *allowed = (np.abs(x - truth).max(initial=0) for x in (fast, *(out for out, _ in honest)))
    floor = 4 * np.finfo(dtype).eps * np.abs(v).max(initial=1)
    assert error <= 2 * max(allowed) + floor, f"error {error:.2e}, honest {max(allowed):.2e}, floor {floor:.2e}"


@pytest.mark.parametrize("stage2", ["int8", "float"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (1, 300), (2, 3), (16, 64), (17, 65), (130, 257), (50, 7)])
def test_kernel_equals_the_equation(Tq: int, Tk: int, causal: bool, stage2: str) -> None:
    q, k, v = heads(2, 6, Tq, 24), heads(2, 2, Tk, 24), heads(2, 2, Tk, 9)
    thetas = [0, 0.1, 0.5, 1.0, 3.0, math.inf]
    for dtype in (np.float32, np.float64):
        check(q, k, v, thetas, dtype, causal=causal, stage2=stage2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_kernel_equals_the_equation_for_any_sizes(data: st.DataObject) -> None:
    B, Hkv, group, Tq, Tk, D, Dv = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 40, 150, 140, 70))
    H = Hkv * group
    scale = data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    q, k, v = scale * heads(B, H, Tq, D), heads(data.draw(st.sampled_from([1, B])), Hkv, Tk, D), heads(B, Hkv, Tk, Dv)
    v = v[: len(k)]
    thetas = data.draw(st.lists(st.floats(0, 5) | st.just(math.inf), min_size=H, max_size=H))
    mask = None
    if data.draw(st.booleans()):
        shape = [data.draw(st.sampled_from([1, n])) for n in (B, H, Tq, Tk)]
        mask = np.random.default_rng(1).random(shape) < 0.7
    check(
        q, k, v, thetas, np.float32, causal=data.draw(st.booleans()), mask=mask,
        nibble=data.draw(st.sampled_from(["floor", "round"])), stage2=data.draw(st.sampled_from(["int8", "float"])),
    )  # fmt: skip


@pytest.mark.parametrize("Tk", [1, 2, 3, 257, 258])
def test_an_infinite_value_of_a_kept_key_stays_infinite(Tk: int) -> None:
    q, k, v = (heads(1, 1, T, 24, np.float32) for T in (2, Tk, Tk))
    v[..., -1, 0] = np.inf  # kernels take kept values in pairs: the last one of an odd number meets nothing else
    out, truth = (attend(engine, q, k, v, math.inf)[0] for engine in (NUMBA, NUMPY))
    assert (out[..., 0] == np.inf).all()
    np.testing.assert_allclose(out[..., 1:], truth[..., 1:], rtol=1e-4, atol=1e-5)


# --- the map, for methods that hand it on -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_map_of_the_kernel_equals_the_equation(data: st.DataObject) -> None:
    """The same kept pairs, nothing elsewhere, the 2x rule, and what `filtered_attention` gives once it meets values."""
    B, Hkv, group, Tq, Tk, D = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 40, 150, 140))
    H, scale = Hkv * group, data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    q = (scale * heads(B, H, Tq, D)).astype(np.float32)
    k = heads(data.draw(st.sampled_from([1, B])), Hkv, Tk, D).astype(np.float32)
    thetas = np.array(data.draw(st.lists(st.floats(0, 5) | st.just(math.inf), min_size=H, max_size=H)))
    shape = [data.draw(st.sampled_from([1, n])) for n in (B, H, Tq, Tk)]
    mask = np.random.default_rng(1).random(shape) < 0.7 if data.draw(st.booleans()) else None
    causal, nibble = data.draw(st.booleans()), data.draw(st.sampled_from(["floor", "round"]))
    given_ = D**-0.5, causal, mask, nibble, data.draw(st.sampled_from(["int8", "float"]))
    (q_codes, q_scale), (k_codes, k_scale) = NUMPY.quantize(q), NUMPY.quantize(k)
    fast, kept = NUMBA.filtered_map(q, k, q_codes, k_codes, q_scale, k_scale, thetas, *given_)
    honest = [
        NUMPY.filtered_map(*(x[..., order] for x in (q, k, q_codes, k_codes)), q_scale, k_scale, thetas, *given_)
        for order in orders(D)
    ]
    wide = [x.astype(np.float64) for x in (q, k, q_scale, k_scale)]
    truth, _ = NUMPY.filtered_map(*wide[:2], q_codes, k_codes, *wide[2:], thetas, *given_)
    np.testing.assert_array_equal(kept, honest[0][1])
    assert fast.dtype == np.float32
    error, *allowed = (np.abs(x - truth).max(initial=0) for x in (fast, *(out for out, _ in honest)))
    assert error <= 2 * max(allowed) + 4 * np.finfo(np.float32).eps, f"error {error:.2e}, honest {max(allowed):.2e}"
    assert (np.count_nonzero(fast, axis=(2, 3)) <= kept).all()  # a kept weight may be too small for float32
    values = np.broadcast_to(np.eye(Tk, dtype=np.float32), (len(k), Hkv, Tk, Tk))
    fused, _ = NUMBA.filtered_attention(q, k, values, q_codes, k_codes, q_scale, k_scale, thetas, *given_)
    np.testing.assert_allclose(fast, fused, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("stage2", ["int8", "float"])
def test_rows_that_see_no_key_are_zero(engine: Any, stage2: str) -> None:
    q, k = heads(1, 2, 20, 8), heads(1, 2, 12, 8)
    mask = np.ones((1, 1, 20, 1), bool)
    mask[:, :, 3] = False
    out, kept = attend(engine, q, k, k, 1.0, causal=True, mask=mask, stage2=stage2)
    assert (out[:, :, [*range(8), *([3])]] == 0).all()
    assert (out[:, :, 8:] != 0).any(axis=3).all()
    assert (kept > 0).all()
    none, kept = attend(engine, q, k[:, :, :0], k[:, :, :0], 1.0, stage2=stage2)
    assert (none == 0).all()
    assert (kept == 0).all()
    assert attend(engine, q[:0], k[:0], k[:0], 1.0)[0].shape == (0, 2, 20, 8)
    assert attend(engine, q[:, :, :0], k, k, 1.0)[0].shape == (1, 2, 0, 8)


@BOTH
def test_a_head_that_is_not_finite_makes_no_other_so(engine: Any) -> None:
    q, k, v = heads(1, 2, 9, 8), heads(1, 2, 9, 8), heads(1, 2, 9, 8)
    bad = q.copy()
    bad[0, 0, 4, 2] = np.nan
    out, _ = attend(engine, bad, k, v, 1.0)
    assert np.isnan(out[0, 0]).all()
    np.testing.assert_array_equal(out[0, 1], attend(engine, q, k, v, 1.0)[0][0, 1])


@BOTH
def test_large_scores_stay_finite(engine: Any) -> None:
    q, k, v = (
        1e4 * heads(1, 2, 40, 16, np.float32),
        1e4 * heads(1, 2, 40, 16, np.float32),
        heads(1, 2, 40, 16, np.float32),
    )
    for stage2 in ("int8", "float"):
        out, _ = attend(engine, q, k, v, math.inf, stage2=stage2)
        assert np.isfinite(out).all()
        assert np.abs(out).max() <= np.abs(v).max()


# --- what holds for the filter ----------------------------------------------------------------------------------------


@NIBBLES
def test_kept_sets_are_nested_and_never_empty(nibble: str) -> None:
    q, k = heads(1, 2, 40, 16), heads(1, 2, 90, 16)
    sets = [kept_sets(q, k, theta, nibble=nibble) for theta in (0, 0.05, 0.3, 1, 4, math.inf)]
    assert sets[0].any(axis=3).all()
    for less, more in itertools.pairwise(sets):
        assert (less <= more).all()
        assert (less < more).any()
    assert sets[-1].all()


@BOTH
def test_theta_0_keeps_the_ties_of_the_maximum_alone(engine: Any) -> None:
    q, k = np.full((1, 1, 1, 4), 127.0), np.zeros((1, 1, 5, 4))
    k[0, 0, :, 0] = [127, 120, 111, 16, -127]  # of which 112 to 127 have the upper nibble 7
    out, kept = attend(engine, q, k, np.eye(5)[None, None], 0.0)
    assert kept.tolist() == [[2]]
    assert (out[0, 0, 0] != 0).tolist() == [True, True, False, False, False]


@BOTH
def test_the_maximum_is_over_visible_keys(engine: Any) -> None:
    """A hidden key with the largest estimate filters nothing, under a mask and under a causal mask."""
    q, k, v = heads(1, 1, 12, 16), heads(1, 1, 12, 16), heads(1, 1, 12, 16)
    k = np.concatenate([k, 5 * q[:, :, :1]], axis=2)  # of the scale of 5, and hidden
    v = np.concatenate([v, v[:, :, :1]], axis=2)
    mask = np.arange(13).reshape(1, 1, 1, 13) < 12
    (q_codes, q_scale), (k_codes, k_scale) = engine.quantize(q), engine.quantize(k)
    rest = (np.array([0.7]), 0.25)
    hidden = engine.filtered_attention(q, k, v, q_codes, k_codes, q_scale, k_scale, *rest, False, mask)
    without = engine.filtered_attention(
        q, k[:, :, :12], v[:, :, :12], q_codes, k_codes[:, :, :12], q_scale, k_scale, *rest
    )
    for one, other in zip(hidden, without, strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
def test_values_of_dropped_keys_and_thresholds_of_other_heads_do_not_matter(engine: Any) -> None:
    q, k, v = heads(1, 2, 30, 16), heads(1, 2, 30, 16), heads(1, 2, 30, 16)
    kept = kept_sets(q, k, [0.2, 1.0])
    before, _ = attend(engine, q, k, v, [0.2, 1.0])
    for i in range(30):
        changed = np.where(kept[0, :, i, :, None], v, 1e6)
        np.testing.assert_array_equal(attend(engine, q, k, changed, [0.2, 1.0])[0][0, :, i], before[0, :, i])
    other, _ = attend(engine, q, k, v, [0.2, 0.3])
    np.testing.assert_array_equal(other[:, 0], before[:, 0])
    assert (other[:, 1] != before[:, 1]).any()


@BOTH
def test_kept_probabilities_sum_to_1_and_are_shifted_by_nothing(engine: Any) -> None:
    """Ones for values give ones; a constant added to all scores of a row changes no decision."""
    q, k = heads(1, 2, 30, 16), heads(1, 2, 50, 16)
    ones = np.ones((1, 2, 50, 3))
    np.testing.assert_allclose(attend(engine, q, k, ones, 0.5)[0], 1, rtol=1e-14)
    q[..., 0], k[..., 0] = 2.0, 0.0  # then a channel of keys is a constant of each row
    (q_codes, q_scale), (k_codes, k_scale) = engine.quantize(q), engine.quantize(k)
    v, rest = heads(1, 2, 50, 5), (np.array([0.3, 0.8]), 0.25)
    shifted = k_codes.copy()
    shifted[..., 0] = 64
    outs = [engine.filtered_attention(q, k, v, q_codes, codes, q_scale, k_scale, *rest) for codes in (k_codes, shifted)]
    np.testing.assert_array_equal(outs[0][1], outs[1][1])
    np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-10)


def test_without_a_filter_the_int8_product_is_dense_attention_on_codes() -> None:
    """gamma = 0: bit for bit the attention of the quantised queries and keys, on the NumPy engine."""
    q, k, v = heads(2, 4, 12, 16), heads(2, 2, 20, 16), heads(2, 2, 20, 16)
    (q_codes, q_scale), (k_codes, k_scale) = NUMPY.quantize(q), NUMPY.quantize(k)
    for causal in (False, True):
        found, kept = attend(NUMPY, q, k, v, math.inf, causal=causal)
        step = 0.25 * q_scale * np.repeat(k_scale, 2, axis=1)
        products = NUMPY.scores(q_codes.astype(float), k_codes.astype(float), 1.0, causal)
        dense = NUMPY.weighted_sum(NUMPY.softmax(step * products, causal), v, causal)
        np.testing.assert_array_equal(found, dense)
        plain = NUMPY.attention(q_codes * q_scale, k_codes * k_scale, v, 0.25, causal)
        np.testing.assert_allclose(found, plain, atol=1e-13)
        assert (kept == (sum(range(9, 21)) if causal else 240)).all()


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    q, k, v = heads(1, 3, 150, 32, np.float32), heads(1, 3, 700, 32, np.float32), heads(1, 3, 700, 32, np.float32)
    most = int(numba.config.NUMBA_NUM_THREADS)
    outs = []
    try:
        for threads in (1, most):
            NUMBA.set_threads(threads)
            outs.append(attend(NUMBA, q, k, v, 1.0))
    finally:
        NUMBA.set_threads(most)
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    np.testing.assert_array_equal(outs[0][1], outs[1][1])


def test_odd_operands_are_refused_with_what_was_given() -> None:
    q = heads(1, 2, 5, 8, np.float32)
    codes, sigma = NUMBA.quantize(q)
    thetas = np.ones(2)

    def call(**changes: Any) -> None:
        given = {"q_codes": codes, "q_scale": sigma, "thresholds": thetas, "scale": 0.3, "nibble": "floor", **changes}
        NUMBA.filtered_attention(
            q, q, q, given["q_codes"], codes, given["q_scale"], sigma, given["thresholds"], given["scale"],
            nibble=given["nibble"],
        )  # fmt: skip

    for changes, message in (
        ({"q_codes": codes[:, :, :4]}, "expected int8 codes"),
        ({"q_codes": codes.astype(np.int16)}, "int16"),
        ({"q_scale": sigma[..., 0]}, "scales of the dtype"),
        ({"thresholds": -thetas}, "at least 0"),
        ({"thresholds": np.ones(3)}, r"expected thresholds \(2,\)"),
        ({"scale": 0.0}, "above 0"),
        ({"nibble": "ceil"}, "nibble='ceil'"),
    ):
        with pytest.raises(ShapeError, match=message):
            call(**changes)
    with pytest.raises(UnsupportedError, match="float16"):
        NUMBA.quantize(q.astype(np.float16))


# --- both forms of the product of bytes -------------------------------------------------------------------------------


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="vector code exists only compiled")
@pytest.mark.parametrize("form", [vectors._multiply_add, vectors.multiply_add_portable], ids=["chosen", "portable"])
def test_products_of_words_are_exact_at_the_ends(form: Any) -> None:
    """All of 255 and -128 in a word, which no sum of 16 bits holds."""
    product = vectors.product_of_words(form)

    @numba.njit
    def add(sums: Array, unsigned: Array, signed: Array) -> None:
        product(_first(sums), _first(unsigned), _first(signed))

    rng = np.random.default_rng(0)
    for low, high in ((0, 256), (255, 256)):
        unsigned = rng.integers(low, high, 64).astype(np.uint8)
        signed = (rng.integers(-128, 128, 64) if low == 0 else np.full(64, -128)).astype(np.int8)
        sums = np.arange(16, dtype=np.int32)
        add(sums, unsigned, signed)
        products = unsigned.astype(np.int64) * signed
        np.testing.assert_array_equal(sums, np.arange(16) + products.reshape(16, 4).sum(axis=1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names the features of an x86-64 processor")
def test_the_kernel_is_right_where_the_processor_lacks_its_instructions(tmp_path: Path) -> None:
    """The same tests of shapes on code for AVX2 alone: no vpdpbusd, no compression of vectors."""
    if "avx2" not in vectors._target_features():
        pytest.skip("this processor has no AVX2")
    environment = {
        **os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2,+popcnt,+bmi,+bmi2",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "equation and int8"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "passed" in ran.stdout
