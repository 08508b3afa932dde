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
    normal,
    on_device,
    some_mask,
)

from refimpl.engines.cuda import plans
from refimpl.engines.cuda.fused import DECODE, FLOAT, TENSOR
from refimpl.errors import ShapeError


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
    q[0, 1, 66, 0], q[0, 1, 0, 1], q[0, 0, 3, 2] = np.nan, np.nan, np.inf  # the first row must not fill the others
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
    rows = tiles.rows
    (across, *maps), block = tiles.launch.grid, tiles.launch.block
    assert maps == [heads_, batch]
    assert (across - 1) * rows < q_len <= across * rows
    assert block == (128,)
    assert int(tiles.kernel[6:].split(",")[0]) >= width
    assert tiles.kernel in TENSOR.kernels
    assert tiles.launch.shared_bytes <= (227 << 10) // 2  # two blocks on a multiprocessor of an H100
    assert (rows == 128) == (-(-q_len // 128) * heads_ * batch >= 2 * 132)


def test_tensor_tiles_refuse_what_the_kernel_does_not_take():
    assert plans.tensor_tiles(1, 1, 10, 136, 132) is None
    assert plans.tensor_tiles(65_536, 1, 10, 64, 132) is None
    assert plans.tensor_tiles(1, 1, 10, 66, 132) is None


# --- float32 --------------------------------------------------------------------------------------------------------

# B, H, Hkv, Tq, Tk, D: more than a tile, off the tiles, more keys or more queries, rows not of 16 bytes
FLOAT_SHAPES = [(1, 2, 1, 67, 131, 24), (2, 1, 1, 20, 64, 30), (1, 1, 1, 130, 70, 8), (1, 2, 2, 17, 40, 128)]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", FLOAT_SHAPES, ids=str)
def test_float_attention_is_accurate(engine, launched, shape, causal, masked):
    compare(engine, "attention", *heads("float32", shape), None, causal, some_mask(shape) if masked else None)
    compare(engine, "local_attention", *heads("float32", (1, 2, 1, 70, 140, 8)), 33, 0.4, causal)
    assert engine.capability() < 80 or {name.partition("<")[0] for name in launched} == {"fused_float"}


def test_float_attention_with_growing_logits_nan_and_other_strides(engine, launched):
    q, k, v = heads("float32", (2, 4, 2, 70, 150, 8))
    q, k = abs(q), abs(k) * (1 + np.arange(150, dtype=np.float32)[:, None] // 64)
    compare(engine, "attention", q, k, v, 1.0)
    compare(engine, "attention", q, k, v, -1.0)
    turned = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    given = [engine.asarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in turned]
    whole = engine.attention(*on_device(engine, (q, k, v)))
    np.testing.assert_array_equal(engine.to_numpy(engine.attention(*given)), engine.to_numpy(whole))
    assert engine.merge_heads(whole).data.ptr == whole.data.ptr
    q[0, 1, 66, 0] = np.nan
    compare(engine, "attention", q, k, v)


def test_float_attention_leaves_much_work_to_cublas(engine, launched, monkeypatch):
    monkeypatch.setattr(plans, "FLOAT_FLOPS", 4 * 2 * 20 * 30 * 8 - 1)
    compare(engine, "attention", *heads("float32", (1, 2, 2, 20, 30, 8)))
    assert set(launched) == {"softmax<T, T>"}
    compare(engine, "attention", *heads("float32", (1, 2, 2, 19, 30, 8)))
    assert engine.capability() < 80 or "fused_float<T, 64>" in launched


def test_tiles_that_a_device_has_no_shared_memory_for_take_another_way(engine, launched, monkeypatch):
    monkeypatch.setattr(engine, "block_shared_bytes", lambda: 99 << 10)  # compute capability 8.6 and 8.9
    compare(engine, "attention", *heads("float32", (1, 1, 1, 20, 30, 128)))
    assert set(launched) == {"softmax<T, T>"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_devices_without_asynchronous_copies_take_another_way(engine, launched, monkeypatch, dtype):
    monkeypatch.setattr(engine, "capability", lambda: 75)
    compare(engine, "attention", *heads(dtype, (1, 2, 2, 20, 30, 32)), causal=True)
    assert not [kernel for kernel in launched if kernel.startswith("fused")]


def test_float_tiles_cover_the_queries():
    for q_len in (1, 64, 65, 300):
        tiles = plans.float_tiles(2, 3, q_len, 100, 80)
        assert tiles.kernel == "fused_float<T, 128>"
        assert tiles.kernel in FLOAT.kernels
        assert tiles.launch.grid == (-(-q_len // 64), 3, 2)
        assert tiles.launch.shared_bytes <= 164 << 10  # of an A100
    assert plans.float_tiles(1, 12, 128, 128, 64).launch.shared_bytes * 2 <= 227 << 10
    assert plans.float_tiles(1, 12, 4096, 4096, 64) is None
    assert plans.float_tiles(1, 1, 10, 10, 129) is None
    assert plans.float_tiles(65_536, 1, 1, 1, 8) is None


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
    assert count == 1 or count * blocks * batch <= full  # all blocks run at once


def test_decode_ranges_fill_the_device_where_keys_suffice():
    ranges = plans.decode_ranges(1, 32, 8, 1, 100_000, 128, 2, plans.band(1, 100_000, True, None), 132)
    assert ranges.count * 8 >= 0.9 * plans.DECODE_BLOCKS * 132
    assert plans.decode_ranges(1, 17, 1, 1, 100, 64, 2, (0, 99), 132) is None  # not few
    assert plans.decode_ranges(1, 1, 1, 1, 100, 136, 2, (0, 99), 132) is None
    assert plans.decode_ranges(1, 1, 1, 1, 100, 6, 4, (0, 99), 132) is None


# --- softmax of rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 24, 37, 512, 513, 1040, 16_392, 16_397])
def test_softmax_is_accurate_in_every_team(engine, launched, keys, dtype):
    """A warp, a block and more than a block holds; rows that move 16 bytes at a time and rows that do not."""
    scores = normal(dtype, 1, 1, 2 if keys > 10_000 else 9, keys, size=6.0)
    scores[0, 0, 1, keys // 2 :] = -np.inf
    compare(engine, "softmax", scores)
    compare(engine, "softmax", scores, True)
    assert ("softmax_long<T, T>" in launched) == (keys > 16_384)
    assert ("softmax<T, T>" in launched) == (keys <= 16_384)


def masked_softmax(scores, mask):
    """Each row over what it sees, zeros elsewhere."""
    out = np.zeros_like(scores)
    for index in np.ndindex(scores.shape[:-1]):
        seen = np.broadcast_to(mask, scores.shape)[index]
        if seen.any():
            powers = np.exp(scores[index][seen] - scores[index][seen].max())
            out[index][seen] = powers / powers.sum()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [40, 16_400])
def test_softmax_under_a_mask_and_with_nan(engine, keys, dtype):
    scores, mask = normal(dtype, 2, 2, 3, keys, size=3.0), np.random.default_rng(0).random((2, 1, 3, keys)) < 0.5
    mask[0, 0, 1] = False
    scores[1, 1, 2, np.flatnonzero(mask[1, 0, 2])[0]] = np.nan  # seen: the row is NaN where it is seen
    scores[0, 0, 0, np.flatnonzero(~mask[0, 0, 0])[0]] = np.nan  # hidden: not read
    wide = engine.asarray(scores.astype(np.promote_types(dtype, "float32")))
    for given in (engine.asarray(scores), wide):
        out = engine.xp.empty(scores.shape, dtype)
        engine._softmax(given, out, keys, 0, engine.asarray(mask))
        found = engine.to_numpy(out)
        truth, honest = (masked_softmax(scores.astype(kind), mask) for kind in (np.longdouble, given.dtype))
        assert_close(found, truth, largest(honest[np.isfinite(truth)] - truth[np.isfinite(truth)]), "softmax")


@pytest.mark.parametrize("keys", [*range(1, 40), 511, 512, 513, 1024, 1025, 16_384, 16_385])
@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_softmax_rows_hold_every_number_once(rows, keys):
    launch = plans.softmax_rows(rows, keys)
    if keys > plans.HELD * plans.MOST_THREADS:
        assert launch is None
        return
    (grid,), (team, together) = launch.grid, launch.block
    assert team in (32, 64, 128, 256, 512, 1024)
    assert team * plans.HELD >= keys
    assert team == 32 or team * plans.HELD < 2 * keys
    assert together == 1 or team == 32  # teams of many warps meet at the barrier of their block
    assert (grid - 1) * together < rows <= grid * together


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [16, 300])
def test_relative_scores_move_16_bytes_at_a_time(engine, length, dtype):
    compare(engine, "add_relative", normal(dtype, 1, 2, length, length), normal(dtype, 1, 2, length, 2 * length - 1))


# --- speed, beside another kernel on the same device ----------------------------------------------------------------


def median_s(engine, work, repeats=20, calls=5):
    """Seconds of one of a few calls in a row, so that the host is ahead of the device."""
    seconds = []
    for _ in range(3 + repeats):
        start = engine.mark()
        for _ in range(calls):
            work()
        seconds.append(engine.elapsed_s(start, engine.mark()) / calls)
    return float(np.median(seconds[3:]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("keys", [128, 512, 4096, 16_384, 40_000])
def test_softmax_takes_hardly_longer_than_a_copy(gpu, keys, dtype):
    scores = gpu.asarray(normal(dtype, 1, 16, (1 << 24) // keys, keys))  # 0.5 or 1 GiB, ten times any cache
    out = gpu.xp.empty(scores.shape, dtype)
    softmax_s = median_s(gpu, lambda: gpu._softmax(scores, out, keys, 0, None))
    assert median_s(gpu, lambda: gpu.xp.copyto(out, scores)) >= 0.8 * softmax_s


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [4096, 16_384])
def test_tensor_attention_takes_at_most_twice_as_long_as_pytorch(gpu, length, width, causal):
    torch = pytest.importorskip("torch", reason="PyTorch, whose attention is the comparison, is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    q, k, v = (gpu.asarray(normal("float16", 2, 16, length, width, seed=i)) for i in range(3))
    ours_s = median_s(gpu, lambda: gpu.attention(q, k, v, causal=causal))
    theirs = [torch.from_dlpack(x) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    theirs_s = median_s(gpu, lambda: attend(*theirs, is_causal=causal))  # both in the default stream, where events are
    assert ours_s <= 2 * theirs_s


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 40])
def test_what_no_kernel_takes_takes_the_way_by_blocks(engine, launched, q_len, dtype):
    q, k, v = heads(dtype, (2, 4, 2, q_len, 40, 8))
    compare(engine, "attention", q, k, v[..., :5].copy())  # values of another width
    compare(engine, "attention", q, k, v, 0.0)
    compare(engine, "attention", *heads(dtype, (1, 1, 1, q_len, 40, 136)))
    assert {name.partition("<")[0] for name in launched} == {"softmax"}
    for wrong in ((q[..., :4], k, v), (q[:, :3], k, v), (q, k[..., :4], v[..., :4])):
        with pytest.raises((ShapeError, ValueError)):
            engine.attention(*on_device(engine, wrong))


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
