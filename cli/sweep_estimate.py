"""Estimates of whole blocks of points: one evaluation of the closed form gives all batches and lengths of a design."""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from costmodel.closed_form import Estimate
from costmodel.hardware import Hardware
from costmodel.predict import Prediction, predict
from refimpl.config import ModelConfig, override
from refimpl.errors import EffrefError
from refimpl.weights import resolve_config

from . import machines
from .context import cores
from .estimation import default_device
from .grid import Block, Grid
from .progress import Progress
from .request import BASELINES, Request, device_and_engine
from .results import plain
from .sweep_rows import Rows

PIECE = 8192  # points that are evaluated at once: their arrays stay in the caches
KEPT = 256  # arrays of seconds
TASK_PARTS, TASK_POINTS = 64, 1 << 15  # parts of a task, and points from which no more are put into it
SAFE = 2**61  # figures up to here, and what they are made of, stay within 64 bits


@dataclass(frozen=True)
class Machine:
    """What a prediction is for."""

    hardware: Hardware
    device: str
    engine: str
    threads: int


@dataclass(frozen=True)
class Part:
    """Some workloads of a block on one hardware, as indices into its pairs of batch and length."""

    block: Block
    hardware: int
    picks: Any  # array of int, shape (n,)

    @property
    def points(self) -> Any:
        """Their numbers in the grid."""
        return self.block.first + self.hardware * self.block.workloads + self.picks


class Estimator:
    """Turns parts of one grid into rows.

    Attributes
    ----------
    machines : mapping
        (name of the hardware, dtype) -> Machine.
    skipped : Counter
        Reason -> points that cannot be served for it.
    """

    def __init__(self, machines: Mapping[tuple[str | None, str], Machine]) -> None:
        self.machines = machines
        self.skipped: Counter[str] = Counter()
        self._last: tuple[Hashable, Estimate] | None = None
        self._seconds: dict[Hashable, Any] = {}
        self._fitting: tuple[tuple[int, int], bool] | None = None

    def rows(self, part: Part) -> Rows | None:
        """Those of the points that can be served; the others are counted with their reason."""
        block, picks = part.block, part.picks
        try:
            picks = self._served(block, picks)
            if not len(picks):
                return None
            if not self._fits(block, picks):
                return _joined([self._evaluated(Part(block, part.hardware, int(pick))) for pick in picks])
            return self._evaluated(Part(block, part.hardware, picks))
        except EffrefError as error:
            self.skipped[str(error)] += len(picks)
            return None

    def _served(self, block: Block, picks: Any) -> Any:
        """The picks whose length a streaming model takes; no other model looks at single lengths."""
        if not shape_of(block).streams:
            return picks
        request, refused, places = _request(block), {}, picks % len(block.lengths)
        for index in np.unique(places).tolist():
            try:
                request.workload(block.lengths[index]).check(request.config)
            except EffrefError as error:
                refused[index] = str(error)
        for index, reason in refused.items():
            self.skipped[reason] += int(np.count_nonzero(places == index))
        return picks[~np.isin(places, list(refused))]

    def _evaluated(self, part: Part) -> Rows:
        """Rows of an array of picks; for one pick, as an int, a row with figures of any size."""
        block, one = part.block, isinstance(part.picks, int)
        machine = self.machines[block.hardware[part.hardware], block.work.dtype]
        prediction = predict(self._estimate(part), machine.hardware)
        figures = _figures(prediction)
        for baseline in BASELINES:
            figures[f"speedup_{baseline}"] = self._baseline_s(baseline, part, machine) / prediction.total.seconds
        batch, length = _workloads(part)
        decodes = block.work.phase == "decode"
        own = {"point": part.points, "batch": batch, "kv_len" if decodes else "seq": length, **figures}
        if one:
            columns = {name: np.array([_plain(value)], object) for name, value in own.items()}
        else:
            columns = {name: np.broadcast_to(value, len(part.picks)) for name, value in own.items()}
        return Rows(_shared(prediction.estimate, block, machine), columns)

    def _estimate(self, part: Part) -> Estimate:
        """Met again with the next hardware."""
        key = _key(part)
        if self._last is None or self._last[0] != key:
            self._last = key, _estimate(part)
        return self._last[1]

    def _baseline_s(self, name: str, part: Part, machine: Machine) -> Any:
        """Seconds of exact attention; met again with every method of a model."""
        part = replace(part, block=replace(part.block, method=name, params={}))
        key = (*_key(part), part.hardware)
        if key not in self._seconds:
            if len(self._seconds) >= KEPT:
                self._seconds.clear()
            estimate = _estimate(part)
            self._seconds[key] = predict(estimate, machine.hardware).total.seconds
        return self._seconds[key]

    def _fits(self, block: Block, picks: Any) -> bool:
        """Whether figures of a block stay within 64 bits; of a streaming model at the lengths that it takes."""
        served = np.unique(picks % len(block.lengths)).tolist() if shape_of(block).streams else None
        longest = max(block.lengths) if served is None else max(block.lengths[index] for index in served)
        if self._fitting is None or self._fitting[0] != (block.first, longest):
            self._fitting = (block.first, longest), _fits_64_bits(block, longest)
        return self._fitting[1]


def _key(part: Part) -> tuple[Hashable, ...]:
    """What an estimate depends on, within one grid."""
    block, picks = part.block, part.picks
    sizes, params = tuple(block.sizes.items()), json.dumps(block.params)
    return block.model, sizes, block.work, block.method, params, picks if isinstance(picks, int) else picks.tobytes()


@lru_cache(256)
def _shape(model: str, sizes: tuple[tuple[str, int], ...]) -> ModelConfig:
    return override(resolve_config(model), **dict(sizes))


def shape_of(block: Block) -> ModelConfig:
    """The model with its overrides."""
    return _shape(block.model, tuple(block.sizes.items()))


def _request(block: Block, batch: Any = 1) -> Request:
    work, config = block.work, shape_of(block)
    return Request(
        config, config, (), (block.method,), {block.method: block.params}, batch, work.dtype, work.phase, work.causal,
        "cpu", "numba", 1, work.steps or 1,
    )  # fmt: skip


def _workloads(part: Part) -> tuple[Any, Any]:
    """Batches and lengths of the picks."""
    block = part.block
    if isinstance(part.picks, int):
        return block.workload(part.picks)
    batches, lengths = (indices.tolist() for indices in np.divmod(part.picks, len(block.lengths)))
    return np.array([block.batches[i] for i in batches]), np.array([block.lengths[i] for i in lengths])


def _estimate(part: Part) -> Estimate:
    """The closed form over all picks at once."""
    batch, length = _workloads(part)
    return _request(part.block, batch).estimate(part.block.method, length)


def _fits_64_bits(block: Block, longest: int) -> bool:
    """Whether the figures at the largest workload, and all they are made of, do; they grow with batch and length."""
    found = _request(block, max(block.batches)).estimate(block.method, longest)
    figures = (found.total.flops, found.total.bytes_moved, found.peak_bytes, found.params_bytes)
    return all(figure < SAFE for figure in figures)


def _figures(prediction: Prediction) -> dict[str, Any]:
    estimate, seconds, cost = prediction.estimate, prediction.total, prediction.estimate.total
    return {
        "predicted_s": seconds.seconds,
        "predicted_low_s": seconds.low,
        "predicted_high_s": seconds.high,
        "bound": seconds.bound,
        "matmul_flops": cost.matmul_flops,
        "vector_flops": cost.vector_flops,
        "bytes_read": cost.bytes_read,
        "bytes_written": cost.bytes_written,
        "params_bytes": estimate.params_bytes,
        "cache_bytes": estimate.cache_bytes,
        "peak_bytes": estimate.peak_bytes,
    }


def _plain(value: Any) -> Any:
    """A number or word of NumPy as one of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _shared(estimate: Estimate, block: Block, machine: Machine) -> dict[str, Any]:
    """What all points of a part have in common."""
    config, work, decodes = estimate.config, block.work, block.work.phase == "decode"
    return {
        **described(config),
        "method": block.method,
        "params": json.dumps(plain(asdict(estimate.parameters)), default=str),
        "phase": work.phase,
        **({"seq": estimate.workload.seq, "steps": work.steps or 1} if decodes else {}),
        "dtype": work.dtype,
        "causal": config.causal if work.causal is None else work.causal,
        "hardware": machine.hardware.name,
        "level": machine.hardware.level,
        "device": machine.device,
        "engine": machine.engine,
        "threads": machine.threads,
    }


def described(config: ModelConfig) -> dict[str, Any]:
    """The model's columns."""
    names = ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab")
    return {"model": config.name, **{name: getattr(config, name) for name in names}}


def _joined(rows: list[Rows]) -> Rows:
    columns = {name: np.concatenate([one.columns[name] for one in rows]) for name in rows[0].columns}
    return Rows(rows[0].shared, columns)


def parts_of(grid: Grid) -> Iterator[Part]:
    """All points, piece by piece, in order."""
    for block in grid.blocks():
        for hardware in range(len(block.hardware)):
            for picks in _pieces(block):
                yield Part(block, hardware, picks)


def _pieces(block: Block) -> Iterator[Any]:
    """Arrays of pairs; a streaming model's cached positions one after another, because they decide its chunks."""
    n = len(block.lengths)
    one_length = block.work.phase == "decode" and n > 1 and resolve_config(block.model).streams
    size = 1 if one_length else PIECE
    for first in range(0, block.workloads, size):
        yield np.arange(first, min(first + size, block.workloads))


def chosen_machines(
    grid: Grid, device: str | None, engine: str | None, threads: int | None, progress: Progress
) -> dict[tuple[str | None, str], Machine]:
    """Every hardware of a grid for every dtype, on the device that it is.

    Raises
    ------
    ConfigError
        For unknown hardware, one of another kind than the device, and ``local`` that was not calibrated.
    """
    found: dict[tuple[str | None, str], Machine] = {}
    for name in grid.hardware:
        named = machines.find(name)
        own, runner = device_and_engine(device or default_device(named, engine), engine)
        for dtype in grid.dtypes:
            hardware = machines.choose(named or name, runner, threads or cores(), dtype, progress)
            found[name, dtype] = Machine(hardware, own, runner, threads or cores())
    return found


# --- in several processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Parts that are worth being handed to another process.

    Attributes
    ----------
    needed : tuple of str, or None
        Rows come back as text, with these columns; None: with all columns and no text.
    """

    parts: list[Part]
    machines: Mapping[tuple[str | None, str], Machine]
    needed: tuple[str, ...] | None

    def __call__(self) -> tuple[list[Rows | None], Counter[str]]:
        """The rows of each part, and reasons of points that were left out."""
        estimator = Estimator(self.machines)
        rows = [estimator.rows(part) for part in self.parts]
        if self.needed is not None:
            rows = [one.written_down(self.needed) if one else None for one in rows]
        return rows, estimator.skipped


def in_order(
    parts: Iterable[Part], estimator: Estimator, needed: tuple[str, ...] | None, submit: Callable[[Task], Any],
    ahead: int,
) -> Iterator[tuple[Part, Rows | None]]:  # fmt: skip
    """Rows of parts in their order from tasks that are submitted, so many ahead; `submit` gives a future."""
    tasks = (Task(batch, estimator.machines, needed) for batch in _batches(parts))
    waiting: deque[tuple[Task, Any]] = deque()
    while True:
        for task in itertools.islice(tasks, ahead - len(waiting)):
            waiting.append((task, submit(task)))
        if not waiting:
            return
        task, future = waiting.popleft()
        rows, skipped = future.result()
        estimator.skipped.update(skipped)
        yield from zip(task.parts, rows, strict=True)


def in_processes(
    parts: Iterable[Part], estimator: Estimator, needed: tuple[str, ...] | None, processes: int
) -> Iterator[tuple[Part, Rows | None]]:
    """Rows of parts in their order, computed and written down by several processes."""
    import multiprocessing
    import signal
    from concurrent.futures import ProcessPoolExecutor

    fresh = multiprocessing.get_context("spawn")
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of this process
    pool = ProcessPoolExecutor(processes, fresh, initializer=signal.signal, initargs=ignored)
    try:
        yield from in_order(parts, estimator, needed, pool.submit, 2 * processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts together until they are worth a task."""
    batch: list[Part] = []
    points = 0
    for part in parts:
        batch.append(part)
        points += len(part.picks)
        if len(batch) == TASK_PARTS or points >= TASK_POINTS:
            yield batch
            batch, points = [], 0
    if batch:
        yield batch
