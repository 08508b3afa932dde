"""From which length, or batch, a method beats a baseline: solved on the cost model, and confirmed by measuring.

Measured, a search narrows the place where the sign of log(speedup) changes: both ends, the predicted place, then
halves of the logarithmic distance, until the ends are close or passes no longer tell the two apart.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodel import crossover as solve
from costmodel.crossover import Advantage
from costmodel.hardware import Hardware
from costmodel.predict import predict
from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, unknown
from refimpl.inputs import check_file
from refimpl.model import Runner
from refimpl.weights import load_model

from . import context, endings, machines, results
from .measurement import Bench, Source, Timing, machine_for
from .progress import Progress
from .request import BASELINES, Request, resolve

OVER = ("length", "batch")
RANGES = {"length": (16, 16384), "batch": (1, 64)}
BATCH_AT = 512  # positions, where the batch varies and no length is given
SECONDS = 120.0
PAIRS = 5  # passes of both in turn at each place; up to three times as many where they do not tell the two apart
CLOSE = 1.1  # ratio of the ends at which a search stops
CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Axis:
    """What varies, and from where to where."""

    over: str
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first < self.last:
            raise ConfigError(
                f"range {self.first}:{self.last}: give two rising whole numbers of at least 1, as 16:8192"
            )

    def at(self, request: Request, place: int) -> tuple[Request, int]:
        """The request of this place and its length."""
        if self.over == "batch":
            return replace(request, batch=place), request.lengths[0]
        return replace(request, lengths=(place,)), place


def crossover(
    model: str | Path | ModelConfig | None = None,
    method: str | Sequence[str] = "reuse",
    params: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    over: str = "length",
    limits: tuple[int, int] | None = None,
    baseline: str | None = None,
    measure: bool = False,
    hardware: str | Hardware | None = None,
    input_file: str | Path | None = None,
    max_seconds: float = SECONDS,
    seed: int = 0,
    **given: Any,
) -> dict[str, Any]:
    """From which length or batch methods beat a baseline.

    Parameters
    ----------
    model, method, params, hardware
        As for `effref.estimate`.
    over : {"length", "batch"}
        What varies: T of a prefill, S of decoding, or the sequences of a batch.
    limits : (int, int), optional
        From where to where; default 16 to 16384 positions, or as many as the model was made for; 1 to 64 sequences.
    baseline : {"dense", "flash"}, optional
        Default both.
    measure : bool
        Whether the predicted places are looked for with the clock, too.
    input_file, max_seconds, seed
        For measuring: as for `effref.measure`.
    **given
        seq (one length, where the batch varies), overrides, batch, dtype, phase, kv_len, steps, causal, device, engine,
        threads: as for `effref.estimate`.

    Returns
    -------
    result : dict
        The schema of ``effref crossover --format json``.

    Raises
    ------
    ConfigError, InputError, UnsupportedError, MissingDependencyError
        As for `effref.measure`.
    """
    request, axis = planned(model, method, params, over, limits, given)
    source = Source(None if input_file is None else Path(input_file))
    timing = Timing(PAIRS, 1, max_seconds, seed) if measure else None
    document = found(request, axis, baselines(request, baseline), hardware, source, timing, Progress())
    return context.completed(document, request.threads)


def baselines(request: Request, only: str | None) -> list[str]:
    """The baselines to beat, one or both."""
    named = [only] if only else list(BASELINES)
    wanted = [name for name in request.methods if name not in named]
    if not wanted:
        raise ConfigError(
            f"method {', '.join(request.methods)} against baseline {', '.join(named)}: name another method"
        )
    return named


def planned(
    model: str | Path | ModelConfig | None, method: str | Sequence[str], params: Mapping[str, Mapping[str, Any]] | None,
    over: str, limits: tuple[int, int] | None, given: Mapping[str, Any],
) -> tuple[Request, Axis]:  # fmt: skip
    """Check everything that can be checked before weights are loaded."""
    if over not in OVER:
        raise unknown("axis", over, OVER)
    first, last = limits or RANGES[over]
    decodes = given.get("phase") == "decode"
    name = "kv_len" if decodes else "seq"
    lengths = given.get(name)
    if over == "length":
        if lengths is not None:
            raise ConfigError("the length varies here: give --range FROM:TO instead of --seq and --kv-len")
        given = {**given, name: first}
    elif lengths is None:
        given = {**given, name: BATCH_AT}
    elif not isinstance(lengths, int) and len(lengths) > 1:
        raise ConfigError(f"the batch varies at one length; {len(lengths)} were given")
    request = resolve(model, method=method, params=params, **given)
    if limits is None and over == "length" and request.config.max_positions:
        last = min(last, request.config.max_positions)
    axis = Axis(over, first, last)
    for place in (first, last):
        one, length = axis.at(request, place)
        for each in request.methods:
            one.estimate(each, length)
    return request, axis


def found(
    request: Request, axis: Axis, named: Sequence[str], hardware: str | Hardware | None, source: Source,
    timing: Timing | None, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The result without its context; measured where `timing` is given."""
    if source.path is not None:
        check_file(request.config, source.path)
    if timing is None:
        machine = machines.choose(hardware, request.engine, request.threads, request.dtype, progress)
        rows = _rows(Forecast(request, axis, machine), named, None)
        return _document(request, axis, machine, named, rows, progress)
    ops = machines.started(request.engine, request.threads, progress)
    with machines.limited(request.engine, request.threads):
        machine = machine_for(hardware, request, progress)
        forecast = Forecast(request, axis, machine)
        axis = affordable(forecast, named, timing, progress)
        forecast = replace(forecast, axis=axis)  # what it knows stays known
        progress.stage(f"loading {request.config.name}")
        positions = request.positions(axis.at(request, axis.last)[1])
        model = load_model(request.model, seed=timing.seed, dtype=request.dtype, positions=positions)
        progress.note(f"{request.config.name}: {model.source}")
        runner = Runner(model, ops)
        searches: dict[tuple[str, str], Search] = {}
        with machines.disturbances_noted("measuring", progress, request.device) as seen:
            ended = _searched(forecast, named, runner, source, timing, searches, progress)
    rows = _rows(forecast, named, searches)
    document = _document(request, axis, machine, named, rows, progress)
    document["config"] |= {**vars(timing), "input": str(source.path) if source.path else "seeded random"}
    return document | ended | {"context": seen}


def _searched(
    forecast: Forecast, named: Sequence[str], runner: Runner, source: Source, timing: Timing,
    searches: dict[tuple[str, str], Search], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Fill `searches`; why it ended early, if it did."""
    pairs = list(forecast.pairs(named))
    share = timing.max_seconds / len(pairs)

    def all_pairs() -> None:
        for method, baseline in pairs:
            progress.stage(f"measuring {method} against {baseline}")
            search = searches[method, baseline] = Search(forecast, method, baseline, runner, source, timing, progress)
            search.run(share)

    return endings.worked(all_pairs, lambda: any(search.probes for search in searches.values()), progress)


@dataclass
class Forecast:
    """Predictions over an axis."""

    request: Request
    axis: Axis
    hardware: Hardware
    known: dict[tuple[str, str, int], Advantage] = field(default_factory=dict)

    def pairs(self, named: Sequence[str]) -> list[tuple[str, str]]:
        """Each method with each baseline."""
        return [(method, baseline) for method in self.request.methods for baseline in named if method != baseline]

    def advantage(self, method: str, baseline: str, place: int) -> Advantage:
        """How the method is expected to stand at a place."""
        key = method, baseline, place
        if key not in self.known:
            request, length = self.axis.at(self.request, place)
            own, other = (predict(request.estimate(name, length), self.hardware) for name in (method, baseline))
            self.known[key] = solve.advantage(own, other)
        return self.known[key]

    def wins(self, method: str, baseline: str, figure: str = "speedup") -> list[solve.Interval]:
        """Where this figure of the advantage is above 1."""

        def ahead(place: int) -> bool:
            return float(getattr(self.advantage(method, baseline, place), figure)) > 1.0

        return solve.wins(ahead, self.grid)

    @property
    def grid(self) -> list[int]:
        """Places at which changes are looked for."""
        return solve.places(self.axis.first, self.axis.last)


def affordable(forecast: Forecast, named: Sequence[str], timing: Timing, progress: Progress) -> Axis:
    """The axis up to the last place that memory and time allow to measure."""
    axis, request = forecast.axis, forecast.request
    available = context.available_bytes(request.device)
    pairs = forecast.pairs(named)
    seconds = timing.max_seconds / len(pairs) / 4  # for the longest place of a search

    def fits(place: int) -> bool:
        one, length = axis.at(request, place)
        expected = [forecast.advantage(method, baseline, place) for method, baseline in pairs]
        spent = max(each.method_s + each.baseline_s for each in expected) * (timing.repeats + timing.warmup)
        names = {name for pair in pairs for name in pair}
        return spent <= seconds and all(one.estimate(name, length).peak_bytes <= available for name in names)

    reached = [place for place in forecast.grid if fits(place)]
    if not reached or reached[-1] == axis.first:
        raise ConfigError(
            f"measuring {axis.over} {axis.first} would take more than {seconds:.2g} s or all memory: raise "
            "--max-seconds, or lower --range"
        )
    if reached[-1] < axis.last:
        progress.note(
            f"{axis.over} {axis.last} takes more memory, or more time than --max-seconds {timing.max_seconds:g} leaves "
            f"for it: looked at up to {reached[-1]}"
        )
    return replace(axis, last=reached[-1])


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Passes of both at one place, in turn.

    Attributes
    ----------
    log_ratios : tuple of float
        ln(seconds of the baseline / seconds of the method) of each turn.
    """

    place: int
    method_s: float
    baseline_s: float
    log_ratios: tuple[float, ...]

    @property
    def log_speedup(self) -> float:
        return float(np.median(self.log_ratios))

    @property
    def ahead(self) -> bool:
        return self.log_speedup > 0.0

    @property
    def clear(self) -> bool:
        """Whether the passes tell the two apart."""
        error = float(np.std(self.log_ratios, ddof=1)) / math.sqrt(len(self.log_ratios))
        return abs(self.log_speedup) > CLEAR * error

    def as_dict(self) -> dict[str, Any]:
        """For the result."""
        speedup = math.exp(self.log_speedup)
        return {
            "at": self.place, "method_s": self.method_s, "baseline_s": self.baseline_s, "speedup": speedup,
            "n": len(self.log_ratios), "clear": self.clear,
        }  # fmt: skip


@dataclass
class Search:
    """Looks for the place where a method overtakes a baseline."""

    forecast: Forecast
    method: str
    baseline: str
    runner: Runner
    source: Source
    timing: Timing
    progress: Progress
    probes: dict[int, Probe] = field(default_factory=dict)

    def run(self, seconds: float) -> None:
        """Both ends, the predicted place or the middle, then halves."""
        end = time.perf_counter() + seconds
        axis = self.forecast.axis
        for place in (axis.first, self._guess(), axis.last):
            self._probe(place)
        while time.perf_counter() < end:
            bracket = self._bracket()
            if bracket is None or bracket[1] / bracket[0] <= CLOSE or bracket[1] - bracket[0] == 1:
                break
            if not any(self.probes[place].clear for place in bracket):
                break
            self._probe(round(math.sqrt(bracket[0] * bracket[1])))

    def _guess(self) -> int:
        axis = self.forecast.axis
        predicted = solve.begins(self.forecast.wins(self.method, self.baseline), axis.last)
        return predicted if predicted and predicted > axis.first else round(math.sqrt(axis.first * axis.last))

    def _probe(self, place: int) -> None:
        if place in self.probes:
            return
        request, length = self.forecast.axis.at(self.forecast.request, place)
        pair = (self.method, self.baseline)
        model = self.runner.model
        inputs = self.source.read_all(model, request, self.timing.seed)
        unnamed = replace(request, methods=())  # passes without instruments alone
        bench = Bench(unnamed, pair, self.forecast.hardware, self.runner, inputs, self.timing, self.progress)
        for _ in range(3):
            bench.run()
            own, other = (np.array(bench.samples[name, length].totals) for name in pair)
            self.probes[place] = Probe(
                place, float(np.median(own)), float(np.median(other)), tuple(np.log(other / own).tolist())
            )
            if self.probes[place].clear:
                break

    def _bracket(self) -> tuple[int, int] | None:
        """The last two neighbours that differ; None where all agree."""
        found = None
        seen = sorted(self.probes)
        for low, high in itertools.pairwise(seen):
            if self.probes[low].ahead != self.probes[high].ahead:
                found = low, high
        return found

    def outcome(self) -> dict[str, Any]:
        """What the probes say, in the words of the prediction."""
        seen = sorted(self.probes)
        bracket = self._bracket()
        states = [self.probes[place].ahead for place in seen]
        measured: dict[str, Any] = {
            "outcome": _word(states[0], states[-1], bracket is not None),
            "clear": all(self.probes[place].clear for place in (seen[0], seen[-1])),
            **dict.fromkeys(("from", "low", "high")),
        }
        if bracket and states[-1]:
            low, high = (self.probes[place].log_speedup for place in bracket)
            share = -low / (high - low)
            behind = [place for place in seen if place <= bracket[0] and self.probes[place].clear]
            ahead = [place for place in seen if place >= bracket[1] and self.probes[place].clear]
            measured |= {
                "from": round(bracket[0] * (bracket[1] / bracket[0]) ** share),
                "low": behind[-1] if behind else seen[0],
                "high": ahead[0] if ahead else seen[-1],
            }
        return {**measured, "probes": [self.probes[place].as_dict() for place in seen]}


# --- the result -----------------------------------------------------------------------------------------------------


def _word(first: bool, last: bool, changes: bool) -> str:
    """``always``, ``never``, ``from`` (ahead up to the end, not at once), ``until`` (ahead, but not up to the end)."""
    if not changes:
        return "always" if first else "never"
    return "from" if last else "until"


def _rows(
    forecast: Forecast, named: Sequence[str], searches: Mapping[tuple[str, str], Search] | None
) -> list[dict[str, Any]]:
    rows = []
    for method, baseline in forecast.pairs(named):
        row = _predicted(forecast, method, baseline)
        search = (searches or {}).get((method, baseline))
        if search and len(search.probes) > 1:
            row["measured"] = measured = search.outcome()
            row["agree"] = measured["outcome"] == row["predicted"]["outcome"]
            if row["agree"] and measured["from"]:
                row["rel_error"] = row["predicted"]["from"] / measured["from"] - 1.0
        rows.append(row)
    return rows


def _predicted(forecast: Forecast, method: str, baseline: str) -> dict[str, Any]:
    axis, last = forecast.axis, forecast.axis.last
    request, length = axis.at(forecast.request, axis.first)
    intervals = forecast.wins(method, baseline)
    begins = solve.begins(intervals, last)
    banded = {figure: forecast.wins(method, baseline, figure) for figure in ("high", "low")}
    covered = intervals == [(axis.first, last)]
    starts = bool(intervals) and intervals[0][0] == axis.first
    curve = []
    for place in forecast.grid:
        one = forecast.advantage(method, baseline, place)
        curve.append({"at": place, **asdict(one), "speedup": one.speedup})
    return {
        "method": method,
        "params": results.plain(asdict(request.estimate(method, length).parameters)),
        "baseline": baseline,
        "predicted": {
            "outcome": _word(starts, begins is not None, bool(intervals) and not covered),
            "from": None if covered else begins,
            "low": solve.begins(banded["high"], last),
            "high": solve.begins(banded["low"], last),
            "clear": banded["high"] == banded["low"] == intervals,
            "ahead": [list(interval) for interval in intervals],
        },
        "curve": curve,
    }  # fmt: skip


def _document(
    request: Request, axis: Axis, hardware: Hardware, named: Sequence[str], rows: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    document = results.document(request, hardware, rows, progress.notes)
    document["config"] |= {"over": axis.over, "range": [axis.first, axis.last], "baseline": list(named)}
    return document
