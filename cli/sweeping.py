"""Design spaces: every point of a grid estimated or measured, into one file with a row for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from refimpl.errors import ConfigError, unknown

from . import files, grid, pareto
from .grid import Grid
from .progress import Progress
from .request import device_and_engine
from .sweep_estimate import Estimator, Part, chosen_machines, in_processes, parts_of
from .sweep_rows import ESTIMATE_COLUMNS, PASSES, CSVWriter, ParquetWriter, Rows, Writer, require_pyarrow

MODES = ("estimate", "measure")
SUFFIXES = (".csv", ".parquet")
# objective -> its column in either mode; less is better
OBJECTIVES = {
    "estimate": {"time": "predicted_s", "memory": "peak_bytes"},
    "measure": {"time": "measured_median_s", "memory": "peak_bytes", "fidelity": "rel_l2"},
}
EVALUATION_S, POINT_S = 3e-3, 1e-5  # about what an evaluation takes, and a point's own part of it with its row
LONG_S = 2.0  # from which further processes are worth starting
MOST_COMPARED = 50_000_000  # points whose objectives are kept in memory
SECONDS = 10.0  # for the passes of one measured point


@dataclass
class Summary:
    """What became of the points of a grid.

    Attributes
    ----------
    points, written : int
        Of the grid, and rows of the result.
    skipped : Counter
        Reason -> points that cannot be served for it.
    interrupted : bool
        Ctrl-C came; what was done by then is kept.
    front : list of dict or None
        Rows that are dominated by none, where objectives were named.
    """

    points: int
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    front: list[dict[str, Any]] | None = None


def sweep(
    design_space: str | Path | Mapping[str, Any],
    output: str | Path | None = None,
    *,
    mode: str = "estimate",
    objectives: Sequence[str] = (),
    cluster: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    repeats: int | None = None,
    warmup: int = 1,
    max_seconds: float | None = None,
    seed: int = 0,
    l2: str = "warm",
    graph: bool = False,
    fuse: bool = False,
) -> Summary:
    """Estimate or measure every point of a design space.

    Parameters
    ----------
    design_space : str, Path or mapping
        A TOML file (docs/sweep.md), or what it holds as nested mappings.
    output : str or Path, optional
        A ``.csv`` or ``.parquet`` file for the rows. Measuring needs one, and goes on where an earlier run stopped.
    mode : {"estimate", "measure"}
    objectives : sequence of str
        Of "time", "memory" and, measured, "fidelity": the designs that are dominated by none are in `front`.
    cluster : str, optional
        Address of a Dask scheduler whose workers do the work.
    device, engine, threads
        As for `effref.estimate` and `effref.measure`.
    repeats, warmup, max_seconds, seed, l2, graph, fuse
        Of each measured point; see `effref.measure`. Default `max_seconds` 10.

    Returns
    -------
    summary : Summary

    Raises
    ------
    ConfigError
        If the grid, a name or a value is not allowed, no point can be served, or the file is of another sweep.
    MissingDependencyError
        If Dask or pyarrow is needed and missing.
    """
    axes = grid.from_table(design_space) if isinstance(design_space, Mapping) else grid.read(Path(design_space))
    path = None if output is None else Path(output)
    seconds = SECONDS if max_seconds is None else max_seconds
    timing = Timing(repeats, warmup, seconds, seed, l2, graph, fuse)
    plan = Plan(axes, path, mode, tuple(objectives), cluster, device, engine, threads, timing)
    if mode == "estimate":
        with opened(path) as writer:
            return estimated(plan, writer, Progress())
    from .sweep_measure import measured

    return measured(plan, Progress())


@dataclass(frozen=True)
class Timing:
    """How long, how often and on which passes each point is measured; see `effref.measure`."""

    repeats: int | None = None
    warmup: int = 1
    max_seconds: float = SECONDS
    seed: int = 0
    l2: str = "warm"
    graph: bool = False
    fuse: bool = False

    @property
    def passes(self) -> dict[str, Any]:
        """What a row says of its passes."""
        return {name: getattr(self, name) for name in PASSES}

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `effref.measure`, without usual passes: a file begun before there were others stays of its sweep."""
        usual = Timing().passes
        return {name: value for name, value in vars(self).items() if name not in usual or value != usual[name]}


@dataclass(frozen=True)
class Plan:
    """What is asked for, checked as far as it can be without working.

    Attributes
    ----------
    processes : int
        That estimates of very many points may take; more than one needs a main module that can be imported.
    """

    grid: Grid
    path: Path | None
    mode: str
    objectives: tuple[str, ...] = ()
    cluster: str | None = None
    device: str | None = None
    engine: str | None = None
    threads: int | None = None
    timing: Timing = field(default_factory=Timing)
    processes: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        known = OBJECTIVES[self.mode]
        for name in self.objectives:
            if name == "fidelity" and name not in known:
                raise ConfigError("fidelity is known of measured points only: add --mode measure, or leave it out")
            if name not in known:
                raise unknown("objective", name, OBJECTIVES["measure"])
        if len(set(self.objectives)) != len(self.objectives) or len(self.objectives) == 1:
            raise ConfigError("--pareto takes two or three different objectives, as time,memory")
        if self.objectives and self.grid.size > MOST_COMPARED:
            raise ConfigError(
                f"the grid has {self.grid.size} points; --pareto compares at most {MOST_COMPARED}: take fewer values"
            )
        if self.cluster is not None and not self.cluster.strip():
            raise ConfigError("--cluster is empty; give the address of a Dask scheduler, as tcp://10.0.0.1:8786")
        if self.mode == "measure":
            self._check_measuring()
        elif self.timing.passes != Timing().passes:
            raise ConfigError(
                "--l2, --graph and --fuse are for measured passes: add --mode measure, or leave them away"
            )
        if self.path:
            check_path(self.path)

    def _check_measuring(self) -> None:
        if self.path is None:
            raise ConfigError("measured points are kept in a file: name one with --output")
        if len(self.grid.hardware) > 1:
            raise ConfigError(
                f"[hardware] names {len(self.grid.hardware)}; measuring compares with one, by default the machine's "
                "own profile: leave [hardware] out"
            )
        from .measurement import Timing as Measured

        every = Measured(**{**vars(self.timing), "repeats": self.timing.repeats or 1})
        every.check_device(*device_and_engine(self.device, self.engine), "decode" in self.grid.phases)

    def columns(self) -> list[str]:
        """Those of the objectives."""
        return [OBJECTIVES[self.mode][name] for name in self.objectives]


def check_path(path: Path) -> None:
    """Raise an error where rows cannot be written to a file; called before any work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {path}: rows are written to a file that ends in {' or '.join(SUFFIXES)}")
    files.check_target(path)
    if path.suffix.lower() == ".parquet":
        require_pyarrow()


def sidecar(path: Path) -> Path:
    """Where a file of measured points says which sweep it is of."""
    return path.with_name(path.name + ".sweep.json")


@contextmanager
def opened(path: Path | None, stream: TextIO | None = None) -> Iterator[Writer | None]:
    """What takes the rows: a file that is written whole or not at all, or a stream, or nothing."""
    if path is None:
        own = CSVWriter(stream) if stream else None
        yield own
        if own:
            own.close()
        return
    if sidecar(path).exists():
        raise ConfigError(f"{path} holds measured points, as {sidecar(path).name} says: name another --output")
    with files.whole(path) as scratch:
        if path.suffix.lower() == ".parquet":
            writer: Writer = ParquetWriter(scratch, ESTIMATE_COLUMNS)
            yield writer
            writer.close()
            return
        with scratch.open("w", encoding="utf-8", newline="\n") as text:
            writer = CSVWriter(text)
            yield writer
            writer.close()


# --- estimates ------------------------------------------------------------------------------------------------------


def estimated(plan: Plan, writer: Writer | None, progress: Progress) -> Summary:
    """Estimate all points in order and give the rows to a writer; with Ctrl-C those that are done."""
    summary = Summary(plan.grid.size)
    chosen = chosen_machines(plan.grid, plan.device, plan.engine, plan.threads, progress)
    estimator = Estimator(chosen)
    progress.stage(f"estimating {summary.points} points")
    compared = _Compared(plan)
    try:
        for part, rows in _done_parts(plan, estimator, writer):
            if rows is not None:
                if writer:
                    writer.write(rows)
                summary.written += len(rows)
                compared.add(part, rows)
            progress.advance(f"{summary.written} points", (int(part.points[-1]) + 1) / summary.points)
    except KeyboardInterrupt:
        summary.interrupted = True
    progress.done()
    summary.skipped = estimator.skipped
    refuse_empty(summary)
    if plan.objectives:
        summary.front = compared.front(estimator)
    return summary


def _done_parts(plan: Plan, estimator: Estimator, writer: Writer | None) -> Iterable[tuple[Part, Rows | None]]:
    parts = parts_of(plan.grid)
    needed = tuple(plan.columns()) if writer and writer.is_text else None
    if plan.cluster:
        from .cluster import estimated_on

        return estimated_on(plan.cluster, parts, estimator, needed)
    expected_s = plan.grid.evaluations * EVALUATION_S + plan.grid.size * POINT_S
    if plan.processes > 1 and expected_s >= LONG_S:
        return in_processes(parts, estimator, needed, plan.processes)
    return ((part, estimator.rows(part)) for part in parts)


def refuse_empty(summary: Summary) -> None:
    """Raise ConfigError where no point can be served."""
    if summary.written or summary.interrupted or not summary.skipped:
        return
    reason, count = summary.skipped.most_common(1)[0]
    raise ConfigError(f"none of the {summary.points} points can be served; {count} of them: {reason}")


class _Compared:
    """The objectives of all points, and where to find their rows again."""

    def __init__(self, plan: Plan) -> None:
        self.columns = plan.columns()
        self.parts: list[Part] = []
        self.values: list[Any] = []
        self.workloads: list[Any] = []
        self.numbers: dict[Any, int] = {}  # what is compared only with its like -> its number

    def add(self, part: Part, rows: Rows) -> None:
        """Designs are compared for the same work: phase, steps, mask, batch and length."""
        if not self.columns:
            return
        block, work = part.block, part.block.work
        key = (work.phase, work.steps, work.causal, block.batches, block.lengths)
        first = self.numbers.setdefault(key, sum(len(k[3]) * len(k[4]) for k in self.numbers))
        picks = rows.columns["point"].astype(np.int64) - block.first - part.hardware * block.workloads
        self.parts.append(Part(block, part.hardware, picks))
        self.values.append(np.stack([rows.columns[name].astype(float) for name in self.columns], axis=1))
        self.workloads.append(first + picks)

    def front(self, estimator: Estimator) -> list[dict[str, Any]]:
        """The rows that no other one of the same workload dominates; by workload, then the first objective."""
        if not self.values:
            return []
        workloads = np.concatenate(self.workloads)
        kept = pareto.front_of_each(workloads, np.concatenate(self.values))
        found: list[tuple[int, float, int, dict[str, Any]]] = []
        start = 0
        for part, group, values in zip(self.parts, self.workloads, self.values, strict=True):
            own = np.flatnonzero(kept[start : start + len(group)])
            start += len(group)
            if len(own):
                rows = estimator.rows(Part(part.block, part.hardware, part.picks[own]))
                assert rows is not None  # they were served before
                for place, row in zip(own, rows.dicts(), strict=True):
                    found.append((int(group[place]), float(values[place, 0]), row["point"], row))
        return [row for *_, row in sorted(found, key=lambda one: one[:3])]
