"""Records as one batch: mapped and copied are the same bits, and a mapping lives as long as its arrays."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.errors import UnsupportedError
from refimpl.memo import mapping
from refimpl.memo.database import Database, Writer
from refimpl.memo.mapping import gather

WHOLE_PAGES, PADDED = (4, 32, 32), (3, 20, 20)  # 16384 and 4800 bytes of float32
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped on Linux")


@pytest.fixture(scope="module", params=[WHOLE_PAGES, PADDED], ids=["whole pages", "padded"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    folder = tmp_path_factory.mktemp("mapping") / "db"
    with Writer(folder, {}, durable=False) as writer:
        writer.append("maps-0", np.random.default_rng(0).random((9, *request.param)).astype(np.float32), aligned=True)
        writer.commit()
    with Database(folder) as opened:
        yield opened


def shows_records(address: int) -> bool:
    """Whether a page of the file is mapped at this address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return "maps-0" in line
    return False


@linux
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.none() | st.integers(0, 8), max_size=12))
def test_mapped_and_copied_batches_are_the_same_bits(database: Database, rows: list[int | None]) -> None:
    """Any rows in any order, repeated ones and holes among them."""
    records = database.records("maps-0")
    mapped, copied = gather(records, rows, "map"), gather(records, rows, "copy")
    assert mapped.shape == copied.shape == (len(rows), *records.layout.shape)
    assert mapped.dtype == copied.dtype
    for b, row in enumerate(rows):
        if row is not None:
            assert mapped[b].tobytes() == copied[b].tobytes() == records.array[row].tobytes()


@linux
def test_a_batch_of_whole_pages_is_contiguous_and_a_padded_one_has_gaps(database: Database) -> None:
    records = database.records("maps-0")
    batch = gather(records, [3, 1], "map")
    assert batch.flags.c_contiguous == (records.layout.stride == records.layout.record_bytes)
    assert batch[0].flags.c_contiguous
    assert batch.strides[0] == records.layout.stride


@linux
def test_a_batch_without_holes_cannot_be_written_to(database: Database) -> None:
    batch = gather(database.records("maps-0"), [3, 1], "map")
    with pytest.raises(ValueError, match="read-only"):
        batch[0] = 0


@linux
def test_what_is_written_into_a_batch_with_holes_stays_there(database: Database) -> None:
    records = database.records("maps-0")
    before = records.array.copy()
    batch = gather(records, [3, None, 3], "map")
    batch[1] = 7
    batch[0, 0] = 8  # a record: no caller does, and the file must not notice
    assert np.all(batch[1] == 7)
    assert batch[2].tobytes() == before[3].tobytes()
    assert records.array.tobytes() == before.tobytes()


@linux
def test_a_mapping_lives_as_long_as_its_arrays(database: Database) -> None:
    records = database.records("maps-0")
    batch = gather(records, [5, 2, 8], "map")
    address = batch.__array_interface__["data"][0]
    part = batch[1:, 1]
    del batch
    gc.collect()
    assert shows_records(address)
    assert part.tobytes() == records.array[[2, 8], 1].tobytes()
    del part
    gc.collect()
    assert not shows_records(address)


@linux
def test_a_mapping_outlives_the_database(tmp_path: Path) -> None:
    with Writer(tmp_path / "db", {}, durable=False) as writer:
        writer.append("maps-0", np.ones((2, *WHOLE_PAGES), np.float32), aligned=True)
        writer.commit()
    with Database(tmp_path / "db") as database:
        batch = gather(database.records("maps-0"), [1, 0], "map")
    for path in (tmp_path / "db").iterdir():
        path.unlink()
    assert np.all(batch == 1)


@linux
def test_many_batches_leave_nothing_mapped(database: Database) -> None:
    records = database.records("maps-0")
    gather(records, [0, 1], "map")
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(300):
        gather(records, [0, 4, None, 8], "map")
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 20


@linux
@pytest.mark.parametrize("row", [-1, 9])
def test_rows_that_do_not_exist_are_refused(database: Database, row: int) -> None:
    """A page behind the end of the file would end the process."""
    with pytest.raises(IndexError, match=f"record {row} of 9"):
        gather(database.records("maps-0"), [0, row], "map")


def test_where_pages_cannot_be_mapped_it_says_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    records = database.records("maps-0")
    monkeypatch.setattr(mapping.mmap, "PAGESIZE", 1 << 20)
    with pytest.raises(UnsupportedError, match="give transfer='copy'"):
        gather(records, [0], "map")
    assert gather(records, [0], "copy").tobytes() == records.array[:1].tobytes()


@linux
def test_a_refused_mapping_raises_and_leaves_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    records = database.records("maps-0")
    real, calls = mapping._map, []

    def fails(*given: int) -> int:
        calls.append(given)
        return real(*given) if len(calls) < 3 else real(*given[:4], 9999, given[5])  # no such descriptor

    monkeypatch.setattr(mapping, "_map", fails)
    with pytest.raises(OSError, match="Bad file descriptor"):
        gather(records, [0, 1], "map")
    monkeypatch.undo()
    gc.collect()
    assert np.array_equal(gather(records, [1], "map"), records.array[1:2])
