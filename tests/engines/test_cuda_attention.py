"""The attention kernels of the CuPy engine, each at shapes that cross its tiles; the rule is in `cupy_cases`."""

from __future__ import annotations

import numpy as np
import pytest
from cupy_cases import (
    DTYPES,
    REFERENCE,
    assert_close,
    compare,
    heads,
    honest_errors,
    in_dtype,
    largest,
    on_device,
    some_mask,
)

from refimpl.engines.cuda import plans
from refimpl.engines.cuda.fused import DECODE, TENSOR


@pytest.fixture
def launched(engine, monkeypatch):
    """The kernels that the engine launches, in order."""
    names = []

    def launch(source, kernel, x, shape, *arguments, run=engine._launch):
        names.append(kernel)
        run(source, kernel, x, shape, *arguments)

    monkeypatch.setattr(engine, "_launch", launch)
    return names


def skip_without_tensor_cores(engine):
    if engine.capability() < TENSOR.capability:
        pytest.skip("mma m16n8k16 needs compute capability 8.0")


# --- tensor cores ---------------------------------------------------------------------------------------------------

# B, H, Hkv, Tq, Tk, D: tiles of 64 keys, of 32; ends off the tiles; more keys or more queries; padded widths
TENSOR_SHAPES = [
    (1, 2, 1, 67, 131, 24), (2, 1, 1, 65, 64, 32), (1, 1, 1, 130, 70, 8), (1, 1, 1, 20, 65, 128), (1, 2, 2, 17, 40, 80),
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", TENSOR_SHAPES, ids=str)
def test_tensor_attention_is_accurate(engine, launched, shape, causal, masked):
    skip_without_tensor_cores(engine)
    compare(engine, "attention", *heads("float16", shape), None, causal, some_mask(shape) if masked else None)
    assert {name.partition("<")[0] for name in launched} == {"fused"}


def test_both_heights_of_a_tensor_tile_give_the_same_bits(engine, launched, monkeypatch):
    skip_without_tensor_cores(engine)
    q, k, v = (engine.asarray(x) for x in heads("float16", (1, 1, 1, 150, 150, 16)))
    low = engine.to_numpy(engine.attention(q, k, v, causal=True))
    monkeypatch.setattr(plans, "BLOCKS_EACH", 0)
    tall = engine.to_numpy(engine.attention(q, k, v, causal=True))
    assert launched == ["fused<32, 1>", "fused<32, 2>"]
    np.testing.assert_array_equal(tall, low)
    compare(engine, "attention", *(engine.to_numpy(x) for x in (q, k, v)), None, True)


@pytest.mark.parametrize("window", [0, 3, 70])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tensor_attention_within_a_band(engine, launched, window, causal):
    skip_without_tensor_cores(engine)
    shape = (1, 2, 1, 70, 140, 8)
    for mask in (None, some_mask(shape)):
        compare(engine, "local_attention", *heads("float16", shape), window, 0.4, causal, mask)
    assert set(launched) == {"fused<32, 1>"}


def test_tensor_attention_rescales_what_it_has_when_the_maximum_grows(engine):
    """Each tile of keys has larger logits than the one before, by more than float16 could make up for."""
    skip_without_tensor_cores(engine)
    q, k, v = heads("float16", (1, 1, 1, 20, 200, 16))
    q[...] = np.abs(q)
    k[...] = np.abs(k) * (1 + np.arange(200)[:, None] // 64)
    v[:, :, :64] += 8
    compare(engine, "attention", q, k, v, 0.5)
    compare(engine, "attention", q, k, v, -0.5)  # and falling ones
    compare(engine, "attention", 30 * q, k, v, 1.0)


def test_tensor_attention_reads_any_strides(engine, launched):
    skip_without_tensor_cores(engine)
    rng = np.random.default_rng(0)
    host = rng.standard_normal((2, 70, 3 * 3 * 16 + 1)).astype(np.float16)

    def reference(x):
        parts = [REFERENCE.split_heads(x[..., i : i + 48], 3) for i in (0, 48, 96)]
        return REFERENCE.merge_heads(REFERENCE.attention(*parts))

    (error,) = honest_errors(np.dtype("float16"), reference, host)
    truth = in_dtype(np.float64, reference, host)
    for width in (144, 145):  # rows that start at multiples of 16 bytes, and rows that do not
        x = engine.asarray(np.ascontiguousarray(host[..., :width]))
        parts = [engine.split_heads(x[..., i : i + 48], 3) for i in (0, 48, 96)]
        out = engine.attention(*parts)
        assert engine.merge_heads(out).data.ptr == out.data.ptr
        assert_close(engine.to_numpy(engine.merge_heads(out)), truth, error, f"rows of {width}")
    assert set(launched) == {"fused<32, 1>"}


def test_tensor_attention_broadcasts_keys_and_masks(engine):
    skip_without_tensor_cores(engine)
    q, _, _ = heads("float16", (2, 4, 2, 20, 70, 16))
    _, k, v = heads("float16", (1, 4, 2, 20, 70, 16))
    compare(engine, "attention", q, k, v)
    mask = np.random.default_rng(0).random((2, 1, 1, 70)) < 0.5
    compare(engine, "attention", q, k, v, None, False, mask)


def test_tensor_attention_hands_on_nan_and_infinity(engine):
    skip_without_tensor_cores(engine)
    q, k, v = heads("float16", (1, 2, 2, 70, 70, 8))
    q[0, 1, 66, 0], q[0, 0, 3, 2] = np.nan, np.inf
    compare(engine, "attention", q, k, v)
    later = engine.attention(*(engine.asarray(x) for x in (abs(k), k, v)), causal=True)
    assert np.isfinite(engine.to_numpy(later)).all()


@pytest.mark.parametrize("width", [1, 8, 32, 40, 64, 96, 104, 128])
@pytest.mark.parametrize(("batch", "heads_", "q_len"), [(1, 1, 1), (1, 12, 128), (8, 16, 2048), (3, 5, 129)])
def test_tensor_tiles_cover_the_queries(batch, heads_, q_len, width):
    tiles = plans.tensor_tiles(batch, heads_, q_len, width, 132)
    if width % 8:
        assert tiles is None
        return
    rows = 64 * tiles.stripes
    (across, *maps), block = tiles.launch.grid, tiles.launch.block
    assert maps == [heads_, batch]
    assert (across - 1) * rows < q_len <= across * rows
    assert block == (128,)
    assert tiles.width >= width
    assert tiles.kernel in TENSOR.kernels
    assert tiles.launch.shared_bytes <= (227 << 10) // 2  # two blocks on a multiprocessor of an H100
    assert (tiles.stripes == 2) == (-(-q_len // 128) * heads_ * batch >= 2 * 132)


def test_tensor_tiles_refuse_what_the_kernel_does_not_take():
    assert plans.tensor_tiles(1, 1, 10, 136, 132) is None
    assert plans.tensor_tiles(65_536, 1, 10, 64, 132) is None
    assert plans.tensor_tiles(1, 1, 10, 66, 132) is None


# --- few queries over many keys -------------------------------------------------------------------------------------

# B, H, Hkv, Tq, Tk, D: one query, grouped heads, more queries than a block takes, padded and unpadded widths
DECODE_SHAPES = [
    (2, 2, 2, 1, 75, 64), (1, 4, 1, 1, 700, 16), (1, 6, 2, 3, 90, 24), (1, 2, 2, 5, 3, 128), (1, 2, 1, 1, 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", DECODE_SHAPES, ids=str)
def test_decode_attention_is_accurate(engine, launched, shape, masked, dtype, monkeypatch):
    monkeypatch.setattr(plans, "DECODE_KEYS", 30)
    mask = np.random.default_rng(0).random((*shape[:2], *shape[3:5])) < 0.7 if masked else None
    for causal in (False, True):
        compare(engine, "attention", *heads(dtype, shape), None, causal, mask)
    wanted = ["decode", "combine"] if shape[4] > 60 else ["decode"]
    assert [name.partition("<")[0] for name in launched] == 2 * wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_within_a_band_and_over_a_store(engine, launched, dtype, monkeypatch):
    monkeypatch.setattr(plans, "DECODE_KEYS", 20)
    q, k, v = heads(dtype, (2, 4, 2, 2, 90, 8))
    for window in (0, 40):
        compare(engine, "local_attention", q, k, v, window, 0.4, True)
    stores = [engine.asarray(np.full((2, 2, 128, 8), np.nan, dtype)) for _ in range(2)]
    filled = [engine.append(store, engine.asarray(x), 0) for store, x in zip(stores, (k, v), strict=True)]
    before = len(launched)
    found = engine.to_numpy(engine.attention(engine.asarray(q), *filled, causal=True))
    np.testing.assert_array_equal(found, engine.to_numpy(engine.attention(*on_device(engine, (q, k, v)), causal=True)))
    assert [name.partition("<")[0] for name in launched[before:]] == 2 * ["decode", "combine"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_adds_ranges_of_very_different_logits(engine, dtype, monkeypatch):
    """With logits of 40 the errors of float64 as truth count, so that long doubles are the truth here."""
    monkeypatch.setattr(plans, "DECODE_KEYS", 20)
    q, k, v = heads(dtype, (3, 8, 4, 1, 100, 8))
    q, k = abs(q), abs(k) * (1 + np.arange(100)[:, None] // 20).astype(dtype)
    hidden = np.ones((1, 1, 1, 100), bool)
    hidden[..., 20:70] = False  # whole ranges that see nothing
    # logits that grow from range to range, that fall, ranges that see nothing, and nothing seen at all
    for scale, mask in ((1.0, None), (-1.0, None), (1.0, hidden), (1.0, np.zeros_like(hidden))):
        truth = in_dtype(np.longdouble, REFERENCE.attention, q, k, v, scale, False, mask)
        honest = largest(REFERENCE.attention(q, k, v, scale, False, mask) - truth)
        given = on_device(engine, (q, k, v))
        fast = engine.to_numpy(engine.attention(*given, scale, False, None if mask is None else engine.asarray(mask)))
        assert_close(fast, truth, honest, f"scale {scale}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_hands_on_nan(engine, dtype):
    q, k, v = heads(dtype, (1, 2, 2, 1, 9, 8))
    q[0, 1, 0, 0] = np.nan
    compare(engine, "attention", q, k, v)
    k[0, 0, 4, 3] = np.inf
    compare(engine, "attention", q, k, v)


def test_few_queries_with_rows_that_cannot_be_read_by_columns_take_another_way(engine, launched):
    compare(engine, "attention", *heads("float32", (1, 2, 2, 1, 9, 6)))
    assert not [name for name in launched if name.startswith("decode")]


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize(("batch", "heads_", "groups"), [(1, 8, 8), (1, 32, 8), (64, 32, 8), (1, 6, 2)])
@pytest.mark.parametrize("k_len", [0, 1, 255, 4096, 100_000])
@pytest.mark.parametrize("window", [None, 500])
def test_decode_ranges_cover_the_visible_keys_once(batch, heads_, groups, q_len, k_len, window, multiprocessors):
    seen = plans.band(q_len, k_len, True, window)
    ranges = plans.decode_ranges(batch, heads_, groups, q_len, k_len, 64, 2, seen, multiprocessors)
    assert ranges.kernel in DECODE.kernels
    assert ranges.first == max(0, k_len - q_len - (k_len if window is None else window))
    assert ranges.stop == k_len
    (count, blocks, z), rows = ranges.launch.grid, heads_ // groups * q_len
    assert blocks // groups * ranges.rows >= rows
    assert z == batch
    assert (count - 1) * ranges.share < max(1, ranges.stop - ranges.first) <= count * ranges.share
    assert count == 1 or ranges.share >= plans.DECODE_KEYS
    full = plans.DECODE_BLOCKS * multiprocessors
    assert count == 1 or (count - 1) * blocks * batch < full  # no more ranges than fill the device


def test_decode_ranges_fill_the_device_where_keys_suffice():
    ranges = plans.decode_ranges(1, 32, 8, 1, 100_000, 128, 2, plans.band(1, 100_000, True, None), 132)
    assert ranges.count * 8 >= 0.9 * plans.DECODE_BLOCKS * 132
    assert plans.decode_ranges(1, 17, 1, 1, 100, 64, 2, (0, 99), 132) is None  # not few
    assert plans.decode_ranges(1, 1, 1, 1, 100, 136, 2, (0, 99), 132) is None
    assert plans.decode_ranges(1, 1, 1, 1, 100, 6, 4, (0, 99), 132) is None


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 2, 100])
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 5), (3, 9), (9, 4)])
def test_a_band_is_what_the_masks_say(q_len, k_len, window, causal):
    low, high = plans.band(q_len, k_len, causal, window)
    i, j = np.arange(q_len)[:, None], np.arange(k_len)[None]
    wanted = np.ones((q_len, k_len), bool)
    if causal:
        wanted &= j <= i + k_len - q_len
    if window is not None:
        wanted &= abs(j - (i + k_len - q_len)) <= window
    np.testing.assert_array_equal((i + low <= j) & (j <= i + high), wanted)
    assert low >= -(2**30)
    assert high <= 2**30


def test_aligned_rows_start_at_multiples_of_16_bytes():
    assert plans.aligned(1024, (128, 8, 16, 1), 2)
    assert not plans.aligned(1026, (128, 8, 16, 1), 2)
    assert not plans.aligned(1024, (128, 8, 12, 1), 2)
    assert not plans.aligned(1024, (128, 8, 16, 2), 2)
    assert plans.aligned(1024, (0, 4, 12, 1), 4)
