"""The CuPy engine: on a GPU where there is one, and without one on the CPU.

The same checks run on two engines. `gpu` is CuPy on a device. `emulated` is the same engine, the same kernel sources
and the same cuBLAS calls with another `cupy` below: arrays in host memory, the sources compiled by g++ and run thread
by thread with real barriers, products from the raw pointers, strides and flags that cuBLAS would be given. What this
cannot show is speed, the device's own arithmetic, and cuBLAS and CuPy themselves.

Rule: ``max|fast - truth| <= 2 max|honest - truth| + floor``, truth in float64, honest the NumPy engine in the same
dtype, floor two roundings of the largest value (a sum in another order, and its result). Float64 has no better truth:
its honest error is that of float32 times the ratio of the two roundings.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
from cuda_emulation import HostCupy
from cupy_cases import (
    DTYPES,
    REFERENCE,
    assert_close,
    compare,
    heads,
    honest_errors,
    in_dtype,
    largest,
    normal,
    on_device,
    some_mask,
)  # fmt: skip
from cupy_passes import CONFIGS, inputs_for, weights_as
from memo_data import listed
from strategies import fits

import refimpl
from refimpl.engines import chunked
from refimpl.engines.cuda import launch, shapes
from refimpl.engines.cupy_engine import CupyEngine
from refimpl.errors import MissingDependencyError, ShapeError, UnsupportedError

# --- ops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 33), (1, 1, 1), (5, 300), (0, 4, 8), (3, 257)], ids=str)
@pytest.mark.parametrize("op", ["gelu", "gelu_tanh", "silu", "relu"])
def test_activation_is_accurate(engine, op, shape, dtype):
    x = normal(dtype, *shape, size=4.0)
    x.reshape(-1)[:1] = -300.0  # exp(300) overflows
    compare(engine, op, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_accurate(engine, dtype):
    x = normal(dtype, 2, 5, 66, size=4.0)
    compare(engine, "glu", x)
    compare(engine, "swiglu", x[..., :33].copy(), x[..., 33:].copy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_reads_the_parts_of_project(engine, dtype):
    x, weight, bias = normal(dtype, 2, 5, 16), normal(dtype, 24, 16, size=0.25), normal(dtype, 24)
    device = [engine.asarray(a) for a in (x, weight, bias)]
    fast = engine.to_numpy(engine.swiglu(*engine.project(*device, (12, 12))))

    def reference(*arrays):
        return REFERENCE.swiglu(*REFERENCE.project(*arrays, (12, 12)))

    (error,) = honest_errors(fast.dtype, reference, x, weight, bias)
    assert_close(fast, in_dtype(np.float64, reference, x, weight, bias), error, "swiglu of project")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [(2, 7, 33), (7, 33), (33,), (2, 1, 33), (1, 33)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5, -3.0])
def test_add_is_accurate(engine, other, scale, dtype):
    compare(engine, "add", normal(dtype, 2, 7, 33), normal(dtype, *other, seed=1), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 64, 300, 1030])
def test_norms_are_accurate(engine, width, dtype):
    x = normal(dtype, 2, 3, width, size=3.0) + np.asarray(2.0, dtype)
    weight, bias = normal(dtype, width, seed=1), normal(dtype, width, seed=2)
    compare(engine, "rms_norm", x, weight, 1e-5)
    compare(engine, "batch_norm", x, bias, np.abs(weight), weight, bias, 1e-5)
    compare(engine, "layer_norm", x, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layer_norm_survives_a_large_mean(engine, dtype):
    x = normal(dtype, 4, 100) + np.asarray(1e4, dtype)
    compare(engine, "layer_norm", x, normal(dtype, 100), normal(dtype, 100), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out"), [((2, 5), 16, 24), ((1, 1), 1, 1), ((0, 3), 4, 6), ((7,), 33, 65), ((2,), 0, 4)]
)
def test_linear_is_accurate(engine, rows, d_in, d_out, dtype):
    x, weight, bias = normal(dtype, *rows, d_in), normal(dtype, d_out, d_in), normal(dtype, d_out)
    compare(engine, "linear", x, weight)
    compare(engine, "linear", x, weight, bias)
    if d_out > 3:
        compare(engine, "project", x, weight, bias, (1, 2, d_out - 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "blocks", "d_in", "d_out"), [((2, 5), 3, 8, 5), ((1, 1), 2, 1, 1), ((0, 3), 2, 4, 6), ((7,), 4, 33, 17)]
)
def test_block_linear_is_accurate(engine, rows, blocks, d_in, d_out, dtype):
    x, weight = normal(dtype, *rows, blocks * d_in), normal(dtype, blocks, d_out, d_in)
    compare(engine, "block_linear", x, weight)
    compare(engine, "block_linear", x, weight, normal(dtype, blocks * d_out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "kernel", "stride"), [(9, 3, 1), (9, 3, 2), (8, 3, 2), (1, 3, 2), (5, 4, 3), (2, 1, 1)]
)
def test_conv1d_is_accurate(engine, length, kernel, stride, dtype):
    x, weight = normal(dtype, 2, length, 6), normal(dtype, 5, kernel, 6, size=0.3)
    compare(engine, "conv1d", x, weight, normal(dtype, 5), stride)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "kernel"), [(9, 31), (40, 31), (5, 3), (1, 1), (6, 4)])
def test_depthwise_conv_is_accurate(engine, length, kernel, dtype):
    x, weight = normal(dtype, 2, length, 33), normal(dtype, kernel, 33, size=0.3)
    compare(engine, "depthwise_conv", x, weight, normal(dtype, 33))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_concat_copy(engine, dtype):
    table, ids = normal(dtype, 11, 5), np.array([[0, 10, 3], [3, 3, 1]])
    compare(engine, "embedding", table, ids)
    compare(engine, "concat", (normal(dtype, 2, 1, 4), normal(dtype, 2, 3, 4)), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_its_rows_and_returns_a_view(engine, dtype):
    before, new = normal(dtype, 2, 3, 7, 4), normal(dtype, 2, 2, 3, 4)
    store = engine.asarray(before)
    filled = engine.append(store, engine.asarray(new).transpose(0, 2, 1, 3), 4)  # heads lie as (B, T, H, D)
    assert filled.data.ptr == store.data.ptr
    expected = before.copy()
    expected[:, :, 4:6] = new.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(engine.to_numpy(store), expected)
    np.testing.assert_array_equal(engine.to_numpy(filled), expected[:, :, :6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_maps_are_found_fetched_and_placed(engine, dtype):
    compare(engine, "max_pool", normal(dtype, 2, 7, 10))
    compare(engine, "take_rows", normal(dtype, 4, 3, 5), (3, 0))
    x, points, maps = normal(dtype, 3, 128), normal(dtype, 40, 128), normal(dtype, 4, 2, 5, 5)
    distances, rows = engine.nearest(engine.asarray(x), engine.asarray(points))
    truth = np.linalg.norm(x[:, None].astype(np.float64) - points.astype(np.float64), axis=-1)
    found, tolerance = engine.to_numpy(rows), 20 * np.finfo(dtype).eps  # rounding may decide between near ties
    np.testing.assert_allclose(truth[range(3), found], truth.min(1), rtol=tolerance)
    np.testing.assert_allclose(engine.to_numpy(distances), truth.min(1), rtol=tolerance)
    fetched = engine.fetch(listed(maps), (2, None, 0), "copy")
    placed = engine.scatter(fetched, engine.asarray(maps[3:]), (1,))
    np.testing.assert_array_equal(engine.to_numpy(placed), maps[[2, 3, 0]])
    with pytest.raises(ShapeError, match="points"):
        engine.nearest(engine.asarray(x), engine.asarray(points[:, :5]))
    with pytest.raises(ShapeError, match="scatter"):
        engine.scatter(fetched, engine.asarray(maps[3:]), (3,))


@pytest.mark.parametrize(
    ("shape", "start"), [((2, 3, 2, 4), 6), ((2, 3, 2, 4), -1), ((2, 1, 2, 4), 0), ((2, 3, 2, 1), 0)]
)
def test_append_refuses_what_does_not_fit(engine, shape, start):
    store = engine.asarray(normal("float32", 2, 3, 7, 4))
    with pytest.raises(ShapeError, match=r"\(2, 3, "):
        engine.append(store, engine.asarray(normal("float32", *shape)), start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_takes_the_first_of_equal_numbers(engine, dtype):
    for z in (normal(dtype, 2, 3, 50), np.round(normal(dtype, 2, 3, 50)), np.zeros((1, 9), dtype)):
        for n in (1, 4, z.shape[-1]):
            found = engine.to_numpy(engine.top(engine.asarray(z), n))
            np.testing.assert_array_equal(found, np.sort(np.argsort(-z, axis=-1, kind="stable")[..., :n], axis=-1))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refine_writes_exact_products_of_its_candidates(engine, dtype, replace, monkeypatch):
    monkeypatch.setattr("refimpl.engines.cuda.shapes.SCRATCH_BYTES", 4 * 3 * 6)  # a row or two at a time
    z, weight, wide = normal(dtype, 2, 4, 9), normal(dtype, 9, 6), normal(dtype, 2, 4, 8)
    ids = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(9), (2, 4, 1)), axis=-1)[..., :3], axis=-1)
    found, g = engine.asarray(z), engine.asarray(wide)[..., 2:]
    assert engine.refine(found, engine.asarray(ids), engine.asarray(weight), g, replace) is found
    args = [array.astype(np.float64) for array in (z, weight, wide[..., 2:])]
    truth, honest = (REFERENCE.refine(a.copy(), ids, b, c, replace) for a, b, c in (args, (z, weight, wide[..., 2:])))
    allowed = 2 * largest(honest - truth) + 4 * float(np.finfo(dtype).eps) * largest(truth)
    assert largest(engine.to_numpy(found).astype(np.float64) - truth) <= allowed
    with pytest.raises(ShapeError, match=r"\(2, 4, 9\)"):
        engine.refine(found, engine.asarray(ids), engine.asarray(weight[:8]), g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("length", [1, 9])
def test_rotary_is_accurate(engine, length, interleaved, dtype):
    angles = np.random.default_rng(1).uniform(-3, 3, (length, 5))
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    compare(engine, "rotary", normal(dtype, 2, 3, length, 10), cos, sin, interleaved)
    heads = engine.split_heads(engine.asarray(normal(dtype, 2, length, 30)), 3)  # strided
    turned = engine.to_numpy(engine.rotary(heads, engine.asarray(cos), engine.asarray(sin), interleaved))
    honest = REFERENCE.rotary(REFERENCE.split_heads(normal(dtype, 2, length, 30), 3), cos, sin, interleaved)
    np.testing.assert_allclose(turned, honest, atol=4 * np.finfo(dtype).eps * 4)


# B, H, Hkv, Tq, Tk, D: ordinary, one position, GQA, fewer and more keys than queries, batch 0, off any grid
SHAPES = [
    (2, 3, 3, 5, 5, 8), (1, 2, 2, 1, 1, 4), (2, 4, 2, 7, 7, 6), (1, 2, 1, 6, 3, 5), (2, 2, 2, 3, 9, 7),
    (0, 2, 2, 4, 4, 8), (1, 1, 1, 67, 67, 3), (1, 6, 2, 2, 35, 16),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_accurate(engine, shape, causal, masked, dtype, monkeypatch):
    monkeypatch.setattr(shapes, "CAUSAL_ROWS", 16)
    q, k, v = heads(dtype, shape)
    mask = some_mask(shape) if masked else None
    compare(engine, "attention", q, k, v, None, causal, mask)
    compare(engine, "scores", q, k, 0.3, causal, mask)
    scores = REFERENCE.scores(q, k, 0.3, causal, mask)
    compare(engine, "softmax", scores, causal)
    compare(engine, "weighted_sum", REFERENCE.softmax(scores, causal), v, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("rows", "scratch"), [(4, 64 << 20), (128, 400), (3, 5000)])
def test_attention_is_the_same_in_every_blocking(engine, rows, scratch, causal, dtype, monkeypatch):
    monkeypatch.setattr(CupyEngine, "_fused_by_kernel", lambda *_: None)
    monkeypatch.setattr(shapes, "BLOCK_ROWS", rows)
    monkeypatch.setattr(shapes, "SCRATCH_BYTES", scratch)
    for shape in [(2, 4, 2, 13, 13, 6), (3, 2, 2, 9, 4, 5)]:
        compare(engine, "attention", *heads(dtype, shape), None, causal, some_mask(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [0, 3, 20])
def test_a_band_is_accurate_in_every_blocking(engine, window, causal, dtype, monkeypatch):
    monkeypatch.setattr(CupyEngine, "_fused_by_kernel", lambda *_: None)
    monkeypatch.setattr(shapes, "BLOCK_ROWS", 4)
    for shape in [(2, 4, 2, 13, 13, 6), (2, 4, 4, 13, 13, 6), (1, 2, 2, 4, 19, 5)]:
        q, k, v = heads(dtype, shape)
        mask = some_mask(shape)
        compare(engine, "local_attention", q, k, v, window, 0.4, causal, None)
        compare(engine, "local_attention", q, k, v, window, 0.4, causal, mask)
        if shape[1] == shape[2] and shape[3] == shape[4]:
            p = normal(dtype, shape[1], 2 * shape[3] - 1, shape[5], seed=4)
            compare(engine, "local_relative_attention", q, q, k, v, p, window, 0.4, causal, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_linear_attention_and_projections_are_accurate(engine, causal, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 5)
    q, k, _ = heads(dtype, (2, 4, 2, 13, 13, 6))
    keys = some_mask((2, 1, 1, 1, 13, 1))
    keys[:, :, :, 4:9] = True
    compare(engine, "elu_plus_one", q)
    compare(engine, "linear_attention", np.abs(q), np.abs(k), k, causal, None)
    compare(engine, "linear_attention", np.abs(q), np.abs(k), k, causal, keys)
    compare(engine, "project_length", k, normal(dtype, 4, 13, seed=5), keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scratch", [64 << 20, 900])
@pytest.mark.parametrize(("length", "groups"), [(1, 4), (2, 4), (13, 4), (13, 2)])
def test_relative_attention_is_accurate(engine, length, groups, scratch, causal, dtype, monkeypatch):
    monkeypatch.setattr(shapes, "SCRATCH_BYTES", scratch)
    shape = (2, 4, groups, length, length, 6)
    q, k, v = heads(dtype, shape)
    q_position, p = normal(dtype, 2, 4, length, 6, seed=3), normal(dtype, 4, 2 * length - 1, 6, seed=4)
    for mask in (None, some_mask(shape)):
        compare(engine, "relative_attention", q, q_position, k, v, p, 0.4, causal, mask)
    scores = REFERENCE.scores(q, k, 0.4, causal)
    compare(engine, "add_relative", scores, REFERENCE.scores(q_position, p[None], 0.4))
    compare(engine, "scores", q_position, p[None], 0.4)  # keys of one batch for all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage2", ["int8", "float"])
def test_filtered_attention_keeps_the_keys_that_the_reference_keeps(engine, stage2, dtype):
    """The plain array form: the same codes and kept pairs; contexts obey the rule."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, count, length, 16)).astype(dtype) for count, length in ((4, 9), (2, 21), (2, 21))
    )
    (q_codes, q_scale), (k_codes, k_scale) = REFERENCE.quantize(q), REFERENCE.quantize(k)
    for ours, theirs in zip(engine.quantize(on_device(engine, q)), (q_codes, q_scale), strict=True):
        np.testing.assert_array_equal(engine.to_numpy(ours), theirs)
    thresholds = np.array([0.0, 0.4, 1.5, np.inf])
    for causal, nibble in ((False, "floor"), (True, "round")):
        given = [on_device(engine, x) for x in (q, k, v, q_codes, k_codes, q_scale, k_scale, thresholds)]
        context, kept = (
            engine.to_numpy(x) for x in engine.filtered_attention(*given, 0.25, causal, None, nibble, stage2)
        )
        wide = [x.astype(np.float64) for x in (q, k, v)]
        scales = [x.astype(np.float64) for x in (q_scale, k_scale)]
        rest = (thresholds, 0.25, causal, None, nibble, stage2)
        truth, wanted = REFERENCE.filtered_attention(*wide, q_codes, k_codes, *scales, *rest)
        honest, _ = REFERENCE.filtered_attention(q, k, v, q_codes, k_codes, q_scale, k_scale, *rest)
        np.testing.assert_array_equal(kept, wanted)
        assert context.dtype == dtype
        error, allowed = (largest(x.astype(np.float64) - truth) for x in (context, honest))
        assert error <= 2 * allowed + 2 * float(np.finfo(dtype).eps) * largest(v), (dtype, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_weighted_sum_ignores_hidden_weights(engine, causal, dtype, monkeypatch):
    monkeypatch.setattr(shapes, "CAUSAL_ROWS", 4)
    weights = np.abs(normal(dtype, 2, 4, 11, 14))  # not zero where hidden
    compare(engine, "weighted_sum", weights, normal(dtype, 2, 2, 14, 5), causal)
    compare(engine, "softmax", weights, causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_takes_large_and_shifted_logits(engine, dtype):
    scores = normal(dtype, 1, 3, 4, 300, size=40.0)
    scores[:, 1] -= 200  # a head far from the others
    scores[:, 2, 0] = -np.inf  # a row that sees nothing
    compare(engine, "softmax", scores)
    q, k, v = heads(dtype, (1, 2, 2, 9, 9, 8), size=30.0)
    compare(engine, "attention", q, k, v, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_attention_read_strided_heads(engine, dtype):
    x = engine.asarray(normal(dtype, 2, 7, 36))
    q, k, v = (engine.split_heads(part, 3) for part in (x[..., :12], x[..., 12:24], x[..., 24:]))
    fast = engine.to_numpy(engine.merge_heads(engine.attention(q, k, v)))

    def reference(x):
        parts = [REFERENCE.split_heads(x[..., i : i + 12], 3) for i in (0, 12, 24)]
        return REFERENCE.merge_heads(REFERENCE.attention(*parts))

    host = normal(dtype, 2, 7, 36)
    (error,) = honest_errors(fast.dtype, reference, host)
    assert_close(fast, in_dtype(np.float64, reference, host), error, "attention of views")
    scores = engine.asarray(normal(dtype, 2, 4, 5, 5))
    some = engine.to_numpy(engine.softmax(scores[:, 1:3], causal=True))
    np.testing.assert_array_equal(some, engine.to_numpy(engine.softmax(scores, causal=True))[:, 1:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_output(engine, dtype):
    q, k, v = heads(dtype, (1, 2, 2, 5, 5, 4))
    q[0, 1, 2, 0] = np.nan
    compare(engine, "attention", q, k, v)
    scores = normal(dtype, 1, 2, 3, 40)
    scores[0, 0, 1, 7] = np.nan
    scores[0, 1, 2, :] = np.nan
    compare(engine, "softmax", scores)
    x = normal(dtype, 3, 8)
    x[1, 2] = np.nan
    for op in ("gelu", "gelu_tanh", "silu", "relu", "glu"):
        compare(engine, op, x)
    compare(engine, "layer_norm", x, x[0], x[2], 1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_without_keys_is_zero(engine, causal):
    q, k, v = heads("float32", (1, 2, 2, 3, 0, 4))
    out = engine.to_numpy(engine.attention(*(engine.asarray(a) for a in (q, k, v)), causal=causal))
    np.testing.assert_array_equal(out, np.zeros((1, 2, 3, 4), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_output_ignores_the_future(engine, dtype, monkeypatch):
    monkeypatch.setattr(shapes, "SCRATCH_BYTES", 600)
    q, k, v = heads(dtype, (1, 2, 2, 12, 12, 4))
    later_k, later_v = k.copy(), v.copy()
    later_k[:, :, 7:], later_v[:, :, 7:] = 5, -9

    def first_rows(k, v):
        arrays = [engine.asarray(a) for a in (q, k, v)]
        fused = engine.attention(*arrays, causal=True)
        scores = engine.softmax(engine.scores(*arrays[:2], 0.5, causal=True), causal=True)
        return [engine.to_numpy(x)[:, :, :7] for x in (fused, engine.weighted_sum(scores, arrays[2], causal=True))]

    for before, after in zip(first_rows(k, v), first_rows(later_k, later_v), strict=True):
        np.testing.assert_array_equal(before, after)


def test_merge_heads_after_attention_is_a_view(engine):
    q, k, v = (engine.asarray(a) for a in heads("float32", (2, 4, 4, 3, 3, 2)))
    for heads_out in (engine.attention(q, k, v), engine.weighted_sum(engine.softmax(engine.scores(q, k, 1.0)), v)):
        assert heads_out.shape == (2, 4, 3, 2)
        assert engine.merge_heads(heads_out).data.ptr == heads_out.data.ptr


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("linear", [(2, 3), (4, 5)]),
        ("layer_norm", [(2, 3), (4,), (3,), 1e-5]),
        ("swiglu", [(2, 3), (2, 4)]),
        ("depthwise_conv", [(1, 2, 3), (3, 4), (3,)]),
        ("block_linear", [(2, 6), (3, 4, 3)]),
        ("conv1d", [(1, 2, 3), (2, 3, 4), (2,), 1]),
        ("add_relative", [(1, 1, 3, 3), (1, 1, 3, 4)]),
        ("scores", [(1, 1, 3, 3), (1, 1, 3, 4), 1.0]),
    ],
)
def test_wrong_shapes_are_refused(engine, op, shapes):
    args = [engine.asarray(normal("float32", *s)) if isinstance(s, tuple) else s for s in shapes]
    with pytest.raises(ShapeError):
        getattr(engine, op)(*args)


def test_wrong_dtypes_are_refused(engine):
    x = engine.asarray(normal("float32", 2, 3))
    with pytest.raises(ShapeError, match="float64"):
        engine.layer_norm(x, *(engine.asarray(normal("float64", 3)) for _ in range(2)), 1e-5)
    with pytest.raises(ShapeError, match="float16"):
        engine.linear(x, engine.asarray(normal("float16", 4, 3)))
    with pytest.raises(UnsupportedError, match="int64"):
        engine.relu(engine.asarray(np.ones((2, 3), np.int64)))


# --- memory and time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_ops_stay_within_the_scratch(emulated, dtype, monkeypatch):
    monkeypatch.setattr(shapes, "SCRATCH_BYTES", 4_000)
    xp = emulated.xp
    q, k, v = (emulated.asarray(a) for a in heads(dtype, (2, 2, 2, 48, 48, 1)))
    p = emulated.asarray(normal(dtype, 2, 95, 1))
    assert 2 * 2 * 48 * 48 * k.dtype.itemsize > 4 * 4_000
    for causal in (False, True):
        xp.allocated.clear()
        emulated.attention(q, k, v, causal=causal)
        assert max(xp.allocated) <= 4_000
        xp.allocated.clear()
        emulated.relative_attention(q, q, k, v, p, 1.0, causal)
        assert max(xp.allocated) <= 4_000


@pytest.mark.gpu
@pytest.mark.parametrize("relative", [False, True])
def test_fused_ops_fit_where_the_map_does_not(gpu, relative):
    length, width = 8192, 64
    q, k, v = (gpu.asarray(a) for a in heads("float32", (1, 8, 8, length, length, width)))  # the map is 2 GiB
    p = gpu.asarray(normal("float32", 8, 2 * length - 1, width))
    gpu.attention(q[:, :, :8], k, v)  # cuBLAS takes its workspace
    gpu.synchronize()
    pool = gpu.xp.get_default_memory_pool()
    pool.free_all_blocks()
    used = pool.total_bytes()
    pool.set_limit(size=used + (256 << 20))
    try:
        out = gpu.relative_attention(q, q, k, v, p, 0.125) if relative else gpu.attention(q, k, v)
        assert np.isfinite(gpu.to_numpy(out)).all()
    finally:
        pool.set_limit(size=0)


@pytest.mark.gpu
def test_events_measure_the_device(gpu):
    x = gpu.asarray(normal("float32", 4096, 4096))
    gpu.linear(x, x)
    gpu.synchronize()
    began, start = time.perf_counter(), gpu.mark()
    for _ in range(10):
        gpu.linear(x, x)
    queued, stop = time.perf_counter() - began, gpu.mark()
    seconds = gpu.elapsed_s(start, stop)
    waited = time.perf_counter() - began
    assert 0 < seconds <= waited
    assert queued < waited  # the calls returned before the device was done
    assert 10 * 2 * 4096**3 / seconds < 2e15  # FLOP/s: no machine does that in float32


def test_services(engine):
    start = engine.mark()
    stop = engine.mark()
    assert engine.elapsed_s(start, stop) >= 0
    assert engine.free_bytes() > 0
    assert engine.device_name()
    engine.synchronize()
    x = normal("float32", 2, 3, 8)
    back = engine.to_numpy(engine.merge_heads(engine.split_heads(engine.asarray(x), 4)))
    np.testing.assert_array_equal(back, x)
    assert type(back) is np.ndarray


# --- whole passes ---------------------------------------------------------------------------------------------------

METHODS = [
    ("dense", {}), ("flash", {}), ("reuse", {"group": 2}), ("reuse", {"group": 4, "heads": 3}),
    ("reuse", {"group": 2, "heads": 1, "share": "scores", "head_order": "keep"}),
    ("folding", {}), ("folding", {"mask": "subtoken", "fused": True}),
    ("attmemo", {"epochs": 0, "tau": 0.5}),
    ("efficientasr", {"group": 1, "score_residual": 0.5, "band": 3}),
    ("fewer-heads", {}), ("narrow", {"fused": True}), ("local", {"window": 2}), ("linformer", {"length": 4}),
    ("linear", {}),
    ("efficientasr", {"band": 2, "band_penalty": 1.5, "ffn_chunks": 4, "ffn_tied": True}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [None, True], ids=["own", "causal"])
@pytest.mark.parametrize(("method", "params"), METHODS, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_is_accurate(engine, config, method, params, causal, dtype, monkeypatch):
    if isinstance(engine.xp, HostCupy):
        monkeypatch.setattr(shapes, "THREADS", 32)  # smaller blocks emulate faster
    if params.get("heads") and config.kv_heads != config.heads:
        params = {"group": 2, "share": "scores"}
    if method == "folding" and config.position == "relative":
        params = {"fold": 1, "fold_ffn": 2}
    if method == "attmemo" and config.position == "relative":
        params = {"tau": 1.1}
    if not fits(method, params, config) or (method == "linformer" and causal):
        pytest.skip("the method refuses this model: tests/methods/test_contract.py")
    model = refimpl.load_model(config, dtype=dtype)
    inputs = inputs_for(config)
    inputs = inputs if config.stem == "tokens" else inputs.astype(dtype)
    fast = refimpl.forward(model, inputs, method, params, engine, causal=causal)

    def run(dtype, given=model):
        placed = replace(given, weights=weights_as(dtype, given.weights))
        return refimpl.forward(placed, inputs, method, params, causal=causal)

    lower = "float32" if dtype == "float64" else dtype
    ratio = float(np.finfo(dtype).eps / np.finfo(lower).eps)
    truth = run(np.float64)
    rounded = replace(model, weights=weights_as(lower, model.weights))
    error = ratio * largest(run(lower).output.astype(np.float64) - run(np.float64, rounded).output)
    assert fast.output.dtype == dtype
    assert_close(fast.output, truth.output, error, f"{config.name} {method}")
    assert [(c.component, c.op, c.sizes) for c in fast.calls] == [(c.component, c.op, c.sizes) for c in truth.calls]


# --- without a device -----------------------------------------------------------------------------------------------


def one_line_error():
    with pytest.raises(MissingDependencyError) as caught:
        refimpl.engine("cupy")
    message = str(caught.value)
    assert "\n" not in message
    return message


def fake_cupy(**runtime):
    cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(**runtime))
    return types.SimpleNamespace(cuda=cuda)


def test_cupy_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert one_line_error() == (
        "CuPy is not installed: pip install 'effref[gpu]' (CUDA 12) or cupy-cuda13x (CUDA 13), and an NVIDIA GPU with "
        "its driver is needed"
    )


def test_cupy_without_a_driver(monkeypatch):
    def fails():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version\nis insufficient")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(getDeviceCount=fails))
    message = one_line_error()
    assert message.startswith("CuPy finds no NVIDIA GPU: ")
    assert "cudaErrorInsufficientDriver: CUDA driver version is insufficient" in message


def test_cupy_without_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(getDeviceCount=lambda: 0))
    assert one_line_error().startswith("CuPy finds no NVIDIA GPU: ")


def test_cupy_without_cublas(monkeypatch):
    class Cuda:
        runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)

        @property
        def cublas(self):
            raise ImportError("libcublas.so.12: cannot open\nshared object file")

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=Cuda()))
    message = one_line_error()
    assert "install the CUDA toolkit" in message
    assert "libcublas.so.12" in message


def test_cupy_broken(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('CuPy failed to load\\n\\nlibnvrtc.so.12')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert one_line_error() == "CuPy cannot be loaded: CuPy failed to load libnvrtc.so.12"


def test_cupy_has_what_the_engine_calls():
    """The emulation falls back to NumPy's functions; this needs CuPy, but no device."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    source = "".join(file.read_text("utf-8") for file in launch.FOLDER.glob("*.py"))
    names = set(re.findall(r"\b(?:xp|cupy)\.(\w+(?:\.\w+)*)", source)) - {"cuda.cublas", "cuda.nvrtc", "scipy.special"}
    assert {"empty", "cuda.device.get_cublas_handle", "cuda.runtime.memGetInfo"} <= names
    for name in names:
        found = cupy
        for part in name.split("."):
            assert hasattr(found, part), f"cupy has no {name}"
            found = getattr(found, part)


def test_importing_refimpl_imports_no_cupy():
    code = "import sys, refimpl, refimpl.engines.cupy_engine; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- launch shapes, strides and blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 31, 32, 33, 64, 255, 256, 257, 100_000])
def test_row_threads_is_a_power_of_two_that_covers(width):
    threads = shapes.row_threads(width)
    assert threads & (threads - 1) == 0
    assert 32 <= threads <= shapes.THREADS
    assert threads >= min(width, shapes.THREADS)
    assert threads < 2 * max(width, 32)


@pytest.mark.parametrize("width", [1, 40, 64, 700])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 1000])
def test_rows_by_columns_covers_every_row(rows, width):
    found = shapes.rows_by_columns(rows, width)
    (grid,), (across, down) = found.grid, found.block
    assert across * down == shapes.THREADS
    assert grid * down >= rows
    assert (grid - 1) * down < rows or rows == 0 == grid


def element_strides(x):
    return tuple(s // x.itemsize for s in x.strides)


def test_row_stride_finds_evenly_spaced_rows():
    x = np.zeros((3, 4, 10))
    assert shapes.row_stride(x.shape, element_strides(x)) == 10
    part = x[..., 2:5]
    assert shapes.row_stride(part.shape, element_strides(part)) == 10
    assert shapes.row_stride((7,), (1,)) == 7
    for uneven in (x[:, :2], x[..., ::2], x.transpose(1, 0, 2)):
        assert shapes.row_stride(uneven.shape, element_strides(uneven)) is None
    assert shapes.row_stride(x[:1, :2].shape, element_strides(x)) == 10


@pytest.mark.parametrize("most", [65_535, 2])
@pytest.mark.parametrize(
    ("batch", "strides"),
    [
        ((), [(), (), ()]),
        ((2, 3, 1), [(60, 20, 20), (60, 20, 0), (60, 20, 20)]),  # contiguous: one call
        ((2, 3, 4), [(240, 80, 20), (60, 20, 0), (240, 80, 20)]),  # grouped queries
        ((2, 3, 1), [(60, 4, 4), (60, 4, 4), (60, 20, 20)]),  # heads of (B, T, H D)
        ((5, 1, 1), [(7, 9, 9), (0, 0, 0), (3, 1, 1)]),  # keys of one batch for all
    ],
)
def test_product_calls_visit_every_product_once(batch, strides, most):
    wanted = sorted(
        tuple(sum(i * s for i, s in zip(index, step, strict=True)) for step in strides) for index in np.ndindex(*batch)
    )
    found = []
    for count, steps, offsets in shapes.product_calls(batch, strides, most):
        assert 0 < count <= most
        found += [tuple(o + i * s for o, s in zip(offsets, steps, strict=True)) for i in range(count)]
    assert sorted(found) == wanted


def test_product_calls_merge_what_is_contiguous():
    (call,) = shapes.product_calls((2, 3, 4), [(12, 4, 1)] * 3)
    assert call == (24, (1, 1, 1), (0, 0, 0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (7, 7), (9, 4), (4, 9), (0, 3), (5, 0)])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_query_blocks_cover_the_rows_that_see(q_len, k_len, size, causal):
    seen_by = {}
    for rows, seen in shapes.query_blocks(q_len, k_len, size, causal):
        assert 0 < rows.stop - rows.start <= size
        for i in range(rows.start, rows.stop):
            seen_by[i] = seen
            assert seen >= (i + 1 + k_len - q_len if causal else k_len)
        assert seen <= k_len
    first = max(0, q_len - k_len) if causal else 0
    assert list(seen_by) == list(range(first, q_len))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "groups", "per_group", "length"),
    [(1, 16, 1, 1000), (64, 12, 1, 128), (8, 8, 4, 4096), (1, 32, 1, 100_000), (2, 3, 2, 5), (1, 1, 1, 1)],
)
def test_blocks_fit_the_scratch_and_cover_every_map(batch, groups, per_group, length, dtype, relative):
    row_bytes = shapes.map_row_bytes(length, dtype, relative)
    met = np.zeros((batch, groups, per_group), int)
    for b, g, h in shapes.head_blocks(batch, groups, per_group, length, row_bytes):
        assert (h.start, h.stop) == (g.start * per_group, g.stop * per_group)
        met[b, g] += 1
        maps = (b.stop - b.start) * (h.stop - h.start)
        rows = shapes.rows_that_fit(maps, length, row_bytes)
        assert 1 <= rows <= length
        assert maps * rows * row_bytes <= shapes.SCRATCH_BYTES
    assert (met == 1).all()


def test_kernel_arguments_are_eight_bytes_wide():
    for value, dtype in ((3, np.int64), (True, np.int64), (0.5, np.float64)):
        assert launch.kernel_argument(value).dtype == dtype
    array = np.zeros(2)
    assert launch.kernel_argument(array) is array
