"""Grids, their estimates, and what nothing dominates."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import effref as package
import numpy as np
import pytest
from effref import grid, pareto, profiles, sweep_estimate
from effref.sweep_estimate import Estimator
from effref.sweep_rows import ESTIMATE_COLUMNS, MEASURE_COLUMNS, parsed
from effref.sweeping import Plan, estimated, opened
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.errors import ConfigError, EffrefError
from refimpl.methods import CATALOG

from .conftest import error_of, profile

SMALL = """
[model]
name = "bert-base"
layers = [2, 3]
[workload]
seq = [8, 16]
batch = [1, 2]
[method.reuse]
group = [1, 2]
[method.dense]
[hardware]
name = ["xeon-8480", "h100-sxm"]
"""


def rows_of(text: str) -> list[dict[str, Any]]:
    return [{k: parsed(k, v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]


def rows_from(axes: grid.Grid, **given: Any) -> tuple[list[dict[str, Any]], Any]:
    from effref.progress import Progress

    text = io.StringIO()
    with opened(None, text) as writer:
        summary = estimated(Plan(axes, None, "estimate", **given), writer, Progress())
    return rows_of(text.getvalue()), summary


def alone(row: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The figures of a row from `effref.estimate`."""
    lengths = {"kv_len": row["kv_len"], "steps": row["steps"]} if row["phase"] == "decode" else {"seq": row["seq"]}
    sizes = ("layers", "d_model", "heads", "kv_heads", "d_ff", *(("vocab",) if row["vocab"] else ()))
    document = package.estimate(
        row["model"], method=row["method"], params={row["method"]: json.loads(row["params"])}, batch=row["batch"],
        dtype=row["dtype"], phase=row["phase"], causal=row["causal"], **lengths,
        **{"hardware": row["hardware"], "overrides": {name: row[name] for name in sizes}} | given,
    )  # fmt: skip
    (found,) = document["results"]
    return {
        **{name: value for name, value in found["total"].items() if name in ESTIMATE_COLUMNS},
        **{name: found[name] for name in ("params_bytes", "cache_bytes", "peak_bytes", "seq", "device", "engine")},
        **{f"speedup_{name}": ratio["predicted"] for name, ratio in found["speedup"].items()},
    }


# --- rows equal single estimates ------------------------------------------------------------------------------------

AXES = {
    "bert-base": {"layers": (1, 2, 5), "d_ff": (64, 100)},
    "conformer-m": {"layers": (2, 4), "heads": (2, 4)},
    "smollm2-135m": {"layers": (2, 8), "vocab": (1000, 5000)},
    "emformer-rnnt-base": {"layers": (2,)},
}
CHOICES = {
    "reuse": {"group": [1, 2, 3], "share": ["probabilities", "scores"]},
    "folding": {"fold": [1, 2], "fused": [False, True]},
    "latte": {"kept": [0.1, 1 / 3]},
    "attmemo": {"hit_rate": [0.0, 0.3, 1.0], "transfer": ["copy", "map"]},
    "efficientasr": {"ffn_chunks": [1, 2], "band": [3]},
    "svd-softmax": {"window": [16]},
}
lengths = st.lists(st.integers(1, 12) | st.integers(1, 3000), min_size=1, max_size=5, unique=True)


@st.composite
def grids(draw: st.DrawFn) -> dict[str, Any]:
    model = draw(st.sampled_from(sorted(AXES)))
    sizes = {
        name: draw(st.lists(st.sampled_from(values), min_size=1, unique=True)) for name, values in AXES[model].items()
    }
    phases = draw(st.sampled_from([["prefill"], ["decode"], ["prefill", "decode"]]))
    workload: dict[str, Any] = {"phase": phases, "batch": draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))}
    if "prefill" in phases:
        workload["seq"] = draw(lengths)
    if "decode" in phases:
        workload |= {"kv_len": draw(lengths), "steps": draw(st.sampled_from([1, 3]))}
    if draw(st.booleans()):
        workload["causal"] = [False, True]
    methods = draw(st.lists(st.sampled_from(sorted(CATALOG)), min_size=1, max_size=3, unique=True))
    return {
        "model": {"name": model, **sizes},
        "workload": workload,
        "method": {name: CHOICES.get(name, {}) for name in methods},
        "hardware": {"name": draw(st.sampled_from([["xeon-8480"], ["l4", "epyc-9654"], ["local"]]))},
    }


@settings(deadline=None, max_examples=25)
@given(grids(), st.data())
def test_every_row_is_what_estimate_gives_for_the_point_alone(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any], data: st.DataObject
) -> None:
    """Bit for bit: counts and seconds, also where few rows make other kernels within one array."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFREF_CACHE", str(tmp_path_factory.getbasetemp() / "sweep-cache"))
        if profiles.load("numba", 1, "float32") is None:
            profiles.save(slow_with_few(), "numba", 1, "float32")
        axes = grid.from_table(given)
        try:
            rows, summary = rows_from(axes, threads=1)
        except ConfigError:  # no point can be served
            rows, summary = [], None
        assert [row["point"] for row in rows] == sorted({row["point"] for row in rows})
        missing = sorted(set(range(axes.size)) - {row["point"] for row in rows})
        assert summary is None or summary.skipped.total() == len(missing)
        for number in data.draw(st.lists(st.sampled_from(missing), max_size=3)) if missing else []:
            block = next(block for block in axes.blocks() if block.first <= number < block.first + block.size)
            index = number - block.first
            machine, (batch, length) = block.hardware[index // block.workloads], block.workload(index % block.workloads)
            lengths = {"kv_len": length, "steps": block.work.steps} if block.work.phase == "decode" else {"seq": length}
            with pytest.raises(EffrefError):
                package.estimate(
                    block.model, method=block.method, params={block.method: block.params}, batch=batch,
                    phase=block.work.phase, causal=block.work.causal, overrides=block.sizes, hardware=machine,
                    threads=1, **lengths,
                )  # fmt: skip
        if not rows:
            return
        for row in data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=4)):
            expected = alone(
                row, hardware=axes.hardware[0] if axes.hardware == ("local",) else row["hardware"], threads=1
            )
            assert {name: row[name] for name in expected} == expected


def slow_with_few() -> Any:
    """A profile whose constants differ for each kind of op."""
    import dataclasses

    plain = profile()
    ops = {
        name: dataclasses.replace(op, overhead_s=1e-6 * (1 + place), matmul_flops_per_s=1e9 * (3 + place % 7))
        for place, (name, op) in enumerate(plain.ops.items())
    }
    return dataclasses.replace(plain, ops=ops | {"fetch, mapped": plain.ops["fetch"]})


def test_skipped_points_are_those_that_estimate_refuses() -> None:
    """A streaming model takes no prefill shorter than a chunk, and other methods refuse a model as a whole."""
    table = {
        "model": {"name": "emformer-rnnt-base"}, "workload": {"seq": [1, 3, 4, 8]},
        "method": {"dense": {}, "svd-softmax": {}}, "hardware": {"name": "l4"},
    }  # fmt: skip
    rows, summary = rows_from(grid.from_table(table))
    assert [row["seq"] for row in rows] == [4, 8]
    assert sorted(summary.skipped.values()) == [2, 2, 2]
    for seq in (1, 3):
        with pytest.raises(ConfigError) as refused:
            package.estimate("emformer-rnnt-base", seq, "dense", hardware="l4")
        assert str(refused.value) in summary.skipped


def test_figures_beyond_64_bits_are_exact() -> None:
    """2^40 positions make 2^80 pairs."""
    table = {
        "model": {"name": "bert-base"}, "workload": {"seq": [16, 2**40], "batch": [1, 2**20]},
        "method": {"dense": {}, "latte": {}}, "hardware": {"name": "l4"},
    }  # fmt: skip
    rows, _ = rows_from(grid.from_table(table))
    assert max(row["matmul_flops"] for row in rows) > 2**100
    for row in rows:
        expected = alone(row)
        assert {name: row[name] for name in expected} == expected


def test_pieces_and_single_blocks_give_the_same_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    whole, _ = rows_from(grid.read(path))
    monkeypatch.setattr(sweep_estimate, "PIECE", 3)
    pieces, _ = rows_from(grid.read(path))
    assert pieces == whole
    assert [row["point"] for row in whole] == list(range(grid.read(path).size))


def test_further_processes_give_the_same_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from effref import sweeping
    from effref.progress import Progress

    axes = grid.from_table(
        {"model": {"name": "conformer-m"}, "method": {"dense": {}, "attmemo": {}}, "hardware": {"name": "l4"}}
    )
    files = []
    for processes in (1, 2):
        monkeypatch.setattr(sweeping, "LONG_S", 0.0)
        monkeypatch.setattr(sweep_estimate, "TASK_PARTS", 1)
        monkeypatch.setattr(sweep_estimate, "PIECE", 1)
        files.append(tmp_path / f"{processes}.csv")
        with opened(files[-1]) as writer:
            plan = Plan(axes, files[-1], "estimate", ("time", "memory"), processes=processes)
            summary = estimated(plan, writer, Progress())
        assert summary.skipped.total() == 4  # conformer-m has relative positions
        assert [row["method"] for row in summary.front] == ["dense"] * 4
    assert files[0].read_bytes() == files[1].read_bytes()


# --- Pareto ---------------------------------------------------------------------------------------------------------


def _brute(objectives: np.ndarray) -> list[bool]:
    return [not any((other <= one).all() and (other < one).any() for other in objectives) for one in objectives]


@settings(deadline=None)
@given(st.integers(2, 3).flatmap(lambda k: st.lists(st.tuples(*[st.integers(0, 6)] * k), min_size=1, max_size=40)))
def test_front_is_what_brute_force_finds(points: list[tuple[int, ...]]) -> None:
    objectives = np.array(points, float)
    assert pareto.front(objectives).tolist() == _brute(objectives)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_fronts_of_groups_are_apart(points: list[tuple[int, int, int]]) -> None:
    table = np.array(points)
    kept = pareto.front_of_each(table[:, 0], table[:, 1:])
    for group in set(table[:, 0]):
        members = table[:, 0] == group
        assert kept[members].tolist() == _brute(table[members, 1:])


def test_pareto_lists_the_designs_of_each_workload(effref, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    rows = rows_of(effref("sweep", str(path)).stdout)
    listed = json.loads(effref("sweep", str(path), "--pareto", "time,memory", "--format", "json").stdout)
    for batch in (1, 2):
        for seq in (8, 16):
            same = [row for row in rows if (row["batch"], row["seq"]) == (batch, seq)]
            kept = _brute(np.array([[row["predicted_s"], row["peak_bytes"]] for row in same]))
            expected = {row["point"] for row, is_kept in zip(same, kept, strict=True) if is_kept}
            assert {row["point"] for row in listed if (row["batch"], row["seq"]) == (batch, seq)} == expected
    text = effref("sweep", str(path), "--pareto", "memory,time").stdout
    assert "prefill T=16 B=2" in text
    assert effref("sweep", str(path), "--pareto", "time,memory", "--format", "csv").stdout.startswith("point,model")


# --- files ----------------------------------------------------------------------------------------------------------


def test_parquet_and_csv_hold_the_same(effref, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    for name in ("x.csv", "x.parquet"):
        assert effref("sweep", str(path), "--output", str(tmp_path / name)).exit_code == 0
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.to_pylist() == rows_of((tmp_path / "x.csv").read_text())
    assert table.column_names == list(ESTIMATE_COLUMNS)


def test_figures_that_parquet_cannot_hold_are_refused(effref, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "grid.toml"
    path.write_text('[workload]\nseq = "2^40"\n[method.dense]\n[hardware]\nname = "l4"\n')
    assert "write a .csv" in error_of(effref("sweep", str(path), "--output", str(tmp_path / "x.parquet"), "--quiet"))
    assert [one.name for one in tmp_path.iterdir()] == ["grid.toml"]


def test_parquet_without_its_package(effref, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    assert "effref[sweep]" in error_of(effref("sweep", str(path), "--output", str(tmp_path / "x.parquet")))
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "effref[sweep]" in error_of(effref("sweep", str(path), "--cluster", "tcp://127.0.0.1:1", "--quiet"))


def test_ctrl_c_keeps_what_is_done(effref, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    original, seen = Estimator.rows, []

    def interrupted(self: Estimator, part: Any) -> Any:
        seen.append(part)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, part)

    monkeypatch.setattr(Estimator, "rows", interrupted)
    result = effref("sweep", str(path), "--output", str(tmp_path / "x.csv"))
    assert result.exit_code == 130
    assert "interrupted: 8 of 48 points are kept" in result.stderr
    assert len(rows_of((tmp_path / "x.csv").read_text())) == 8


# --- grids ----------------------------------------------------------------------------------------------------------


def test_axes_are_read_as_in_other_commands() -> None:
    axes = grid.from_table(
        {
            "model": {"name": "conformer-m", "d-model": [128, 256]},
            "workload": {"seq": ["2^3:2^5", 12, {"from": 100, "to": 131, "step": 10}], "batch": [2, 2, 1]},
            "method": {"reuse": {"heads": [2, True]}},
        }
    )
    assert axes.seq == (8, 12, 16, 32, 100, 110, 120, 130)
    assert axes.batches == (2, 1)
    assert axes.sizes == {"d_model": (128, 256)}
    assert axes.designs == (("reuse", {"heads": 2}), ("reuse", {"heads": True}))
    assert axes.size == 2 * 2 * 8 * 2
    assert axes.size == sum(block.size for block in axes.blocks())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[workloads]\nseq = 8", "did you mean 'workload'"),
        ("[workload]\nbatches = 1", "did you mean 'batch'"),
        ("[model]\nlayer = 2", "did you mean 'layers'"),
        ("[model]\nname = 'bert-bas'", "did you mean 'bert-base'"),
        ("[method.reus]", "did you mean 'reuse'"),
        ("[method.reuse]\ngrup = 1", "did you mean 'group'"),
        ("[method.flash]\nx = 1", "has no parameters"),
        ("[hardware]\nname = 'h100-sx'", "did you mean 'h100-sxm'"),
        ("[hardware]\nkind = 'gpu'", "unknown key of [hardware]"),
        ("[workload]\nphase = 'decoding'", "did you mean 'decode'"),
        ("[workload]\ndtype = 'float31'", "did you mean 'float32'"),
        ("[workload]\nseq = []", "[workload] seq is an empty list"),
        ("[method.reuse]\ngroup = []", "[method.reuse] group is an empty list"),
        ("[workload]\nseq = 0", "whole number from 1"),
        ("[workload]\nseq = true", "whole number from 1"),
        ("[workload]\nbatch = 1.5", "whole number from 1"),
        ("[workload]\nseq = [[8]]", "whole number from 1"),
        ("[workload]\nseq = 'many'", "not a whole number"),
        ("[workload]\nseq = {from = 1, till = 8}", "unknown key of a range"),
        ("[workload]\nseq = {from = 9, to = 8}", "ends before it begins"),
        ("[workload]\nseq = {to = 8}", "from, to and step"),
        ("[workload]\nseq = {from = 1, to = 1000000000000}", "take larger steps"),
        ("[workload]\ncausal = 1", "true or false"),
        ("[workload]\nkv_len = 8", "belong to decoding"),
        ("[workload]\nphase = 'decode'\nseq = 8", "belongs to a prefill"),
        ("[model]\nname = 3", "a name in quotes"),
        ("[model]\nd_model = 8\nd-model = 8", "given twice"),
        ("model = 'bert-base'", "must be a table"),
        ("[method]\nreuse = 2", "must be a table"),
        ("[model]\nheads = 7", "none of the 12 points can be served"),
        ("[method.reuse]\ngroup = 'x'\n[model]\nname = 'bert-base'", "whole number of at least 1"),
        ("seq = [", "not a TOML file"),
        ("\x00", "not a TOML file"),
    ],
)
def test_a_grid_that_cannot_be_served_is_refused_in_one_line(effref, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    assert says in error_of(effref("sweep", str(path), "--quiet", "--pareto", "time,memory"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--mode mesure", "did you mean 'measure'"),
        ("--pareto time", "two or three different objectives"),
        ("--pareto time,fidelity", "--mode measure"),
        ("--pareto time,memry", "did you mean 'memory'"),
        ("--output x.json", ".csv or .parquet"),
        ("--output no/x.csv", "no folder"),
        ("--mode measure", "name one with --output"),
        ("--format json", "--pareto"),
        ("--device gpu", "is a cpu, not a gpu"),
        ("--graph", "--graph and --fuse are for measured passes: add --mode measure"),
        ("--l2 cold --device gpu", "--l2, --graph and --fuse are for measured passes: add --mode measure"),
        ("--mode measure --output x.csv --graph", "on the CPU, for decoding with the engine 'numba'"),
        ("--mode measure --output x.csv --l2 cold", "--l2 cold is for GPUs: add --device gpu"),
        ("--mode measure --output x.csv --l2 col --device gpu", "did you mean 'cold'"),
        ("--mode measure --output x.csv --fuse --device gpu", "--fuse is for the passes of --graph"),
        ("--cluster=", "--cluster is empty"),
        ("--cluster tcp://127.0.0.1:1", "no Dask scheduler answers"),
        ("--cluster nowhere://x", "no Dask scheduler answers"),
        ("--cluster tcp://127.0.0.1:port", "no Dask scheduler answers"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    effref, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, says: str
) -> None:
    from effref import cluster

    monkeypatch.setattr(cluster, "CONNECT_S", 0.2)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.toml"
    path.write_text("[hardware]\nname = 'xeon-8480'")
    assert says in error_of(effref("sweep", str(path), "--quiet", *words.split()))
    assert [file.name for file in tmp_path.iterdir()] == ["grid.toml"]  # nothing was begun


def test_files_that_are_no_grid(effref, tmp_path: Path) -> None:
    assert "cannot read the grid" in error_of(effref("sweep", str(tmp_path / "none.toml")))
    assert "cannot read the grid" in error_of(effref("sweep", str(tmp_path)))
    path = tmp_path / "grid.toml"
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in error_of(effref("sweep", str(path)))


def test_the_public_function(tmp_path: Path) -> None:
    summary = package.sweep({"method": {"flash": {}}, "hardware": {"name": "l4"}}, objectives=("time", "memory"))
    assert (summary.points, summary.written) == (4, 4)
    assert [row["seq"] for row in summary.front] == [256, 512, 1024, 2048]
    assert set(ESTIMATE_COLUMNS) < set(MEASURE_COLUMNS)


def test_the_example_is_a_grid(effref, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(effref("sweep", "--example").stdout)
    assert grid.read(path).size == 2 * 3 * 2 * 4 * 2
    assert len(rows_of(effref("sweep", str(path)).stdout)) == 96
