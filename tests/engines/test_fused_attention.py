"""The fused CPU attention against the equation, on inputs that break careless kernels.

The rule: the error against a wider type is at most twice that of the plain equation in the inputs' own type,
plus a rounding floor. The equation below is written here a second time, on purpose.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.engines.numba_kernels.attention import fused_attention, fused_relative_attention

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="vector code exists only compiled")

WIDER = {np.float32: np.float64, np.float64: np.longdouble}
TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
Array = np.ndarray


# The equation, inputs, and the rule ------------------------------------------------------------------------


def plain_attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool = False,
    mask: Array | None = None,
    added: Any = 0,
) -> Array:
    """softmax(scale * (q k^T + added)) v in the type of the inputs; a row that sees no key is zero."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    Tq, Tk = q.shape[2], k.shape[2]
    with np.errstate(all="ignore"):
        scores = q.dtype.type(scale) * (q @ k.swapaxes(2, 3) + added)
        seen = np.ones((Tq, Tk), bool) if mask is None else mask
        if causal:
            seen = seen & (np.arange(Tk) <= np.arange(Tq)[:, None] + Tk - Tq)
        scores = np.where(seen, scores, -np.inf)
        largest = scores.max(axis=3, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(largest == -np.inf, 0, largest))
        total = weights.sum(axis=3, keepdims=True)
        return ((weights / np.where(total == 0, 1, total)).astype(q.dtype)) @ v


def position_scores(q: Array, p: Array) -> Array:
    """Entry [b, h, i, j] is q[b, h, i] . p[h, T - 1 - i + j]."""
    T = q.shape[2]
    distance = T - 1 - np.arange(T)[:, None] + np.arange(T)
    return np.einsum("bhid,hijd->bhij", q, p[:, distance])


def heads(rng: np.random.Generator, B: int, H: int, T: int, D: int, dtype: Any = np.float32) -> Array:
    """Random heads (B, H, T, D) as models have them: a transposed view of (B, T, H, D)."""
    return rng.standard_normal((B, T, H, D)).astype(dtype).transpose(0, 2, 1, 3)


def qkv(
    Tq: int,
    Tk: int,
    *,
    B: int = 2,
    Hq: int = 2,
    Hkv: int = 2,
    D: int = 64,
    Dv: int = 64,
    dtype: Any = np.float32,
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(Tq + 1000 * Tk)
    return (
        heads(rng, B, Hq, Tq, D, dtype),
        heads(rng, B, Hkv, Tk, D, dtype),
        heads(rng, B, Hkv, Tk, Dv, dtype),
    )


def assert_obeys_rule(fast: Array, truth: Array, honest: Array, floor: float) -> None:
    """The error of `fast` is at most twice the honest error plus `floor`; NaN stands where it should."""
    assert fast.dtype == honest.dtype
    np.testing.assert_array_equal(np.isfinite(fast), np.isfinite(honest))
    finite = np.isfinite(honest)
    error, allowed = (np.abs(x - truth)[finite].max(initial=0) for x in (fast, honest))
    assert error <= 2 * allowed + floor, f"error {error:.2e}, honest {allowed:.2e}, floor {floor:.2e}"


def check(q: Array, k: Array, v: Array, scale: float = 0.125, causal: bool = False, mask: Array | None = None) -> Array:
    """Run the kernel, hold it to the rule, return its result."""
    fast = fused_attention(q, k, v, scale, causal, mask)
    wide = [x.astype(WIDER[q.dtype.type]) for x in (q, k, v)]
    truth = plain_attention(*wide, scale, causal, mask)
    honest = plain_attention(q, k, v, scale, causal, mask)
    floor = 4 * np.finfo(q.dtype).eps * np.abs(v, where=np.isfinite(v), out=np.zeros_like(v)).max(initial=1)
    assert_obeys_rule(fast, truth, honest, float(floor))
    return fast


def check_relative(
    q: Array, r: Array, k: Array, v: Array, p: Array, causal: bool = False, mask: Array | None = None
) -> Array:
    """The same for relative positions; r are the queries of the positions."""
    fast = fused_relative_attention(q, r, k, v, p, 0.125, causal, mask)
    wide = [x.astype(WIDER[q.dtype.type]) for x in (q, k, v, r, p)]
    truth = plain_attention(*wide[:3], 0.125, causal, mask, position_scores(*wide[3:]))
    honest = plain_attention(q, k, v, 0.125, causal, mask, position_scores(r, p))
    assert_obeys_rule(fast, truth, honest, float(4 * np.finfo(q.dtype).eps * np.abs(v).max(initial=1)))
    return fast


# Shapes ----------------------------------------------------------------------------------------------------


@TYPES
@CAUSAL
@pytest.mark.parametrize(
    ("Tq", "Tk"), [(1, 1), (1, 300), (2, 3), (48, 128), (49, 129), (257, 257), (600, 40), (40, 600), (7, 1)]
)
def test_fused_equals_equation(Tq: int, Tk: int, causal: bool, dtype: Any) -> None:
    check(*qkv(Tq, Tk, dtype=dtype), causal=causal)


@TYPES
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (3, 5), (16, 16), (20, 37), (64, 128), (128, 64), (200, 8)])
def test_fused_head_sizes_off_the_vector_grid(D: int, Dv: int, dtype: Any) -> None:
    check(*qkv(50, 70, D=D, Dv=Dv, dtype=dtype), scale=D**-0.5)


@CAUSAL
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 1), (6, 3), (4, 2)])
@pytest.mark.parametrize("Tq", [1, 5, 130])
def test_fused_grouped_queries(Hq: int, Hkv: int, Tq: int, causal: bool) -> None:
    q, k, v = qkv(Tq, 130, Hq=Hq, Hkv=Hkv)
    check(q, k, v, causal=causal)
    check(q, k, v, causal=causal, mask=np.random.default_rng(0).random((2, Hq, Tq, 130)) < 0.7)


def test_fused_empty_batch_and_empty_queries() -> None:
    assert fused_attention(*qkv(5, 5, B=0), 1.0).shape == (0, 2, 5, 64)
    assert fused_attention(*qkv(0, 5), 1.0).shape == (2, 2, 0, 64)
    assert fused_attention(*qkv(5, 5, Dv=0), 1.0).shape == (2, 2, 5, 0)


@pytest.mark.parametrize("Tq", [1, 50])
def test_fused_no_keys_gives_zeros(Tq: int) -> None:
    assert not check(*qkv(Tq, 0)).any()
    assert not check(*qkv(Tq, 0, Hkv=1)).any()


def test_fused_empty_heads_give_the_mean() -> None:
    check(*qkv(5, 9, D=0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fused_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    Tq, Tk = draw(st.integers(0, 200)), draw(st.integers(0, 300))
    D, Dv, Hkv, group = (draw(st.integers(1, most)) for most in (70, 70, 3, 3))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    sizes = {"B": draw(st.integers(0, 2)), "Hq": Hkv * group, "Hkv": Hkv, "D": D, "Dv": Dv}
    q, k, v = qkv(Tq, Tk, dtype=dtype, **sizes)
    mask = None
    if draw(st.booleans()):
        shape = tuple(n if draw(st.booleans()) else 1 for n in (q.shape[0], q.shape[1], Tq, Tk))
        mask = np.random.default_rng(Tk).random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    check(q, k, v, D**-0.5, draw(st.booleans()), mask)


# Numbers ---------------------------------------------------------------------------------------------------


@TYPES
@CAUSAL
def test_fused_large_logits(causal: bool, dtype: Any) -> None:
    q, k, v = qkv(100, 300, dtype=dtype)
    assert np.abs(q @ k.swapaxes(2, 3)).max() * 300 > 1e4
    check(q, k, v, 300.0, causal)


@TYPES
def test_fused_huge_logits(dtype: Any) -> None:
    q, k, v = qkv(60, 300, dtype=dtype)
    check(q, k, v, 1e30)


@TYPES
def test_fused_shifted_head(dtype: Any) -> None:
    q, k, v = qkv(100, 300, dtype=dtype)
    q[:, 0, :, 0], k[:, 0, :, 0] = 8, -200  # scores of head 0 are all near -200
    check(q, k, v)


@TYPES
def test_fused_rising_maximum_rescales(dtype: Any) -> None:
    """Every block of keys raises the maximum, so all that was accumulated before must shrink each time."""
    q, k, v = qkv(100, 1000, dtype=dtype)
    q[..., 0], k[..., 0] = 1, np.linspace(0, 40, 1000)
    check(q, k, v)


@TYPES
def test_fused_falling_maximum(dtype: Any) -> None:
    q, k, v = qkv(100, 1000, dtype=dtype)
    q[..., 0], k[..., 0] = 1, np.linspace(40, 0, 1000)
    check(q, k, v)


@TYPES
def test_fused_minus_infinite_logits(dtype: Any) -> None:
    q, k, v = qkv(60, 300, dtype=dtype)
    q[..., 0], k[:, :, ::3, 0] = 1, -np.inf
    k[:, :, :140, 0] = -np.inf  # a whole block
    assert np.isfinite(check(q, k, v)).all()


def test_fused_infinite_logit_is_nan() -> None:
    q, k, v = qkv(60, 300)
    q[..., 0], k[0, 0, 7, 0] = 1, np.inf
    assert np.isnan(check(q, k, v)[0, 0]).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_fused_any_scale(scale: float) -> None:
    check(*qkv(100, 300), scale=scale)
    check(*qkv(100, 300), scale=scale, mask=np.arange(300) % 5 > 0)


@TYPES
@pytest.mark.parametrize("payload", [0, 1, 0x155])
def test_fused_nan_in_query_reaches_its_row_only(payload: int, dtype: Any) -> None:
    q, k, v = qkv(100, 300, dtype=dtype)
    bits = np.array([np.nan], dtype).view(np.uint32 if dtype is np.float32 else np.uint64) | payload
    q[1, 0, 17, 3] = bits.view(dtype)[0]
    fast = check(q, k, v)
    assert np.isnan(fast[1, 0, 17]).all()
    assert np.isnan(fast).sum() == 64


@CAUSAL
@pytest.mark.parametrize("where", [0, 130, 299])
def test_fused_nan_in_key_reaches_all_rows_that_see_it(where: int, causal: bool) -> None:
    q, k, v = qkv(300, 300)
    k[0, 1, where, 5] = np.nan
    fast = check(q, k, v, causal=causal)
    first = where if causal else 0
    assert np.isnan(fast[0, 1, first:]).all()
    assert np.isnan(fast).sum() == 64 * (300 - first)


def test_fused_nan_in_value_reaches_its_column() -> None:
    q, k, v = qkv(100, 300)
    v[1, 1, 200, 9] = np.nan
    fast = check(q, k, v)
    assert np.isnan(fast[1, 1, :, 9]).all()
    assert np.isnan(fast).sum() == 100


# Few queries -----------------------------------------------------------------------------------------------
# Heads that share keys, seen by few queries, take a way of their own: keys fall into ranges, put together at the end.


@TYPES
@pytest.mark.parametrize("Tq", [1, 3])
def test_few_queries_when_the_maximum_rises_or_falls_with_the_keys(Tq: int, dtype: Any) -> None:
    q, k, v = qkv(Tq, 3000, Hq=4, dtype=dtype)
    q[..., 0] = 1
    for slope in (40, -40):
        k[..., 0] = np.linspace(0, slope, 3000)
        check(q, k, v, causal=True)


@TYPES
def test_few_queries_with_large_shifted_and_infinite_logits(dtype: Any) -> None:
    q, k, v = qkv(1, 700, Hq=6, dtype=dtype)
    check(q, k, v, 1e4)
    q[..., 0], k[:, 0, :, 0], k[:, 1, 130:400, 0] = 8, -200, -np.inf  # all scores of one head; whole ranges of another
    assert np.isfinite(check(q, k, v)).all()
    k[0, 1, 500, 0] = np.inf
    assert np.isnan(check(q, k, v)[0, 3:]).all()


@TYPES
@pytest.mark.parametrize("where", [0, 130, 699])
def test_few_queries_see_nan_where_it_is(where: int, dtype: Any) -> None:
    q, k, v = qkv(1, 700, Hq=6, dtype=dtype)
    k[0, 1, where, 5], v[1, 0, where, 9] = np.nan, np.nan
    nan = np.isnan(check(q, k, v))
    assert nan[0, 3:].all()
    assert nan[1, :3, :, 9].all()
    assert nan.sum() == 3 * 64 + 3


def test_few_queries_that_see_no_key_are_zero_even_with_bad_values() -> None:
    q, k, v = qkv(2, 700, Hq=4)
    v[0, 0, 3], v[1, 1, 650] = np.inf, np.nan
    mask = np.ones((2, 700), bool)
    mask[1] = False
    fast = fused_attention(q, k, v, 0.125, mask=mask)
    assert not fast[:, :, 1].any()
    assert fast[:, :, 0].all()


def test_few_queries_over_odd_layouts() -> None:
    q, k, v = qkv(2, 300, Hq=4, D=64, Dv=64)
    check(q[:, :, ::-1], k[:, :, ::-1, ::2].repeat(2, axis=3), v[..., ::-1])
    check(q, np.broadcast_to(k[:, :1], k.shape), np.broadcast_to(v[:1], v.shape), causal=True)
    packed = np.zeros(300, np.dtype([("x", np.float32, (2, 64)), ("odd", np.int8)]))["x"]
    packed[:] = np.random.default_rng(0).standard_normal((300, 2, 64))
    odd = packed.transpose(1, 0, 2)[None]
    assert not odd.flags.aligned
    check(q[:1], odd, odd)


# Masks -----------------------------------------------------------------------------------------------------


@TYPES
@CAUSAL
@pytest.mark.parametrize("shape", [(300,), (100, 300), (2, 1, 1, 300), (2, 2, 100, 300), (1, 2, 100, 1), (1,)])
def test_fused_mask_broadcasts(shape: tuple[int, ...], causal: bool, dtype: Any) -> None:
    check(*qkv(100, 300, dtype=dtype), causal=causal, mask=np.random.default_rng(1).random(shape) < 0.6)


def test_fused_mask_strides() -> None:
    mask = np.random.default_rng(1).random((300, 200)) < 0.6
    check(*qkv(100, 300), mask=mask.T[::2])
    check(*qkv(100, 300), mask=mask.T[:100][:, ::-1])


def test_fused_masked_row_is_zero_even_with_bad_values() -> None:
    q, k, v = qkv(100, 300)
    v[0, 0, 3] = np.inf
    mask = np.ones((100, 300), bool)
    mask[5] = False
    fast = fused_attention(q, k, v, 0.125, mask=mask)
    assert not fast[:, :, 5].any()
    assert not np.isnan(fast[:, :, 5]).any()


@TYPES
def test_fused_rows_before_the_first_key_are_zero(dtype: Any) -> None:
    fast = check(*qkv(200, 60, dtype=dtype), causal=True)
    assert not fast[:, :, :140].any()
    assert fast[:, :, 140:].all()


@TYPES
@pytest.mark.parametrize("Tq", [300, 120, 1])
def test_fused_future_keys_change_nothing(Tq: int, dtype: Any) -> None:
    q, k, v = qkv(Tq, 300, dtype=dtype)
    seen = 300 - Tq // 2
    before = fused_attention(q, k, v, 0.125, causal=True)
    k[:, :, seen:], v[:, :, seen:] = 1e4, -1e4
    after = fused_attention(q, k, v, 0.125, causal=True)
    rows = seen - (300 - Tq)
    np.testing.assert_array_equal(before[:, :, :rows], after[:, :, :rows])


def test_fused_masked_keys_change_nothing() -> None:
    q, k, v = qkv(100, 300)
    mask = np.random.default_rng(2).random(300) < 0.5
    before = fused_attention(q, k, v, 0.125, mask=mask)
    k[:, :, ~mask], v[:, :, ~mask] = np.nan, 1e4
    np.testing.assert_array_equal(before, fused_attention(q, k, v, 0.125, mask=mask))


# Relative positions ----------------------------------------------------------------------------------------


def relative_inputs(T: int, D: int = 64, Dv: int = 64, dtype: Any = np.float32) -> tuple[Array, ...]:
    q, k, v = qkv(T, T, D=D, Dv=Dv, dtype=dtype)
    rng = np.random.default_rng(T)
    return q, heads(rng, 2, 2, T, D, dtype), k, v, rng.standard_normal((2, 2 * T - 1, D)).astype(dtype)


@TYPES
@CAUSAL
@pytest.mark.parametrize("T", [1, 2, 47, 48, 49, 128, 130, 257])
def test_relative_equals_equation(T: int, causal: bool, dtype: Any) -> None:
    check_relative(*relative_inputs(T, dtype=dtype), causal=causal)


@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (20, 37), (36, 36), (144, 16)])
def test_relative_head_sizes_off_the_vector_grid(D: int, Dv: int) -> None:
    check_relative(*relative_inputs(90, D, Dv))


def test_relative_mask() -> None:
    mask = np.random.default_rng(0).random((2, 1, 150, 150)) < 0.5
    mask[0, 0, 7] = False
    assert not check_relative(*relative_inputs(150), mask=mask)[0, :, 7].any()


def test_relative_large_logits() -> None:
    q, r, k, v, p = relative_inputs(200)
    check_relative(50 * q, 50 * r, 30 * k, v, 30 * p)


def test_relative_nan_position_reaches_its_diagonal() -> None:
    q, r, k, v, p = relative_inputs(130)
    p[1, 100] = np.nan  # keys 29 places before their query
    fast = check_relative(q, r, k, v, p)
    assert np.isnan(fast[:, 1, 29:]).all()
    assert not np.isnan(fast[:, 1, :29]).any()


def test_relative_shared_table_of_strided_rows() -> None:
    q, r, k, v, p = relative_inputs(100)
    spread = np.zeros((199, 2, 70), np.float32).transpose(1, 0, 2)
    spread[:, :, :64] = p
    check_relative(q, r, k, v, spread[:, :, :64])


# Memory ----------------------------------------------------------------------------------------------------


def test_fused_leaves_read_only_inputs_alone() -> None:
    inputs = qkv(100, 300)
    copies = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False
    check(*inputs, causal=True)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_relative_leaves_inputs_alone() -> None:
    inputs = relative_inputs(100)
    copies = [x.copy() for x in inputs]
    check_relative(*inputs)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_fused_strided_inputs() -> None:
    rng = np.random.default_rng(0)
    merged = rng.standard_normal((2, 100, 3, 2, 64)).astype(np.float32).transpose(2, 0, 3, 1, 4)
    check(*merged)  # heads of one projection
    q, k, v = qkv(100, 100, D=128, Dv=128)
    check(q[..., ::2], k[..., ::-2], v[..., ::2])  # last axis not contiguous
    check(q[:, :, ::-1], k[:, ::-1], v[:, :, ::3][:, :, np.zeros(100, int)])
    check(q, np.broadcast_to(k[:, :1], k.shape), np.broadcast_to(v[:1], v.shape))
    packed = np.zeros(100, np.dtype([("x", np.float32, (2, 64)), ("odd", np.int8)]))["x"]
    packed[:] = rng.standard_normal((100, 2, 64))
    odd = packed.transpose(1, 0, 2)[None]
    assert odd.strides[2] % 4
    check(odd, odd, odd)


def test_fused_writes_only_its_output() -> None:
    q, k, v = qkv(100, 300, Dv=20)
    buffer = np.full((2, 102, 2, 24), 7, np.float32)
    out = buffer[:, 1:101, :, 2:22].transpose(0, 2, 1, 3)
    assert fused_attention(q, k, v, 0.125, out=out) is out
    np.testing.assert_array_equal(out, fused_attention(q, k, v, 0.125))
    buffer[:, 1:101, :, 2:22] = 7
    assert (buffer == 7).all()


def test_fused_decoding_writes_its_output() -> None:
    q, k, v = qkv(1, 300, Hq=4)
    out = np.zeros((2, 1, 4, 64), np.float32).transpose(0, 2, 1, 3)
    assert fused_attention(q, k, v, 0.125, out=out) is out
    np.testing.assert_array_equal(out, fused_attention(q, k, v, 0.125))
    assert out.all()


def test_fused_default_output_merges_heads_without_a_copy() -> None:
    out = fused_attention(*qkv(10, 10), 0.125)
    assert out.transpose(0, 2, 1, 3).flags.c_contiguous


def test_fused_same_bits_on_any_number_of_threads() -> None:
    q, k, v = qkv(500, 300)
    threads = numba.get_num_threads()
    results = []
    for n in (1, threads):
        numba.set_num_threads(n)
        results.append(fused_attention(q, k, v, 0.125, causal=True))
    numba.set_num_threads(threads)
    np.testing.assert_array_equal(*results)


def test_fused_never_holds_the_map() -> None:
    T = 3000
    inputs = relative_inputs(T, 16, 16)
    tracemalloc.start()
    fused_attention(*inputs[:1], *inputs[2:4], 0.25)
    fused_relative_attention(*inputs, 0.25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < T * T  # one byte per entry of one head's map


# Other processors ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(numba.config.CPU_NAME is not None, reason="already runs for a chosen processor")
@pytest.mark.parametrize("features", ["", "+avx,+avx2,+fma"], ids=["sse2", "avx2"])
def test_fused_on_narrower_vectors(features: str, tmp_path: Path) -> None:
    """Compiles for a lesser processor, in a process of its own, and runs a few of the tests above."""
    if numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[0].split("-")[0] != "x86_64":
        pytest.skip("names x86 processors")
    choice = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    few = "f32 and (relative_equals or fused_equals or broadcasts or few_queries) or huge or grouped"
    command = [sys.executable, "-m", "pytest", "-q", "-k", few, "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, **choice}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
