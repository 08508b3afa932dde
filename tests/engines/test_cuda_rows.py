"""Norms, elementwise ops and convolutions of the CuPy engine: 16 bytes at a time, at the edges of packs and tiles."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cupy_cases import DTYPES, REFERENCE, assert_close, compare, honest_errors, in_dtype, normal
from hypothesis import example, given
from hypothesis import strategies as st

from refimpl.engines.cuda import launch, rows, shapes, tiles
from refimpl.errors import UnsupportedError

PACK = {"float16": 8, "float32": 4, "float64": 2}


@pytest.fixture
def launched(engine, monkeypatch):
    """The kernels that the engine launches, in order."""
    names = []

    def note(source, kernel, x, shape, *arguments, run=engine._launch):
        names.append(kernel)
        run(source, kernel, x, shape, *arguments)

    monkeypatch.setattr(engine, "_launch", note)
    return names


def view(engine, host, offset=0, apart=0):
    """An array on the device that begins `offset` elements behind an aligned address, rows `apart` elements apart."""
    *_, width = host.shape
    wide = np.zeros((*host.shape[:-1], width + offset + apart), host.dtype)
    wide[..., offset : offset + width] = host
    return engine.asarray(wide)[..., offset : offset + width]


def compare_views(engine, op, views, *scalars):
    """`compare` for arrays that lie as given."""
    host = [engine.to_numpy(x) for x in views]
    fast = engine.to_numpy(getattr(engine, op)(*views, *scalars))
    truth = in_dtype(np.float64, getattr(REFERENCE, op), *host, *scalars)
    (error,) = honest_errors(fast.dtype, getattr(REFERENCE, op), *host, *scalars)
    assert_close(fast, truth, error, op)


# --- launch shapes --------------------------------------------------------------------------------------------------


def test_packs_are_read_where_address_stride_and_width_allow():
    assert tiles.pack_elements(2, 64, (512, 64), (1024, 0)) == 8
    assert tiles.pack_elements(4, 64, (512, 64)) == 4
    assert tiles.pack_elements(8, 64, (512, 64)) == 2
    assert tiles.pack_elements(2, 60, (512, 64)) == 1  # the last pack of a row would reach beyond it
    assert tiles.pack_elements(2, 64, (512, 64), (514, 64)) == 1  # begins within 16 bytes
    assert tiles.pack_elements(2, 64, (512, 68)) == 1  # the second row does
    assert tiles.pack_elements(4, 1, (512, 1)) == 1


@given(st.integers(0, 5_000), st.integers(1, 900), st.sampled_from((1, 4)), st.sampled_from((32, 256)))
@example(40_000, 1, 4, 256)
@example(9_000, 257, 4, 256)
@example(1, 100_000, 4, 256)
def test_tiles_cover_every_pack_once(row_count, packs, rows_each, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "THREADS", threads)
        found = tiles.tiles(row_count, packs, rows_each)
    (grid,), (across, down) = found.grid, found.block
    assert across * down <= threads
    chunks = -(-packs // across)  # as tiles.cuh counts
    assert grid % chunks == 0
    step = grid // chunks * down
    assert row_count <= rows_each * step  # no thread has more rows than it reads
    assert step - down < max(row_count, 1)  # nor blocks without any
    assert chunks * across >= packs > (chunks - 1) * across


def test_threads_get_more_rows_once_the_gpu_is_full():
    def rows_of_a_thread(row_count):
        found = tiles.tiles(row_count, 64)
        return row_count / (found.grid[0] * found.block[1])

    assert [rows_of_a_thread(n) for n in (4_096, 8_192, 16_384, 1 << 20)] == [1, 2, 4, 4]


@given(st.integers(1, 5_000), st.integers(1, 9_000), st.sampled_from((tiles.HELD, (4,))))
@example(1, 1_024 * 4, tiles.HELD)
def test_row_holders_hold_the_row_in_as_few_places_as_can_be(row_count, packs, held):
    each, found = tiles.row_holders(row_count, packs, held)
    (grid,), (across, down) = found.grid, found.block
    assert each in held
    assert across % 32 == 0
    assert across <= 1_024
    assert down == 1 or across == 32  # a barrier waits for the whole block
    assert grid * down >= row_count > (grid - 1) * down
    assert across * each >= packs or (across, each) == (1_024, held[-1])
    if across * each >= packs:
        assert all(-(-packs // (32 * other)) * other >= across * each // 32 for other in held if packs <= 1_024 * other)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(256, (1, 32)), (512, (2, 32)), (768, (3, 32)), (1024, (4, 32)), (1280, (1, 160)), (4096, (4, 128)),
     (8192, (4, 256)), (32_768, (4, 1024)), (40_000, (4, 1024))],
)  # fmt: skip
def test_rows_of_models_in_half(width, expected):
    each, found = tiles.row_holders(8_192, width // 8)
    assert (each, found.block[0]) == expected


def test_what_32_bits_cannot_count_is_refused():
    for row_count, packs in ((1 << 30, 1), (1, 1 << 30)):
        with pytest.raises(UnsupportedError, match="2\\^30"):
            tiles.tiles(row_count, packs)
        with pytest.raises(UnsupportedError, match="2\\^30"):
            tiles.row_holders(row_count, packs)


def test_kernels_and_launches_share_their_constants():
    for file, name, value in (("tiles.cuh", "ROWS", tiles.ROWS_EACH), ("convolutions.cu", "RUN", tiles.RUN)):
        (found,) = re.findall(rf"const int {name} = (\d+);", (launch.FOLDER / file).read_text("utf-8"))
        assert int(found) == value


def test_names_of_kernels():
    assert rows.packed("add<T, V>") == ("add<T, V>", "add<T, 1>")
    assert rows.held("norm<T, V, P>")[0] == "norm<T, V, 1>"
    assert rows.held("norm<T, V, P>")[-1] == "norm<T, 1, 4>"
    assert launch.instance("add<T, V>", "float16") == "kernel_add<__half, 8>"
    assert launch.instance("add<T, 1>", "float64") == "kernel_add<double, 1>"


# --- ops ------------------------------------------------------------------------------------------------------------

OPS = {
    "layer_norm": (2, (1e-5,)), "rms_norm": (1, (1e-5,)), "batch_norm": (4, (1e-5,)), "add": (1, (0.5,)),
    "gelu": (0, ()), "gelu_tanh": (0, ()), "silu": (0, ()), "relu": (0, ()), "glu": (0, ()),
    "elu_plus_one": (0, ()),
}  # fmt: skip


def operands(dtype, op, width):
    count, _ = OPS[op]
    columns = [np.abs(normal(dtype, width, seed=7 + i)) + np.asarray(0.5, dtype) for i in range(count)]
    return [normal(dtype, 2, 3, width, size=3.0), *columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_packs_are_used_and_misaligned_views_are_right(engine, launched, op, dtype):
    width = 2 * PACK[dtype] * (2 if op == "glu" else 1)
    host, (_, scalars) = operands(dtype, op, width), OPS[op]
    compare_views(engine, op, [engine.asarray(x) for x in host], *scalars)
    for offset, apart in ((1, 0), (0, 1), (PACK[dtype], 2 * PACK[dtype])):
        compare_views(engine, op, [view(engine, host[0], offset, apart), *map(engine.asarray, host[1:])], *scalars)
    assert [", V" in name for name in launched] == [True, False, False, True], launched
    if len(host) > 1:
        launched.clear()
        compare_views(engine, op, [engine.asarray(host[0]), *(view(engine, x, 1, 1) for x in host[1:])], *scalars)
        assert ", 1" in launched[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_rows_are_held_by_warps_by_blocks_and_read_again(engine, launched, op, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "FULL", 1)  # 4 rows per block
    monkeypatch.setattr(tiles, "ROW_THREADS", 64)
    pack, (_, scalars) = PACK[dtype], OPS[op]
    for packs in (1, 40, 70, 100, 150, 256, 300):  # of 64 threads with 4 packs each
        compare(engine, op, *operands(dtype, op, packs * pack), *scalars)
    assert [name.split(", ")[-1] for name in launched] == ["1>", "2>", "3>", "4>", "3>", "4>", "4>"]
    compare(engine, op, *operands(dtype, op, 301), *scalars)  # single elements, the last 45 read again
    assert launched[-1].endswith("<T, 1, 4>")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("op", ["silu", "add", "batch_norm", "glu"])
def test_a_thread_may_have_several_rows(engine, op, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "FULL", 1)
    monkeypatch.setattr(shapes, "THREADS", 32)
    count, scalars = OPS[op]
    for row_count, width in ((15, 16 * PACK[dtype]), (31, 6), (7, 2 * 40 * PACK[dtype])):
        columns = [np.abs(normal(dtype, width, seed=i)) for i in range(count)]
        compare(engine, op, normal(dtype, row_count, width), *columns, *scalars)
    if op == "add":
        compare(engine, op, normal(dtype, 2, 9, 16), normal(dtype, 9, 16, seed=1), 0.5)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_one_column_and_nan(engine, op):
    count, scalars = OPS[op]
    for row_count, width in ((0, 8), (3, 2 if op == "glu" else 1)):
        columns = [np.abs(normal("float32", width, seed=i)) for i in range(count)]
        compare(engine, op, normal("float32", row_count, width), *columns, *scalars)
    x, *columns = operands("float32", op, 8)
    x[0, 1, 3], x[1, 0, 0] = np.nan, np.inf
    compare(engine, op, x, *columns, *scalars)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_far_from_zero_rows_loses_nothing(engine, dtype):
    x = normal(dtype, 4, 128) + np.asarray(500.0, dtype)
    compare(engine, "layer_norm", x, normal(dtype, 128), normal(dtype, 128), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_read_halves_that_begin_within_a_pack(engine, launched, dtype):
    pack = PACK[dtype]
    for width, packed in ((2 * pack, True), (2 * pack + 1, False)):
        x = normal(dtype, 3, 2 * width, size=4.0)
        compare(engine, "glu", x)
        compare_views(engine, "swiglu", [engine.asarray(x)[:, :width], engine.asarray(x)[:, width:]])
        assert [", V" in name for name in launched[-2:]] == [packed, packed]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table_are_copied(engine, launched, dtype):
    ids = np.array([[0, 10, 3, 3], [7, 1, 10, 0]])
    for width in (2 * PACK[dtype], 5):
        compare(engine, "embedding", normal(dtype, 11, width), ids)
    assert launched == ["gather<T, V>", "gather<T, 1>"]
    table, ids = normal(dtype, 11, 16), np.array([[0, 3], [8, 8]], np.int32)
    found = engine.embedding(view(engine, table, 1)[2:], engine.asarray(ids))
    np.testing.assert_array_equal(engine.to_numpy(found), table[2:][ids])
    assert launched[-1] == "gather<T, 1>"


def test_a_row_that_is_not_there_is_nan(engine):
    table, ids = engine.asarray(normal("float32", 5, 8))[1:4], engine.asarray(np.array([2, 3, -1]))
    missing = np.isnan(engine.to_numpy(engine.embedding(table, ids)))
    np.testing.assert_array_equal(missing, [[False] * 8, [True] * 8, [True] * 8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_fills_what_the_product_is_added_to(engine, launched, dtype):
    for d_out in (3 * PACK[dtype], 7):
        x, weight, bias = normal(dtype, 2, 3, 8), normal(dtype, d_out, 8), normal(dtype, d_out, size=4.0)
        compare(engine, "linear", x, weight, bias)
    assert launched == ["repeat<T, V>", "repeat<T, 1>"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_packs_of_pairs(engine, launched, interleaved, dtype):
    for half in (PACK[dtype], 3 * PACK[dtype], 3):
        angles = np.random.default_rng(1).uniform(-3, 3, (5, half))
        cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        flat = normal(dtype, 2, 5, 3 * 2 * half)
        turned = engine.rotary(
            engine.split_heads(engine.asarray(flat), 3), engine.asarray(cos), engine.asarray(sin), interleaved
        )

        def reference(x, cos, sin):
            return REFERENCE.rotary(REFERENCE.split_heads(x, 3), cos, sin, interleaved)

        (error,) = honest_errors(dtype, reference, flat, cos, sin)
        truth = in_dtype(np.float64, reference, flat, cos, sin)
        assert_close(engine.to_numpy(turned), truth, error, "rotary of heads")
        compare(engine, "rotary", normal(dtype, 1, 2, 5, 2 * half), cos, sin, interleaved)
    assert launched == ["rotary<T, V>"] * 4 + ["rotary<T, 1>"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "kernel"), [(9, 5), (3, 31), (8, 4), (1, 1), (6, 2)])
def test_depthwise_runs_of_packs_are_accurate(engine, launched, length, kernel, dtype):
    for width in (2 * PACK[dtype], 3):
        weight = normal(dtype, kernel, width, size=0.3)
        compare(engine, "depthwise_conv", normal(dtype, 2, length, width), weight, normal(dtype, width))
    assert launched == ["depthwise<T, V>", "depthwise<T, 1>"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_windows_of_packs_are_accurate(engine, launched, dtype):
    for width in (2 * PACK[dtype], 5):
        weight = normal(dtype, 5, 3, width, size=0.3)
        compare(engine, "conv1d", normal(dtype, 2, 9, width), weight, normal(dtype, 5), 2)
    assert [name for name in launched if name.startswith("windows")] == ["windows<T, V>", "windows<T, 1>"]
