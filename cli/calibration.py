"""Calibration: run small models of every recipe and method, time each op where it stands, fit the machine's constants.

The models are synthetic and their sizes are not those of any preset, so that a prediction for a preset is one for
shapes that were not fitted. Ops are timed inside forward passes, because there their operands are as warm or cold in
the caches as they will be later; alone in a loop they run faster than they ever do in a model. Passes that the engine
can record are then timed as recorded ones, too.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from costmodel.closed_form import estimate
from costmodel.fit import Pass, Sample, fit
from costmodel.hardware import Hardware
from refimpl.cache import Cache
from refimpl.config import DTYPES, ModelConfig, Workload
from refimpl.engines import ENGINES
from refimpl.engines import engine as get_engine
from refimpl.engines.protocol import Engine
from refimpl.errors import UnsupportedError
from refimpl.inputs import random_inputs
from refimpl.model import Prepared, Run, Runner
from refimpl.recorder import Call
from refimpl.weights import load_model

from .context import available_bytes, cpu_name
from .gpu import too_little

Say = Callable[[str, float], None]  # a message and the fraction done
Key = tuple[str, tuple[tuple[str, int], ...]]  # op and sizes
Under = tuple[tuple[str, dict[str, Any]], ...]  # methods and their parameters

ADDS, REPLAYS, WIDTH = (20, 120), 5, 1024  # of the graphs that bandwidths are measured with; columns of their arrays
TURNS = 5  # of a recorded and an ordinary pass, at least
WORKING = 3  # passes as large as the largest that a GPU's memory must hold beside weights and caches

EXACT: Under = (("dense", {}), ("flash", {}))
METHODS: Under = (*EXACT, ("reuse", {"groups": [[0, 1]]}))  # whose ops most others share
# Those with ops of their own, which some cells run, too.
HALVES: Under = (("efficientasr", {"group": 1, "ffn_chunks": 2}),)
QUARTERS: Under = (("efficientasr", {"group": 1, "ffn_chunks": 4}),)
HEAD: Under = (("svd-softmax", {"decomposition": "gram"}),)
FILTERS: Under = (("latte", {}), ("latte", {"kept": 0.5}))  # two parts of pairs, to tell kept and visible ones apart
LINEAR: Under = (("linear", {}),)  # which takes no cache, so that causal passes need models without a head
# Maps of the pass's own inputs, which are all found, and of others.
LOOKUPS: Under = (("attmemo", {"epochs": 0}),)
if sys.platform == "linux":
    LOOKUPS = (*LOOKUPS, ("attmemo", {"epochs": 0, "transfer": "map"}))


@dataclass(frozen=True)
class Cell:
    """One synthetic model at one length, or one step of it behind `kv_len` cached positions."""

    config: ModelConfig
    seq: int = 1
    batch: int = 1
    kv_len: int = 0
    methods: Under = METHODS
    records: int = 0  # sequences beside its own whose maps are stored

    def workload(self, dtype: str = "float32") -> Workload:
        """What one pass does."""
        if self.kv_len:
            return Workload(1, self.batch, "decode", dtype=dtype, kv_len=self.kv_len)
        return Workload(self.seq, self.batch, dtype=dtype, fills_cache=self.config.generates)


def _model(recipe: str, d_model: int, heads: int, d_ff: int, **changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "conformer": {"stem": "frames", "features": 48, "strides": (2, 2), "position": "relative", "conv_kernel": 23,
                      "activation": "silu", "final_norm": False},
        "post-norm": {"vocab": 3000, "token_types": 2, "position": "learned", "max_positions": 4096,
                      "embedding_norm": True, "final_norm": False},
        "pre-norm": {"stem": "frames", "features": 48, "strides": (1, 2), "position": "sinusoidal",
                     "max_positions": 4096},
        "patches": {"recipe": "pre-norm", "stem": "patches", "features": 200, "position": "learned",
                    "max_positions": 4096},
        "decoder": {"recipe": "pre-norm", "vocab": 5000, "position": "rotary", "norm": "rms", "bias": False,
                    "activation": "silu", "gated": True, "causal": True, "head": True},
    }[recipe]  # fmt: skip
    return ModelConfig(
        **{"name": "calibration", "recipe": recipe, "layers": 2, "d_model": d_model, "heads": heads, "d_ff": d_ff,
           **base, **changes}
    )  # fmt: skip


# Widths, head widths and lengths on either side of what people run; no preset's own.
CELLS: tuple[Cell, ...] = (
    Cell(_model("conformer", 208, 4, 832), 90),
    Cell(_model("conformer", 320, 5, 1280), 640),
    Cell(_model("conformer", 144, 3, 576), 1700),
    Cell(_model("conformer", 240, 4, 960), 340, batch=2, methods=(*METHODS, *QUARTERS)),
    Cell(_model("post-norm", 320, 10, 1280), 60, methods=(*METHODS, *FILTERS, *LOOKUPS), records=300),
    Cell(_model("post-norm", 640, 10, 2560), 420, methods=(*METHODS, *HALVES)),
    Cell(_model("post-norm", 288, 9, 1152), 200, batch=3, methods=(*METHODS, *LOOKUPS), records=40),
    Cell(_model("post-norm", 448, 14, 1792), 1100, methods=(*METHODS, *FILTERS)),
    Cell(_model("pre-norm", 320, 5, 1280), 1250, methods=(*METHODS, *HALVES)),
    Cell(_model("pre-norm", 480, 8, 1920), 160, methods=(*METHODS, *QUARTERS)),
    Cell(_model("pre-norm", 192, 3, 768), 2300, methods=(*METHODS, *FILTERS, *LINEAR)),
    Cell(_model("patches", 272, 4, 1088), 210, methods=(*METHODS, *FILTERS, *LINEAR)),
    Cell(_model("pre-norm", 224, 4, 640, causal=True), 520, methods=LINEAR),
    Cell(_model("pre-norm", 160, 5, 480, causal=True), 1500, methods=LINEAR),
    Cell(_model("decoder", 544, 8, 1408, kv_heads=2), 330, methods=(*METHODS, *FILTERS)),
    Cell(_model("decoder", 192, 3, 576), 1400, methods=(*METHODS, *HEAD)),
    Cell(_model("decoder", 448, 7, 1216), 900, methods=(*METHODS, *HEAD, *FILTERS)),
    Cell(_model("decoder", 720, 6, 2016, kv_heads=3, activation="gelu_tanh", gated=False), 60),
    Cell(_model("decoder", 544, 8, 1408, kv_heads=2), kv_len=330, methods=(*METHODS, *QUARTERS)),
    # More layers than the others: recorded, it tells what starting a pass takes from what its calls do.
    Cell(_model("decoder", 192, 3, 576, layers=12), kv_len=1400, methods=(*METHODS, *HEAD, *FILTERS)),
    Cell(
        _model("decoder", 720, 6, 2016, kv_heads=3, activation="gelu_tanh", gated=False),
        kv_len=90,
        batch=3,
        methods=(*METHODS, *HALVES),
    ),
    # A model that no cache holds, so that its weights come from memory.
    Cell(_model("decoder", 1216, 19, 3328, layers=8), kv_len=700, methods=(*EXACT, *HEAD)),
)

# What a GPU runs beside them: launches take most of the time of the ones above, so that these have to fill it.
LARGE_CELLS: tuple[Cell, ...] = (
    Cell(_model("conformer", 320, 5, 1280), 640, batch=12),
    Cell(_model("conformer", 144, 3, 576), 1700, batch=6),
    Cell(_model("conformer", 640, 10, 2560), 480, batch=16, methods=(*METHODS, *QUARTERS)),
    Cell(_model("post-norm", 288, 9, 1152), 200, batch=16, methods=(*METHODS, *LOOKUPS), records=24),
    Cell(_model("post-norm", 448, 14, 1792), 1100, batch=6, methods=(*METHODS, *FILTERS)),
    Cell(_model("pre-norm", 1344, 21, 5376), 1000, batch=8, methods=(*METHODS, *HALVES)),
    Cell(_model("pre-norm", 192, 3, 768), 2300, batch=4, methods=(*METHODS, *FILTERS, *LINEAR)),
    Cell(_model("patches", 272, 4, 1088), 210, batch=32, methods=(*METHODS, *FILTERS, *LINEAR)),
    Cell(_model("pre-norm", 224, 4, 640, causal=True), 520, batch=32, methods=LINEAR),
    Cell(_model("decoder", 544, 8, 1408, kv_heads=2), 330, batch=24, methods=(*METHODS, *QUARTERS)),
    Cell(_model("decoder", 1344, 21, 3584), 900, batch=8, methods=(*METHODS, *HEAD, *FILTERS)),
    Cell(_model("decoder", 544, 8, 1408, kv_heads=2), kv_len=1800, batch=32, methods=(*METHODS, *QUARTERS)),
    Cell(_model("decoder", 1344, 21, 3584, layers=3), kv_len=1500, batch=4, methods=(*EXACT, *HEAD, *FILTERS)),
)


def calibrate(
    engine: str = "numba",
    threads: int | None = None,
    dtype: str = "float32",
    seconds: float = 12.0,
    progress: Say | None = None,
) -> Hardware:
    """Fit the constants of this machine under one engine.

    Parameters
    ----------
    engine : {"numba", "numpy", "cupy", "cupy-tf32"}
    threads : int, optional
        CPU threads; default the engine's own.
    dtype : {"float32", "float64", "float16"}
    seconds : float
        Time to spend on measuring, after compilation; more gives steadier medians. Every pass runs at least once.
    progress : callable, optional
        Called with a message and the fraction done.

    Returns
    -------
    hardware : Hardware
        A profile of level "calibrated"; its `about` holds what it was fitted on and the residuals.

    Raises
    ------
    UnsupportedError
        If the free memory of the GPU holds not even the small models.
    """
    say = progress or (lambda message, fraction: None)
    ops: Any = get_engine(engine)
    if threads is not None and hasattr(ops, "set_threads"):
        ops.set_threads(threads)
    kind: Literal["cpu", "gpu"] = "gpu" if ENGINES[engine][2] == "gpu" else "cpu"
    about: dict[str, Any] = {
        "engine": engine,
        "device": kind,
        "threads": threads or getattr(ops, "threads", None),
        "dtype": dtype,
        "machine": cpu_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "capacity_bytes": available_bytes(kind),
    }
    cells = CELLS
    if kind == "gpu":
        cells = fitting(dtype, about["capacity_bytes"])
        about |= {"threads": None, "machine": ops.device_name(), "cache_bytes": ops.cache_bytes()}
        about |= bandwidths(ops, dtype)
    passes = _measure(cells, ops, dtype, seconds, say)
    say("fitting", 1.0)
    return fit(passes, DTYPES[dtype], kind=kind, about=about)


def bandwidths(gpu: Any, dtype: str) -> dict[str, float]:
    """Bandwidths of the second-level cache and of the memory of a GPU, by the streaming op in CUDA graphs.

    In a pass the launch of an op takes longer than reading what the cache holds, so that passes do not tell them. The
    difference between a long graph and a short one leaves out what launching a graph takes.
    """
    found = {}
    for name, working_set in (("near_bytes_per_s", gpu.cache_bytes() // 3), ("far_bytes_per_s", 8 * gpu.cache_bytes())):
        rows = max(1, working_set // (3 * WIDTH * DTYPES[dtype]))  # of two operands and the result
        x, y = (gpu.asarray(np.ones((1, rows, WIDTH), dtype)) for _ in range(2))
        try:
            short, long = (_adds_s(gpu, x, y, count) for count in ADDS)
        except UnsupportedError:  # the fit has to do with what passes tell
            return {}
        if long > short:  # else the clock does not tell them apart
            found[name] = (ADDS[1] - ADDS[0]) * 3 * x.nbytes / (long - short)
    return found


def _adds_s(gpu: Any, x: Any, y: Any, count: int) -> float:
    """Seconds of a graph of so many additions, the least of a few replays."""

    def adds() -> Any:
        for _ in range(count):
            out = gpu.add(x, y)
        return out

    replay = gpu.record(adds)
    return min(float(replay()[1]) for _ in range(REPLAYS))


def fitting(dtype: str, available_bytes: int) -> tuple[Cell, ...]:
    """The cells for a GPU that so much memory holds together: the small ones, and of the large ones as many as fit.

    Raises
    ------
    UnsupportedError
        If it does not hold the small ones.
    """
    held, found = 0, []
    for cell in (*CELLS, *LARGE_CELLS):
        method, params = cell.methods[0]
        cost = estimate(method, cell.config, cell.workload(dtype), params)
        own = int(cost.resident_bytes + cost.cache_bytes * len(cell.methods))
        if held + own + WORKING * int(cost.peak_bytes) <= available_bytes:
            held += own
            found.append(cell)
        elif cell in CELLS:
            needed = held + own + WORKING * cost.peak_bytes
            raise UnsupportedError(f"calibrating needs at least {too_little(needed, available_bytes, 'gpu')}")
    return tuple(found)


@dataclass
class _Run:
    """One cell under one method, and what was seen of it."""

    cell: Cell
    ready: Prepared
    runner: Runner
    inputs: Any
    dtype: str
    cache: Cache | None = None
    passes: list[Run] = field(default_factory=list)
    recorded: float | None = None  # seconds of a recorded pass / of an ordinary one

    def once(self) -> Run:
        """One pass; a step of decoding is one of several, so another one goes before it."""
        if self.cell.kv_len:
            self._rewind()
            self.runner(self.inputs, self.ready, cache=self.cache, record=False)
        self._rewind()
        return self.runner(self.inputs, self.ready, cache=self.cache)

    def record(self, seconds: float) -> None:
        """Time the pass as a recorded one in turn with an ordinary one, as machines drift; for so long at least."""
        self._rewind()
        try:
            again = self.runner.recorded(self.inputs, self.ready, cache=self.cache)
        except UnsupportedError:
            return
        again()  # warms up
        turns: list[tuple[float, float]] = []
        start = time.perf_counter()
        while len(turns) < TURNS or time.perf_counter() - start < seconds:
            turns.append((again().seconds, self.once().seconds))
        recorded_s, ordinary_s = np.median(turns, axis=0)
        self.recorded = float(recorded_s / ordinary_s)

    def _rewind(self) -> None:
        if self.cache is not None:
            self.cache.truncate(self.cell.kv_len)

    def summary(self) -> Pass:
        """The closed form with the medians over all passes."""
        cost = estimate(self.ready.method, self.cell.config, self.cell.workload(self.dtype), self.ready.parameters)
        total_s = float(np.median([one.seconds for one in self.passes]))
        recorded_s = None if self.recorded is None else self.recorded * total_s
        return Pass(cost, list(_samples([one.calls for one in self.passes])), total_s, recorded_s)


def _measure(cells: Sequence[Cell], ops: Engine, dtype: str, seconds: float, say: Say) -> list[Pass]:
    """Every cell under every method, in rounds until the time is spent."""
    runs = list(_runs(cells, ops, dtype))
    for index, run in enumerate(runs):
        say("compiling and warming up", index / len(runs))
        run.once()
    start = time.perf_counter()
    spent = 0.0
    while spent < seconds:
        for run in runs:
            run.passes.append(run.once())
            spent = time.perf_counter() - start
            say("measuring", min(spent / seconds, 1.0))
    for index, run in enumerate(runs):
        say("recording passes", index / len(runs))
        run.record(seconds / len(runs))
    return [run.summary() for run in runs]


def _runs(cells: Sequence[Cell], ops: Engine, dtype: str) -> Iterator[_Run]:
    for cell in cells:
        runner = Runner(load_model(cell.config, dtype=dtype), ops)
        inputs = random_inputs(cell.config, cell.seq, cell.batch, dtype=dtype)
        past = random_inputs(cell.config, cell.kv_len, cell.batch, dtype=dtype) if cell.kv_len else inputs
        if cell.records:
            past = np.concatenate([past, random_inputs(cell.config, cell.seq, cell.records, seed=1, dtype=dtype)])
        for method, params in cell.methods:
            ready = runner.prepare(method, params, past)
            yield _Run(cell, ready, runner, inputs, dtype, _cache(cell, ready, runner, dtype))


def _cache(cell: Cell, ready: Prepared, runner: Runner, dtype: str) -> Cache | None:
    """The cache that a pass of this cell fills or continues."""
    if not cell.workload().fills_cache:
        return None
    cache = runner.new_cache(cell.kv_len + cell.seq, ready, batch=cell.batch)
    if cell.kv_len:
        _fill(cache, runner.engine, cell.kv_len, dtype)
    return cache


def _fill(cache: Cache, ops: Engine, positions: int, dtype: str) -> None:
    """Keys and values of past positions, drawn instead of computed."""
    rng = np.random.default_rng(0)
    for layer, kept in enumerate(cache.stored):
        for heads, append in ((kept.key_heads, cache.keys), (kept.value_heads, cache.values)):
            if heads:
                rows = rng.standard_normal((cache.batch, heads, positions * kept.rows, kept.width)).astype(dtype)
                append(lambda _: ops, layer, ops.asarray(rows))
    cache.advance(positions)


def _samples(rounds: list[list[Call]]) -> Iterator[Sample]:
    """One sample per op and sizes of a pass: the median over rounds of the mean over its calls in a round."""
    times: dict[Key, list[float]] = defaultdict(list)
    for calls in rounds:
        here: dict[Key, list[float]] = defaultdict(list)
        for call in calls:
            here[call.op, call.sizes].append(call.seconds)
        for key, values in here.items():
            times[key].append(float(np.mean(values)))
    for (op, sizes), values in times.items():
        yield Sample(op, dict(sizes), float(np.median(values)), len(values))
