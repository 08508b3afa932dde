"""The numba engine against float64 formulas that are written out here.

Float32: ``max|fast - truth| <= 2 max|honest - truth| + floor``, where honest is the same formula in float32 NumPy and
the floor a few roundings of the largest number. Float64 is held to roundings alone.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memo_data import listed
from scipy.special import erf

from refimpl.engines import numba_engine
from refimpl.engines.buffers import SMALLEST_BYTES, Buffers
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numba_kernels import elementwise, few_rows, layout, parallel, rows
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, ShapeError, UnsupportedError

Array = Any
ENGINE, NUMPY = NumbaEngine(), NumpyEngine()
ROOT = Path(__file__).parents[2]
INF, NAN = math.inf, math.nan
PROPERTY = settings(max_examples=40, deadline=None)


# --- the formulas, in the dtype of their arguments ------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = np.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


def conv1d(x: Array, weight: Array, bias: Array, stride: int) -> Array:
    kernel, length = weight.shape[1], x.shape[1]
    before = (kernel - 1) // 2
    out = np.zeros((x.shape[0], -(-length // stride), weight.shape[0]), x.dtype)
    for i in range(out.shape[1]):
        for tap in range(kernel):
            t = i * stride + tap - before
            if 0 <= t < length:
                out[:, i] += x[:, t] @ weight[:, tap].T
    return out + bias


def depthwise_conv(x: Array, weight: Array, bias: Array) -> Array:
    kernel, length = weight.shape[0], x.shape[1]
    out = np.zeros_like(x)
    for t in range(length):
        for tap in range(kernel):
            if 0 <= t + tap - (kernel - 1) // 2 < length:
                out[:, t] += x[:, t + tap - (kernel - 1) // 2] * weight[tap]
    return out + bias


def block_linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    parts = np.split(x, len(weight), axis=-1)
    y = np.concatenate([linear(part, block) for part, block in zip(parts, weight, strict=True)], -1)
    return y if bias is None else y + bias


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    y = x - x.mean(-1, keepdims=True)
    return y / np.sqrt((y * y).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def batch_norm(x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def add(x: Array, y: Array, scale: float = 1.0) -> Array:
    return x + scale * y


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def relu(x: Array) -> Array:
    return np.where(x < 0, 0, x).astype(x.dtype)


def glu(x: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    with np.errstate(over="ignore"):
        return a / (1 + np.exp(-b))


def swiglu(gate: Array, up: Array) -> Array:
    return silu(gate) * up


def rotary(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[..., a] = x[..., a] * cos[:, i] - x[..., b] * sin[:, i]
        out[..., b] = x[..., a] * sin[:, i] + x[..., b] * cos[:, i]
    return out


def hidden(q_len: int, k_len: int, causal: bool) -> Array:
    i, j = np.arange(q_len)[:, None], np.arange(k_len)
    return (j > i + k_len - q_len) & causal


def scores(q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    s = np.einsum("bhid,bhjd->bhij", q * scale, np.broadcast_to(k, (q.shape[0], *k.shape[1:])))
    s[..., hidden(*s.shape[2:], causal)] = -INF
    return s if mask is None else np.where(mask, s, -INF).astype(s.dtype)


def softmax(s: Array, causal: bool = False) -> Array:
    s = np.where(hidden(*s.shape[2:], causal), -INF, s).astype(s.dtype)
    largest = s.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - np.where(largest == -INF, 0, largest).astype(s.dtype))
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total).astype(s.dtype)


def weighted_sum(weights: Array, v: Array, causal: bool = False) -> Array:
    weights = np.where(hidden(*weights.shape[2:], causal), 0, weights).astype(weights.dtype)
    return np.einsum("bhij,bhjd->bhid", weights, np.repeat(v, weights.shape[1] // v.shape[1], axis=1))


def add_relative(s: Array, position: Array) -> Array:
    length = s.shape[2]
    i, j = np.arange(length)[:, None], np.arange(length)
    return s + position[:, :, i, length - 1 - i + j]


def attention(
    q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False, mask: Array | None = None
) -> Array:
    s = scores(q, k, 1 / math.sqrt(q.shape[3]) if scale is None else scale, causal, mask)
    return weighted_sum(softmax(s), np.broadcast_to(v, (q.shape[0], *v.shape[1:])))


def relative_attention(
    q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float,
    causal: bool = False, mask: Array | None = None,
) -> Array:  # fmt: skip
    position = np.einsum("bhid,hrd->bhir", q_position * scale, p)
    s = add_relative(scores(q, k, scale, causal, mask), position)
    return weighted_sum(softmax(s), v)


# --- the rule -------------------------------------------------------------------------------------------------------


def wide(value: Any) -> Any:
    """Arguments in float64."""
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def distance(a: Array, b: Array) -> float:
    """The largest difference of finite numbers; infinities and NaN must be in the same places."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    assert (same | finite).all(), f"inf or NaN in other places: {np.argwhere(~(same | finite))[:5].tolist()}"
    with np.errstate(invalid="ignore"):
        return float(np.where(finite, np.abs(a - b), 0).max(initial=0))


def assert_right(fast: Array, formula: Callable[..., Array], *args: Any, rows: int | None = None) -> None:
    """The rule of this file; also shape and dtype.

    `fast` may be of the first `rows` alone: the error of a formula in one or two numbers is luck, so the arguments hold
    more of the same kind.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        honest, truth = formula(*args), formula(*map(wide, args))
    assert fast.shape == truth[:rows].shape
    error = distance(fast, truth[:rows])
    assert fast.dtype == honest.dtype
    scale = np.abs(truth[np.isfinite(truth)]).max(initial=0)
    floor = 4 * np.finfo(fast.dtype).eps * scale + np.finfo(fast.dtype).tiny
    if fast.dtype == np.float64:
        terms = max(max(x.shape, default=1) for x in args if isinstance(x, np.ndarray))
        assert error <= terms * floor
        return
    allowed = 2 * distance(honest.astype(np.float64), truth) + floor
    assert error <= allowed, f"{formula.__name__}: error {error:.3g}, allowed {allowed:.3g}"


def case(op: str, *args: Any, dtype: Any = np.float32) -> tuple[Array, tuple[Any, ...]]:
    """Run an op on arguments cast to `dtype`; it must leave them as they are."""
    cast = tuple(x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in args)
    before = [x.copy() if isinstance(x, np.ndarray) else x for x in cast]
    fast = getattr(ENGINE, op)(*cast)
    for now, then in zip(cast, before, strict=True):
        np.testing.assert_array_equal(now, then)
    return fast, cast


RNG = np.random.default_rng(3)
normal = RNG.standard_normal


def heads(batch: int, count: int, length: int, width: int) -> Array:
    """Heads as a projection gives them: columns of a (B, T, ...) array."""
    return normal((batch, length, 2 * count * width))[..., count * width :].reshape(
        batch, length, count, width
    ).transpose(0, 2, 1, 3)  # fmt: skip


def angles(length: int, half: int) -> tuple[Array, Array]:
    angle = np.arange(length)[:, None] * 0.9 ** np.arange(half)
    return np.cos(angle), np.sin(angle)


ANY_MASK = RNG.random((2, 1, 37, 70)) > 0.4
CASES: dict[str, tuple[Callable[..., Array], tuple[Any, ...]]] = {
    "linear": (linear, (normal((2, 50, 33)), normal((47, 33)), normal(47))),
    "linear large": (linear, (normal((3, 300, 64)), normal((128, 64)), normal(128))),
    "linear without bias": (linear, (normal((7, 33)), normal((5, 33)))),
    "linear one row": (linear, (normal((1, 1, 576)), normal((301, 576)), normal(301))),
    "linear few rows": (linear, (normal((layout.FEW_ROWS, 1, 77)), normal((2000, 77)), normal(2000))),
    "conv1d": (conv1d, (normal((2, 45, 6)), normal((10, 3, 6)), normal(10), 2)),
    "conv1d wide": (conv1d, (normal((1, 3, 5)), normal((4, 9, 5)), normal(4), 1)),
    "depthwise_conv": (depthwise_conv, (normal((2, 150, 40)), normal((31, 40)), normal(40))),
    "depthwise_conv parallel": (depthwise_conv, (normal((3, 180, 129)), normal((7, 129)), normal(129))),
    "block_linear": (block_linear, (normal((2, 50, 33)), normal((3, 17, 11)), normal(51))),
    "block_linear large": (block_linear, (normal((3, 300, 128)), normal((2, 96, 64)), normal(192))),
    "block_linear one row": (block_linear, (normal((1, 1, 96)), normal((4, 50, 24)), normal(200))),
    "block_linear few rows": (block_linear, (normal((5, 1, 512)), normal((2, 301, 256)))),
    "layer_norm": (layer_norm, (normal((2, 350, 97)) + 3, normal(97), normal(97), 1e-5)),
    "rms_norm": (rms_norm, (normal((2, 350, 97)) + 3, normal(97), 1e-6)),
    "batch_norm": (
        batch_norm,
        (normal((2, 350, 97)) + 3, normal(97) + 3, normal(97) ** 2, normal(97), normal(97), 1e-5),
    ),
    "add residual": (add, (normal((3, 211, 113)), normal((3, 211, 113)), 0.5)),
    "add table": (add, (normal((3, 211, 113)), normal((211, 113)))),
    "add bias": (add, (normal((3, 211, 113)), normal(113))),
    "add other": (add, (normal((3, 5, 7)), normal((3, 1, 7)))),
    "gelu": (gelu, (6 * normal((5, 139, 101)),)),
    "gelu_tanh": (gelu_tanh, (6 * normal((5, 139, 101)),)),
    "silu": (silu, (30 * normal((5, 139, 101)),)),
    "relu": (relu, (normal((5, 139, 101)),)),
    "glu": (glu, (30 * normal((5, 139, 202)),)),
    "swiglu": (swiglu, (30 * normal((5, 139, 101)), normal((5, 139, 101)))),
    "rotary halves": (rotary, (heads(2, 3, 250, 48), *angles(250, 24), False)),
    "rotary pairs": (rotary, (heads(2, 3, 250, 48), *angles(250, 24), True)),
    "scores": (scores, (heads(2, 6, 150, 16), heads(2, 6, 150, 16), 0.3)),
    "scores grouped": (scores, (heads(2, 6, 37, 16), heads(1, 2, 70, 16), 0.3, False, ANY_MASK)),
    "scores causal": (scores, (heads(1, 2, 400, 16), heads(1, 2, 400, 16), -0.3, True)),
    "add_relative": (add_relative, (normal((2, 3, 110, 110)), normal((2, 3, 110, 219)))),
    "softmax": (softmax, (3 * normal((2, 3, 90, 301)),)),
    "softmax causal": (softmax, (3 * normal((2, 3, 90, 130)), True)),
    "weighted_sum": (weighted_sum, (normal((2, 6, 37, 70)), heads(2, 2, 70, 16))),
    "weighted_sum causal": (weighted_sum, (normal((1, 2, 400, 400)), heads(1, 2, 400, 16), True)),
    "attention": (attention, (heads(2, 4, 37, 24), heads(2, 2, 70, 24), heads(2, 2, 70, 9), None, True)),
    "attention shared": (attention, (heads(2, 4, 37, 24), heads(1, 2, 70, 24), heads(1, 2, 70, 9), 0.2)),
    "relative_attention": (
        relative_attention,
        (heads(2, 3, 50, 16), heads(2, 3, 50, 16), heads(2, 3, 50, 16), heads(2, 3, 50, 16), normal((3, 99, 16)), 0.2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", CASES)
def test_op_is_as_right_as_its_formula(name: str, dtype: Any) -> None:
    formula, args = CASES[name]
    fast, cast = case(formula.__name__, *args, dtype=dtype)
    assert_right(fast, formula, *cast)


def test_project_is_linear_cut_into_columns() -> None:
    x, weight, bias = (a.astype(np.float32) for a in (normal((2, 30, 16)), normal((24, 16)), normal(24)))
    parts = ENGINE.project(x, weight, bias, (10, 8, 6))
    np.testing.assert_array_equal(np.concatenate(parts, -1), ENGINE.linear(x, weight, bias))
    assert all(part.strides[-1] == 4 for part in parts)


def test_embedding_and_concat_copy_exactly() -> None:
    table, ids = normal((20, 6)).astype(np.float32), RNG.integers(0, 20, (3, 5))
    np.testing.assert_array_equal(ENGINE.embedding(table, ids), table[ids])
    parts = (normal((2, 3, 4, 5)), normal((2, 3, 1, 5)))
    np.testing.assert_array_equal(ENGINE.concat(parts, 2), np.concatenate(parts, 2))
    np.testing.assert_array_equal(ENGINE.concat(parts, -2), np.concatenate(parts, 2))


# --- stored maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 8, 10), (2, 7, 5), (1, 1, 4), (0, 4, 4)])
def test_max_pool_equals_the_equation(shape: tuple[int, ...], dtype: str) -> None:
    x = normal(shape).astype(dtype)
    np.testing.assert_array_equal(ENGINE.max_pool(x), NUMPY.max_pool(x))
    np.testing.assert_array_equal(ENGINE.max_pool(x[:, ::-1]), NUMPY.max_pool(x[:, ::-1]))


@pytest.mark.parametrize("points", [1, 5, numba_engine.NEAREST_BLOCK, 2 * numba_engine.NEAREST_BLOCK + 3])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_nearest_is_within_twice_the_error_of_the_equation(points: int, shift: float) -> None:
    """Also far from the origin, where squares minus products cancel."""
    x, stored = (shift + normal((n, 128)).astype(np.float32) for n in (6, points))
    x[1] = stored[points // 2]
    truth, rows = NUMPY.nearest(x.astype(np.float64), stored.astype(np.float64))
    plain, fast = NUMPY.nearest(x, stored), ENGINE.nearest(x, stored)
    assert np.abs(fast[0] - truth).max() <= 2 * np.abs(plain[0] - truth).max() + 1e-6
    assert fast[0][1] == 0.0
    np.testing.assert_array_equal(fast[1], rows)


def test_equally_near_points_give_the_first() -> None:
    stored = np.ones((2 * numba_engine.NEAREST_BLOCK, 4), np.float32)
    for engine in (ENGINE, NUMPY):
        assert list(engine.nearest(np.ones((2, 4), np.float32), stored)[1]) == [0, 0]


def test_fetch_take_rows_and_scatter_move_what_they_name() -> None:
    maps, x = normal((4, 2, 3, 3)).astype(np.float32), normal((5, 3, 4)).astype(np.float32)
    fetched = ENGINE.fetch(listed(maps), (2, None, 0), "copy")
    np.testing.assert_array_equal(fetched[[0, 2]], maps[[2, 0]])
    assert ENGINE.scatter(fetched, maps[3:], (1,)) is fetched
    np.testing.assert_array_equal(fetched, maps[[2, 3, 0]])
    np.testing.assert_array_equal(ENGINE.take_rows(x, (4, 1)), x[[4, 1]])
    assert ENGINE.take_rows(x, ()).shape == (0, 3, 4)


# --- inputs that break things ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_softmax_of_hostile_rows(parallel: bool) -> None:
    s = normal((1, 4, 300, 77) if parallel else (1, 4, 9, 77)).astype(np.float32)
    s[0, 0] *= 1e4
    s[0, 1] -= 200
    s[0, 2, 0], s[0, 2, 1, :-1], s[0, 2, 2, 5] = -INF, -INF, NAN
    s[0, 3, :, ::2] = -INF
    p = ENGINE.softmax(s)
    assert_right(p, softmax, s)
    assert (p[0, 2, 0] == 0).all()
    assert p[0, 2, 1, -1] == 1
    assert np.isnan(p[0, 2, 2]).all()
    assert np.isfinite(p[0, 2, 3:]).all()
    assert (p[0, 3, :, ::2] == 0).all()


def test_activations_at_the_ends_of_the_number_line() -> None:
    x = np.array([0.0, -0.0, 1e-30, -1e-30, 90, -90, 1e4, -1e4, 3e38, -3e38, INF, NAN], np.float32)
    for op in (gelu, gelu_tanh, silu, relu):
        with np.errstate(over="ignore", invalid="ignore"):
            assert_right(getattr(ENGINE, op.__name__)(x), op, x)


def test_small_gelu_keeps_its_relative_accuracy() -> None:
    x = np.geomspace(1e-30, 1e-3, 100, dtype=np.float32)
    np.testing.assert_allclose(ENGINE.gelu(x), gelu(x.astype(float)), rtol=3e-7)


def test_hidden_values_never_reach_a_causal_sum() -> None:
    weights = ENGINE.softmax(normal((1, 2, 6, 6)).astype(np.float32), causal=True)
    v = normal((1, 2, 6, 4)).astype(np.float32)
    clean = ENGINE.weighted_sum(weights, v, causal=True)
    v[:, :, 4], v[:, :, 5] = NAN, INF
    dirty = ENGINE.weighted_sum(weights, v, causal=True)
    np.testing.assert_allclose(dirty[:, :, :4], clean[:, :, :4], rtol=1e-5, atol=1e-6)
    assert np.isnan(dirty[:, :, 4:]).all()


def test_fully_masked_row_attends_to_nothing() -> None:
    q, k, v = (normal((1, 2, 5, 8)).astype(np.float32) for _ in range(3))
    mask = np.ones((1, 1, 5, 5), bool)
    mask[0, 0, 3] = False
    s = ENGINE.scores(q, k, 0.3, mask=mask)
    assert (s[:, :, 3] == -INF).all()
    assert (ENGINE.weighted_sum(ENGINE.softmax(s), v)[:, :, 3] == 0).all()
    assert (ENGINE.attention(q, k, v, mask=mask)[:, :, 3] == 0).all()


@pytest.mark.parametrize("n", [3, 8, 17, 31, 63])
@pytest.mark.parametrize("kernel", ["softmax", "factors"])
def test_sums_do_not_depend_on_where_arrays_lie(kernel: str, n: int) -> None:
    """Results right behind the operands, and far away: LLVM has another loop for arrays that may overlap."""
    found = []
    for gap in (0, 1000):
        memory = np.zeros(2 * n + gap, np.float32)
        x, out = memory[:n], memory[n + gap :]
        x[:] = np.random.default_rng(n).standard_normal(n)
        if kernel == "softmax":
            rows.kernel_softmax(x, n, out, n, 1, False, 1, 1)
        else:
            out[:] = np.random.default_rng(0).random(n)
            few_rows.factors_of(x[None], out[None])
        found.append((x.copy(), out.copy()))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_spreads_nan_over_its_row_only(op: str) -> None:
    x, weight = normal((4, 33)).astype(np.float32), np.ones(33, np.float32)
    x[1, 7] = NAN
    y = ENGINE.layer_norm(x, weight, weight, 1e-5) if op == "layer_norm" else ENGINE.rms_norm(x, weight, 1e-5)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2, 3]]).all()


def test_layer_norm_of_constant_and_shifted_rows() -> None:
    x = np.concatenate([np.full((1, 64), 5.0), 1e3 + normal((3, 64)), np.zeros((1, 64))]).astype(np.float32)
    weight, bias = normal(64).astype(np.float32), normal(64).astype(np.float32)
    assert_right(ENGINE.layer_norm(x, weight, bias, 1e-5), layer_norm, x, weight, bias, 1e-5)


def test_empty_batches_give_empty_results() -> None:
    def f32(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    d, ids = f32(8), np.zeros((0, 3), int)
    x, q, s = f32(0, 3, 8), f32(0, 2, 3, 4), f32(0, 2, 3, 3)
    assert ENGINE.linear(x, f32(5, 8), f32(5)).shape == (0, 3, 5)
    assert ENGINE.conv1d(x, f32(5, 3, 8), f32(5), 2).shape == (0, 2, 5)
    assert ENGINE.depthwise_conv(x, f32(3, 8), d).shape == x.shape
    assert ENGINE.block_linear(x, f32(2, 5, 4), f32(10)).shape == (0, 3, 10)
    assert ENGINE.embedding(f32(5, 8), ids).shape == (0, 3, 8)
    assert ENGINE.batch_norm(x, d, d, d, d, 1.0).shape == x.shape
    assert ENGINE.rms_norm(x, d, 1.0).shape == ENGINE.layer_norm(x, d, d, 1.0).shape == x.shape
    assert ENGINE.add(x, x).shape == ENGINE.swiglu(x, x).shape == ENGINE.gelu(x).shape == x.shape
    assert ENGINE.glu(x).shape == (0, 3, 4)
    assert ENGINE.rotary(q, f32(3, 2), f32(3, 2), True).shape == q.shape
    assert ENGINE.scores(q, q, 1.0, causal=True).shape == ENGINE.softmax(s).shape == s.shape
    assert ENGINE.add_relative(s, f32(0, 2, 3, 5)).shape == s.shape
    assert ENGINE.weighted_sum(s, q, causal=True).shape == ENGINE.attention(q, q, q).shape == q.shape
    assert (ENGINE.weighted_sum(f32(1, 1, 2, 0), f32(1, 1, 0, 4)) == np.zeros((1, 1, 2, 4))).all()


# --- shapes ---------------------------------------------------------------------------------------------------------

small = st.integers(1, 3)
length = st.integers(1, 40)


@PROPERTY
@given(
    small,
    small,
    small,
    length,
    length,
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_attention_steps_on_any_shape(
    batch: int,
    groups: int,
    shared: int,
    q_len: int,
    k_len: int,
    width: int,
    causal: bool,
    masked: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, groups * shared, q_len, width), dtype=np.float32)
    k, v = (rng.standard_normal((batch, groups, k_len, width), dtype=np.float32) for _ in range(2))
    mask = rng.random((batch, 1, q_len, k_len)) > 0.3 if masked else None
    s = ENGINE.scores(q, k, 0.5, causal, mask)
    assert_right(s, scores, q, k, 0.5, causal, mask)
    p = ENGINE.softmax(s, causal)
    assert_right(p, softmax, s, causal)
    assert_right(ENGINE.weighted_sum(p, v, causal), weighted_sum, p, v, causal)


@PROPERTY
@given(
    small,
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_convolutions_on_any_shape(batch: int, length: int, width: int, kernel: int, stride: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, length, width), dtype=np.float32)
    weight, bias = rng.standard_normal((3, kernel, width), dtype=np.float32), np.ones(3, np.float32)
    assert_right(ENGINE.conv1d(x, weight, bias, stride), conv1d, x, weight, bias, stride)
    shift = rng.standard_normal(width, dtype=np.float32)
    assert_right(ENGINE.depthwise_conv(x, weight[0], shift), depthwise_conv, x, weight[0], shift)


@PROPERTY
@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**31))
def test_rows_of_any_width(count: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal((count, 2 * width), dtype=np.float32)[:, width:] for _ in range(2))
    weight, bias = (rng.standard_normal(width, dtype=np.float32) for _ in range(2))
    assert_right(ENGINE.layer_norm(x, weight, bias, 1e-5), layer_norm, x, weight, bias, 1e-5)
    assert_right(ENGINE.rms_norm(x, weight, 1e-5), rms_norm, x, weight, 1e-5)
    assert_right(ENGINE.gelu(x), gelu, x)
    assert_right(ENGINE.swiglu(x, y), swiglu, x, y)
    assert_right(ENGINE.add(x, bias, 0.25), add, x, bias, 0.25)


# --- layouts and threads --------------------------------------------------------------------------------------------

X = normal((3, 240, 3 * 96)).astype(np.float32)  # (B, T, three parts)
PART = X[..., 96:192]
HEADS = PART.reshape(3, 240, 4, 24).transpose(0, 2, 1, 3)  # (B, H, T, D)
COS, SIN = (a.astype(np.float32) for a in angles(240, 12))
D = normal(96).astype(np.float32)
CALLS: dict[str, Callable[[Array, Array], Array]] = {
    "linear": lambda x, h: ENGINE.linear(x, PART[0], PART[0, 0, :1].repeat(240)),
    "depthwise_conv": lambda x, h: ENGINE.depthwise_conv(x, X[0, :9, :96], D),
    "layer_norm": lambda x, h: ENGINE.layer_norm(x, D, D, 1e-5),
    "rms_norm": lambda x, h: ENGINE.rms_norm(x, D, 1e-5),
    "batch_norm": lambda x, h: ENGINE.batch_norm(x, D, D * D, D, D, 1e-5),
    "add": lambda x, h: ENGINE.add(x, x, 0.3),
    "gelu": lambda x, h: ENGINE.gelu(x),
    "silu": lambda x, h: ENGINE.silu(x),
    "glu": lambda x, h: ENGINE.glu(x),
    "swiglu": lambda x, h: ENGINE.swiglu(x, x),
    "rotary": lambda x, h: ENGINE.rotary(h, COS, SIN, False),
    "scores": lambda x, h: ENGINE.scores(h, h, 0.2, causal=True),
    "softmax": lambda x, h: ENGINE.softmax(h, causal=True),
    "weighted_sum": lambda x, h: ENGINE.weighted_sum(ENGINE.scores(h, h, 0.2), h),
    "attention": lambda x, h: ENGINE.attention(h, h, h),
}


@pytest.mark.parametrize("name", CALLS)
def test_column_slices_and_transposed_heads_give_the_same_numbers(name: str) -> None:
    call = CALLS[name]
    strided, contiguous = call(PART, HEADS), call(PART.copy(), HEADS.copy(order="C"))
    if name in ("linear", "scores", "weighted_sum", "attention"):  # BLAS may add in another order
        np.testing.assert_allclose(strided, contiguous, rtol=1e-5, atol=1e-4)
    else:
        np.testing.assert_array_equal(strided, contiguous)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "attention"])
def test_result_does_not_depend_on_the_number_of_threads(name: str) -> None:
    threads = ENGINE.threads
    if threads == 1:
        pytest.skip("one core")
    many = CALLS[name](PART, HEADS).copy()
    try:
        ENGINE.set_threads(1)
        assert ENGINE.threads == 1
        np.testing.assert_array_equal(CALLS[name](PART, HEADS), many)
    finally:
        ENGINE.set_threads(threads)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("linear", "scores", "weighted_sum")])
def test_small_and_large_calls_give_the_same_numbers(name: str) -> None:
    """The serial path below `SERIAL_ELEMENTS` and the parallel one above it, on the same rows."""
    large, one = CALLS[name](PART, HEADS)[:1], CALLS[name](PART[:1], HEADS[:1])
    assert PART[:1].size < layout.SERIAL_ELEMENTS <= PART.size
    np.testing.assert_array_equal(large, one)


def test_read_only_reversed_and_byte_shifted_inputs() -> None:
    x = normal((5, 64)).astype(np.float32)
    expected = ENGINE.silu(x)
    compiled = len(elementwise.kernel_activation.signatures)
    frozen = x.copy()
    frozen.flags.writeable = False
    shifted = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for same in (frozen, frozen[:, :], x[::-1].copy()[::-1], np.asfortranarray(x), shifted):
        np.testing.assert_array_equal(ENGINE.silu(same), expected)
    assert len(elementwise.kernel_activation.signatures) == compiled  # nothing was compiled anew


@pytest.mark.parametrize("count", [1, 3, layout.FEW_ROWS])
def test_few_rows_against_weights_of_any_layout(count: int) -> None:
    x, wide = normal((count, 2 * 40)).astype(np.float32), normal((120, 3 * 40)).astype(np.float32)
    weight, bias = wide[30:90, 40:80], normal(120).astype(np.float32)[::2]
    expected = ENGINE.linear(x[:, 40:].copy(), weight.copy(), bias.copy())
    assert_right(expected, linear, x[:, 40:], weight, bias)
    frozen = weight.copy()
    frozen.flags.writeable = False
    shifted = np.frombuffer(b"x" + weight.tobytes(), np.uint8)[1:].view(np.float32).reshape(weight.shape)
    for same in (weight, frozen, weight.copy()[::-1].copy()[::-1]):
        np.testing.assert_array_equal(ENGINE.linear(x[:, 40:], same, bias), expected)
    for same in (np.asfortranarray(weight), shifted):
        assert_right(ENGINE.linear(x[:, 40:], same, bias), linear, x[:, 40:], weight, bias)


def test_thread_count_outside_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="threads must be 1 to"):
        ENGINE.set_threads(10**6)


# --- kernels uncompiled ---------------------------------------------------------------------------------------------


def test_kernels_say_the_same_in_plain_python() -> None:
    """The second oracle: every kernel's own loops, run by the interpreter."""
    x, w, b = (normal(n).astype(np.float32) for n in (40, 8, 8))
    mask = RNG.random(40) > 0.3

    def fill() -> Array:
        return np.zeros(40, np.float32)

    calls: list[tuple[Any, Callable[[Array], tuple[Any, ...]]]] = [
        *((elementwise.kernel_activation, lambda y, k=k: (k, x, 8, y, 8, 5, 2)) for k in range(4)),
        *((elementwise.kernel_gate, lambda y, s=s: (s, x, 8, x, 8, y, 8, 5, 2)) for s in (False, True)),
        (elementwise.kernel_add, lambda y: (x, 8, w, 8, 1, 0.5, y, 8, 5, 2)),
        (elementwise.kernel_bias, lambda y: (y, b, 5, 2)),
        *(
            (elementwise.kernel_rotary, lambda y, i=i: (x, (40, 40, 8), x[:20], x[20:], i, y, 1, 5, 5, 2))
            for i in (False, True)
        ),
        (rows.kernel_layer_norm, lambda y: (x, 8, w, b, 1e-5, y, 5, 2)),
        (rows.kernel_rms_norm, lambda y: (x, 8, w, 1e-5, y, 5, 2)),
        (rows.kernel_batch_norm, lambda y: (x, 8, w, b, w, y, 5, 2)),
        *((rows.kernel_softmax, lambda y, c=c: (x, 8, y, 8, 5, c, 5, 2)) for c in (False, True)),
        (rows.kernel_hide_future, lambda y: (y, 8, 5, 5, 2)),
        (rows.kernel_hide_masked, lambda y: (y, mask, (40, 40, 8), 1, 5, 8, 5, 2)),
        (rows.kernel_add_relative, lambda y: (x[:25], normal(45).astype(np.float32), y, 5, 5, 2)),
    ]
    for kernel, args in calls:
        compiled, plain = fill(), fill()
        operands = args(compiled)
        kernel(*operands)
        kernel.py_func(*(plain if operand is compiled else operand for operand in operands))
        np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-6, err_msg=kernel.__name__)


# --- the door -------------------------------------------------------------------------------------------------------

Z = np.zeros


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda f: ENGINE.linear(Z((2, 3), f), Z((4, 5), f)), ["x (2, 3)", "weight (4, 5)"]),
        (lambda f: ENGINE.linear(Z((2, 3), f), Z((4, 3), f), Z(5, f)), ["weight (4, 3)", "bias (5,)"]),
        (lambda f: ENGINE.project(Z((2, 3), f), Z((4, 3), f), None, (1, 2)), ["weight (4, 3)", "(1, 2)"]),
        (lambda f: ENGINE.conv1d(Z((1, 5, 3), f), Z((4, 3, 2), f), Z(4, f), 1), ["x (1, 5, 3)", "(4, 3, 2)"]),
        (lambda f: ENGINE.depthwise_conv(Z((1, 5, 3), f), Z((3, 2), f), Z(3, f)), ["x (1, 5, 3)", "(3, 2)"]),
        (lambda f: ENGINE.block_linear(Z((2, 6), f), Z((3, 4, 3), f)), ["x (2, 6)", "(3, 4, 3)"]),
        (lambda f: ENGINE.block_linear(Z((2, 6), f), Z((2, 4, 3), f), Z(4, f)), ["(2, 4, 3)", "bias (4,)"]),
        (lambda f: ENGINE.block_linear(Z((2, 6), f), Z((4, 6), f)), ["x (2, 6)", "(4, 6)"]),
        (lambda f: ENGINE.embedding(Z((5, 3), f), np.array([5])), ["table (5, 3)", "5"]),
        (lambda f: ENGINE.layer_norm(Z((2, 3), f), Z(3, f), Z(4, f), 1e-5), ["x (2, 3)", "bias (4,)"]),
        (lambda f: ENGINE.rms_norm(Z((2, 3), f), Z(4, f), 1e-5), ["x (2, 3)", "weight (4,)"]),
        (lambda f: ENGINE.add(Z((2, 3), f), Z((2, 2), f)), ["x (2, 3)", "y (2, 2)"]),
        (lambda f: ENGINE.add(Z((2, 3), f), Z((2, 3))), ["float32", "float64"]),
        (lambda f: ENGINE.glu(Z((2, 3), f)), ["x (2, 3)"]),
        (lambda f: ENGINE.swiglu(Z((2, 3), f), Z((2, 4), f)), ["gate (2, 3)", "up (2, 4)"]),
        (
            lambda f: ENGINE.rotary(Z((1, 1, 4, 6), f), Z((4, 2), f), Z((4, 2), f), True),
            ["(1, 1, 4, 6)", "(4, 2)"],
        ),
        (lambda f: ENGINE.concat((Z((2, 3), f), Z((3, 4), f)), 1), ["(2, 3)", "(3, 4)"]),
        (lambda f: ENGINE.append(Z((1, 1, 4, 3), f), Z((1, 1, 2, 3), f), 3), ["(1, 1, 4, 3)", "(1, 1, 2, 3)", "3 + T"]),
        (lambda f: ENGINE.append(Z((1, 1, 4, 3), f), Z((1, 2, 2, 3), f), 0), ["(1, 1, 4, 3)", "(1, 2, 2, 3)"]),
        (
            lambda f: ENGINE.scores(Z((1, 3, 4, 6), f), Z((1, 2, 4, 6), f), 1.0),
            ["q (1, 3, 4, 6)", "k (1, 2, 4, 6)"],
        ),
        (lambda f: ENGINE.max_pool(Z((3, 4), f)), ["x (3, 4)"]),
        (lambda f: ENGINE.nearest(Z((3, 4), f), Z((3, 5), f)), ["x (3, 4)", "points (3, 5)"]),
        (lambda f: ENGINE.nearest(Z((3, 4), f), Z((0, 4), f)), ["points (0, 4)"]),
        (lambda f: ENGINE.scatter(Z((3, 4), f), Z((1, 4), f), (3,)), ["(1, 4)", "(3, 4)", "(3,)"]),
        (lambda f: ENGINE.softmax(Z((3, 4), f)), ["scores (3, 4)"]),
        (lambda f: ENGINE.top(Z((3, 4), f), 5), ["z (3, 4)", "V >= 5"]),
        (lambda f: ENGINE.top(Z((3, 4), f), 0), ["z (3, 4)", "0 >= 1"]),
        (
            lambda f: ENGINE.refine(Z((1, 4), f), np.zeros((1, 2), int), Z((5, 3), f), Z((1, 3), f)),
            ["z (1, 4)", "weight (5, 3)"],
        ),
        (lambda f: ENGINE.refine(Z((1, 5), f), np.array([[5]]), Z((5, 3), f), Z((1, 3), f)), ["(5, 3)", "5"]),
        (lambda f: ENGINE.refine(Z((1, 5), f), np.array([[1.0]]), Z((5, 3), f), Z((1, 3), f)), ["int64"]),
        (
            lambda f: ENGINE.add_relative(Z((1, 1, 3, 3), f), Z((1, 1, 3, 6), f)),
            ["(1, 1, 3, 3)", "(1, 1, 3, 6)"],
        ),
        (
            lambda f: ENGINE.weighted_sum(Z((1, 1, 2, 3), f), Z((1, 1, 4, 3), f)),
            ["(1, 1, 2, 3)", "(1, 1, 4, 3)"],
        ),
        (
            lambda f: ENGINE.attention(Z((1, 1, 2, 3), f), Z((1, 1, 2, 3), f), Z((1, 1, 4, 3), f)),
            ["k (1, 1, 2, 3)", "v (1, 1, 4, 3)"],
        ),
        (
            lambda f: ENGINE.scores(Z((1, 1, 2, 3), f), Z((1, 1, 2, 3), f), 1.0, False, Z((1, 1, 3, 2), bool)),
            ["(1, 1, 2, 2)", "(1, 1, 3, 2)"],
        ),
    ],
)
def test_sizes_that_disagree_are_named(call: Callable[[Any], Array], names: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        call(np.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


def test_float16_is_refused_with_the_engines_that_take_it() -> None:
    with pytest.raises(UnsupportedError, match=r"float32 and float64, not float16.*cupy.*numpy"):
        ENGINE.gelu(np.zeros(3, np.float16))


# --- memory ---------------------------------------------------------------------------------------------------------


def address(x: Array) -> int:
    return int(x.__array_interface__["data"][0])


def test_memory_is_used_again_once_no_view_is_left() -> None:
    buffers, shape = Buffers(), (200, 300)
    first = buffers.empty(shape, np.float32)
    place, column = address(first), first[:, 3:5].T
    del first
    second = buffers.empty(shape, np.float32)
    assert address(second) != place  # `column` still reads the first
    del column
    assert address(buffers.empty(shape, np.float32)) == place
    assert place % 64 == 0


def test_memory_in_use_is_counted_and_unused_memory_returned() -> None:
    buffers = Buffers(most_kept_bytes=3 * 2**20)
    arrays = [buffers.empty((2**18,), np.float32) for _ in range(4)]  # 1 MiB each
    assert buffers.live_bytes == buffers.high_water_bytes == 4 * 2**20
    del arrays[1:]
    assert buffers.live_bytes == 2**20
    assert buffers.high_water_bytes == 4 * 2**20
    buffers.reset_high_water()
    assert buffers.high_water_bytes == 2**20
    other = buffers.empty((2**19,), np.float32)  # a new size: only 1 MiB of the unused 3 may stay
    assert buffers.kept_bytes == (1 + 1 + 2) * 2**20
    buffers.release()
    assert buffers.kept_bytes == arrays[0].nbytes + other.nbytes


def test_small_arrays_come_from_numpy() -> None:
    buffers = Buffers()
    array = buffers.empty((SMALLEST_BYTES // 8 - 1,), np.float64)
    assert array.base is None
    assert buffers.kept_bytes == 0


@given(st.integers(SMALLEST_BYTES, 2**26))
def test_memory_is_rounded_up_by_a_quarter_at_most(n_bytes: int) -> None:
    buffers = Buffers()
    array = buffers.empty((n_bytes,), np.uint8)
    assert array.nbytes == n_bytes
    assert n_bytes <= buffers.kept_bytes <= 1.25 * n_bytes


# --- compilation ----------------------------------------------------------------------------------------------------


def run(code: str, cache: Path) -> str:
    setup = (
        "import numpy as np; from refimpl.engines.numba_engine import NumbaEngine; e = NumbaEngine()\n"
        "e.warm_up(lambda message: print('said', message)); x = np.ones((1, 1, 300, 300), np.float32)\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-500:])
    return ran.stdout


@numba.njit(**parallel.STEP)
def _count_rows(counts, first, last):
    for row in range(first, last):
        counts[row] += 1


@numba.njit
def _count_in_parts(counts, parts):
    parallel.share(_count_rows, (counts,), counts.size, parts)


def test_every_row_is_worked_on_once_by_any_number_of_threads_and_parts() -> None:
    before = ENGINE.threads
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            ENGINE.set_threads(threads)
            for rows_, parts in ((1, 1), (2, 2), (5, 3), (64, 64), (1000, 63), (1000, 200)):
                counts = np.zeros(rows_, np.int64)
                for _ in range(20):
                    _count_in_parts(counts, parts)
                np.testing.assert_array_equal(counts, 20)
    finally:
        ENGINE.set_threads(before)


def test_compilation_is_announced_once_and_cached_kernels_run_on_threads(tmp_path: Path) -> None:
    """Each kernel also runs from the cache alone: Numba forgets the threads of a loop that was cached before it."""
    first = run("e.relu(x); e.softmax(x)", tmp_path)
    assert first.count("said compiling") == 1
    run("e.add(x, x)", tmp_path)
    assert run("e.relu(x); e.softmax(x); e.add(x, x); print('done')", tmp_path) == "done\n"
    for op in ("relu(x)", "softmax(x)", "add(x, x)"):
        assert run(f"e.{op}; print('done')", tmp_path) == "done\n"
