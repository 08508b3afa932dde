"""How true methods stay to exact attention on real weights and input, beside what they cost, knob by knob.

Every setting of a method runs over the same sequences; its outputs are compared with those of ``dense``. Then all
settings take turns at being timed, so that a change of the machine's speed meets all of them. The passes of the
comparison come first and are not counted: they compile and touch new memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.closed_form import Estimate
from costmodel.hardware import Hardware
from costmodel.ops import visible_pairs
from costmodel.predict import Prediction, predict
from refimpl.cache import Cache
from refimpl.config import DTYPES, ModelConfig
from refimpl.errors import ConfigError, InputError, UnsupportedError
from refimpl.model import Prepared, Runner
from refimpl.recorder import Call
from refimpl.weights import Model, load_model

from . import context, endings, gpu, machines, results
from .agreement import Agreement, NextToken
from .curves import Choices, Point, Settings, points
from .material import TOKENS, WINDOWS, Material, Wanted, gather
from .measurement import DECODE_REPEATS, REPEATS, SECONDS, Timing
from .preparation import looks_first, prepared
from .progress import Progress
from .request import BASELINES, Request, resolve
from .results import Samples

METHODS = ("reuse",)
REFERENCE = "dense"


def fidelity(
    model: str | Path | ModelConfig | None = None,
    method: str | Sequence[str] = METHODS,
    params: Settings | None = None,
    *,
    over: Choices | None = None,
    vary: Choices | None = None,
    input_file: str | Path | None = None,
    calibration_file: str | Path | None = None,
    seq: int | None = None,
    windows: int | None = None,
    kv_len: int | None = None,
    measure: bool | None = None,
    hardware: str | Hardware | None = None,
    overrides: Mapping[str, int | None] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    repeats: int | None = None,
    max_seconds: float = SECONDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Error against exact attention on real weights and input, beside the cost, over the knobs of methods.

    Parameters
    ----------
    model, method, params, overrides, dtype, device, engine, threads, hardware
        As for `effref.estimate`; weights are real where they were fetched. ``dense``, the reference, and ``flash`` are
        run in any case.
    over : mapping, optional
        Method -> knob -> values, as ``{"reuse": {"group": [1, 2, 4]}}``: one curve per knob. Default: the knob of the
        method's parameters, from off onward.
    vary : mapping, optional
        Method -> parameter -> values: a curve for each value, and for every combination of several parameters.
    input_file, calibration_file : str or Path, optional
        What the methods are judged on, and what they may look at before. Default: texts that come with effref for
        language models; for others a recording or text, judged and looked at.
    seq : int, optional
        T of a sequence; default 512 tokens for language models, else the input's own length.
    windows : int, optional
        Sequences that a text is cut into for language models; default 2.
    kv_len : int, optional
        For language models: cached positions before a decoding step; default T.
    measure : bool, optional
        Time the passes, too; default where the engine is a fast one.
    repeats, max_seconds, seed
        See ``effref.measure``; `seed` is that of random weights and inputs.

    Returns
    -------
    result : dict
        The schema of ``effref fidelity --format json``: a result for ``dense``, for ``flash`` and for every value of
        every curve, each with ``fidelity``, costs, and for language models ``decode``.

    Raises
    ------
    ConfigError, InputError, UnsupportedError, MissingDependencyError
        Unknown names, values that are not allowed, files that do not suit the model, too little memory.
    """
    own, other = (None if path is None else Path(path) for path in (input_file, calibration_file))
    plan = planned(
        model, method, params, over or {}, vary or {}, Wanted(own, other, seq, windows, seed), kv_len, measure,
        Timing(repeats or REPEATS, 0, max_seconds, seed), repeats or DECODE_REPEATS,
        overrides=overrides, dtype=dtype, device=device, engine=engine, threads=threads,
    )  # fmt: skip
    document = compared(plan, hardware, Progress())
    return context.completed(document, plan.request.threads)


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked without loading anything.

    Attributes
    ----------
    request : Request
        Of a prefill; its length is not final where a file decides.
    points : tuple of Point
    wanted : Wanted
    kv_len : int or None
    measures : bool
    timing : Timing
    decode_repeats : int
    about : dict
        Curves as asked for, for the ``config`` of the result.
    """

    request: Request
    points: tuple[Point, ...]
    wanted: Wanted
    kv_len: int | None
    measures: bool
    timing: Timing
    decode_repeats: int
    about: Mapping[str, Any]


def planned(
    model: str | Path | ModelConfig | None, method: str | Sequence[str], params: Settings | None, over: Choices,
    vary: Choices, wanted: Wanted, kv_len: int | None, measure: bool | None, timing: Timing, decode_repeats: int,
    **given: Any,
) -> Plan:  # fmt: skip
    """Check everything that can be checked before weights are loaded; see `fidelity`.

    Raises
    ------
    ConfigError, InputError
        See `fidelity`.
    """
    request = resolve(model, wanted.length, method, params, **given)
    config, params = request.config, request.params
    wanted.check(config)
    _check_kv_len(config, kv_len)
    found = points(request.methods, params, over, vary, config)
    usual = TOKENS if config.generates else config.max_positions or 1
    request = replace(request, lengths=(wanted.length or config.chunk or min(usual, config.max_positions or usual),))
    for point in found:
        request.estimate(point.method, request.lengths[0], point.params)
    measures = request.engine != "numpy" if measure is None else measure
    about = {"params": params, "over": over, "vary": vary}
    return Plan(request, found, wanted, kv_len, measures, timing, decode_repeats, about)


def _check_kv_len(config: ModelConfig, kv_len: int | None) -> None:
    if kv_len is None:
        return
    if not config.generates:
        raise ConfigError(f"--kv-len is for decoding; {config.name} is no language model: leave it away")
    if kv_len < 1:
        raise ConfigError(f"kv_len is {kv_len}; it must be at least 1")
    if config.max_positions and kv_len >= config.max_positions:
        raise ConfigError(
            f"--kv-len {kv_len} leaves no room for a step: {config.name} has {config.max_positions} positions"
        )


def compared(plan: Plan, hardware: str | Hardware | None, progress: Progress) -> dict[str, Any]:
    """The result without its context; with ``"interrupted": True`` after Ctrl-C."""
    request = plan.request
    machines.require(request.engine)
    machine = machines.choose(hardware, request.engine, request.threads, request.dtype, progress)
    _check_memory(plan, plan.wanted.windows or WINDOWS)
    ops = machines.started(request.engine, request.threads, progress)
    with machines.limited(request.engine, request.threads):
        model = _loaded(plan, progress)
        material = gather(model, plan.wanted)
        plan = replace(plan, request=replace(request, config=model.config, lengths=(material.length,)))
        _check_memory(plan, len(material.sequences))
        _announce(plan, material, progress)
        bench = Bench(plan, machine, Runner(model, ops), material, progress)
        watching = machines.disturbances_noted("measuring", progress, request.device)
        with watching if plan.measures else nullcontext() as seen:
            ended = bench.run()
    document = results.document(plan.request, machine, bench.results(), progress.notes)
    document["config"] |= {
        **plan.about,
        "repeats": plan.timing.repeats, "max_seconds": plan.timing.max_seconds, "seed": plan.timing.seed,
        "decode_repeats": plan.decode_repeats, "measure": plan.measures,
        "weights": model.source, "pretrained": model.pretrained,
        "input": material.source, "sequences": len(material.sequences), "valid_positions": material.valid,
        "calibration": material.calibration_source,
        "decode": {"kv_len": bench.kv_len, "steps": 1} if bench.decoding else None,
    }  # fmt: skip
    return document | ended | {"context": seen or {}}


def _check_memory(plan: Plan, sequences: int) -> None:
    """Refuse what does not fit: exact weights and outputs that are kept, the largest pass, and caches for timing."""
    request, (length,) = plan.request, plan.request.lengths
    config, itemsize = request.config, DTYPES[request.dtype]
    estimates = [request.estimate(point.method, length, point.params) for point in plan.points]
    largest = max(estimates, key=lambda estimate: estimate.peak_bytes)
    width = config.vocab if config.head else config.d_out or config.d_model
    kept = sequences * length * width * itemsize + estimates[0].params_bytes
    if plan.measures:
        kept += sum(_cache_bytes(request, estimate, plan.kv_len or length) for estimate in estimates)
    needed, available = largest.peak_bytes + kept, context.available_bytes(request.device)
    if needed > available:
        raise UnsupportedError(
            f"{largest.method} at T={length} and the exact outputs of {sequences} sequences need "
            f"{gpu.too_little(needed, available, request.device)}: lower --seq, --windows or --layers"
        )


def _cache_bytes(request: Request, estimate: Estimate, positions: int) -> int:
    """Keys and values of so many positions; 0 where no cache is filled."""
    return int(request.estimate(estimate.method, positions, estimate.parameters).cache_bytes)


def _loaded(plan: Plan, progress: Progress) -> Model:
    request = plan.request
    progress.stage(f"loading {request.config.name}")
    model = load_model(request.model, seed=plan.timing.seed, dtype=request.dtype)
    meaning = "" if model.pretrained else ": figures of the mechanism, not of quality"
    progress.note(f"{request.config.name}: {model.source}{meaning}{_how_to_get(request, model)}")
    return model


def _how_to_get(request: Request, model: Model) -> str:
    from refimpl.weights.pretrained import available, folder

    name = str(request.model)
    names = {**{entry.alias: found for found, entry in available().items()}, **{found: found for found in available()}}
    if model.pretrained or name not in names or folder(name) is not None:
        return ""
    return f"; 'effref models fetch {names[name]}' gets trained weights"


def _announce(plan: Plan, material: Material, progress: Progress) -> None:
    """What the methods are judged on, and what those that prepare themselves look at before."""
    for note in material.notes:
        progress.note(note)
    progress.note(f"input: {material.source}")
    if any(looks_first(point.method) for point in plan.points):
        progress.note(f"methods are prepared on: {material.calibration_source}")


# --- the passes -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Candidate:
    """A point that was compared.

    Attributes
    ----------
    point : Point
    ready : Prepared
    fidelity : dict
    prefill, step : Prediction, Prediction or None
        Of a pass over one sequence, and of a decoding step.
    prefill_s, step_s : list of float
        Measured.
    cache : Cache or None
    """

    point: Point
    ready: Prepared
    fidelity: dict[str, Any]
    prefill: Prediction
    step: Prediction | None
    prefill_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    cache: Cache | None = None


@dataclass
class Bench:
    """All points of a plan: compared, then timed in turns."""

    plan: Plan
    hardware: Hardware
    runner: Runner
    material: Material
    progress: Progress
    candidates: list[Candidate] = field(default_factory=list)
    exact: list[Any] = field(default_factory=list)  # (T, d) or (T, V) for each sequence, without padding

    @property
    def request(self) -> Request:
        """Of a prefill of one sequence."""
        return self.plan.request

    @property
    def decoding(self) -> Request | None:
        """The request of a decoding step, for language models."""
        if not self.request.config.generates:
            return None
        return replace(self.request, phase="decode", lengths=(self.kv_len,), steps=1)

    @property
    def kv_len(self) -> int:
        """Cached positions before a decoding step: one less than the model has, at most."""
        limit = self.request.config.max_positions
        return self.plan.kv_len or (min(self.material.length, limit - 1) if limit else self.material.length)

    def run(self) -> dict[str, Any]:
        """Compare and time all points; why it ended early, if it did, with what was seen until then."""

        def all_points() -> None:
            self._compare()
            if self.plan.measures:
                self._time()

        return endings.worked(all_points, lambda: self.candidates, self.progress)

    def _compare(self) -> None:
        """All points; those for which a method finds nothing are left out, unless none but the baselines remains."""
        failed = None
        for number, point in enumerate(self.plan.points, 1):
            self.progress.stage(f"comparing {point.name} ({number} of {len(self.plan.points)})")
            try:
                self.candidates.append(self._compared(point))
            except ConfigError as error:
                failed = error
                self.progress.note(f"{point.name} is left out: {error}")
        if failed and len(self.candidates) == len(BASELINES):
            raise failed

    def _compared(self, point: Point) -> Candidate:
        ready = self._prepared(point)
        found = self._fidelity(point, ready)
        parameters = ready.parameters
        if "kept" in found:
            parameters = parameters.with_kept(found["kept"])
        prefill = predict(self.request.estimate(point.method, self.material.length, parameters), self.hardware)
        step = None
        if self.decoding:
            step = predict(self.decoding.estimate(point.method, self.kv_len, parameters), self.hardware)
        return Candidate(point, ready, found, prefill, step)

    def _prepared(self, point: Point) -> Prepared:
        """With what the method has to find first, on the input for calibration."""
        if not looks_first(point.method):
            return self.runner.prepare(point.method, point.params)
        ready, _ = prepared(self.runner, point.method, point.params, self.material.calibration, self.progress)
        return ready

    def _fidelity(self, point: Point, ready: Prepared) -> dict[str, Any]:
        """Figures over the valid positions of all sequences together; the first point gives what is exact."""
        material = self.material
        outputs = Agreement()
        tokens = NextToken() if self.request.config.head else None
        filtered = np.zeros(2, np.int64)
        for index, sequence in enumerate(material.sequences):
            run = self.runner(sequence[None], ready)
            filtered += kept_and_visible(run.calls)
            output = run.output[0, : material.valid]  # (T, d) or (T, V)
            if not np.isfinite(output).all():
                raise InputError(
                    f"the output of {point.name} holds NaN or infinite values in {self.request.dtype}: check weights "
                    "and input, or take --dtype float32"
                )
            if len(self.exact) == index:
                self.exact.append(output)
            outputs.add(output, self.exact[index])
            if tokens:
                tokens.add(output, self.exact[index], None if material.following is None else material.following[index])
            self.progress.advance(point.name, (index + 1) / len(material.sequences))
        positions = len(material.sequences) * material.valid
        return {
            "reference": REFERENCE, "positions": positions, **outputs.figures(), **(tokens.figures() if tokens else {}),
            **({"kept": float(filtered[0] / filtered[1])} if filtered[1] else {}),
        }  # fmt: skip

    # --- time -------------------------------------------------------------------------------------------------------

    def _time(self) -> None:
        """Passes over a sequence, then decoding steps behind what these left in the caches."""
        sequence = self.material.sequences[:1]
        seconds = self.plan.timing.max_seconds / (2 if self.decoding else 1)
        if self.decoding:
            for one in self.candidates:
                one.cache = self.runner.new_cache(max(self.material.length, self.kv_len + 1), one.ready)

        def prefill(one: Candidate) -> None:
            if one.cache is not None:
                one.cache.truncate(0)
            one.prefill_s.append(self.runner(sequence, one.ready, record=False, cache=one.cache).seconds)

        self._turns(f"timing T={self.material.length}", self.plan.timing.repeats, seconds, prefill)
        if not self.decoding:
            return
        ids = np.resize(sequence, (1, self.kv_len + 1))  # repeated where it is shorter

        def step(one: Candidate) -> float:
            assert one.cache is not None
            one.cache.truncate(self.kv_len)
            return self.runner.decode(ids[:, -1:], one.ready, one.cache, record=False).seconds

        for one in self.candidates:
            self._fill(one, ids)
            step(one)  # the first one is not counted
        self._turns(
            f"timing a step after S={self.kv_len}", self.plan.decode_repeats, seconds,
            lambda one: one.step_s.append(step(one)),
        )  # fmt: skip

    def _fill(self, one: Candidate, ids: Any) -> None:
        """Have the cache hold the positions before a step."""
        assert one.cache is not None
        one.cache.truncate(min(one.cache.length, self.kv_len))
        if one.cache.length < self.kv_len:
            self.runner(ids[:, one.cache.length : self.kv_len], one.ready, record=False, cache=one.cache)

    def _turns(self, what: str, repeats: int, seconds: float, turn: Callable[[Candidate], None]) -> None:
        """Rounds in which every candidate has its turn: one at least, more while there is time."""
        self.progress.stage(what)
        start = time.perf_counter()
        for round_ in range(1, repeats + 1):
            for one in self.candidates:
                turn(one)
            spent = time.perf_counter() - start
            self.progress.advance(f"{what}, round {round_}", round_ / repeats)
            if spent + spent / round_ > seconds:
                break

    # --- what was seen ----------------------------------------------------------------------------------------------

    def results(self) -> list[dict[str, Any]]:
        """One entry per point that was compared."""
        return [self._entry(one) for one in self.candidates]

    def _entry(self, one: Candidate) -> dict[str, Any]:
        point, request = one.point, self.request
        entry = _whole(request, one, one.prefill, one.prefill_s)
        entry |= {"curve": point.curve, "knob": point.knob or None, "value": point.value, "fidelity": one.fidelity}
        entry["speedup"] = self._speedups(one, lambda other: other.prefill, lambda other: other.prefill_s)
        if self.decoding:
            entry["cache_bytes"] = _cache_bytes(request, one.prefill.estimate, self.kv_len)
            step = _whole(self.decoding, one, one.step, one.step_s)
            kept = {name: step[name] for name in ("kv_len", "steps", "cache_traffic", "tokens_per_s")}
            speedup = self._speedups(one, lambda other: other.step, lambda other: other.step_s)
            entry["decode"] = {**kept, **step["total"], "speedup": speedup}
        return entry

    def _speedups(
        self, one: Candidate, prediction: Callable[[Candidate], Any], seconds: Callable[[Candidate], list[float]]
    ) -> dict[str, Any]:
        compared = {other.point.method: other for other in self.candidates if other.point.method in BASELINES}
        compared[""] = one
        predicted = {name: float(prediction(other).total.seconds) for name, other in compared.items()}
        medians = {name: float(np.median(seconds(other))) for name, other in compared.items() if seconds(other)}
        return results.speedups(predicted, medians, "")


def kept_and_visible(calls: Iterable[Call]) -> tuple[int, int]:
    """Pairs of query and key that filters kept, and those that were visible to them; 0 and 0 where nothing filters."""
    kept = visible = 0
    for sizes in (dict(call.sizes) for call in calls):
        if "kept" in sizes:
            kept += sizes["kept"]
            visible += sizes["maps"] * visible_pairs(sizes["q_len"], sizes["k_len"], sizes["causal"])
    return kept, visible


def _whole(request: Request, one: Candidate, prediction: Any, seconds: list[float]) -> dict[str, Any]:
    """A result in total; components are not measured here, and so not listed."""
    entry = results.entry(request, one.point.method, prediction)
    entry["components"] = []
    if seconds:
        results.add_measured(entry, Samples({}, seconds))
    return entry
