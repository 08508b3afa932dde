"""Claims one after the other: closed form, measurement, verdict; what fails becomes a row and stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refimpl.errors import ConfigError, EffrefError
from refimpl.weights import resolve_config

from .. import context, gpu, machines
from ..progress import Progress
from ..request import device_and_engine
from ..results import SCHEMA_VERSION, describe
from .claims import Claim, Reading, claims_of
from .closed_forms import CLOSED_FORMS
from .measurements import MEASUREMENTS, Lab
from .verdicts import Outcome, counts, shown, verdict

SECONDS = 600.0
NOT_ASKED = "not measured: closed forms alone were asked for"
NO_TIME = "not measured: --max-seconds was used up before"
STOPPED = "not measured: interrupted"


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked.

    Attributes
    ----------
    claims : tuple of Claim
    methods : tuple of str or None
        As given; None for all.
    model : str, Path or None
        Instead of the models that the claims name.
    device, engine, threads, hardware, seed
        As for `effref.measure`.
    measures : bool
    max_seconds : float
    """

    claims: tuple[Claim, ...]
    methods: tuple[str, ...] | None
    model: str | Path | None
    device: str
    engine: str
    threads: int
    hardware: str | None
    measures: bool
    max_seconds: float
    seed: int


def audit(
    method: str | Sequence[str] | None = None,
    *,
    model: str | Path | None = None,
    measure: bool = True,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    hardware: str | None = None,
    max_seconds: float = SECONDS,
    seed: int = 0,
) -> dict[str, Any]:
    """The papers' headline claims: what the cost model says, what was measured here, and a verdict.

    Parameters
    ----------
    method : str or sequence of str, optional
        Claims about these methods only.
    model : str or Path, optional
        What is measured, instead of the model that each claim names; closed forms stay with the claim's own.
    measure : bool
        False for closed forms only.
    device, engine, threads, hardware
        As for `effref.measure`; this machine is not calibrated for it, because no verdict looks at predicted seconds.
    max_seconds : float
        For all claims together. What is begun is finished, so that it may take somewhat longer.
    seed : int
        Of random weights and inputs.

    Returns
    -------
    result : dict
        The schema of ``effref audit --format json``. With ``"interrupted": True`` after Ctrl-C.

    Raises
    ------
    ConfigError
        Unknown names, or values that are not allowed. What a single claim cannot be measured for stands in its row.
    """
    plan = planned(method, model, measure, device, engine, threads, hardware, max_seconds, seed)
    return context.completed(audited(plan, Progress()), plan.threads)


def planned(
    method: str | Sequence[str] | None, model: str | Path | None, measure: bool, device: str | None,
    engine: str | None, threads: int | None, hardware: str | None, max_seconds: float, seed: int,
) -> Plan:  # fmt: skip
    """Check everything that can be checked without running; see `audit`."""
    chosen = claims_of(method)
    device, engine = device_and_engine(device, engine)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1")
    if not max_seconds > 0:
        raise ConfigError(f"max_seconds is {max_seconds}; it must be above 0")
    if model is not None:
        resolve_config(model)
    machines.find(hardware)
    if measure:
        machines.require(engine)
    names = None if method is None else (method,) if isinstance(method, str) else tuple(method)
    count = threads or context.cores()
    return Plan(tuple(chosen), names, model, device, engine, count, hardware, measure, max_seconds, seed)


def audited(plan: Plan, progress: Progress) -> dict[str, Any]:
    """The result, its context but for the GPU's name left out."""
    bench = _Bench(plan, progress)
    rows: list[dict[str, Any]] = []
    try:
        for number, claim in enumerate(plan.claims):
            progress.stage(f"claim {number + 1} of {len(plan.claims)}: {claim.name}")
            closed_form = _outcome(lambda claim=claim: CLOSED_FORMS[claim.name](claim.settings))  # type: ignore[misc]
            rows.append(_row(claim, closed_form, bench.measured(claim, len(plan.claims) - number)))
    except KeyboardInterrupt:  # between two measurements
        if not rows:
            raise
        bench.stopped = True
    progress.done()
    document = {
        "schema_version": SCHEMA_VERSION,
        "config": {
            "method": list(plan.methods) if plan.methods else None,
            "model": None if plan.model is None else str(plan.model),
            "device": plan.device, "engine": plan.engine, "threads": plan.threads, "measure": plan.measures,
            "max_seconds": plan.max_seconds, "seed": plan.seed,
            "hardware": bench.lab.hardware.name if bench.lab else None,
        },
        "hardware": describe(bench.lab.hardware) if bench.lab else None,
        "results": rows,
        "notes": list(progress.notes),
    }  # fmt: skip
    if bench.lab and bench.lab.gpu:
        document["context"] = {"gpu": bench.lab.gpu}
    return {**document, "interrupted": True} if bench.stopped else document


class _Bench:
    """Measures claims until the time is used up or someone stops it."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress, self.stopped = plan, progress, False
        self.lab: Lab | None = None
        self.began_s = time.perf_counter()
        if plan.measures:
            machine = machines.choose(plan.hardware, plan.engine, plan.threads, "float32", Progress())
            self.lab = Lab(machine, plan.engine, plan.device, plan.threads, plan.seed, progress, plan.model)

    def measured(self, claim: Claim, left: int) -> Outcome:
        """What the claim's measurement came to; `left` claims, this one among them, share what is left of the time."""
        if self.lab is None:
            return Outcome(reason=NOT_ASKED)
        if self.stopped:
            return Outcome(reason=STOPPED)
        spared = self.plan.max_seconds - (time.perf_counter() - self.began_s)
        if spared <= 0:
            return Outcome(reason=NO_TIME)
        lab, before = self.lab, len(self.progress.notes)
        lab.seconds = spared / left
        try:
            found = _outcome(lambda: MEASUREMENTS[claim.name](claim.settings, lab))
        except KeyboardInterrupt:
            found = Outcome(reason=STOPPED)
            self.stopped = True
        self.stopped = self.stopped or lab.interrupted
        notes = tuple(dict.fromkeys(self.progress.notes[before:]))
        del self.progress.notes[before:]
        return Outcome(found.readings, found.reason, notes, found.seconds)


def _outcome(run: Callable[[], list[Reading]]) -> Outcome:
    """Readings, or why there are none."""
    start = time.perf_counter()
    readings, reason = [], ""
    try:
        readings = run()
    except EffrefError as error:
        reason = " ".join(str(error).split())
    except Exception as error:
        if not gpu.out_of_memory(error):
            raise
        reason = gpu.shortage(error)
    return Outcome(tuple(readings), reason, (), time.perf_counter() - start)


def _row(claim: Claim, closed_form: Outcome, measured: Outcome) -> dict[str, Any]:
    found = verdict(claim, closed_form, measured)
    about = asdict(claim)
    del about["settings"]
    return {
        "claim": about.pop("name"), **about,
        "closed_form": _side(claim, closed_form), "measured": _side(claim, measured),
        "verdict": {"kind": found.kind, "why": found.why, "decided_by": _reading(claim, found.decided_by)},
    }  # fmt: skip


def _side(claim: Claim, outcome: Outcome) -> dict[str, Any]:
    return {
        "shown": _reading(claim, shown(claim, outcome.readings)),
        "readings": [_reading(claim, one) for one in outcome.readings],
        "reason": outcome.reason,
        "notes": list(outcome.notes),
        "seconds": round(outcome.seconds, 3),
    }


def _reading(claim: Claim, reading: Reading | None) -> dict[str, Any] | None:
    return None if reading is None else {**asdict(reading), "counts": counts(claim, reading)}
