"""Measured time of methods beside its prediction, component by component.

At each length the methods take turns, so that a change of the machine's speed meets all of them. Every turn is two
passes: an instrumented one, which gives the components, and a plain one, which gives the total. Baselines that were not
named have plain passes only. Before the turns every method runs once uncounted, because first use compiles and
touches new memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.closed_form import Estimate
from costmodel.fit import bare_roofline
from costmodel.hardware import Hardware
from costmodel.predict import Prediction, Seconds, predict
from refimpl.cache import Cache
from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, InputError, UnsupportedError, unknown
from refimpl.inputs import Inputs, load_input, random_inputs
from refimpl.model import Prepared, Run, Runner, sequence_length
from refimpl.parameters import PARAMETERS
from refimpl.parameters.composition import members
from refimpl.weights import Model, load_model

from . import context, endings, gpu, machines, results
from .agreement import agreement
from .preparation import prepared
from .progress import Progress
from .request import BASELINES, METHODS, Request, check_records, resolve
from .results import Samples

SECONDS = 40.0
REPEATS, DECODE_REPEATS = 5, 25
L2 = ("warm", "cold")
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
    l2 : {"warm", "cold"}
        Whether the GPU's second-level cache holds what the pass before left there, or is overwritten before each pass.
    graph : bool
        Time totals on recorded passes, CUDA graphs or decoding steps in one compiled call; components still on ordinary
        passes.
    fuse : bool
        Pairs of ops of these graphs as one kernel.
    """

    repeats: int = REPEATS
    warmup: int = 1
    max_seconds: float = SECONDS
    seed: int = 0
    l2: str = "warm"
    graph: bool = False
    fuse: bool = False

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}; it must be above 0")
        if self.l2 not in L2:
            raise unknown("l2", self.l2, L2)
        if self.fuse and not self.graph:
            raise ConfigError("--fuse is for the passes of --graph, whose ops are not timed one by one: add --graph")

    def check(self, request: Request) -> None:
        """Raise ConfigError or UnsupportedError for what the device or the passes do not have."""
        self.check_device(request.device, request.engine, request.decodes)
        if self.graph:
            request.check_recorded()

    def check_device(self, device: str, engine: str, decodes: bool) -> None:
        """Raise ConfigError for what no pass on a device has."""
        for given, name in ((self.l2 == "cold", "--l2 cold"), (self.fuse, "--fuse")):
            if given and device != "gpu":
                raise ConfigError(f"{name} is for GPUs: add --device gpu, or leave it away")
        if self.graph:
            check_records(device, engine, decodes)


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
    kv_len: int | Sequence[int] | None = None,
    steps: int | None = None,
    causal: bool | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    repeats: int | None = None,
    warmup: int = 1,
    max_seconds: float = SECONDS,
    seed: int = 0,
    l2: str = "warm",
    graph: bool = False,
    fuse: bool = False,
) -> dict[str, Any]:
    """Run methods and put measured beside predicted seconds.

    Parameters
    ----------
    model, method, params, overrides, batch, dtype, phase, kv_len, steps, causal
        As for `effref.estimate`. ``dense`` and ``flash`` are run in any case, for speed-ups and fidelity.
    seq : int or sequence of int, optional
        Lengths; default that of `input_file`, else 256 to 2048.
    hardware : str or Hardware, optional
        Default: this machine's profile, which is made and kept where there is none yet.
    input_file : str or Path, optional
        Text, recording or array to run on; default seeded random input.
    device, engine, threads
        Default ``numba`` on all cores of the CPU.
    repeats, warmup, max_seconds, seed, l2, graph, fuse
        See `Timing`.

    Returns
    -------
    result : dict
        The schema of ``effref measure --format json``. With ``"interrupted": True`` after Ctrl-C, and
        ``"out_of_memory"``, what ran out, where memory did; both hold what was measured until then.

    Raises
    ------
    ConfigError, InputError, UnsupportedError, MissingDependencyError
        Unknown names, values that are not allowed, inputs that do not fit, too little memory, a missing device.
    """
    request = resolve(
        model, seq, method, params, overrides=overrides, batch=batch, dtype=dtype, phase=phase, kv_len=kv_len,
        steps=steps, causal=causal, device=device, engine=engine, threads=threads,
    )  # fmt: skip
    source = Source(None if input_file is None else Path(input_file), own_length=seq is None and phase == "prefill")
    timing = Timing(repeats or default_repeats(request), warmup, max_seconds, seed, l2, graph, fuse)
    document = measured(request, hardware, source, timing, Progress())
    return context.completed(document, request.threads)


def default_repeats(request: Request) -> int:
    """Decoding passes are short: more of them."""
    return DECODE_REPEATS if request.decodes else REPEATS


@dataclass(frozen=True)
class Source:
    """Where inputs come from: a file, whose own length may be taken, or a random generator."""

    path: Path | None = None
    own_length: bool = False

    @property
    def decides(self) -> bool:
        """Whether the file says how long the input is."""
        return self.path is not None and self.own_length

    def read_all(self, model: Model, request: Request, seed: int) -> dict[int, Inputs]:
        """Length -> input of all positions that there are at the end of a pass."""
        if self.decides:
            own = self._from_file(model, request, None)
            return {sequence_length(model.config, own.array): own}
        return {length: self._read(model, request, request.positions(length), seed) for length in request.lengths}

    def _read(self, model: Model, request: Request, positions: int, seed: int) -> Inputs:
        if self.path is not None:
            return self._from_file(model, request, positions)
        array = random_inputs(model.config, positions, request.batch, seed, request.dtype)
        return Inputs(array, model.config.stem, (), positions)

    def _from_file(self, model: Model, request: Request, seq: int | None) -> Inputs:
        assert self.path is not None
        given = load_input(model, self.path, seq)
        own = given.array.shape[0]
        if request.batch not in (1, own) and own != 1:
            raise ConfigError(f"{self.path} holds {own} sequences, but batch is {request.batch}: give --batch {own}")
        return replace(given, array=np.repeat(given.array, max(request.batch // own, 1), axis=0))


def measured(
    request: Request, hardware: str | Hardware | None, source: Source, timing: Timing, progress: Progress
) -> dict[str, Any]:
    """The result without its context."""
    timing.check(request)
    ops = machines.started(request.engine, request.threads, progress)
    with machines.limited(request.engine, request.threads):
        _what_fits(replace(request, lengths=(1,)) if source.decides else request, timing, Progress())
        model = _model(request, source, timing, progress)
        inputs = source.read_all(model, request, timing.seed)
        request = replace(request, lengths=tuple(inputs), batch=next(iter(inputs.values())).array.shape[0])
        methods = _what_fits(request, timing, progress)
        machine = machine_for(hardware, request, progress)
        for note in dict.fromkeys(note for given in inputs.values() for note in given.notes):
            progress.note(note)
        bench = Bench(request, methods, machine, Runner(model, ops), inputs, timing, progress)
        with machines.disturbances_noted("measuring", progress, request.device) as seen:
            ended = bench.run()
    found = bench.results()
    if timing.graph:
        recorded = "replayed as CUDA graphs" if request.device == "gpu" else "recorded and run as one compiled call"
        progress.note(
            f"totals are of passes {recorded}; components are of ordinary ones, in which the host launches each op"
            + ("; in predictions no two ops are one kernel" if timing.fuse else "")
        )
    document = results.document(request, machine, found, progress.notes)
    document["config"] |= {**vars(timing), "input": str(source.path) if source.path else "seeded random"}
    document["accuracy"] = results.accuracy(found) | _rivals(bench, found)
    return document | ended | {"context": seen}


def _what_fits(request: Request, timing: Timing, progress: Progress) -> tuple[str, ...]:
    """The methods to run; refuses named ones that do not fit into memory, and leaves out such baselines.

    The graphs of all methods keep the memory of a pass each, beside that of an ordinary one.
    """
    available = context.available_bytes(request.device)
    fitting, graphs = [], 0
    for name in request.all_methods:
        estimates = [request.estimate(name, length) for length in request.lengths]
        graphs += max(one.peak_bytes - one.resident_bytes for one in estimates) if timing.graph else 0
        needed = graphs + max(one.peak_bytes for one in estimates)
        if needed <= available:
            fitting.append(name)
            continue
        shortage = f"{name} needs {gpu.too_little(needed, available, request.device)}"
        if name in request.methods:
            raise UnsupportedError(f"{shortage}: lower --seq, --batch or --layers, or take --method flash")
        progress.note(f"{shortage}: no ratio to it")
    return tuple(fitting)


def _model(request: Request, source: Source, timing: Timing, progress: Progress) -> Model:
    progress.stage(f"loading {request.config.name}")
    positions = 0 if source.decides else request.positions(request.lengths[-1])
    model = load_model(request.model, seed=timing.seed, dtype=request.dtype, positions=positions)
    progress.note(f"{request.config.name}: {model.source}")
    return model


def machine_for(hardware: str | Hardware | None, request: Request, progress: Progress) -> Hardware:
    """The hardware that is named; else this machine, calibrated now where it never was."""
    named = machines.find(hardware)
    if named:
        return machines.choose(named, request.engine, request.threads, request.dtype, progress)
    return machines.local(request.engine, request.threads, request.dtype, progress)


# --- the passes -----------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Passes of the methods over the lengths, and what was seen."""

    request: Request
    methods: tuple[str, ...]
    hardware: Hardware
    runner: Runner
    inputs: Mapping[int, Inputs]
    timing: Timing
    progress: Progress
    ready: dict[tuple[str, int], Prepared] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)  # of the length that is being measured
    graphs: dict[str, Callable[[], Run]] = field(default_factory=dict)  # of that length, too
    samples: dict[tuple[str, int], Samples] = field(default_factory=dict)
    fidelity: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ready = {(name, length): ready for name in self.methods for length, ready in self._prepare(name).items()}
        self.predictions: dict[tuple[str, int], Prediction] = {
            (name, length): predict(self.request.estimate(name, length, ready.parameters), self.hardware)
            for (name, length), ready in self.ready.items()
        }
        self.totals = {place: self._total(one) for place, one in self.predictions.items()}
        self._began_s = time.perf_counter()
        self._seen_s = self._expected_s = 0.0  # of all counted passes: how fast this machine is beside the prediction

    def _total(self, ordinary: Prediction) -> Seconds:
        """What the timed passes are predicted to take: recorded ones, if that is asked for."""
        if not self.timing.graph:
            return ordinary.total
        return predict(ordinary.estimate, self.hardware, recorded=True).total

    def _prepare(self, name: str) -> dict[int, Prepared]:
        """Let a method find what it needs first; this is no part of its latency.

        On the longest input for all lengths, or on each input where what is found fits one length alone.
        """
        lengths, given = self.request.lengths, self.request.params_of(name)
        ready: dict[int, Prepared] = {}
        for length in reversed(lengths):
            if not ready or any(getattr(PARAMETERS[one], "PER_LENGTH", False) for one in members(name)):
                inputs = self.inputs[length].array
                found, _ = prepared(self.runner, name, given, inputs, self.progress, self.request.causal)
            ready[length] = found
        return dict(sorted(ready.items()))

    def run(self) -> dict[str, Any]:
        """Measure all lengths; why it ended early, if it did, with what was seen until then."""

        def all_lengths() -> None:
            for length in self.request.lengths:
                self._measure_length(length)

        return endings.worked(all_lengths, self.results, self.progress)

    def _measure_length(self, length: int) -> None:
        lengths = self.request.lengths
        self.progress.stage(f"measuring {self._place(length)} ({lengths.index(length) + 1} of {len(lengths)})")
        self.graphs = {}  # lets go of those of the length before
        self._fill_caches(length)
        if self.timing.graph:
            self._record_graphs(length)
        if length == lengths[0]:
            self._warm_up(length)
            self._began_s = time.perf_counter()  # compilation does not count
        elif self.request.device == "gpu" or self._seconds_for(length) > self._round_s(length):
            self._warm_up(length)  # on a GPU the first pass of a length allocates
        outputs: dict[str, Any] = {}
        start, allowed = time.perf_counter(), self._seconds_for(length)
        for round_ in range(1, self.timing.repeats + 1):
            for name in self.methods:
                self._turn(name, length, outputs)
            spent = time.perf_counter() - start
            self.progress.advance(f"{self._place(length)}, round {round_}", round_ / self.timing.repeats)
            if spent + spent / round_ > allowed:
                break

    def _warm_up(self, length: int) -> None:
        for _ in range(self.timing.warmup):
            for name in self.methods:
                doing = f"warming up {name}; the first use on a machine compiles"
                self.progress.advance(f"{self._place(length)}, {doing}", 0.0)
                self._pass(name, length, record=False)
                if self.timing.graph:
                    self._replayed(name)

    def _turn(self, name: str, length: int, outputs: dict[str, Any]) -> None:
        """An instrumented pass of a named method, and a plain one."""
        samples = self.samples.setdefault((name, length), Samples())
        recorded = self._pass(name, length, record=True) if name in self.request.methods else None
        plain = self._replayed(name) if self.timing.graph else self._pass(name, length, record=False)
        if recorded:
            for component, seconds in recorded.breakdown.items():
                samples.components.setdefault(component, []).append(seconds)
        samples.totals.append(plain.seconds)
        self._seen_s += plain.seconds
        self._expected_s += float(self.totals[name, length].seconds)
        if name not in outputs:
            self._compare(name, length, plain.output, outputs)

    def _pass(self, name: str, length: int, record: bool) -> Run:
        inputs, ready = self.inputs[length].array, self.ready[name, length]
        cache = self.caches.get(name)
        self._clear_cache()
        if cache is None:
            return self.runner(inputs, ready, causal=self.request.causal, record=record)
        if self.request.decodes:
            cache.truncate(length)
            _, new = self._split(inputs, length)
            return self.runner.decode(new, ready, cache, causal=self.request.causal, record=record)
        cache.truncate(0)
        return self.runner(inputs, ready, causal=self.request.causal, record=record, cache=cache)

    def _replayed(self, name: str) -> Run:
        self._clear_cache()
        return self.graphs[name]()

    def _clear_cache(self) -> None:
        if self.timing.l2 == "cold":
            self.runner.engine.clear_cache()  # type: ignore[attr-defined]  # of the GPU's engine, as was checked

    def _record_graphs(self, length: int) -> None:
        """A graph of the pass of each method, behind what its new cache holds whenever it is replayed."""
        for name in self.methods:
            self.progress.advance(f"{self._place(length)}, recording {name}", 0.0)
            inputs = self.inputs[length].array
            new = self._split(inputs, length)[1] if self.request.decodes else inputs
            try:
                self.graphs[name] = self.runner.recorded(
                    new, self.ready[name, length], causal=self.request.causal, cache=self.caches.get(name),
                    fused=self.timing.fuse,
                )  # fmt: skip
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error}") from error

    def _fill_caches(self, length: int) -> None:
        """New caches for this length; in decoding they hold its positions already."""
        self.caches = {}
        if not self.request.workload(length).fills_cache:
            return
        positions = self.request.positions(length)
        for name in self.methods:
            cache = self.runner.new_cache(positions, self.ready[name, length], batch=self.request.batch)
            self.caches[name] = cache
            if self.request.decodes:
                self.progress.advance(f"{self._place(length)}, filling the cache of {name}", 0.0)
                past, _ = self._split(self.inputs[length].array, length)
                self.runner(past, self.ready[name, length], causal=self.request.causal, record=False, cache=cache)

    def _split(self, inputs: Any, length: int) -> tuple[Any, Any]:
        """The inputs of the cached positions (of whole chunks, if need be of more) and of the new ones."""
        config = self.request.config
        if not config.streams:
            return inputs[:, :length], inputs[:, length:]
        filled = -(-length // config.chunk) * config.chunk
        return inputs[:, : config.stem_length(filled)], inputs[:, length * config.reduction :]

    def _place(self, length: int) -> str:
        return f"{'S' if self.request.decodes else 'T'}={length}"

    # --- time -------------------------------------------------------------------------------------------------------

    def _round_s(self, length: int) -> float:
        """What one round of turns will take, going by the passes seen so far."""
        passes = {name: 2 if name in self.request.methods else 1 for name in self.methods}
        predicted = sum(count * float(self.totals[name, length].seconds) for name, count in passes.items())
        return predicted * (self._seen_s / self._expected_s if self._expected_s else 1.0)

    def _seconds_for(self, length: int) -> float:
        """The time for a length: later ones keep a warm-up and a round each; of the rest half, or all for the last."""
        later = [other for other in self.request.lengths if other > length]
        kept = sum((1 + 0.5 * self.timing.warmup) * self._round_s(other) for other in later)
        left = self.timing.max_seconds - (time.perf_counter() - self._began_s) - kept
        return max(left / 2 if later else left, 0.0)

    # --- what was seen ----------------------------------------------------------------------------------------------

    def _compare(self, name: str, length: int, output: Any, outputs: dict[str, Any]) -> None:
        """Check the first output of a method, and compare it with exact attention once both are there."""
        if not np.isfinite(output).all():
            raise InputError(
                f"the output of {name} at {self._place(length)} holds NaN or infinite values in {self.request.dtype}: "
                "check weights and input, or take --dtype float32"
            )
        outputs[name] = output
        exact = next((baseline for baseline in BASELINES if baseline in self.methods), None)
        for other in [*outputs] if name == exact else [name]:
            if exact in outputs:
                found = agreement(outputs[other], outputs[exact], self._compared(length))
                self.fidelity[other, length] = {"reference": exact, **found}

    def _compared(self, length: int) -> int:
        """Positions of an output that are no padding."""
        request = self.request
        return request.steps * request.step_positions if request.decodes else self.inputs[length].valid_positions

    def results(self) -> list[dict[str, Any]]:
        """One entry per named method and length that has passes of both kinds."""
        found = []
        for name in self.request.methods:
            for length in self.request.lengths:
                samples = self.samples.get((name, length), Samples())
                if samples.complete:
                    found.append(self._entry(name, length, samples))
        return found

    def _entry(self, name: str, length: int, samples: Samples) -> dict[str, Any]:
        entry = results.entry(self.request, name, self.predictions[name, length], self.totals[name, length])
        results.add_measured(entry, samples)
        predicted = {other: float(self.totals[other, length].seconds) for other in self.methods}
        seen = {other: self.samples[other, length].totals for other in self.methods if (other, length) in self.samples}
        medians = {other: float(np.median(totals)) for other, totals in seen.items() if totals}
        entry["speedup"] = results.speedups(predicted, medians, name)
        entry["fidelity"] = self.fidelity.get((name, length))
        entry["flags"] = self._above_roof(entry)
        return entry

    def estimate_of(self, result: Mapping[str, Any]) -> Estimate:
        """The closed form behind a result."""
        return self.predictions[result["method"], results.length_of(result)].estimate

    def _above_roof(self, entry: Mapping[str, Any]) -> list[str]:
        """Components that are faster than the machine can be: their FLOPs must be wrong."""
        roof = self.hardware.matmul_flops_per_s.get(self.request.dtype)
        return [
            f"{row['component']}: {row['matmul_flops'] / row['measured_s']['median'] / 1e9:.0f} GFLOP/s were measured, "
            f"above the matrix peak of {roof / 1e9:.0f}: its formula or the profile is wrong"
            for row in entry["components"]
            if roof and row["measured_s"]["median"]
            and row["matmul_flops"] / row["measured_s"]["median"] > ROOF_TOLERANCE * roof
        ]  # fmt: skip


def _rivals(bench: Bench, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The accuracy that simpler models would have: the bare roofline, and the same times one fitted factor."""
    hardware = bench.hardware
    if hardware.level == "spec":
        return {}
    roof = bare_roofline(hardware)
    plain = [results.predicted_again(one, predict(bench.estimate_of(one), roof)) for one in found]
    rivals = {"bare_roofline": results.accuracy(plain)}
    factor = hardware.about.get("global_efficiency")
    if factor:
        rivals["global_efficiency"] = results.accuracy([results.slower(one, factor) for one in plain])
    return rivals
