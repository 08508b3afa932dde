"""Filtered attention of the CuPy engine: the same codes and kept pairs as the equation, and the 2x rule.

Shapes cross the kernels' tiles: 16 rows of a warp, 64 of a block, 32 keys at a time, 64 of a tile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cupy_cases import DTYPES, REFERENCE, largest, normal, on_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.engines.cuda import filtered, shapes
from refimpl.errors import ShapeError, UnsupportedError

NIBBLES = pytest.mark.parametrize("nibble", ["floor", "round"])
H100, L4 = 227 << 10, 99 << 10  # shared memory that a block can have: compute capability 9.0 and 8.9
THRESHOLDS = np.array([0.0, 0.4, 1.5, np.inf])


@pytest.fixture(autouse=True)
def _together(monkeypatch):
    """All kernels of a dtype in one module: g++ takes as long for one."""
    for name in ("FILTERED", "HALF"):
        monkeypatch.setattr(filtered, name, replace(getattr(filtered, name), apart=False))


@pytest.fixture(autouse=True)
def _able(engine):
    if engine.capability() < filtered.FILTERED.capability:
        pytest.skip("mma m16n8k32 needs compute capability 8.0")


def case(dtype, B, H, Hkv, Tq, Tk, D, Dv=None, size=1.0):
    """Queries, keys and values with the codes and scales of the first two, by the reference."""
    q, k = normal(dtype, B, H, Tq, D, size=size), normal(dtype, B, Hkv, Tk, D, seed=1)
    return q, k, normal(dtype, B, Hkv, Tk, Dv or D, seed=2), *filtering(q, k)


def filtering(q, k):
    (q_codes, q_scale), (k_codes, k_scale) = REFERENCE.quantize(q), REFERENCE.quantize(k)
    return q_codes, k_codes, q_scale, k_scale


def thresholds_for(heads):
    return np.resize(THRESHOLDS, heads)


def some_mask(*shape):
    mask = np.random.default_rng(0).random(shape) < 0.7
    mask[..., :1, :] = False  # a query that sees nothing
    return mask


def orders(q, k, v, q_codes, k_codes, *rest):
    """The operands with their columns in several orders: with few logits the error of one sum is chance."""
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(q.shape[3]) if seed else slice(None)
        yield q[..., order], k[..., order], v, q_codes[..., order], k_codes[..., order], *rest


def check(engine, q, k, v, q_codes, k_codes, q_scale, k_scale, thresholds, *rest):
    """Kept pairs are those of the equation; contexts and maps obey the rule."""
    arrays = q, k, v, q_codes, k_codes, q_scale, k_scale, thresholds
    device = [on_device(engine, x) for x in arrays]
    rest = tuple(on_device(engine, x) for x in rest)
    context, kept = (engine.to_numpy(x) for x in engine.filtered_attention(*device, *rest))
    weights, kept_by_map = (engine.to_numpy(x) for x in engine.filtered_map(*device[:2], *device[3:], *rest))
    rest = tuple(engine.to_numpy(x) if hasattr(x, "dtype") else x for x in rest)
    wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in arrays]
    with np.errstate(all="ignore"):
        truth, wanted = REFERENCE.filtered_attention(*wide, *rest)
        true_weights, _ = REFERENCE.filtered_map(*wide[:2], *wide[3:], *rest)
        honest = [REFERENCE.filtered_attention(*turned, *rest)[0] for turned in orders(*arrays)]
        honest_weights = [REFERENCE.filtered_map(*turned[:2], *turned[3:], *rest)[0] for turned in orders(*arrays)]
    assert kept.dtype == kept_by_map.dtype == np.int64
    np.testing.assert_array_equal(kept, wanted)
    np.testing.assert_array_equal(kept_by_map, wanted)
    for what, fast, exact, same_dtype, scale in (
        ("context", context, truth, honest, largest(v)), ("map", weights, true_weights, honest_weights, 1.0)
    ):  # fmt: skip
        assert fast.dtype == q.dtype
        assert fast.shape == exact.shape
        np.testing.assert_array_equal(np.isnan(fast), np.isnan(exact), what)
        finite = np.isfinite(exact)
        error, *allowed = (largest(x[finite].astype(np.float64) - exact[finite]) for x in (fast, *same_dtype))
        assert error <= 2 * max(allowed) + 2 * float(np.finfo(q.dtype).eps) * scale, (what, error, allowed)
    np.testing.assert_array_equal(weights[true_weights == 0], 0)
    return context, kept


# --- quantisation ---------------------------------------------------------------------------------------------------


def check_codes(engine, x, device=None):
    codes, sigma = engine.quantize(engine.asarray(x) if device is None else device)
    with np.errstate(all="ignore"):
        wanted = REFERENCE.quantize(x)
    for found, expected in zip((codes, sigma), wanted, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(engine.to_numpy(found), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packs", [1 << 20, 5], ids=["one block", "many blocks"])
@pytest.mark.parametrize(("length", "width"), [(1, 8), (33, 24), (70, 3), (40, 10)])
def test_codes_are_those_of_the_reference(engine, length, width, packs, dtype, monkeypatch):
    """Rows that are read 16 bytes at a time and one by one; heads of one block and of many."""
    monkeypatch.setattr(filtered, "HEAD_PACKS", packs)
    monkeypatch.setattr(shapes, "THREADS", 64)
    x = normal(dtype, 2, 3, length, width, size=5.0)
    check_codes(engine, x)
    turned = x.transpose(0, 2, 1, 3)  # as (B, T, H, D)
    check_codes(engine, turned, engine.asarray(np.ascontiguousarray(x)).transpose(0, 2, 1, 3))
    check_codes(engine, x[..., ::2], engine.asarray(x)[..., ::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packs", [1 << 20, 2], ids=["one block", "many blocks"])
def test_codes_of_heads_that_are_zero_tiny_or_not_finite(engine, packs, dtype, monkeypatch):
    monkeypatch.setattr(filtered, "HEAD_PACKS", packs)
    tiny = np.finfo(dtype)
    x = normal(dtype, 1, 8, 9, 8)
    x[0, 0] = 0
    x[0, 1] = tiny.smallest_subnormal
    x[0, 2] *= np.asarray(100 * float(tiny.smallest_normal), dtype)  # the scale is below the smallest normal number
    x[0, 3, 8, 7], x[0, 4, 0, 0], x[0, 5, 3, 3] = np.nan, -np.inf, tiny.max
    x[0, 6] = -x[0, 6]
    check_codes(engine, x)
    check_codes(engine, x[:, :, :0])
    with pytest.raises(ShapeError, match="quantize"):
        engine.quantize(engine.asarray(x[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_round_halves_to_even_like_the_reference(engine, dtype):
    """Also by a scale whose reciprocal is rounded: a product with that is no quotient."""
    halves = np.concatenate([[127.0], np.arange(-127, 127) + 0.5]).reshape(1, 1, -1, 1)
    check_codes(engine, np.concatenate([scale * halves for scale in (1, 3, 7)], axis=1).astype(dtype))


# --- which keys are kept --------------------------------------------------------------------------------------------


@NIBBLES
def test_kept_keys_of_all_pairs_of_codes(engine, nibble):
    """D = 1, every code of a query and of a key: the tensor cores' estimates and products against whole numbers."""
    codes = np.arange(-127, 128, dtype=np.int8)
    q, k = codes.astype(np.float32).reshape(1, 1, -1, 1), codes.astype(np.float32).reshape(1, 1, -1, 1)
    ones, v = np.ones((1, 1, 1, 1), np.float32), np.eye(255, dtype=np.float32)[None, None]
    for theta in (0.0, 700.0):
        arrays = q, k, v, q.astype(np.int8), k.astype(np.int8), ones, ones, np.array([theta])
        device = [engine.asarray(x) for x in arrays]
        context, kept = (engine.to_numpy(x) for x in engine.filtered_attention(*device, 1e-3, nibble=nibble))
        weights, wanted = REFERENCE.filtered_map(*arrays[:2], *arrays[3:], 1e-3, nibble=nibble)
        np.testing.assert_array_equal(kept, wanted)
        np.testing.assert_array_equal(context != 0, weights != 0)
    everything = [engine.asarray(x) for x in (*arrays[:-1], np.array([np.inf]))]
    context, kept = (engine.to_numpy(x) for x in engine.filtered_attention(*everything, 1e-3, nibble=nibble))
    assert kept.tolist() == [[255 * 255]]
    scores = np.log(context[0, 0].astype(np.float64) / context[0, 0, :, 127:128]) / 1e-3  # that of code 0 is 0
    np.testing.assert_allclose(scores, np.multiply.outer(codes.astype(int), codes.astype(int)), atol=0.02)


@NIBBLES
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_kept_set_is_that_of_the_equation(engine, causal, nibble):
    """Values are an identity, so that the context is the map; heads share keys, so that tiles of rows cross heads."""
    q, k, _, *rest = case("float32", 1, 4, 2, 37, 70, 20)
    v = np.broadcast_to(np.eye(70, dtype=np.float32), (1, 2, 70, 70)).copy()
    mask = some_mask(1, 4, 37, 70)
    for seen in (None, mask):
        device = [on_device(engine, x) for x in (q, k, v, *rest, THRESHOLDS)]
        context, _ = engine.filtered_attention(*device, 20**-0.5, causal, on_device(engine, seen), nibble, "int8")
        weights, _ = REFERENCE.filtered_map(q, k, *rest, THRESHOLDS, 20**-0.5, causal, seen, nibble, "int8")
        np.testing.assert_array_equal(engine.to_numpy(context) != 0, weights != 0)


# --- the rule -------------------------------------------------------------------------------------------------------

# B, H, Hkv, Tq, Tk, D, Dv: tiles of 64 rows and keys and their ends; more queries than keys; one query of many heads
SHAPES = [
    (2, 4, 2, 9, 21, 16, 5), (1, 2, 1, 67, 131, 24, 64), (1, 1, 1, 70, 33, 33, 3), (1, 8, 1, 1, 200, 48, 32),
    (1, 2, 2, 3, 64, 64, 128),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "nibble"), [(False, "floor"), (True, "round")])
@pytest.mark.parametrize("stage2", ["int8", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filtered_attention_obeys_the_rule(engine, shape, stage2, causal, nibble, dtype):
    B, H, _, Tq, Tk, D, _ = shape
    mask = some_mask(B, 1, Tq, Tk) if stage2 == "int8" else some_mask(1, 1, 1, Tk) | True
    check(engine, *case(dtype, *shape), thresholds_for(H), D**-0.5, causal, mask, nibble, stage2)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_filtered_attention_of_any_sizes(engine, data):
    B, Hkv, group, Tq, Tk, D, Dv = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 40, 100, 70, 40))
    H = Hkv * group
    q, k, v, *_ = case("float32", B, H, Hkv, Tq, Tk, D, Dv, size=data.draw(st.sampled_from([1e-3, 1.0, 30.0])))
    if data.draw(st.booleans()):
        k, v = k[:1], v[:1]  # keys of one batch for all
    thresholds = np.array(data.draw(st.lists(st.floats(0, 5) | st.just(np.inf), min_size=H, max_size=H)))
    shape = [data.draw(st.sampled_from([1, n])) for n in (B, H, Tq, Tk)]
    mask = some_mask(*shape) if data.draw(st.booleans()) else None
    nibble, stage2 = data.draw(st.sampled_from(["floor", "round"])), data.draw(st.sampled_from(["int8", "float"]))
    check(engine, q, k, v, *filtering(q, k), thresholds, D**-0.5, data.draw(st.booleans()), mask, nibble, stage2)


@pytest.mark.parametrize("stage2", ["int8", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_share_the_keys_of_a_row_add_up(engine, dtype, stage2, monkeypatch):
    """Three blocks of 64 keys; of one head the keys of one block alone are kept, and the mask hides another's."""
    monkeypatch.setattr(filtered, "LEAST_KEYS", 60)
    given = case(dtype, 2, 4, 2, 3, 190, 16, 20)
    mask = np.ones((2, 1, 1, 190), bool)
    mask[1, :, :, 64:128] = False
    tiles = filtered.cut_of(4, 6, 190, filtered.WARPS, True)
    assert (tiles.splits, tiles.span) == (3, 64)
    for causal in (False, True):
        split = check(engine, *given, THRESHOLDS, 0.25, causal, mask, "floor", stage2)
        with monkeypatch.context() as patch:
            patch.setattr(filtered, "LEAST_KEYS", 1000)
            whole = check(engine, *given, THRESHOLDS, 0.25, causal, mask, "floor", stage2)
        np.testing.assert_array_equal(split[1], whole[1])


@pytest.mark.parametrize("stage2", ["int8", "float"])
def test_scores_that_grow_from_tile_to_tile_are_rescaled(engine, stage2):
    """Each tile of keys has larger scores than the one before, by more than a weight could show; and smaller ones."""
    q, k = np.abs(normal("float32", 1, 2, 20, 16)), np.abs(normal("float32", 1, 2, 200, 16))
    v = normal("float32", 1, 2, 200, 8)
    steps = 1 + np.arange(200, dtype=np.float32)[:, None] // 40
    for keys in (k * steps, (k * steps)[:, :, ::-1].copy()):
        for factor in (1.0, 30.0 if stage2 == "int8" else 3.0):
            check(
                engine, q, keys, v, *filtering(q, keys), np.array([np.inf, 200.0]), factor, False, None, "floor", stage2
            )


def test_no_threshold_keeps_all_that_is_visible_and_zero_keeps_ties_of_the_maximum(engine):
    given = case("float32", 1, 2, 1, 40, 66, 16)
    _, kept = check(engine, *given, np.array([np.inf, 0.0]), 0.25, True, None, "floor", "int8")
    assert kept[0, 0] == sum(range(27, 67))  # query i sees i + 1 + 26 keys
    assert 40 <= kept[0, 1] < 80


@pytest.mark.parametrize("stage2", ["int8", "float"])
def test_heads_that_are_not_finite_or_tiny_spoil_their_rows_alone(engine, stage2):
    q, k, v, *_ = case("float32", 1, 4, 4, 5, 40, 16)
    q[0, 1, 2, 3], k[0, 2, 39, 0] = np.nan, np.inf
    q[0, 3] *= np.float32(1e-30)
    k[0, 3] *= np.float32(1e-30)
    with np.errstate(all="ignore"):
        codes = filtering(q, k)
        context, _ = check(engine, q, k, v, *codes, np.array([0.4, 0.4, 0.4, 0.0]), 0.25, False, None, "floor", stage2)
    assert np.isfinite(context[0, [0, 3]]).all()
    assert np.isnan(context[0, 1, 2]).all()


def test_what_is_dropped_or_hidden_has_no_effect(engine):
    q, k, v, *rest = case("float32", 1, 2, 1, 20, 70, 16)
    keys = np.array([0.3, 0.3])
    weights, _ = REFERENCE.filtered_map(q, k, *rest, keys, 0.25, True, None, "floor", "int8")
    spoilt = v.copy()
    spoilt[0, 0, (weights == 0).all(axis=(0, 1, 2))] = np.nan
    assert np.isnan(spoilt).any()
    clean, changed = (
        engine.to_numpy(
            engine.filtered_attention(*(engine.asarray(x) for x in (q, k, values, *rest, keys)), 0.25, True)[0]
        )
        for values in (v, spoilt)
    )
    np.testing.assert_array_equal(clean, changed)


def test_strided_heads_and_a_context_that_merges_without_a_copy(engine):
    x = normal("float32", 2, 21, 96)
    q, k, v = (REFERENCE.split_heads(x[..., i : i + 32], 2) for i in (0, 32, 64))
    device = engine.asarray(x)
    parts = [engine.split_heads(device[..., i : i + 32], 2) for i in (0, 32, 64)]
    codes = [engine.quantize(part) for part in parts[:2]]
    given = *parts, codes[0][0], codes[1][0], codes[0][1], codes[1][1], engine.asarray(THRESHOLDS[1:3])
    context, kept = engine.filtered_attention(*given, 0.25, True)
    wanted, wanted_kept = REFERENCE.filtered_attention(q, k, v, *filtering(q, k), THRESHOLDS[1:3], 0.25, True)
    np.testing.assert_array_equal(engine.to_numpy(kept), wanted_kept)
    np.testing.assert_allclose(engine.to_numpy(context), wanted, atol=2e-6)
    assert engine.merge_heads(context).data.ptr == context.data.ptr


@pytest.mark.parametrize(("width", "kernel"), [(8, "filtered_half<false>"), (12, "filtered<T, A, 1, false>")])
def test_tensor_cores_add_values_of_float16_where_rows_are_whole_packs(engine, width, kernel, monkeypatch):
    launched, run = [], engine._launch
    monkeypatch.setattr(
        engine, "_launch", lambda source, name, *rest: (launched.append(name), run(source, name, *rest))
    )
    q, k, wide, *rest = case("float16", 1, 2, 1, 20, 70, 16, 32)
    given = [engine.asarray(x) for x in (q, k)]
    codes = [engine.asarray(x) for x in (*rest, THRESHOLDS[1:3])]
    for first, name in ((0, kernel), (3, "filtered<T, A, 1, false>")):  # 3: rows begin at no multiple of 16 bytes
        context, _ = engine.filtered_attention(*given, engine.asarray(wide)[..., first : first + width], *codes, 0.25)
        v = wide[..., first : first + width]
        wanted, _ = REFERENCE.filtered_attention(q, k, v, *rest, THRESHOLDS[1:3], 0.25)
        np.testing.assert_allclose(engine.to_numpy(context), wanted, atol=4e-3)
        assert launched[-1] == name


def test_without_keys_or_queries_there_is_nothing(engine):
    for q_len, k_len in ((3, 0), (0, 4)):
        given = case("float32", 1, 2, 1, q_len, k_len, 8, 4)
        device = [engine.asarray(x) for x in (*given, THRESHOLDS[:2])]
        context, kept = engine.filtered_attention(*device, 0.5)
        np.testing.assert_array_equal(engine.to_numpy(context), np.zeros((1, 2, q_len, 4), np.float32))
        assert engine.to_numpy(kept).tolist() == [[0, 0]]
        weights, kept = engine.filtered_map(*device[:2], *device[3:], 0.5)
        assert weights.shape == (1, 2, q_len, k_len)
        assert engine.to_numpy(kept).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda k: k[:, :, :, :4], r"k \(1, 2, 9, 4\)"), (2, lambda v: v[:, :, :4], r"v \(1, 2, 4, 8\)"),
        (3, lambda codes: codes.astype(np.int32), "int32"), (6, lambda sigma: sigma[:, :1], "scales"),
        (7, lambda thresholds: thresholds[:1], r"thresholds \(1,\)"),
    ],
    ids=["keys", "values", "codes", "scales", "thresholds"],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(engine, place, change, message):
    given = [*case("float32", 1, 2, 2, 5, 9, 8), THRESHOLDS[:2].copy()]
    given[place] = change(given[place])
    with pytest.raises(ShapeError, match=message):
        engine.filtered_attention(*(engine.asarray(x) for x in given), 0.5)


def test_words_and_heads_that_are_not_known_are_refused(engine, monkeypatch):
    given = [engine.asarray(x) for x in (*case("float32", 1, 2, 2, 5, 9, 8), THRESHOLDS[:2])]
    with pytest.raises(ShapeError, match="nearest"):
        engine.filtered_attention(*given, 0.5, nibble="nearest")
    monkeypatch.setattr(engine, "block_shared_bytes", lambda: 5000)
    with pytest.raises(UnsupportedError, match=r"heads of 8 numbers .* do not fit into 5000 bytes"):
        engine.filtered_attention(*given, 0.5)
    monkeypatch.setattr(engine, "capability", lambda: 75)
    with pytest.raises(UnsupportedError, match=r"capability 8\.0.* has 7\.5"):
        engine.filtered_attention(*given, 0.5)


# --- launch shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits_keys", [False, True])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize(
    ("maps", "rows", "k_len"), [(1, 1, 1), (12, 1, 8192), (96, 512, 512), (3, 65, 257), (1, 16, 64)]
)
def test_tiles_cover_all_rows_and_keys_once(maps, rows, k_len, warps, splits_keys):
    tiles = filtered.cut_of(maps, rows, k_len, warps, splits_keys)
    tall = filtered.TILE * tiles.launch.block[1]
    assert tiles.launch.grid == (maps * tiles.tiles * tiles.splits,)
    assert (tiles.tiles - 1) * tall < rows <= tiles.tiles * tall
    assert (tiles.splits - 1) * tiles.span < k_len <= tiles.splits * tiles.span
    assert tiles.span % filtered.KEYS == 0
    assert splits_keys or tiles.splits == 1
    if (maps, k_len) == (12, 8192) and splits_keys:
        assert maps * tiles.splits >= 132  # one query of twelve heads keeps an H100 busy


@pytest.mark.parametrize(
    ("width", "itemsize", "v_width", "warps", "used"),
    [(64, 4, 64, 4, 36_864), (128, 4, 128, 4, 61_440), (128, 8, 128, 4, 104_448), (256, 8, 256, 2, 101_888)],
)
def test_shared_memory_of_common_heads(width, itemsize, v_width, warps, used):
    assert filtered.warps_that_fit(H100, width, itemsize, v_width) == warps
    assert filtered.shared_bytes(width, warps, itemsize, v_width) == used


def test_blocks_are_smaller_on_a_device_with_less_shared_memory(engine, monkeypatch):
    """Float64 heads of 128 numbers in four warps are too much for an L4."""
    asked, launch = [], engine._launch
    monkeypatch.setattr(engine, "_launch", lambda *given: (asked.append(given[3].shared_bytes), launch(*given)))
    arrays = [engine.asarray(x) for x in (*case(np.float64, 1, 2, 1, 40, 70, 128), THRESHOLDS[:2])]
    found = []
    for available, used in ((H100, 104_448), (L4, 33_024)):
        monkeypatch.setattr(engine, "block_shared_bytes", lambda available=available: available)
        asked.clear()
        found.append(engine.to_numpy(engine.filtered_attention(*arrays, 0.1)[0]))
        assert max(asked) == used <= available
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_shared_memory_of_heads_in_float16_leaves_room_for_four_blocks():
    used = filtered.shared_bytes(64, filtered.warps_that_fit(H100, 64, 4, 64, True), 4, 64, True)
    assert used == 48_128
    assert 4 * (used + 1024) <= 228 << 10  # of a multiprocessor, of which each block costs 1 KiB more


@pytest.mark.parametrize(("maps", "packs"), [(1, 1), (12, 2048), (12, 2049), (96, 8192), (5000, 10**6), (1, 10**6)])
def test_heads_are_quantised_in_parts_of_even_size(maps, packs):
    parts, span = filtered.parts_of_heads(maps, packs)
    assert (parts - 1) * span < packs <= parts * span
    assert parts == 1 or packs > filtered.HEAD_PACKS
