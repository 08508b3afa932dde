"""Measured points of a grid: a file that grows row by row and survives a kill, here or on the workers of a cluster."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from refimpl.errors import ConfigError, EffrefError

from . import files, gpu, machines, pareto
from .files import OutputError
from .grid import Block, Grid
from .progress import Progress
from .request import device_and_engine
from .sweep_rows import MEASURE_COLUMNS, PASSES, ParquetWriter, line, parsed
from .sweeping import Plan, Summary, Timing, refuse_empty, sidecar

if sys.platform != "win32":
    import fcntl

VERSION = 1  # of the sidecar
BEFORE = tuple(name for name in MEASURE_COLUMNS if name not in PASSES)  # columns of files from when passes were usual


@dataclass(frozen=True)
class Point:
    """One point, as `effref.measure` takes it."""

    number: int
    request: Mapping[str, Any]

    @classmethod
    def of(cls, block: Block, index: int, plan: Plan) -> Point:
        """The point at an index of a block."""
        batch, length = block.workload(index)
        work = block.work
        lengths = {"kv_len": length, "steps": work.steps} if work.phase == "decode" else {"seq": length}
        given = {
            "model": block.model, "method": block.method, "params": {block.method: dict(block.params)},
            "overrides": dict(block.sizes), "batch": batch, "dtype": work.dtype, "phase": work.phase,
            "causal": work.causal, "hardware": block.hardware[0], "device": plan.device, "engine": plan.engine,
            "threads": plan.threads, **lengths, **plan.timing.arguments,
        }  # fmt: skip
        return cls(block.first + index, given)


@dataclass(frozen=True)
class Outcome:
    """The row of a point, or why there is none."""

    number: int
    row: Mapping[str, Any] | None = None
    reason: str = ""


def points_of(plan: Plan, done: Mapping[int, Any]) -> Iterator[Point]:
    """Those that are not done."""
    for block in plan.grid.blocks():
        for index in range(block.size):
            if block.first + index not in done:
                yield Point.of(block, index, plan)


def measure_point(point: Point) -> Outcome:
    """Measure one point on this machine, under its profile, which is made where there is none.

    Raises
    ------
    KeyboardInterrupt
        If the measurement was interrupted: a point is measured in full or not at all.
    """
    from .measurement import measure

    try:
        document = measure(**point.request)
    except EffrefError as error:
        return Outcome(point.number, reason=str(error))
    except Exception as error:
        if not gpu.out_of_memory(error):
            raise
        return Outcome(point.number, reason=gpu.shortage(error))
    if "out_of_memory" in document:
        return Outcome(point.number, reason=document["out_of_memory"])
    if "interrupted" in document:
        raise KeyboardInterrupt
    return Outcome(point.number, row_of(point.number, document))


def row_of(number: int, document: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a measured document with one method and length."""
    (result,) = document["results"]
    config, hardware, context = document["config"], document["hardware"], document["context"]
    total, measured, speedup = result["total"], result["total"]["measured_s"], result["speedup"]
    model = config["model"]
    return {
        "point": number,
        "model": model["name"],
        **{name: model[name] for name in ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab")},
        **result,  # method, seq, kv_len, steps, batch, phase, device, engine and bytes
        "params": json.dumps(result["params"], default=str),
        **{name: config[name] for name in ("dtype", "causal", "threads")},
        "hardware": hardware["name"],
        "level": hardware["level"],
        **{name: value for name, value in total.items() if name in MEASURE_COLUMNS},
        **{f"speedup_{name}": ratio["predicted"] for name, ratio in speedup.items()},
        **{f"measured_{name}_s": measured[name] for name in ("median", "p10", "p90")},
        "measured_n": measured["n"],
        **{f"measured_speedup_{name}": ratio["measured"] for name, ratio in speedup.items()},
        **{name: (result["fidelity"] or {}).get(name) for name in ("reference", "rel_l2", "cosine", "max_abs")},
        **{name: context[name] for name in ("host", "cpu", "date")},
        "gpu": context["gpu"] if result["device"] == "gpu" else None,
        "notes": "; ".join([*document["notes"], *result["flags"]]),
        **{name: config[name] for name in PASSES},
    }


def measured(plan: Plan, progress: Progress) -> Summary:
    """Measure what is not in the file yet; with Ctrl-C what is done stays there."""
    assert plan.path is not None  # a plan that measures has one
    if plan.cluster is None:  # on a cluster the workers need a GPU, not this machine
        machines.require(device_and_engine(plan.device, plan.engine)[1])
    summary = Summary(plan.grid.size)
    run = {"device": plan.device, "engine": plan.engine, "threads": plan.threads, **plan.timing.arguments}
    checksum = plan.grid.checksum(**run)
    with Journal(plan.path, checksum, plan.grid) as journal:
        if journal.rows:
            progress.line(f"{plan.path} holds {len(journal.rows)} of {summary.points} points; the others follow")
        try:
            _fill(journal, plan, summary, progress)
        except KeyboardInterrupt:
            summary.interrupted = True
        progress.done()
        summary.written = len(journal.rows)
        if plan.path.suffix.lower() == ".parquet":
            journal.as_parquet(plan.path)
    refuse_empty(summary)
    if plan.objectives:
        summary.front = front(list(journal.rows.values()), plan.columns())
    return summary


def _fill(journal: Journal, plan: Plan, summary: Summary, progress: Progress) -> None:
    outcomes = _outcomes(plan, points_of(plan, journal.rows))
    progress.stage(f"measuring {summary.points - len(journal.rows)} points")
    for outcome in outcomes:
        if outcome.row is None:
            summary.skipped[outcome.reason] += 1
        else:
            journal.add(outcome.row)
        finished = len(journal.rows) + summary.skipped.total()
        progress.advance(f"{finished} of {summary.points} points", finished / summary.points)


def _outcomes(plan: Plan, points: Iterator[Point]) -> Iterable[Outcome]:
    if plan.cluster is None:
        return map(measure_point, points)
    from .cluster import measured_on

    return measured_on(plan.cluster, points)


def front(rows: list[Mapping[str, Any]], columns: list[str]) -> list[dict[str, Any]]:
    """The rows that no other one of the same workload dominates; by workload, then the first objective.

    A row without a figure, as a baseline that did not fit beside it leaves none for the error, is not compared.
    """
    comparable = [row for row in rows if all(row.get(name) is not None for name in columns)]
    if not comparable:
        return []
    keys = [tuple(str(row.get(name)) for name in ("phase", "steps", "causal")) + _sizes(row) for row in comparable]
    order = {key: place for place, key in enumerate(sorted(set(keys)))}
    groups = np.array([order[key] for key in keys])
    values = np.array([[float(row[name]) for name in columns] for row in comparable])
    kept = np.flatnonzero(pareto.front_of_each(groups, values))
    return [dict(comparable[i]) for i in sorted(kept, key=lambda i: (groups[i], values[i, 0], comparable[i]["point"]))]


def _sizes(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["batch"], row.get("kv_len") or row["seq"]


# --- the file -------------------------------------------------------------------------------------------------------


class Journal:
    """A CSV file of measured points that grows by whole rows; beside it a small file that says of which sweep.

    Attributes
    ----------
    rows : dict
        Number of the point -> its row.
    columns : sequence of str
        Of the file, which may have been begun when there were fewer.
    """

    def __init__(self, path: Path, checksum: str, grid: Grid) -> None:
        self.target, self.checksum, self.grid = path, checksum, grid
        self.path = path.with_name(path.name + ".rows.csv") if path.suffix.lower() == ".parquet" else path
        self.rows: dict[int, Mapping[str, Any]] = {}
        self.columns = tuple(MEASURE_COLUMNS)

    def __enter__(self) -> Journal:
        begun = self._check_sidecar()
        for path in {self.path, self.target}:
            if not begun and path.exists() and path.stat().st_size:
                raise ConfigError(f"{path} exists and holds no measured points of a sweep: name another --output")
        try:
            self.file: IO[bytes] = open(self.path, "a+b")  # held until the end
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            self._lock()
            begun = self._check_sidecar()  # another process may have begun meanwhile
            self._read()
            if not begun:
                about = {
                    "effref": "sweep", "version": VERSION, "checksum": self.checksum, "points": self.grid.size,
                    "grid": asdict(self.grid),
                }  # fmt: skip
                files.write_text(sidecar(self.target), json.dumps(about, indent=1, default=str) + "\n")
            if self.file.tell() == 0:
                self._append(",".join(self.columns) + "\n")
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row that a crash from now on does not take away.

        Raises
        ------
        OutputError
            If the disk is full or the like; what was there before is kept.
        """
        number = row["point"]
        if number in self.rows:
            return
        self._append(line(row, self.columns))
        self.rows[number] = {name: row.get(name) for name in MEASURE_COLUMNS}

    def as_parquet(self, path: Path) -> None:
        """All rows by number as a Parquet file."""
        with files.whole(path) as scratch:
            writer = ParquetWriter(scratch, MEASURE_COLUMNS)
            writer.write_dicts([self.rows[number] for number in sorted(self.rows)])
            writer.close()

    def _append(self, text: str) -> None:
        try:
            self.file.write(text.encode())
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}; its whole rows are kept"
            ) from error

    def _check_sidecar(self) -> bool:
        """Whether the sweep was begun; raises ConfigError where it was another one."""
        place = sidecar(self.target)
        try:
            about = json.loads(place.read_text("utf-8"))
            version, checksum = about["version"], about["checksum"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{place} cannot be read ({error}): name another --output") from error
        if version != VERSION:
            raise ConfigError(f"{place} was written by another version of effref: name another --output")
        if checksum != self.checksum:
            raise ConfigError(
                f"{self.target} holds points of another grid, or measured with other options: restore them, or name "
                "another --output"
            )
        return True

    def _lock(self) -> None:
        if sys.platform != "win32":
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system when the process ends
            except OSError:
                raise ConfigError(
                    f"another process is measuring into {self.path}: wait until it has ended, or name another --output"
                ) from None

    def _read(self) -> None:
        """The whole rows; a half-written one behind them is cut off, and its point measured again."""
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.file.truncate(len(whole))
        self.file.seek(0, os.SEEK_END)
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if lines:
            self.columns = tuple(lines[0].split(","))
        if self.columns not in (tuple(MEASURE_COLUMNS), BEFORE):
            raise ConfigError(f"{self.path} has other columns than this version of effref: name another --output")
        for place, text in enumerate(lines[1:], 2):
            row = self._row(text, place)
            self.rows[row["point"]] = row

    def _row(self, text: str, place: int) -> dict[str, Any]:
        import csv

        try:
            cells = next(csv.reader([text], strict=True))
            row = Timing().passes | {name: parsed(name, cell) for name, cell in zip(self.columns, cells, strict=True)}
            if not 0 <= row["point"] < self.grid.size or row["point"] in self.rows:
                raise ValueError(f"point {row['point']} is not of the grid, or there twice")
        except (ValueError, KeyError, TypeError, StopIteration, csv.Error) as error:
            raise ConfigError(
                f"{self.path}, line {place}, is damaged ({error}): delete the line to measure its point again"
            ) from error
        return row
