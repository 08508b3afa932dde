"""The reference engine against truth from elsewhere: SciPy, NumPy one-liners, and loops over single numbers.

Values are compared in float64 to 1e-12; then what holds in every dtype: the dtype that goes in comes out, inputs stay
as they are, a row that sees nothing is zero, NaN is not lost, the future changes nothing.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from memo_data import ExactIndex, listed

from refimpl.engines.numpy_engine import QUERY_BLOCK, NumpyEngine, visible_keys
from refimpl.engines.protocol import SIZES
from refimpl.errors import ShapeError

IN_PLACE = ("append", "refine", "scatter")
ENGINE = NumpyEngine()
DTYPES = ("float16", "float32", "float64")
EXAMPLES = settings(max_examples=60, deadline=None)


def normal(*shape, seed=0, dtype="float64"):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def assert_equal(ours, truth, tolerance=1e-12):
    np.testing.assert_allclose(ours, truth, rtol=0, atol=tolerance)


# --- truth, number by number ----------------------------------------------------------------------------------------


def sees(i, j, q_len, k_len, causal, mask, b, h):
    """Whether query i of head h may look at key j; the mask has all its axes in full."""
    if causal and j > i + (k_len - q_len):
        return False
    return mask is None or bool(mask[b, h, i, j])


def loop_logit(q, k, scale, b, h, i, j):
    group = h * k.shape[1] // q.shape[1]  # query heads in order, evenly over the key heads
    return sum(scale * float(q[b, h, i, d]) * float(k[b % k.shape[0], group, j, d]) for d in range(q.shape[3]))


def loop_attention(q, k, v, scale, causal=False, mask=None, extra=None):
    """Attention as four nested loops; `extra` is a function (b, h, i, j) added to the logits."""
    batch, heads, q_len, _ = q.shape
    k_len, out = k.shape[2], np.zeros((*q.shape[:3], v.shape[3]))
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, q_len, k_len))
    for b, h, i in np.ndindex(batch, heads, q_len):
        seen = [j for j in range(k_len) if sees(i, j, q_len, k_len, causal, mask, b, h)]
        if not seen:
            continue
        logits = [loop_logit(q, k, scale, b, h, i, j) + (extra(b, h, i, j) if extra else 0.0) for j in seen]
        e = [math.exp(s - max(logits)) for s in logits]
        group = h * k.shape[1] // heads
        for d in range(v.shape[3]):
            out[b, h, i, d] = sum(w * float(v[b, group, j, d]) for w, j in zip(e, seen, strict=True)) / sum(e)
    return out


def loop_scores(q, k, scale, causal=False, mask=None):
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, q_len, k_len))
    out = np.full((batch, heads, q_len, k_len), -np.inf)
    for b, h, i, j in np.ndindex(out.shape):
        if sees(i, j, q_len, k_len, causal, mask, b, h):
            out[b, h, i, j] = loop_logit(q, k, scale, b, h, i, j)
    return out


def heads_for(batch, heads, groups, q_len, k_len, width, dtype="float64"):
    q = normal(batch, heads, q_len, width, dtype=dtype)
    return q, *(normal(batch, groups, k_len, width, seed=seed, dtype=dtype) for seed in (1, 2))


def some_mask(*shape, seed=0):
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask[:, :, :1, :] = False  # a query that sees nothing
    return mask


# --- linear maps ----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_linear_is_x_times_w_transposed(batch, length, d_in, d_out, with_bias):
    x, weight, bias = normal(batch, length, d_in), normal(d_out, d_in), normal(d_out) if with_bias else None
    truth = np.zeros((batch, length, d_out))
    for b, t, o in np.ndindex(truth.shape):
        truth[b, t, o] = math.fsum(x[b, t, i] * weight[o, i] for i in range(d_in)) + (bias[o] if with_bias else 0.0)
    assert_equal(ENGINE.linear(x, weight, bias), truth)


def test_project_parts_are_bit_for_bit_linear():
    x, weight, bias = normal(2, 5, 6), normal(9, 6), normal(9)
    q, k, v = ENGINE.project(x, weight, bias, (4, 3, 2))
    np.testing.assert_array_equal(q, ENGINE.linear(x, weight[:4], bias[:4]))
    np.testing.assert_array_equal(k, ENGINE.linear(x, weight[4:7], bias[4:7]))
    np.testing.assert_array_equal(v, ENGINE.linear(x, weight[7:], bias[7:]))


@EXAMPLES
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_block_linear_is_the_block_diagonal_product(length, blocks, d_in, d_out, with_bias):
    x, weight = normal(2, length, blocks * d_in), normal(blocks, d_out, d_in)
    bias = normal(blocks * d_out) if with_bias else None
    truth = x @ scipy.linalg.block_diag(*weight).T + (0.0 if bias is None else bias)
    assert_equal(ENGINE.block_linear(x, weight, bias), truth)


def test_blocks_are_bit_for_bit_linear_and_independent():
    x, weight, bias = normal(2, 5, 6), normal(3, 4, 2), normal(12)
    y, other = ENGINE.block_linear(x, weight, bias), x.copy()
    for c in range(3):
        alone = ENGINE.linear(x[..., 2 * c : 2 * c + 2], weight[c], bias[4 * c : 4 * c + 4])
        np.testing.assert_array_equal(y[..., 4 * c : 4 * c + 4], alone)
    other[..., 2:4] = np.nan
    changed = np.isnan(ENGINE.block_linear(other, weight, bias)).all((0, 1))
    np.testing.assert_array_equal(changed, np.repeat([False, True, False], 4))
    with pytest.raises(ValueError, match="reshape"):
        ENGINE.block_linear(normal(2, 5, 7), weight)


@EXAMPLES
@given(st.integers(1, 12), st.sampled_from([1, 3, 5, 7]), st.integers(1, 3), st.integers(1, 3))
def test_conv1d_is_numpy_convolve_of_every_channel_pair(length, kernel, stride, width):
    x, weight, bias = normal(2, length, width), normal(4, kernel, width), normal(4)
    truth = np.zeros((2, length, 4))
    for b, o, i in np.ndindex(2, 4, width):
        full = np.convolve(x[b, :, i], weight[o, ::-1, i])  # a convolution flips its kernel, a layer does not
        truth[b, :, o] += full[(kernel - 1) // 2 : (kernel - 1) // 2 + length]
    assert_equal(ENGINE.conv1d(x, weight, bias, stride), truth[:, ::stride] + bias)


@EXAMPLES
@given(st.integers(1, 12), st.sampled_from([1, 3, 5, 31]), st.integers(1, 3))
def test_depthwise_conv_is_numpy_convolve_of_every_channel(length, kernel, width):
    x, weight, bias = normal(2, length, width), normal(kernel, width), normal(width)
    truth = np.zeros_like(x)
    for b, c in np.ndindex(2, width):
        full = np.convolve(x[b, :, c], weight[::-1, c])
        truth[b, :, c] = full[(kernel - 1) // 2 : (kernel - 1) // 2 + length] + bias[c]
    assert_equal(ENGINE.depthwise_conv(x, weight, bias), truth)


def test_depthwise_conv_is_centred():
    x = np.zeros((1, 7, 1))
    x[0, 3, 0] = 1.0
    response = ENGINE.depthwise_conv(x, np.array([[1.0], [2.0], [4.0]]), np.zeros(1))[0, :, 0]
    np.testing.assert_array_equal(response, [0, 0, 4, 2, 1, 0, 0])  # tap 0 reads one step back


def test_embedding_and_concat():
    table, ids = normal(5, 3), np.array([[4, 0], [2, 2]])
    np.testing.assert_array_equal(ENGINE.embedding(table, ids), table[ids])
    parts = normal(2, 1, 3), normal(2, 4, 3)
    np.testing.assert_array_equal(ENGINE.concat(parts, 1), np.concatenate(parts, 1))


def test_heads_are_consecutive_columns():
    x = normal(2, 3, 8)
    heads = ENGINE.split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    for h in range(4):
        np.testing.assert_array_equal(heads[:, h], x[:, :, 2 * h : 2 * h + 2])
    np.testing.assert_array_equal(ENGINE.merge_heads(heads), x)


# --- norms and elementwise ------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.integers(1, 40), st.sampled_from([1e-12, 1e-5, 0.1]))
def test_norms(width, eps):
    x, weight, bias = normal(2, 3, width) * 3 + 1, normal(width), normal(width, seed=1)
    truth = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias
    assert_equal(ENGINE.layer_norm(x, weight, bias, eps), truth, 1e-11)
    root = np.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(width)
    assert_equal(ENGINE.rms_norm(x, weight, eps), x / np.hypot(root, math.sqrt(eps)) * weight, 1e-11)
    mean, variance = normal(width, seed=2), np.exp(normal(width, seed=3))
    truth = weight * ((x - mean) * (variance + eps) ** -0.5) + bias
    assert_equal(ENGINE.batch_norm(x, mean, variance, weight, bias, eps), truth, 1e-11)


def test_layer_norm_survives_a_large_mean():
    x = normal(1, 64)
    shifted = ENGINE.layer_norm(x + 1e6, np.ones(64), np.zeros(64), 1e-12)
    assert_equal(shifted, ENGINE.layer_norm(x, np.ones(64), np.zeros(64), 1e-12), 1e-8)


@EXAMPLES
@given(st.floats(-30, 30))
def test_activations_of_a_number(number):
    x = np.array([number])
    assert_equal(ENGINE.gelu(x), number * scipy.special.ndtr(number))
    assert_equal(ENGINE.silu(x), number * scipy.special.expit(number))
    assert_equal(ENGINE.relu(x), max(number, 0.0))
    inner = math.sqrt(2 / math.pi) * (number + 0.044715 * number**3)
    assert_equal(ENGINE.gelu_tanh(x), 0.5 * number * (1 + math.tanh(inner)))
    pair = np.array([[number, -2.0, 3.0, number / 2]])
    assert_equal(ENGINE.glu(pair), pair[:, :2] * scipy.special.expit(pair[:, 2:]))
    assert_equal(ENGINE.swiglu(x, 2 - x), number * scipy.special.expit(number) * (2 - number))


def test_activations_at_the_ends():
    far = np.array([-1e4, 1e4])
    for op in ("gelu", "gelu_tanh", "silu", "relu"):
        np.testing.assert_array_equal(getattr(ENGINE, op)(far), [0.0, 1e4], op)


@pytest.mark.parametrize("other", [(2, 5, 3), (5, 3), (3,)], ids=str)
def test_add_broadcasts(other):
    x, y = normal(2, 5, 3), normal(*other, seed=1)
    assert_equal(ENGINE.add(x, y), x + np.broadcast_to(y, x.shape))
    assert_equal(ENGINE.add(x, y, scale=0.5), x + np.broadcast_to(y, x.shape) / 2)


@EXAMPLES
@given(st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_rotary_is_multiplication_by_a_unit_complex_number(length, half, interleaved):
    x = normal(2, 3, length, 2 * half)
    angles = np.random.default_rng(half).uniform(-4, 4, (length, half))
    turned = ENGINE.rotary(x, np.cos(angles), np.sin(angles), interleaved)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    truth = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    assert_equal(turned[..., first], truth.real)
    assert_equal(turned[..., second], truth.imag)


# --- attention ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Sizes, causal, mask: grouped heads, fewer or more keys than queries, masks of every broadcast shape."""
    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, k_len = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    batch, heads = draw(st.integers(0, 2)), groups * per_group
    mask = None
    if draw(st.booleans()) and batch:
        full = (batch, heads, q_len, k_len)
        mask = some_mask(*(n if draw(st.booleans()) else 1 for n in full), seed=draw(st.integers(0, 9)))
    return heads_for(batch, heads, groups, q_len, k_len, draw(st.integers(1, 4))), draw(st.booleans()), mask


@EXAMPLES
@given(problems(), st.sampled_from([0.3, 1.0, 20.0]))
def test_attention_is_four_loops(problem, scale):
    (q, k, v), causal, mask = problem
    truth = loop_attention(q, k, v, scale, causal, mask)
    assert_equal(ENGINE.attention(q, k, v, scale, causal, mask), truth)
    scores = ENGINE.scores(q, k, scale, causal, mask)
    assert_equal(scores, loop_scores(q, k, scale, causal, mask), 1e-11)
    assert_equal(ENGINE.weighted_sum(ENGINE.softmax(scores, causal), v, causal), truth)


def test_attention_scales_by_the_head_width_by_default():
    q, k, v = heads_for(1, 2, 2, 3, 4, 9)
    np.testing.assert_array_equal(ENGINE.attention(q, k, v), ENGINE.attention(q, k, v, 1 / 3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 3])
def test_fused_is_materialised_across_blocks(length, causal):
    q, k, v = heads_for(2, 4, 2, length, length + 2, 5)
    mask = some_mask(2, 1, length, length + 2)
    scores = ENGINE.scores(q, k, 0.4, causal, mask)
    truth = ENGINE.weighted_sum(ENGINE.softmax(scores, causal), v, causal)
    assert_equal(ENGINE.attention(q, k, v, 0.4, causal, mask), truth)


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1.0, 300.0]))
def test_softmax_is_that_of_scipy(width, rows, size):
    scores = size * normal(1, 2, rows, width)
    assert_equal(ENGINE.softmax(scores), scipy.special.softmax(scores, axis=-1))
    visible = np.tril(np.ones((rows, width), bool), width - rows)
    hidden = np.where(visible, scores, -np.inf)
    seen = visible.any(-1)
    out = ENGINE.softmax(scores, causal=True)
    assert_equal(out[:, :, seen], scipy.special.softmax(hidden[:, :, seen], axis=-1))
    np.testing.assert_array_equal(out[:, :, ~seen], 0.0)


@EXAMPLES
@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_weighted_sum_ignores_hidden_weights(q_len, k_len, causal):
    weights, v = normal(2, 4, q_len, k_len), normal(2, 2, k_len, 3)
    shown = np.tril(weights, k_len - q_len) if causal else weights
    assert_equal(ENGINE.weighted_sum(weights, v, causal), np.einsum("bhij,bhjd->bhid", shown, np.repeat(v, 2, axis=1)))


@EXAMPLES
@given(st.integers(1, 7))
def test_add_relative_shifts_by_index(length):
    scores, position = normal(2, 3, length, length), normal(2, 3, length, 2 * length - 1)
    truth = scores.copy()
    for i, j in np.ndindex(length, length):
        truth[:, :, i, j] += position[:, :, i, length - 1 - i + j]
    np.testing.assert_array_equal(ENGINE.add_relative(scores, position), truth)


def test_add_relative_is_the_shift_of_transformer_xl():
    """Pad a zero column, read the memory with rows one element longer, drop the first row (appendix B)."""
    length = 6
    position = normal(1, 2, length, 2 * length - 1)
    padded = np.concatenate([np.zeros((1, 2, length, 1)), position], axis=3).reshape(1, 2, 2 * length, length)
    shifted = padded[:, :, 1:].reshape(1, 2, length, 2 * length - 1)[..., :length]
    np.testing.assert_array_equal(ENGINE.add_relative(np.zeros((1, 2, length, length)), position), shifted)


@EXAMPLES
@given(st.integers(1, 6), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.booleans())
def test_relative_attention_is_four_loops(length, groups, per_group, causal, masked):
    q, k, v = heads_for(2, groups * per_group, groups, length, length, 3)
    q_position, p = normal(*q.shape, seed=3), normal(q.shape[1], 2 * length - 1, 3, seed=4)
    mask = some_mask(2, 1, length, length) if masked else None

    def offset(b, h, i, j):
        return sum(0.7 * q_position[b, h, i, d] * p[h, length - 1 - i + j, d] for d in range(3))

    truth = loop_attention(q, k, v, 0.7, causal, mask, offset)
    assert_equal(ENGINE.relative_attention(q, q_position, k, v, p, 0.7, causal, mask), truth)
    logits = ENGINE.add_relative(ENGINE.scores(q, k, 0.7, causal, mask), ENGINE.scores(q_position, p[None], 0.7))
    assert_equal(ENGINE.weighted_sum(ENGINE.softmax(logits, causal), v, causal), truth)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (5, 5), (2, 6), (6, 2), (0, 3), (3, 0)])
def test_visible_keys_are_the_lower_triangle(q_len, k_len):
    counted = np.tril(np.ones((q_len, k_len), int), k_len - q_len).sum(-1)
    assert list(visible_keys(q_len, k_len)) == [(i, n) for i, n in enumerate(counted) if n]


# --- what holds in every dtype --------------------------------------------------------------------------------------


def calls(dtype, batch=2, length=5):
    """op -> arguments, for every op."""
    x, row = normal(batch, length, 6, dtype=dtype), normal(6, dtype=dtype)
    q, k, v = heads_for(batch, 4, 4, length, length, 6, dtype)
    half, weights = normal(length, 3, dtype=dtype), np.abs(normal(batch, 4, length, length, dtype=dtype))
    p = normal(4, 2 * length - 1, 6, dtype=dtype)
    mask = some_mask(batch, 4, length, length)
    ids = np.broadcast_to(np.array([1, 4, 7]), (batch, length, 3))
    return {
        "linear": (x, normal(4, 6, dtype=dtype), row[:4]),
        "project": (x, normal(6, 6, dtype=dtype), row, (2, 4)),
        "conv1d": (x, normal(4, 3, 6, dtype=dtype), row[:4], 2),
        "depthwise_conv": (x, normal(3, 6, dtype=dtype), row),
        "block_linear": (x, normal(2, 2, 3, dtype=dtype), row[:4]),
        "embedding": (x[0] if batch else row[None], np.zeros((batch, 2), np.int64)),
        "layer_norm": (x, row, row, 1e-5),
        "rms_norm": (x, row, 1e-5),
        "batch_norm": (x, row, row * row, row, row, 1e-5),
        "add": (x, row, 0.5),
        "gelu": (x,),
        "gelu_tanh": (x,),
        "silu": (x,),
        "relu": (x,),
        "glu": (x,),
        "elu_plus_one": (x,),
        "swiglu": (x, x),
        "rotary": (q, half, half, True),
        "concat": ((x, x), 1),
        "append": (np.zeros((batch, 4, length + 3, 6), dtype), k, 2),
        "max_pool": (x,),
        "nearest": (normal(batch, 6, dtype=dtype), normal(9, 6, seed=1, dtype=dtype)),
        "search_graph": (normal(batch, 6, dtype=dtype), ExactIndex(normal(9, 6, seed=1, dtype=dtype))),
        "fetch": (listed(normal(3, 4, 5, 5, dtype=dtype)), (2, 0)[:batch], "copy"),
        "take_rows": (x, (1, 0)[:batch]),
        "scatter": (np.zeros((batch, 4, 2), dtype), normal(batch, 4, 2, dtype=dtype), (1, 0)[:batch]),
        "scores": (q, k, 0.3, True, mask),
        "add_relative": (weights, normal(batch, 4, length, 2 * length - 1, dtype=dtype)),
        "softmax": (weights, True),
        "weighted_sum": (weights, v, True),
        "attention": (q, k, v, None, True, mask),
        "relative_attention": (q, q, k, v, p, 0.3, True, mask),
        "local_attention": (q, k, v, 1, 0.3, True, mask),
        "local_relative_attention": (q, q, k, v, p, 1, 0.3, False, mask),
        "project_length": (k, normal(3, length, dtype=dtype)),
        "linear_attention": (np.abs(q), np.abs(k), v, True),
        "top": (x, 4),
        "refine": (normal(batch, length, 9, dtype=dtype), ids, normal(9, 6, dtype=dtype), x),
        "quantize": (q,),
        "filtered_attention": (q, k, v, *coded(q, k), np.array([0, 0.5, 2.0, np.inf]), 0.3, True, mask),
        "filtered_map": (q, k, *coded(q, k), np.array([0, 0.5, 2.0, np.inf]), 0.3, True, mask),
    }


def coded(q, k):
    """Codes of both, and their scales."""
    (q_codes, q_scale), (k_codes, k_scale) = ENGINE.quantize(q), ENGINE.quantize(k)
    return q_codes, k_codes, q_scale, k_scale


def arrays(values):
    for value in values:
        if isinstance(value, tuple):
            yield from arrays(value)
        elif isinstance(value, np.ndarray):
            yield value


def results(op, args):
    result = getattr(ENGINE, op)(*args)
    return result if isinstance(result, tuple) else (result,)


def test_every_op_is_called():
    assert set(calls("float32")) == set(SIZES)


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (2, 1), (0, 5)], ids=["ordinary", "T=1", "batch 0"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in SIZES if op not in IN_PLACE])
def test_dtype_and_inputs_stay(op, dtype, batch, length):
    args = calls(dtype, batch, length)[op]
    before = [array.copy() for array in arrays(args)]
    for array in arrays(args):
        array.flags.writeable = False
    for result in results(op, args):
        assert result.dtype == dtype or result.dtype.kind == "i", op  # codes and counts are whole numbers
        assert result.shape[0] == batch
    for array, copy in zip(arrays(args), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_append_writes_its_rows_and_no_others():
    store, new = normal(2, 3, 7, 4, dtype="float32"), normal(2, 3, 2, 4, dtype="float32")
    before, given = store.copy(), new.copy()
    seen = ENGINE.append(store, new, 3)
    assert np.shares_memory(seen, store)
    assert seen.shape == (2, 3, 5, 4)
    np.testing.assert_array_equal(store[:, :, 3:5], new)
    np.testing.assert_array_equal(np.delete(store, [3, 4], axis=2), np.delete(before, [3, 4], axis=2))
    np.testing.assert_array_equal(new, given)
    with pytest.raises(ShapeError, match="the store has 7 rows; rows 6 to 7"):
        ENGINE.append(store, new, 6)


def test_refine_writes_its_candidates_and_no_others():
    z, ids = normal(2, 7, dtype="float32"), np.array([[0, 3], [5, 6]])
    weight, g, before = normal(7, 4, dtype="float32"), normal(2, 4, dtype="float32"), z.copy()
    assert ENGINE.refine(z, ids, weight, g) is z
    for row in range(2):
        expected = before[row].astype(np.float64)
        expected[ids[row]] += weight[ids[row]].astype(np.float64) @ g[row]
        np.testing.assert_allclose(z[row], expected, rtol=1e-6, atol=1e-6)
    ENGINE.refine(z, ids, weight, g, True)
    np.testing.assert_allclose(z[1, [5, 6]], weight[[5, 6]] @ g[1], rtol=1e-6)
    np.testing.assert_array_equal(z[1, :5], before[1, :5])


def test_nearest_is_the_smallest_euclidean_distance():
    x, points = normal(4, 6), normal(9, 6, seed=1)
    truth = np.array([[math.dist(query, point) for point in points] for query in x])
    distances, rows = ENGINE.nearest(x, points)
    assert_equal(distances, truth.min(1))
    np.testing.assert_array_equal(rows, truth.argmin(1))


def test_scatter_writes_its_rows_and_no_others():
    store, new = normal(5, 2, 3, dtype="float32"), normal(2, 2, 3, seed=1, dtype="float32")
    before, given = store.copy(), new.copy()
    assert ENGINE.scatter(store, new, (3, 0)) is store
    np.testing.assert_array_equal(store[[3, 0]], new)
    np.testing.assert_array_equal(store[[1, 2, 4]], before[[1, 2, 4]])
    np.testing.assert_array_equal(new, given)
    for rows, part in (((0, 5), new), ((0,), new), ((0, 1), new[:, :1]), ((0, 1), new.astype("float64"))):
        with pytest.raises(ShapeError, match="scatter: new"):
            ENGINE.scatter(store, part, rows)


@pytest.mark.parametrize("op", SIZES)
def test_float16_is_close_to_float64(op):
    args = calls("float16")[op]
    wide = tuple(_wide(a) for a in args)
    for low, high in zip(results(op, args), results(op, wide), strict=True):
        np.testing.assert_allclose(low, high, rtol=0.02, atol=0.02)


def _wide(value):
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_nothing_is_zero(dtype):
    q, k, v = heads_for(1, 2, 2, 5, 3, 4, dtype)
    mask = np.ones((1, 1, 5, 3), bool)
    mask[:, :, 4] = False
    for out in (ENGINE.attention(q, k, v, None, True, mask), _materialised(q, k, v, True, mask)):
        np.testing.assert_array_equal(out[:, :, [0, 1, 4]], 0.0)  # two rows before the first key, one masked
        assert (out[:, :, 2:4] != 0).all()
    square = heads_for(1, 2, 2, 3, 3, 4, dtype)
    p = normal(2, 5, 4, dtype=dtype)
    out = ENGINE.relative_attention(square[0], *square, p, 0.5, False, mask[:, :, 2:])
    np.testing.assert_array_equal(out[:, :, 2], 0.0)
    no_keys = ENGINE.attention(q, k[:, :, :0], v[:, :, :0])
    np.testing.assert_array_equal(no_keys, np.zeros_like(q))


def _materialised(q, k, v, causal, mask=None):
    scores = ENGINE.scores(q, k, 0.5, causal, mask)
    return ENGINE.weighted_sum(ENGINE.softmax(scores, causal), v, causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_not_lost(dtype):
    for op in ("gelu", "gelu_tanh", "silu", "relu"):
        out = getattr(ENGINE, op)(np.array([1.0, np.nan], dtype))
        np.testing.assert_array_equal(np.isnan(out), [False, True], op)
    scores = normal(1, 1, 3, 4, dtype=dtype)
    scores[0, 0, 1, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(ENGINE.softmax(scores)).all(-1)[0, 0], [False, True, False])
    q, k, v = heads_for(1, 1, 1, 3, 3, 4, dtype)
    q[0, 0, 1, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(ENGINE.attention(q, k, v)).any(-1)[0, 0], [False, True, False])
    x = normal(2, 4, dtype=dtype)
    x[1, 0] = np.nan
    for out in (ENGINE.layer_norm(x, x[0], x[0], 1e-5), ENGINE.rms_norm(x, x[0], 1e-5)):
        np.testing.assert_array_equal(np.isnan(out).all(-1), [False, True])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changed", [np.nan, 1e4], ids=["NaN", "large"])
def test_the_future_changes_nothing(dtype, changed):
    q, k, v = heads_for(1, 4, 2, 9, 9, 4, dtype)
    p, mask = normal(4, 17, 4, dtype=dtype), some_mask(1, 1, 9, 9)
    square = heads_for(1, 4, 4, 9, 9, 4, dtype)

    def first_rows(q, k, v, square):
        outputs = [
            ENGINE.attention(q, k, v, None, True, mask),
            _materialised(q, k, v, True),
            ENGINE.relative_attention(square[0], *square, p, 0.5, True, mask),
        ]
        return [out[:, :, :5] for out in outputs]

    before = first_rows(q, k, v, square)
    later = [array.copy() for array in (q, k, v, *square)]
    for array in later:
        array[:, :, 5:] = changed
    with np.errstate(all="ignore"):
        after = first_rows(*later[:3], later[3:])
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_beyond_the_exponential_do_not_overflow(dtype):
    scores = np.array([[[[500.0, 499.0, -500.0], [-900.0, -901.0, -902.0]]]], dtype)
    truth = scipy.special.softmax(scores.astype(np.float64), axis=-1)
    np.testing.assert_allclose(ENGINE.softmax(scores), truth, atol=2 * np.finfo(dtype).eps)


def test_marks_measure_seconds():
    start = ENGINE.mark()
    stop = ENGINE.mark()
    assert 0 <= ENGINE.elapsed_s(start, stop) < 1
