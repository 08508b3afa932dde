"""The reference engine over ``array_api_strict``, which has nothing beyond the array API standard: what passes here
needs no NumPy extra, so that CuPy's namespace will do. Results are those of NumPy, bit for bit."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import scipy.special
from memo_data import ExactIndex, listed
from strategies import fits

import refimpl
from refimpl.config import ModelConfig
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.engines.protocol import SIZES


def erf(x):
    """The standard has no erf: through NumPy and back."""
    return array_api_strict.asarray(scipy.special.erf(np.asarray(x)))


STRICT = NumpyEngine(array_api_strict, erf)
NUMPY = NumpyEngine()
DTYPES = ("float32", "float64")


def normal(dtype, *shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def strict(value):
    if isinstance(value, tuple):
        return tuple(strict(part) for part in value)
    return STRICT.asarray(value) if isinstance(value, np.ndarray) else value


def host(result):
    return [STRICT.to_numpy(part) for part in (result if isinstance(result, tuple) else (result,))]


def cases(dtype):
    """op -> argument lists, together every branch of the engine."""
    x, row, half = normal(dtype, 2, 5, 6), normal(dtype, 6), normal(dtype, 5, 3)
    q, k, v = normal(dtype, 2, 4, 5, 6), normal(dtype, 2, 2, 7, 6), normal(dtype, 2, 2, 7, 3)
    full_k, full_v = normal(dtype, 2, 4, 5, 6, seed=1), normal(dtype, 2, 4, 5, 6, seed=2)
    mask = np.random.default_rng(1).random((2, 1, 5, 7)) < 0.6
    mask[:, :, 2] = False
    weights, p = np.abs(normal(dtype, 2, 4, 5, 7)), normal(dtype, 4, 9, 6)
    table = normal(dtype, 9, 6)
    keys = np.arange(7).reshape(1, 1, 1, 7) < 4  # padding: the same keys for every query
    coded = (*NUMPY.quantize(q), *NUMPY.quantize(k))
    filtered = (q, k, v, coded[0], coded[2], coded[1], coded[3], np.array([0, 0.5, 2.0, np.inf]), 0.4)
    return {
        "linear": [(x, normal(dtype, 4, 6)), (x, normal(dtype, 4, 6), row[:4])],
        "project": [(x, normal(dtype, 7, 6), None, (4, 1, 2)), (x, normal(dtype, 6, 6), row, (3, 3))],
        "conv1d": [(x, normal(dtype, 4, 3, 6), row[:4], stride) for stride in (1, 2)],
        "depthwise_conv": [(x, normal(dtype, kernel, 6), row) for kernel in (1, 4, 31)],
        "block_linear": [(x, normal(dtype, 2, 4, 3)), (x, normal(dtype, 3, 1, 2), row[:3])],
        "embedding": [(half, np.array([[0, 4], [3, 3]]))],
        "layer_norm": [(x, row, row, 1e-5)],
        "rms_norm": [(x, row, 1e-5)],
        "batch_norm": [(x, row, row * row, row, row, 1e-5)],
        "add": [(x, x), (x, normal(dtype, 5, 6), 0.5), (x, row)],
        "gelu": [(x,)],
        "gelu_tanh": [(x,)],
        "silu": [(x,)],
        "relu": [(x,)],
        "glu": [(x,)],
        "elu_plus_one": [(x,)],
        "swiglu": [(x, x)],
        "rotary": [(q, half, half, True), (q, half, half, False)],
        "concat": [((x, x[:, :2]), 1)],
        "append": [(np.zeros((2, k.shape[1], 9, k.shape[3]), dtype), k, 2)],
        "max_pool": [(x,), (x[:, :1],)],
        "nearest": [(normal(dtype, 3, 6), normal(dtype, 7, 6)), (normal(dtype, 0, 6), normal(dtype, 7, 6))],
        "search_graph": [(normal(dtype, 3, 6), ExactIndex(normal(dtype, 7, 6)))],
        "fetch": [(listed(normal(dtype, 3, 4, 5, 5)), (2, 0, 2), "copy")],
        "take_rows": [(x, (1, 0, 1)), (x, ())],
        "scatter": [(np.zeros((3, 4, 2), dtype), normal(dtype, 2, 4, 2), (2, 0))],
        "scores": [
            (q, k, 0.4), (q, k, 0.4, True), (q, k, 0.4, False, mask), (q, k[:1], 0.4, True, mask),
            (q, k, 1.0, False, keys),
        ],
        "add_relative": [(normal(dtype, 2, 4, 5, 5), normal(dtype, 2, 4, 5, 9))],
        "softmax": [(weights,), (weights, True), (normal(dtype, 1, 1, 6, 3), True), (normal(dtype, 1, 1, 3, 0),)],
        "weighted_sum": [(weights, v), (weights, v, True)],
        "attention": [
            (q, k, v), (q, k, v, 0.4, True), (q, k, v, None, False, mask), (q, k, v, None, True, mask),
            (q[:, :, :0], k, v), (q, k, v, None, False, keys), (normal(dtype, 1, 2, 70, 6), k[:1], v[:1]),
        ],
        "relative_attention": [
            (q, q, full_k, full_v, p, 0.4), (q, q, full_k, full_v, p, 0.4, True),
            (q, q, full_k, full_v, p, 0.4, True, mask[..., :5]),
        ],
        "local_attention": [
            (q, k, v, 2, 0.4), (q, k, v, 0, 0.4, True), (q, k, v, 9, 0.4, False, mask), (q, k, v, 1, 0.4, True, mask),
            (q, k, v, 1, 0.4, False, keys),
        ],
        "local_relative_attention": [
            (q, q, full_k, full_v, p, 1, 0.4), (q, q, full_k, full_v, p, 2, 0.4, True, mask[..., :5]),
        ],
        "project_length": [(k, normal(dtype, 3, 7)), (k, normal(dtype, 3, 7), keys)],
        "linear_attention": [
            (np.abs(q), np.abs(k), k), (np.abs(q), np.abs(k), k, False, keys), (np.abs(q), np.abs(k), k, True),
            (0 * q, np.abs(k), k, True, keys),
        ],
        "top": [(x, 1), (x, 6), (np.round(x), 3)],
        "refine": [
            (normal(dtype, 2, 5, 9), np.array([[[0, 8], [1, 2], [3, 4], [5, 6], [6, 7]]] * 2), table, x, replace)
            for replace in (False, True)
        ],
        "quantize": [(q,), (q * np.inf,), (q[:, :, :0],)],
        "filtered_attention": [
            filtered, (*filtered, True, mask, "round"), (*filtered, False, mask, "floor", "float"),
            (*filtered, True, None, "round", "float"),
        ],
        "filtered_map": [
            (*filtered[:2], *filtered[3:]), (*filtered[:2], *filtered[3:], True, mask, "round"),
            (*filtered[:2], *filtered[3:], True, mask, "floor", "float"),
        ],
    }  # fmt: skip


def test_every_op_is_here():
    assert set(cases("float32")) == set(SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", SIZES)
def test_op_needs_nothing_beyond_the_standard(op, dtype):
    for args in cases(dtype)[op]:
        for ours, theirs in zip(host(getattr(STRICT, op)(*strict(args))), host(getattr(NUMPY, op)(*args)), strict=True):
            assert ours.dtype == theirs.dtype
            assert theirs.dtype == dtype or theirs.dtype.kind == "i"  # codes and counts
            np.testing.assert_array_equal(ours, theirs, op)


@pytest.mark.parametrize("op", SIZES)
def test_sizes_of_a_call_need_nothing_beyond_the_standard(op):
    for args in cases("float32")[op]:
        sizes = SIZES[op](*strict(args))
        assert sizes == SIZES[op](*args)
        assert all(type(size) is int for size in sizes.values())


def test_split_and_merge_heads():
    x = normal("float32", 2, 5, 6)
    heads = STRICT.split_heads(STRICT.asarray(x), 3)
    np.testing.assert_array_equal(STRICT.to_numpy(heads), NUMPY.split_heads(x, 3))
    np.testing.assert_array_equal(STRICT.to_numpy(STRICT.merge_heads(heads)), x)


SMALL = {"layers": 4, "d_model": 8, "heads": 4, "d_ff": 12, "max_positions": 9}
CONFIGS = {
    "post-norm": ModelConfig(
        "bert", "post-norm", **SMALL, vocab=11, token_types=2, position="learned", embedding_norm=True, final_norm=False
    ),
    "pre-norm": ModelConfig(
        "whisper", "pre-norm", **SMALL, stem="frames", features=3, strides=(1, 2), position="sinusoidal"
    ),
    "conformer": ModelConfig(
        "conformer", "conformer", **SMALL, activation="silu", stem="frames", features=3, strides=(2,),
        position="relative", conv_kernel=5,
    ),
    "llama": ModelConfig(
        "llama", "pre-norm", **SMALL, kv_heads=2, gated=True, norm="rms", bias=False, causal=True, vocab=11,
        position="rotary", head=True,
    ),
    "vit": ModelConfig(
        "vit", "pre-norm", **SMALL, activation="gelu_tanh", stem="patches", features=5, position="learned"
    ),
}  # fmt: skip
METHODS = {
    "dense": ("dense", {}),
    "flash": ("flash", {}),
    "reuse": ("reuse", {"group": 2}),
    "reuse scores": ("reuse", {"group": 3, "share": "scores", "output_projection": False}),
    "partial reuse": ("reuse", {"group": 3, "heads": 3}),
    "partial reuse of scores": ("reuse", {"groups": [[0, 2, 3]], "heads": 1, "share": "scores"}),
    "folding": ("folding", {}),
    "folding fused": ("folding", {"mask": "subtoken", "fused": True, "fold_ffn": 4}),
    "efficientasr": ("efficientasr", {"band": 2}),
    "efficientasr soft": ("efficientasr", {"group": 1, "score_residual": 0.5, "band": 1, "band_penalty": 1.5}),
    "efficientasr tied": ("efficientasr", {"ffn_chunks": 4, "ffn_tied": True}),
    "svd-softmax": ("svd-softmax", {"window": 3, "candidates": 4}),
    "fewer-heads": ("fewer-heads", {}),
    "narrow": ("narrow", {}),
    "local": ("local", {"window": 2}),
    "linformer": ("linformer", {"length": 3}),
    "linear": ("linear", {}),
    "efficientasr fused": ("efficientasr", {"group": 1, "score_residual": 0, "band": 2, "fused": True}),
}


def inputs_for(config, dtype):
    if config.stem == "tokens":
        return np.random.default_rng(3).integers(0, config.vocab, (2, 7))
    return normal(dtype, 2, config.stem_length(7), config.features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_needs_nothing_beyond_the_standard(config, method, causal, dtype):
    name, params = METHODS[method]
    if "heads" in params and config.kv_heads != config.heads:
        pytest.skip("grouped keys: reuse takes all heads or none")
    if name == "folding" and config.position == "relative":
        params = {**params, "fold": 1}
    if not fits(name, params, config) or (name == "linformer" and causal):
        pytest.skip("the method refuses this model: tests/methods/test_contract.py")
    model, inputs = refimpl.load_model(config, dtype=dtype), inputs_for(config, dtype)
    mask = np.arange(7).reshape(1, 1, 1, 7) < np.array([7, 5]).reshape(2, 1, 1, 1)
    ours = refimpl.forward(model, inputs, name, params, STRICT, causal=causal, mask=mask)
    theirs = refimpl.forward(model, inputs, name, params, NUMPY, causal=causal, mask=mask)
    assert ours.output.dtype == dtype
    np.testing.assert_array_equal(ours.output, theirs.output)
    assert [call.sizes for call in ours.calls] == [call.sizes for call in theirs.calls]
