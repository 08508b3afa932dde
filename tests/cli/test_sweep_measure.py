"""Measuring sweeps: files that survive a kill, in one process and on a Dask cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import effref as package
import numpy as np
import pytest
from effref import grid, profiles, sweep_measure
from effref.sweep_rows import MEASURE_COLUMNS

from refimpl.engines.recorded_step import RecordedStep
from refimpl.errors import ConfigError, UnsupportedError

from .conftest import error_of, profile
from .test_sweep import _brute, rows_of

GRID = """
[model]
name = "bert-base"
layers = [1, 2]
d_model = 16
heads = 2
d_ff = 8
vocab = 20
[workload]
seq = [4, 6]
[method.reuse]
group = [1, 2]
[method.dense]
"""
FAST = ["--mode", "measure", "--engine", "numpy", "--threads", "1", "--repeats", "1", "--warmup", "0"]


@pytest.fixture(autouse=True)
def known_machine(cache: Path) -> None:
    profiles.save(profile(), "numpy", 1, "float32")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def test_rows_are_what_measure_and_estimate_say(effref, space: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    result = effref("sweep", str(space), *FAST, "--output", str(path))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    rows = rows_of(path.read_text())
    assert list(rows[0]) == list(MEASURE_COLUMNS)
    assert [row["point"] for row in rows] == list(range(12))
    estimates = tmp_path / "estimates.csv"
    local = space.with_name("local.toml")
    local.write_text(GRID + '[hardware]\nname = "local"\n')
    effref("sweep", str(local), "--engine", "numpy", "--threads", "1", "--output", str(estimates))
    for row, expected in zip(rows, rows_of(estimates.read_text()), strict=True):
        assert {name: row[name] for name in expected} == expected
        assert row["rel_error"] == pytest.approx(row["predicted_s"] / row["measured_median_s"] - 1)
        assert row["measured_n"] == 1
        assert row["host"]
        shares = json.loads(row["params"]).get("group") == row["layers"] == 2
        assert (row["rel_l2"] > 1e-4) == shares


def test_what_is_done_is_not_measured_again(effref, space: Path, tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C, then a half-written line as a kill leaves it, then the rest."""
    path, numbers = tmp_path / "x.csv", []
    original = sweep_measure.measure_point

    def measured(point: Any) -> Any:
        if len(numbers) == 5:
            numbers.append(None)
            raise KeyboardInterrupt
        numbers.append(point.number)
        return original(point)

    monkeypatch.setattr(sweep_measure, "measure_point", measured)
    result = effref("sweep", str(space), *FAST, "--output", str(path))
    assert result.exit_code == 130
    assert "interrupted: 5 of 12 points are kept" in result.stderr
    begun = path.read_text()
    assert len(rows_of(begun)) == 5
    path.write_text(begun[:-20])
    result = effref("sweep", str(space), *FAST, "--output", str(path))
    assert result.exit_code == 0, result.stderr
    assert "holds 4 of 12 points" in result.stderr
    assert numbers == [0, 1, 2, 3, 4, None, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [row["point"] for row in rows_of(path.read_text())] == list(range(12))
    assert path.read_text().startswith("".join(begun.splitlines(True)[:5]))
    again = path.read_bytes()
    assert effref("sweep", str(space), *FAST, "--output", str(path)).exit_code == 0
    assert path.read_bytes() == again
    assert len(numbers) == 14


@pytest.mark.parametrize("cut", [1, 30, 700])
def test_a_file_cut_anywhere_is_completed(effref, space: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.csv"
    effref("sweep", str(space), *FAST, "--output", str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] if cut == 1 else whole[:-cut])
    result = effref("sweep", str(space), *FAST, "--output", str(path))
    assert result.exit_code == 0, result.stderr
    assert sorted(row["point"] for row in rows_of(path.read_text())) == list(range(12))


def test_other_grids_options_and_files_are_refused(effref, space: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    assert effref("sweep", str(space), *FAST, "--output", str(path)).exit_code == 0
    kept = path.read_bytes()
    words = ["sweep", str(space), *FAST, "--output", str(path), "--quiet"]
    assert "of another grid, or measured with other options" in error_of(effref(*words, "--seed", "1"))
    assert "holds measured points" in error_of(effref("sweep", str(space), "--output", str(path), "--quiet"))
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("nonsense\n", lines[1], lines[1].replace("0,", "99,", 1), lines[1].replace("false", "no")):
        path.write_text("".join([*lines, damaged]))
        assert "line 14, is damaged" in error_of(effref(*words))
    path.write_text("".join(["a,b\n", *lines[1:]]))
    assert "other columns" in error_of(effref(*words))
    path.write_bytes(kept)
    space.write_text("# a comment changes nothing\n" + GRID)
    assert effref(*words).exit_code == 0
    space.write_text(GRID.replace("group = [1, 2]", "group = [2, 1]"))
    assert "of another grid" in error_of(effref(*words))
    about = Path(f"{path}.sweep.json")
    about.write_text("{}")
    assert "cannot be read" in error_of(effref(*words))
    about.unlink()
    assert "holds no measured points of a sweep" in error_of(effref(*words))
    assert path.read_bytes() == kept


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_begun_before_passes_could_be_recorded_goes_on(
    effref, space: Path, tmp_path: Path, monkeypatch, suffix: str
) -> None:
    """Its checksum knows nothing of them, nor do its columns; what is added to it keeps them."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path, numbers = tmp_path / f"x.{suffix}", []
    text = tmp_path / "x.parquet.rows.csv" if suffix == "parquet" else path
    original = sweep_measure.measure_point
    monkeypatch.setattr(sweep_measure, "measure_point", lambda one: numbers.append(one.number) or original(one))
    words = ["sweep", str(space), *FAST, "--output", str(path)]
    assert effref(*words).exit_code == 0
    about = json.loads(Path(f"{path}.sweep.json").read_text())
    assert about["checksum"] == "52c622b0c67b3087cfcb3c3186b86c4acc65295b6b7e1dd8d538a008d28d6916"  # as it was then
    lines = [line.rsplit(",", 3) for line in text.read_text().splitlines()]
    assert lines[0][1:] == ["l2", "graph", "fuse"]
    assert {tuple(line[1:]) for line in lines[1:]} == {("warm", "false", "false")}
    begun = "".join(line[0] + "\n" for line in lines[:6])
    text.write_text(begun)
    path.touch()
    result = effref(*words, "--pareto", "time,memory", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert "holds 5 of 12 points" in result.stderr
    assert numbers == [*range(12), *range(5, 12)]
    assert text.read_text().startswith(begun)
    assert len(rows_of(text.read_text())) == 12
    assert not {"l2", "graph", "fuse"} & set(rows_of(text.read_text())[-1])
    assert {(row["l2"], row["graph"], row["fuse"]) for row in json.loads(result.stdout)} == {("warm", False, False)}
    if suffix == "parquet":
        from pyarrow import parquet

        assert {row["l2"] for row in parquet.read_table(path).to_pylist()} == {"warm"}


# --- recorded passes ------------------------------------------------------------------------------------------------

STEPS = """
[model]
name = "smollm2-135m"
layers = 2
d_model = 24
heads = 6
kv_heads = 3
d_ff = 20
vocab = 50
[workload]
phase = ["decode"]
kv_len = [4, 9]
[method.dense]
"""
RECORDED = ["--mode", "measure", "--graph", "--threads", "1", "--repeats", "2"]


def test_recorded_steps_are_measured_and_others_left_out(effref, tmp_path: Path, monkeypatch) -> None:
    recorded = []
    original = RecordedStep.__call__
    monkeypatch.setattr(RecordedStep, "__call__", lambda self, ids, at: recorded.append(at) or original(self, ids, at))
    profiles.save(profile(), "numba", 1, "float32")
    space, path = tmp_path / "grid.toml", tmp_path / "x.csv"
    more = STEPS.replace('["decode"]', '["decode", "prefill"]\nsteps = [1, 2]\nseq = 6')
    space.write_text(more + "[method.latte]\n")
    words = ["sweep", str(space), "--output", str(path)]
    result = effref(*words, *RECORDED)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(path.read_text())
    assert [(row["method"], row["phase"], row["kv_len"], row["steps"]) for row in rows] == [
        ("dense", "decode", 4, 1), ("dense", "decode", 9, 1)
    ]  # fmt: skip
    assert recorded == 2 * 3 * [4] + 2 * 3 * [9]  # of dense and flash: a warm-up and two repeats
    assert {(row["l2"], row["graph"], row["fuse"]) for row in rows} == {("warm", True, False)}
    assert all("recorded and run as one compiled call" in row["notes"] for row in rows)
    assert {(row["reference"], row["max_abs"], row["measured_n"]) for row in rows} == {("dense", 0, 2)}
    for reason in (
        "left out 8 of 10 points",
        "2: latte: the step cannot be recorded on the CPU: the op 'quantize' has no instruction",
        "4: --graph replays one pass: give --steps 1",
        "2: --graph is for GPUs and, on the CPU, for decoding",
    ):
        assert reason in result.stderr
    assert "measured with other options" in error_of(effref(*words, "--quiet", *RECORDED[:2], *RECORDED[3:]))


def test_the_public_function_records_too(tmp_path: Path) -> None:
    profiles.save(profile(), "numba", 1, "float32")
    grid = {
        "model": {
            "name": "smollm2-135m",
            "layers": 1,
            "d_model": 24,
            "heads": 6,
            "kv_heads": 3,
            "d_ff": 20,
            "vocab": 50,
        },
        "workload": {"phase": "decode", "kv_len": 4},
        "method": {"dense": {}},
    }
    path = tmp_path / "x.csv"
    package.sweep(grid, path, mode="measure", threads=1, repeats=1, warmup=0, graph=True)
    assert [row["graph"] for row in rows_of(path.read_text())] == [True]
    for given, said in (({"seed": -1}, "seed is -1"), ({"fuse": True}, "--fuse is for the passes of --graph")):
        with pytest.raises(ConfigError, match=said):
            package.sweep(grid, tmp_path / "y.csv", mode="measure", **given)
    assert not (tmp_path / "y.csv").exists()


def test_two_writers_are_kept_apart(effref, space: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    effref("sweep", str(space), *FAST, "--output", str(path))
    axes = grid.read(space)
    checksum = json.loads(Path(f"{path}.sweep.json").read_text())["checksum"]
    words = ["sweep", str(space), *FAST, "--output", str(path), "--quiet"]
    with sweep_measure.Journal(path, checksum, axes):
        assert "another process is measuring into" in error_of(effref(*words))
    assert effref(*words).exit_code == 0


def test_points_that_cannot_be_measured_are_counted(effref, space: Path, tmp_path: Path, monkeypatch) -> None:
    original = package.measure

    def refusing(**given: Any) -> Any:
        if given["seq"] == 6:
            raise UnsupportedError("too little memory")
        return original(**given)

    monkeypatch.setattr("effref.measurement.measure", refusing)
    path = tmp_path / "x.csv"
    result = effref("sweep", str(space), *FAST, "--output", str(path))
    assert result.exit_code == 0
    assert "left out 6 of 12 points" in result.stderr
    assert "6: too little memory" in result.stderr
    assert {row["seq"] for row in rows_of(path.read_text())} == {4}


def test_pareto_of_three_and_parquet(effref, space: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    words = ["sweep", str(space), *FAST, "--output", str(path), "--pareto", "time,memory,fidelity"]
    result = effref(*words, "--format", "json")
    assert result.exit_code == 0, result.stderr
    other = tmp_path / "other.parquet"
    other.write_text("not ours")
    assert "holds no measured points" in error_of(effref("sweep", str(space), *FAST, "--quiet", "--output", str(other)))
    rows = parquet.read_table(path).to_pylist()
    assert rows == rows_of(Path(f"{path}.rows.csv").read_text())
    listed = {row["point"] for row in json.loads(result.stdout)}
    for seq in (4, 6):
        same = [row for row in rows if row["seq"] == seq]
        kept = _brute(np.array([[row["measured_median_s"], row["peak_bytes"], row["rel_l2"]] for row in same]))
        assert {row["point"] for row in same} & listed == {r["point"] for r, k in zip(same, kept, strict=True) if k}
    text = effref(*words).stdout
    assert "error, rel. L2" in text


# --- on a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three worker processes of one thread; their cache holds a profile."""
    distributed = pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFREF_CACHE", str(folder / "cache"))
        for engine in ("numpy", "numba"):
            profiles.save(profile(), engine, 1, "float32")
        with distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(folder)
        ) as started:
            yield started


def test_estimates_on_a_cluster_are_the_same_file(effref, cluster: Any, tmp_path: Path) -> None:
    space = tmp_path / "grid.toml"
    space.write_text('[workload]\nseq = "2^3:2^9"\n[method.dense]\n[method.svd-softmax]\n[hardware]\nname = ["l4"]')
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    assert effref("sweep", str(space), "--output", str(here)).exit_code == 0
    result = effref("sweep", str(space), "--output", str(there), "--cluster", cluster.scheduler_address)
    assert result.exit_code == 0, result.stderr
    assert here.read_bytes() == there.read_bytes()


def test_workers_record_passes_too(effref, cluster: Any, tmp_path: Path) -> None:
    space, path = tmp_path / "grid.toml", tmp_path / "x.csv"
    space.write_text(STEPS)
    result = effref(
        "sweep", str(space), *RECORDED, "--output", str(path), "--cluster", cluster.scheduler_address, "--quiet"
    )
    assert result.exit_code == 0, result.stderr
    rows = rows_of(path.read_text())
    assert sorted((row["kv_len"], row["graph"]) for row in rows) == [(4, True), (9, True)]
    assert all("recorded and run as one compiled call" in row["notes"] for row in rows)


def test_a_killed_worker_loses_and_doubles_nothing(cluster: Any, space: Path, tmp_path: Path) -> None:
    """kill -9 of two workers of three in the middle."""
    path = tmp_path / "x.csv"
    space.write_text(GRID.replace("seq = [4, 6]", "seq = { from = 4, to = 40, step = 6 }"))
    words = [sys.executable, "-m", "effref", "sweep", str(space), *FAST, "--output", str(path), "--cluster"]
    run = subprocess.Popen([*words, cluster.scheduler_address], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not path.exists() or len(path.read_bytes().splitlines()) < 6):
            time.sleep(0.02)
        before = len(path.read_bytes().splitlines())
        for victim in list(cluster.workers.values())[:2]:
            os.kill(victim.pid, signal.SIGKILL)
        _, errors = run.communicate(timeout=100)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0, errors
    points = 6 * 7
    assert before < points  # the kill came in the middle
    rows = rows_of(path.read_text())
    assert sorted(row["point"] for row in rows) == list(range(points))
    assert {row["level"] for row in rows} == {"calibrated"}  # the workers' own profile
    assert all(row["host"] and row["cpu"] and not row["gpu"] for row in rows)


def test_a_machine_measures_one_point_at_a_time() -> None:
    """Also where several worker processes are on it: a lock of the whole machine."""
    from effref.cluster import _alone

    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with _alone():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with _alone():
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_an_interrupted_point_is_not_kept(effref, space: Path, tmp_path: Path, monkeypatch) -> None:
    """`effref.measure` returns what it has when Ctrl-C comes; a row stands for a whole measurement."""
    original, calls = package.measure, []

    def interrupted(**given: Any) -> Any:
        calls.append(given)
        return original(**given) | ({"interrupted": True, "results": []} if len(calls) == 3 else {})

    monkeypatch.setattr("effref.measurement.measure", interrupted)
    path = tmp_path / "x.csv"
    assert effref("sweep", str(space), *FAST, "--output", str(path)).exit_code == 130
    assert [row["point"] for row in rows_of(path.read_text())] == [0, 1]
