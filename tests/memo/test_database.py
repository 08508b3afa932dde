"""The database of maps: what is committed survives a killed writer, a full disk and a hostile file, or is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import DatabaseError
from refimpl.memo.database import Database, Writer
from refimpl.memo.manifest import NAME, PAGE_BYTES

ABOUT = {"model": "random", "length": 6}


def maps(count: int, seed: int = 0, shape: tuple[int, ...] = (2, 6, 6)) -> np.ndarray:
    """Records that differ."""
    return np.random.default_rng(seed).random((count, *shape)).astype(np.float32)


def built(folder: Path, *counts: int) -> np.ndarray:
    """A database with one commit for each count; all its records."""
    with Writer(folder, ABOUT, durable=False) as writer:
        for seed, count in enumerate(counts):
            writer.append("maps-0", maps(count, seed), aligned=True)
            writer.append("points-0", maps(count, seed, (5,)))
            writer.put("network-0", f"weights {seed}".encode())
            writer.commit()
    return np.concatenate([maps(count, seed) for seed, count in enumerate(counts)])


def test_records_come_back_as_they_were_and_begin_at_pages(tmp_path: Path) -> None:
    expected = built(tmp_path / "db", 3, 0, 4)
    with Database(tmp_path / "db", verify=True) as database:
        records = database.records("maps-0")
        assert records.array.tobytes() == expected.tobytes()
        assert not records.array.flags.writeable
        assert records.layout.stride % PAGE_BYTES == 0
        assert len(database.records("points-0")) == len(records) == 7
        assert database.records("points-0").layout.stride == 20
        assert database.file("network-0") == b"weights 2"
        assert database.about == ABOUT
    assert len(list((tmp_path / "db").glob("*.bin"))) == 1  # replaced ones are removed


def test_arrays_outlive_the_database(tmp_path: Path) -> None:
    expected = built(tmp_path / "db", 2)
    with Database(tmp_path / "db") as database:
        array = database.records("maps-0").array
    assert array.tobytes() == expected.tobytes()


def test_what_is_not_committed_does_not_count(tmp_path: Path) -> None:
    built(tmp_path / "db", 3)
    with Writer(tmp_path / "db", durable=False) as writer:
        writer.append("maps-0", maps(5, 9))
        writer.note("profile", {"rate": 1})
        writer.put("network-0", b"other")
        assert writer.count("maps-0") == 8
        with Database(tmp_path / "db", verify=True) as database:
            assert len(database.records("maps-0")) == 3
    with Database(tmp_path / "db", verify=True) as database:
        assert len(database.records("maps-0")) == 3
        assert database.file("network-0") == b"weights 0"
        assert database.notes == {}


def test_what_is_forgotten_counts_until_the_next_commit(tmp_path: Path) -> None:
    built(tmp_path / "db", 3)
    with Writer(tmp_path / "db", durable=False) as writer:
        writer.note("profile", {"rate": 1})
        writer.note("other", 2)
        writer.commit()
        for name in ("network-0", "profile", "absent"):
            writer.forget(name)
        with Database(tmp_path / "db") as before:
            writer.commit()
            assert before.file("network-0") == b"weights 0"  # what was open stays readable
            assert before.notes == {"profile": {"rate": 1}, "other": 2}
    with Database(tmp_path / "db", verify=True) as database:
        assert "network-0" not in database
        assert database.notes == {"other": 2}
        assert len(database.records("maps-0")) == 3
    assert not list((tmp_path / "db").glob("*.bin"))


def test_a_writer_goes_on_behind_what_another_left_uncommitted(tmp_path: Path) -> None:
    built(tmp_path / "db", 3)
    with Writer(tmp_path / "db", durable=False) as writer:
        writer.append("maps-0", maps(5, 9))
    with Writer(tmp_path / "db", durable=False) as writer:
        writer.append("maps-0", maps(1, 10))
        writer.commit()
    with Database(tmp_path / "db", verify=True) as database:
        assert database.records("maps-0").array[3:].tobytes() == maps(1, 10).tobytes()
        size = (tmp_path / "db" / "maps-0.records").stat().st_size
        assert size == 4 * database.records("maps-0").layout.stride


def test_an_open_reader_keeps_its_state_through_later_commits(tmp_path: Path) -> None:
    expected = built(tmp_path / "db", 3)
    with Database(tmp_path / "db") as old:
        with Writer(tmp_path / "db", durable=False) as writer:
            writer.append("maps-0", maps(2, 7))
            writer.put("network-0", b"newer")
            writer.commit()
        old.verify()
        assert old.records("maps-0").array.tobytes() == expected.tobytes()
        assert old.file("network-0") == b"weights 0"
        with Database(tmp_path / "db") as new:
            assert len(new.records("maps-0")) == 5
            assert new.file("network-0") == b"newer"


# --- one writer, killed, beside readers -----------------------------------------------------------------------------

BUILDER = """
import sys
import numpy as np
from refimpl.memo.database import Writer
with Writer(sys.argv[1], {"kind": "endless"}, durable=False) as writer:
    n = writer.count("maps")
    print("ready", flush=True)
    while True:
        for _ in range(n % 3 + 1):
            writer.append("maps", np.full((1, 4, 40, 40), n, np.float32), aligned=True)
            n += 1
        writer.put("state", str(n).encode())
        writer.note("n", n)
        writer.commit()
"""


def builder(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def consistent(folder: Path) -> int:
    """How many records there are, after comparing them with what the builder says that it wrote."""
    with Database(folder, verify=True) as database:
        if "maps" not in database:
            return 0
        array = database.records("maps").array
        assert np.array_equal(array[:, 0, 0, 0], np.arange(len(array)))
        assert np.array_equal(array.min((1, 2, 3)), array.max((1, 2, 3)))
        assert database.notes["n"] == len(array) == int(database.file("state"))
        return len(array)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_builder_leaves_its_last_commit(tmp_path: Path) -> None:
    """Killed at ten moments, each time going on; readers look while it writes and after it died."""
    folder, before = tmp_path / "db", 0
    for round_ in range(10):
        process = builder(folder)
        try:
            time.sleep(0.013 * round_)
            during = consistent(folder)  # two readers beside the writer
            assert consistent(folder) >= during >= before
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        before = consistent(folder)
        assert before >= during
    assert before > 0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such lock")
def test_a_second_writer_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    process = builder(tmp_path / "db")
    try:
        with pytest.raises(DatabaseError, match="another process is writing"):
            Writer(tmp_path / "db")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    Writer(tmp_path / "db").close()


# --- a full disk ----------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
import numpy as np
from refimpl.errors import DatabaseError
from refimpl.memo.database import Database, Writer
folder, room = sys.argv[1], int(sys.argv[2])
with Writer(folder) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        for n in range(100):
            writer.append("maps-0", np.full((1, 2, 6, 6), n, np.float32))
            writer.append("points-0", np.full((1, 5), n, np.float32))
            writer.put("network-0", b"x" * (100 * n))
            writer.commit()
    except DatabaseError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with Database(folder, verify=True) as database:
        print(len(database.records("maps-0")), n)
    writer.append("maps-0", np.full((1, 2, 6, 6), -1, np.float32))  # there is room again
    writer.append("points-0", np.full((1, 5), -1, np.float32))
    writer.commit()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.parametrize("room", [3 * PAGE_BYTES, 5 * PAGE_BYTES + 100, 900])
def test_a_full_disk_loses_nothing_committed(tmp_path: Path, room: int) -> None:
    """Files may grow up to `room` bytes: a record ends within a page, at its end, or a whole file does not fit."""
    expected = built(tmp_path / "db", 3)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "db"), str(room)], capture_output=True, text=True, check=True
    )
    message, counts = done.stdout.splitlines()
    assert re.search(r"cannot write .*\(File too large\); what was committed before is kept", message)
    found, added = map(int, counts.split())
    assert found == 3 + added
    with Database(tmp_path / "db", verify=True) as database:
        array = database.records("maps-0").array
        assert array[:3].tobytes() == expected.tobytes()
        assert array[-1].max() == -1
        assert list(array[3:found, 0, 0, 0]) == list(range(added))


def test_a_writer_that_cannot_flush_does_not_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "db", 3)

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Writer(tmp_path / "db") as writer:
        writer.append("maps-0", maps(1, 4))
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            with pytest.raises(DatabaseError, match="No space left"):
                writer.commit()
        with Database(tmp_path / "db", verify=True) as database:
            assert len(database.records("maps-0")) == 3
        writer.commit()  # once there is room
    with Database(tmp_path / "db", verify=True) as database:
        assert len(database.records("maps-0")) == 4


# --- damaged files --------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["maps-0.records", "points-0.records", "network-0", NAME])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_found(tmp_path: Path, file: str, part: float) -> None:
    built(tmp_path / "db", 3, 2)
    (path,) = (tmp_path / "db").glob(f"{file}*")
    flip(path, int(part * path.stat().st_size))
    with pytest.raises(DatabaseError, match=r"is (damaged|no manifest)|has version") as caught:
        Database(tmp_path / "db", verify=True)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("file", ["maps-0.records", "points-0.records", "network-0", NAME])
@pytest.mark.parametrize("missing", [1, 300, None])
def test_a_short_file_is_refused_when_it_is_opened(tmp_path: Path, file: str, missing: int | None) -> None:
    built(tmp_path / "db", 3, 200)
    (path,) = (tmp_path / "db").glob(f"{file}*")
    os.truncate(path, 0 if missing is None else max(0, path.stat().st_size - missing))
    with pytest.raises(DatabaseError, match=r"is damaged"):
        Database(tmp_path / "db")
    if file.endswith("records"):
        with pytest.raises(DatabaseError, match=r"is damaged"), Writer(tmp_path / "db") as writer:
            writer.append(file.removesuffix(".records"), maps(1, 0, (5,) if "points" in file else (2, 6, 6)))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="holds no database"):
        Database(tmp_path / "none")
    built(tmp_path / "db", 3)
    (tmp_path / "db" / "maps-0.records").unlink()
    with pytest.raises(DatabaseError, match=r"cannot read .*maps-0"):
        Database(tmp_path / "db")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no manifest"),
        ('{"effref": "other"}', "no manifest"),
        ('{"effref": "memo database", "version": 9}', "version 9"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(DatabaseError, match=message):
        Database(tmp_path)


def test_a_manifest_with_an_entry_of_another_kind_is_refused(tmp_path: Path) -> None:
    import zlib

    built(tmp_path, 1)
    document: dict[str, Any] = json.loads((tmp_path / NAME).read_text())
    document["records"]["maps-0"]["segments"] = [3]
    del document["crc32"]
    document["crc32"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    (tmp_path / NAME).write_text(json.dumps(document))
    with pytest.raises(DatabaseError, match="of another kind"):
        Database(tmp_path)


def test_wrong_folders_names_and_shapes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DatabaseError, match=r"not empty \(thesis.txt"):
        Writer(tmp_path / "full", ABOUT)
    with pytest.raises(DatabaseError, match="is no folder"):
        Writer(tmp_path / "absent")
    built(tmp_path / "db", 1)
    with pytest.raises(DatabaseError, match=r"\(length differ\)"):
        Writer(tmp_path / "db", {**ABOUT, "length": 7})
    with Writer(tmp_path / "db", ABOUT) as writer:
        with pytest.raises(DatabaseError, match=r"are float32 \(2, 6, 6\); given are float64"):
            writer.append("maps-0", maps(1).astype(np.float64))
        with pytest.raises(DatabaseError, match="cannot be called"):
            writer.append("../maps", maps(1))
    with Database(tmp_path / "db") as database, pytest.raises(DatabaseError, match="has no maps-1; it holds maps-0"):
        database.records("maps-1")
