"""Measured time of methods beside its prediction, component by component.

At each length the methods take turns, so that a change of the machine's speed meets all of them. Every turn is two
passes: an instrumented one, which gives the components, and a plain one, which gives the total. The first pass of a
method compiles and warms up and is not counted; at lengths that the time limit hardly allows, only the shortest
length warms up, where everything that compiles has been compiled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.fit import bare_roofline
from costmodel.hardware import Hardware
from costmodel.predict import Prediction, predict
from refimpl.config import ModelConfig
from refimpl.engines import engine as get_engine
from refimpl.engines.protocol import Engine
from refimpl.errors import ConfigError, InputError, UnsupportedError
from refimpl.inputs import Inputs, load_input, random_inputs
from refimpl.model import Run, Runner, sequence_length
from refimpl.weights import Model, load_model

from . import context, machines, results
from .agreement import agreement
from .progress import Progress
from .request import LENGTHS, METHODS, Request, resolve
from .results import Samples

SECONDS = 40.0
ROOF_TOLERANCE = 1.05  # measured over peak, above which a formula must be wrong


@dataclass(frozen=True)
class Timing:
    """How long and how often to measure.

    Attributes
    ----------
    repeats : int
        Pairs of passes of each method at each length, at most.
    warmup : int
        Passes before them that are not counted.
    max_seconds : float
        For all passes together; every method is measured at least once at each length.
    seed : int
        Of random weights and inputs.
    """

    repeats: int = 5
    warmup: int = 1
    max_seconds: float = SECONDS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}; it must be above 0")


def measure(
    model: str | Path | ModelConfig | None = None,
    seq: int | Sequence[int] | None = None,
    method: str | Sequence[str] = METHODS,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    hardware: str | Hardware | None = None,
    overrides: Mapping[str, int | None] | None = None,
    input_file: str | Path | None = None,
    batch: int = 1,
    dtype: str = "float32",
    phase: str = "prefill",
    causal: bool | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    repeats: int = 5,
    warmup: int = 1,
    max_seconds: float = SECONDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Run methods and put measured beside predicted seconds.

    Parameters
    ----------
    model, method, params, overrides, batch, dtype, phase, causal
        As for `effref.estimate`. ``dense`` and ``flash`` are run in any case, for speed-ups and fidelity.
    seq : int or sequence of int, optional
        Lengths; default that of `input_file`, else 256 to 2048.
    hardware : str or Hardware, optional
        Default: this machine's profile, which is made and kept where there is none yet.
    input_file : str or Path, optional
        Text, recording or array to run on; default seeded random input.
    device, engine, threads
        Default ``numba`` on all cores of the CPU.
    repeats, warmup, max_seconds, seed
        See `Timing`.

    Returns
    -------
    result : dict
        The schema of ``effref measure --format json``. With ``"interrupted": True`` after Ctrl-C.

    Raises
    ------
    ConfigError, InputError, UnsupportedError, MissingDependencyError
        Unknown names, values that are not allowed, inputs that do not fit, too little memory, a missing device.
    """
    request = resolve(
        model, LENGTHS if seq is None else seq, method, params, overrides=overrides, batch=batch, dtype=dtype,
        phase=phase, causal=causal, device=device, engine=engine, threads=threads,
    )  # fmt: skip
    source = Source(None if input_file is None else Path(input_file), own_length=seq is None)
    timing = Timing(repeats, warmup, max_seconds, seed)
    document = measured(request, hardware, source, timing, Progress())
    return {**document, "context": context.context(request.threads)}


@dataclass(frozen=True)
class Source:
    """Where inputs come from: a file, whose own length may be taken, or a random generator."""

    path: Path | None = None
    own_length: bool = False

    @property
    def decides(self) -> bool:
        """Whether the file says how long the input is."""
        return self.path is not None and self.own_length

    def read(self, model: Model, request: Request, seq: int | None, seed: int) -> Inputs:
        """Input of length `seq`, or of its own length."""
        if self.path is None:
            assert seq is not None
            array = random_inputs(model.config, seq, request.batch, seed, request.dtype)
            return Inputs(array, model.config.stem, (), seq)
        found = load_input(model, self.path, seq)
        own = found.array.shape[0]
        if request.batch != own and own != 1:
            raise ConfigError(f"{self.path} holds {own} sequences, but batch is {request.batch}: give --batch {own}")
        return replace(found, array=np.repeat(found.array, request.batch // own, axis=0))


def measured(
    request: Request, hardware: str | Hardware | None, source: Source, timing: Timing, progress: Progress
) -> dict[str, Any]:
    """The result without its context."""
    ops = get_engine(request.engine)
    with limited(ops, request.threads):
        request, methods = _what_fits(replace(request, lengths=(1,)) if source.decides else request, progress)
        model = _model(request, source, timing, progress)
        if source.decides:
            own = source.read(model, request, None, timing.seed)
            request, methods = _what_fits(replace(request, lengths=(sequence_length(model.config, own.array),)), progress)
        machine = _machine(hardware, request, progress)
        bench = _Bench(request, methods, machine, Runner(model, ops), source, timing, progress)
        del model
        finished = bench.run()
    document = results.document(request, machine, bench.results(), progress.notes)
    document["config"] |= {**vars(timing), "input": str(source.path) if source.path else "random"}
    document["accuracy"] = bench.accuracy(document["results"])
    return document if finished else {**document, "interrupted": True}


@contextmanager
def limited(ops: Engine, threads: int) -> Iterator[None]:
    """Run with so many threads."""
    if hasattr(ops, "set_threads"):
        ops.set_threads(threads)
        yield
        return
    import threadpoolctl

    with threadpoolctl.threadpool_limits(threads):
        yield


def _what_fits(request: Request, progress: Progress) -> tuple[Request, tuple[str, ...]]:
    """The methods to run; refuses named ones that do not fit into memory, and leaves out such baselines."""
    available = context.available_bytes(request.device)
    methods = []
    for name in request.all_methods:
        needed = max(request.estimate(name, seq).peak_bytes for seq in request.lengths)
        if needed <= available:
            methods.append(name)
            continue
        shortage = f"{name} needs {needed / 2**30:.2f} GiB of memory and {available / 2**30:.2f} GiB are available"
        if name in request.methods:
            raise UnsupportedError(f"{shortage}: lower --seq, --batch or --layers, or take --method flash")
        progress.note(f"{shortage}: no ratio to it")
    return request, tuple(methods)


def _model(request: Request, source: Source, timing: Timing, progress: Progress) -> Model:
    positions = 0 if source.decides else request.lengths[-1]
    progress.stage(f"loading {request.config.name}")
    model = load_model(request.model, seed=timing.seed, dtype=request.dtype, positions=positions)
    progress.note(f"{request.config.name}: {model.source}")
    return model


def _machine(hardware: str | Hardware | None, request: Request, progress: Progress) -> Hardware:
    if hardware in (None, machines.LOCAL):
        return machines.local(request.engine, request.threads, request.dtype, progress)
    return machines.choose(hardware, request.engine, request.threads, request.dtype, progress)


@dataclass
class _Bench:
    """Passes of the methods over the lengths, and what was seen."""

    request: Request
    methods: tuple[str, ...]
    hardware: Hardware
    runner: Runner
    source: Source
    timing: Timing
    progress: Progress
    samples: dict[tuple[str, int], Samples] = field(default_factory=dict)
    fidelity: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.predictions: dict[tuple[str, int], Prediction] = {
            (name, seq): predict(self.request.estimate(name, seq), self.hardware)
            for name in self.methods
            for seq in self.request.lengths
        }
        self._speed = _Speed()

    def run(self) -> bool:
        """Measure; False when it was interrupted, with what was seen until then."""
        try:
            for seq in self.request.lengths:
                self._measure_length(seq)
        except KeyboardInterrupt:
            if not any(samples.complete for samples in self.samples.values()):
                raise
            self.progress.note("interrupted: only what was measured until then is shown")
            return False
        finally:
            self.progress.done()
        return True

    # --- passes -----------------------------------------------------------------------------------------------------

    def _measure_length(self, seq: int) -> None:
        place = self.request.lengths.index(seq)
        self.progress.stage(f"measuring T={seq} ({place + 1} of {len(self.request.lengths)})")
        model = Model(self.runner.config, self.runner.weights, "", False)  # its shape, for reading inputs
        given = self.source.read(model, self.request, seq, self.timing.seed)
        return self._rounds(seq, given)

    def _rounds(self, seq: int, given: Inputs) -> None:
        outputs: dict[str, Any] = {}
        allowed = self._seconds_for(seq)
        start = time.perf_counter()
        if seq == self.request.lengths[0] or self._speed.seconds(self._cost(seq)) * 2 < allowed:
            for _ in range(self.timing.warmup):
                for name in self.methods:
                    self._pass(name, seq, given, record=False)
        for done in range(1, self.timing.repeats + 1):
            began = time.perf_counter()
            for name in self.methods:
                self._pair(name, seq, given, outputs)
            now = time.perf_counter()
            self.progress.advance(f"T={seq}, round {done}", max(done / self.timing.repeats, (now - start) / allowed))
            if now - start + (now - began) > allowed:
                break
