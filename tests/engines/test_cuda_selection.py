"""Selection, refinement, softmax of long rows, look-ups and copies of the CuPy engine, where they cross blocks.

The rule is in `cupy_cases`. Blocks are made small, so that short rows are shared by many of them.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
from cuda_emulation import HostCupy
from cupy_cases import DTYPES, REFERENCE, compare, largest, normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from memo_data import ExactIndex

from refimpl.engines.cuda import selection, shapes, stored
from refimpl.errors import ShapeError
from refimpl.methods.svd_softmax import mixed_logits


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two warps that take 64 numbers or points at a time."""
    monkeypatch.setattr(shapes, "THREADS", 64)
    monkeypatch.setattr(selection, "LEAST_SPAN", 64)
    monkeypatch.setattr(stored, "LEAST_POINTS", 5)


def first_of_a_sort(z, n):
    """By a stable sort of the whole row: of equal numbers the first."""
    return np.sort(np.argsort(-z, axis=-1, kind="stable")[..., :n], axis=-1)


# --- top ------------------------------------------------------------------------------------------------------------

LONG = 700  # eleven blocks, the last of them shorter
RNG = np.random.default_rng(0)
ROWS = {
    "normal": RNG.standard_normal(LONG),
    "rising": np.arange(LONG) / 7,
    "falling": -np.arange(LONG) / 7,
    "equal": np.full(LONG, -3.0),
    "few values": RNG.integers(-2, 3, LONG).astype(float),
    "close together": 1 + RNG.integers(0, 40, LONG) * 2.0**-10,  # they differ in the last digits alone
    "zeros of both signs": np.where(RNG.random(LONG) < 0.5, -0.0, 0.0),
    "infinities": np.where(RNG.random(LONG) < 0.3, -np.inf, np.where(RNG.random(LONG) < 0.2, np.inf, 1.0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 43, LONG - 1, LONG])
def test_top_of_rows_that_blocks_share(engine, small_blocks, n, dtype):
    z = np.stack(list(ROWS.values())).astype(dtype)
    ids = engine.to_numpy(engine.top(engine.asarray(z), n))
    assert ids.dtype == np.int64
    for name, found, wanted in zip(ROWS, ids, first_of_a_sort(z, n), strict=True):
        np.testing.assert_array_equal(found, wanted, f"{name}, n={n}")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    z=npst.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        npst.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.integers(-2, 2) | st.floats(-100, 100, width=16) | st.sampled_from([-np.inf, 0.0, -0.0, np.inf]),
    ),
    part=st.floats(0, 1),
)
def test_top_is_the_beginning_of_a_stable_sort(engine, small_blocks, z, part):
    n = 1 + int(part * (z.shape[-1] - 1))
    np.testing.assert_array_equal(engine.to_numpy(engine.top(engine.asarray(z), n)), first_of_a_sort(z, n))


def test_top_of_strided_rows_and_of_more_rows_than_are_counted_at_a_time(engine, small_blocks, monkeypatch):
    z = normal("float32", 2, 5, 300)
    view = engine.asarray(z)[..., 17:260]
    monkeypatch.setattr(shapes, "SCRATCH_BYTES", 4 * selection.BINS * selection.digit_count(4) * 3)  # three rows
    np.testing.assert_array_equal(engine.to_numpy(engine.top(view, 9)), first_of_a_sort(z[..., 17:260], 9))
    uneven = engine.asarray(z)[:, ::2, ::2]
    np.testing.assert_array_equal(engine.to_numpy(engine.top(uneven, 9)), first_of_a_sort(z[:, ::2, ::2], 9))


@pytest.mark.parametrize("n", [0, 10])
def test_top_refuses_more_numbers_than_there_are(engine, n):
    with pytest.raises(ShapeError, match=rf"\(2, 9\); it has no {n} numbers"):
        engine.top(engine.asarray(normal("float32", 2, 9)), n)


@pytest.mark.parametrize("rows", [1, 2, 64, 10_000])
@pytest.mark.parametrize("width", [1, 50, 4096, 4097, 50_257, 800_000])
def test_blocks_share_a_row_in_stretches_of_whole_warps(rows, width):
    blocks, span, launch = selection.blocks_of_rows(rows, width)
    assert launch.grid == (rows * blocks,)
    assert span % launch.block[0] == 0
    assert (blocks - 1) * span < width <= blocks * span
    assert blocks == 1 or span >= selection.LEAST_SPAN / 2
    if width == 800_000:
        assert rows * blocks >= 132  # every multiprocessor of an H100 has one


@pytest.mark.parametrize(("itemsize", "digits"), [(2, 2), (4, 3), (8, 6)])
def test_digits_cover_a_number(itemsize, digits):
    assert selection.digit_count(itemsize) == digits
    assert (digits - 1) * selection.DIGIT < 8 * itemsize <= digits * selection.DIGIT


# --- refine ---------------------------------------------------------------------------------------------------------


def check_refined(engine, z, ids, weight, g, replace, dtype):
    """The rule for the candidates of each row, and nothing else changed; arrays as the device has them."""
    before = [engine.to_numpy(x) for x in (z, ids, weight, g)]
    assert engine.refine(z, ids, weight, g, replace) is z
    found = engine.to_numpy(z).astype(np.float64)
    wide = [x if x.dtype.kind == "i" else x.astype(np.float64) for x in before]
    truth = REFERENCE.refine(wide[0].copy(), *wide[1:], replace)
    honest = REFERENCE.refine(before[0].copy(), *before[1:], replace)
    bound = 2 * largest(honest - truth) + 4 * float(np.finfo(dtype).eps) * largest(truth)
    assert largest(found - truth) <= bound
    untouched = np.ones(found.shape, bool)
    np.put_along_axis(untouched, before[1], False, -1)
    np.testing.assert_array_equal(found[untouched], before[0][untouched])


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("depth", [1, 24, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refine_of_more_candidates_than_a_block_has(engine, small_blocks, dtype, depth, replace):
    """24 and 150 numbers a row are read 16 bytes at a time or one by one, by dtype."""
    rng = np.random.default_rng(1)
    ids = np.stack([np.sort(rng.permutation(60)[:19]) for _ in range(6)]).reshape(2, 3, 19)
    z, weight, g = normal(dtype, 2, 3, 60), normal(dtype, 60, depth), normal(dtype, 2, 3, depth)
    check_refined(engine, *(engine.asarray(x) for x in (z, ids, weight, g)), replace, dtype)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_refine_reads_views_of_any_alignment(engine, start):
    ids, z = np.array([[7, 3, 39, 0, 11]]), engine.asarray(normal("float32", 1, 80))[:, 20:60]
    weight, g = (
        engine.asarray(normal("float32", 40, 32))[:, start : start + 16],
        engine.asarray(normal("float32", 1, 24)),
    )
    check_refined(engine, z, engine.asarray(ids), weight, g[:, 4:20], False, "float32")


def test_refine_leaves_ids_out_that_are_no_rows(engine):
    z, weight, g = normal("float32", 1, 5), normal("float32", 5, 8), normal("float32", 1, 8)
    found, wanted = engine.asarray(z), REFERENCE.refine(z.copy(), np.array([[0, 4]]), weight, g)
    engine.refine(found, engine.asarray(np.array([[0, -1, 5, 4]])), engine.asarray(weight), engine.asarray(g))
    np.testing.assert_allclose(engine.to_numpy(found), wanted, rtol=1e-5)


def test_a_head_of_preview_selection_and_full_view_waits_for_nothing(emulated, small_blocks, monkeypatch):
    """No function of CuPy but those that make arrays: one that looks at results on the host would wait."""
    called = set()
    found = HostCupy.__getattr__

    def noting(self, name):
        called.add(name)
        return found(self, name)

    head = types.SimpleNamespace(
        rotation=normal("float32", 16, 16), preview=normal("float32", 300, 4), full_view=normal("float32", 300, 12)
    )
    on = types.SimpleNamespace(**{name: emulated.asarray(x) for name, x in vars(head).items()})
    h = normal("float32", 2, 3, 16)
    given_h = emulated.asarray(h)
    monkeypatch.setattr(HostCupy, "__getattr__", noting)
    monkeypatch.setattr(HostCupy, "asnumpy", None)
    logits = mixed_logits(emulated, given_h, on, 20)
    assert called <= {"ascontiguousarray"}
    monkeypatch.undo()
    exact = mixed_logits(REFERENCE, *(h.astype(np.float64),), types.SimpleNamespace(
        **{name: x.astype(np.float64) for name, x in vars(head).items()}
    ), 20)  # fmt: skip
    np.testing.assert_allclose(emulated.to_numpy(logits), exact, atol=1e-4)


# --- softmax of long rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_of_rows_that_blocks_share(engine, small_blocks, dtype, monkeypatch):
    monkeypatch.setattr(selection, "LONG_ROW", 200)
    launched = []
    run = engine._launch
    monkeypatch.setattr(
        engine, "_launch", lambda source, kernel, *rest: (launched.append(kernel), run(source, kernel, *rest))
    )
    scores = normal(dtype, 1, 5, 1, 333, size=5.0)
    scores[:, 1] += 400  # far from the others
    scores[:, 2, 0, 40:] = -np.inf  # most blocks see nothing
    scores[:, 3] = -np.inf
    scores[:, 4, 0, 7] = np.inf
    compare(engine, "softmax", scores[:, :4])
    compare(engine, "softmax", np.concatenate([scores[:, :1] * np.array(np.nan, dtype), scores[:, 4:]], axis=1))
    assert set(launched) == {"part_sums<T, A>", "long_softmax<T, A>"}
    launched.clear()
    compare(engine, "softmax", scores[:, :1], True)  # one row sees all, but a kernel that knows of masks is asked
    assert set(launched) == {"softmax<T, T>"}


# --- look-ups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 5), (3, 128), (64, 40), (131, 33)])
def test_nearest_among_points_that_blocks_share(engine, small_blocks, count, width, dtype):
    x, points = normal(dtype, 4, width), normal(dtype, count, width)
    x[0], x[1] = points[-1], points[count // 2]  # of the last block, and of one between
    distances, rows = (engine.to_numpy(a) for a in engine.nearest(engine.asarray(x), engine.asarray(points)))
    truth = np.linalg.norm(x[:, None].astype(np.float64) - points.astype(np.float64), axis=-1)
    tolerance = 20 * float(np.finfo(dtype).eps)  # rounding may decide between near ties
    assert rows.dtype == np.int64
    np.testing.assert_allclose(truth[range(4), rows], truth.min(1), rtol=tolerance)
    np.testing.assert_allclose(distances, truth.min(1), rtol=tolerance)


def test_nearest_takes_the_first_of_equal_points_and_a_point_that_is_not_a_number(engine, small_blocks):
    points = np.tile(normal("float32", 3, 8), (20, 1))  # every point twenty times, in different blocks
    x = engine.asarray(points[[2, 0]])
    distances, rows = (engine.to_numpy(a) for a in engine.nearest(x, engine.asarray(points)))
    assert rows.tolist() == [2, 0]
    assert distances.tolist() == [0, 0]
    points[[33, 50], 3] = np.nan  # as NumPy's argmin does: what is no number comes before all
    distances, rows = (engine.to_numpy(a) for a in engine.nearest(x, engine.asarray(points)))
    assert rows.tolist() == [33, 33] == REFERENCE.nearest(points[[2, 0]], points)[1].tolist()
    assert np.isnan(distances).all()


def test_nearest_reads_strided_rows(engine, small_blocks):
    x, points = normal("float32", 3, 20), normal("float32", 30, 20)
    distances, rows = engine.nearest(engine.asarray(x)[:, 4:14], engine.asarray(points)[::2, 4:14])
    wanted = REFERENCE.nearest(x[:, 4:14], points[::2, 4:14])
    np.testing.assert_array_equal(engine.to_numpy(rows), wanted[1])
    np.testing.assert_allclose(engine.to_numpy(distances), wanted[0], rtol=1e-5)
    none = engine.nearest(engine.asarray(x[:0]), engine.asarray(points))
    assert [part.shape for part in none] == [(0,), (0,)]


@pytest.mark.parametrize("count", [1, 64, 65, 100_000])
def test_points_are_shared_without_empty_blocks(count):
    blocks, span, launch = stored.blocks_of_points(count)
    assert launch.grid == (blocks,)
    assert (blocks - 1) * span < count <= blocks * span
    assert blocks <= shapes.BLOCKS


# --- copies ---------------------------------------------------------------------------------------------------------


class Records:
    """What `fetch` reads of a database."""

    def __init__(self, maps):
        self.array, self.layout = maps, types.SimpleNamespace(shape=maps.shape[1:], dtype=maps.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1,), (3, 7), (2, 16, 16), (2, 40, 40)], ids=str)
def test_records_are_copied_whole(engine, small_blocks, size, dtype):
    """A record of one number, of odd size, of one block and of several."""
    maps, new = normal(dtype, 6, *size), normal(dtype, 2, *size, seed=1)
    device = engine.asarray(maps)
    np.testing.assert_array_equal(engine.to_numpy(engine.take_rows(device, (5, 0, 0))), maps[[5, 0, 0]])
    assert engine.take_rows(device, ()).shape == (0, *size)
    np.testing.assert_array_equal(engine.to_numpy(engine.take_rows(device[1:], (4,))), maps[[5]])
    assert engine.scatter(device, engine.asarray(new), (4, 1)) is device
    wanted = maps.copy()
    wanted[[4, 1]] = new
    np.testing.assert_array_equal(engine.to_numpy(device), wanted)
    for rows in ((6,), (-1,)):
        with pytest.raises(ShapeError, match="take_rows"):
            engine.take_rows(device, rows)
    with pytest.raises(ShapeError, match="row-major"):
        engine.scatter(device[::2], engine.asarray(new), (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_on_the_host_is_asked_for_features_of_the_device(engine, dtype):
    x, index = normal(dtype, 3, 6), ExactIndex(normal(dtype, 7, 6, seed=1))
    for found, wanted in zip(engine.search_graph(engine.asarray(x), index), index.search(x), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(engine.to_numpy(found), wanted)


@pytest.mark.parametrize("staging", [1, 4 * 18 * 2, 1 << 20])
def test_fetch_gathers_from_the_host_and_from_the_device_alike(engine, monkeypatch, staging):
    """By pieces of one record, of two and at once; batch rows that miss lie between those that hit."""
    monkeypatch.setattr(stored, "STAGING_BYTES", staging)
    records = Records(normal("float32", 9, 2, 3, 3))
    rows = (3, 8, None, None, 0, 3, 1, None)
    hits = [b for b, row in enumerate(rows) if row is not None]
    wanted = records.array[[row for row in rows if row is not None]]
    from_host = engine.to_numpy(engine.fetch(records, rows, "copy"))
    np.testing.assert_array_equal(from_host[hits], wanted)
    assert engine.fetch(Records(np.zeros((4, 0, 3), np.float32)), (1,), "copy").shape == (1, 0, 3)
    monkeypatch.setattr(engine, "free_bytes", lambda: records.array.nbytes)
    assert not engine.hold_records(records)
    monkeypatch.setattr(engine, "free_bytes", lambda: 2 * records.array.nbytes)
    assert engine.hold_records(records)
    monkeypatch.setattr(engine, "_send", None)  # the host is not asked any more
    np.testing.assert_array_equal(engine.to_numpy(engine.fetch(records, rows, "copy"))[hits], wanted)
    for row in (9, -1):
        with pytest.raises(ShapeError, match=f"fetch: record {row} of 9"):
            engine.fetch(records, (row,), "copy")
    assert engine.fetch(records, (), "copy").shape == (0, 2, 3, 3)


def test_a_database_on_the_device_goes_with_its_records(engine, monkeypatch):
    monkeypatch.setattr(engine, "free_bytes", lambda: 1 << 20)
    records = Records(normal("float32", 2, 4))
    before = len(engine._resident)
    engine.hold_records(records)
    assert len(engine._resident) == before + 1
    del records
    assert len(engine._resident) == before


def test_memory_that_is_being_sent_is_not_written_to(engine, monkeypatch):
    """The second fetch waits for the event of the first before it fills the same pinned memory."""
    order = []
    staged = engine._pinned

    def pinned(size):
        before = engine._staging
        if before is not None and before[1] is not None:
            waits = before[1].synchronize
            engine._staging = before[0], types.SimpleNamespace(synchronize=lambda: (order.append("waited"), waits()))
        memory = staged(size)
        order.append("written to")
        return memory

    monkeypatch.setattr(engine, "_staging", None)
    monkeypatch.setattr(engine, "_pinned", pinned)
    records = Records(normal("float32", 3, 4))
    for row in (0, 1):
        engine.fetch(records, (row,), "copy")
    assert order == ["written to", "waited", "written to"]


@pytest.mark.parametrize(
    ("places", "wanted"),
    [([], []), ([4], [(0, 1)]), ([0, 1, 2], [(0, 3)]), ([3, 4, 7, 9, 10], [(0, 2), (2, 3), (3, 5)])],
)
def test_runs_are_stretches_that_follow_each_other(places, wanted):
    assert stored.runs(places) == wanted


@pytest.mark.parametrize("words", [1, 1024, 1025, 786_432 // 16])
def test_blocks_cover_a_record(words):
    blocks, launch = stored.blocks_of_record(3, words)
    assert launch.grid == (3 * blocks,)
    assert (blocks - 1) * launch.block[0] * stored.COPIES < words <= blocks * launch.block[0] * stored.COPIES
