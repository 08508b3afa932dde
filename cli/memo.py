"""Databases of attention maps for ``attmemo``: built from texts, inspected, and profiled on text that was held out."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import costmodel
from costmodel.hardware import Hardware
from costmodel.predict import predict
from refimpl.components import MEMO, OUTPUT, POSITIONS, QKV, SCORES, SOFTMAX, WEIGHTED_SUM
from refimpl.config import Workload
from refimpl.engines import engine as get_engine
from refimpl.errors import ConfigError, InputError
from refimpl.inputs import read_text, sample, text_windows
from refimpl.memo.building import Plan, build, describe
from refimpl.memo.database import Database, Writer
from refimpl.memo.mapping import can_map
from refimpl.memo.memo import Memo
from refimpl.memo.selection import paying
from refimpl.methods.subject import Subject
from refimpl.model import Run, Runner
from refimpl.weights import Model, load_model

from . import machines
from .agreement import Agreement
from .context import cores
from .progress import Progress

SAMPLES = ("moby-dick", "union")  # the texts that come along
SUBLAYER = (QKV, POSITIONS, MEMO, SCORES, SOFTMAX, WEIGHTED_SUM, OUTPUT)  # the parts of an attention sublayer


@dataclass(frozen=True)
class Source:
    """Texts, and how they are cut."""

    files: tuple[Path, ...]
    seq: int
    sequences: int | None
    held_out: float

    def windows(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """Windows to keep and windows held out, the last part of each text: (N, T) and (M, T)."""
        kept, held = [], []
        for path in self.files or tuple(sample(name) for name in SAMPLES):
            if path.suffix.lower() != ".txt":
                raise InputError(f"{path}: a database is built from texts; give files that end in .txt")
            if not path.is_file():
                raise InputError(f"there is no file {path}: give a text")
            found = text_windows(model, read_text(path), self.seq)
            first = len(found) - round(self.held_out * len(found))
            kept.append(found[:first])
            held.append(found[first:])
        train, test = np.concatenate(kept), np.concatenate(held)
        if self.sequences is not None:
            train = train[np.linspace(0, len(train) - 1, min(self.sequences, len(train))).round().astype(int)]
        if len(train) < 2:
            raise InputError(f"the texts have {len(train)} windows of {self.seq} tokens to keep; at least 2 are needed")
        return train, test


def build_database(
    folder: Path, model_name: str, source: Source, plan: Plan, seed: int, dtype: str, progress: Progress
) -> dict[str, Any]:
    """Build a database, or go on with one that was begun; what it holds."""
    progress.stage(f"loading {model_name}")
    model = load_model(model_name, seed=seed, dtype=dtype)
    progress.note(f"{model.config.name}: {model.source}")
    train, held = source.windows(model)
    progress.note(f"{len(train)} windows of {source.seq} tokens are kept, {len(held)} are held out")
    started = time.perf_counter()
    engine = get_engine("numba")
    progress.stage("building")
    build(folder, Subject(model, engine, train, progress.advance), plan)
    stream = io.BytesIO()
    np.save(stream, held)
    with Writer(folder) as writer:
        writer.put("held-out", stream.getvalue())
        writer.note("model", model_name)
        writer.commit()
    progress.note(f"built in {time.perf_counter() - started:.1f} s")
    return inspect_database(folder, verify=False)


def inspect_database(folder: Path, verify: bool = True) -> dict[str, Any]:
    """What a database holds; all bytes are compared with their checksums, unless that is not wanted."""
    with Database(folder, verify=verify) as database:
        found = {"folder": str(folder), "verified": verify, **describe(database)}
        return {**found, "profile": database.notes.get("profile")}


def thresholds(given: str) -> tuple[float, ...]:
    """Numbers by comma; ConfigError where one is none from 0 to 1."""
    try:
        found = tuple(float(part) for part in given.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 <= one <= 1 for one in found):
        raise ConfigError(f"--taus {given}; give numbers from 0 to 1 by comma, as 0.95,0.9,0.8")
    return found


# --- the profile ----------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """A database, the model that it is of, and sequences that it does not hold."""

    memo: Memo
    runner: Runner
    batches: list[np.ndarray]  # (B, T) each
    hardware: Hardware
    repeats: int
    progress: Progress
    transfer: str

    @property
    def workload(self) -> Workload:
        return Workload(seq=self.memo.about.length, batch=len(self.batches[0]), causal=self.memo.about.causal)

    def passes(self, methods: dict[str, Any]) -> dict[str, list[Run]]:
        """Recorded passes of each method on each batch, of which the fastest of all rounds.

        On each batch the methods take turns, so that what a machine does for seconds is the same for all of them.
        """
        best: dict[str, list[Run]] = {name: [] for name in methods}
        for round_ in range(self.repeats + 1):  # the first warms up
            self.progress.advance(f"measuring, round {round_ + 1}", round_ / (self.repeats + 1))
            found = [
                {name: self.runner(ids, ready, causal=self.memo.about.causal) for name, ready in methods.items()}
                for ids in self.batches
            ]
            for name in methods:
                runs = [of_batch[name] for of_batch in found]
                if round_ > 1:
                    runs = [min(pair, key=lambda run: run.seconds) for pair in zip(best[name], runs, strict=True)]
                best[name] = runs
        return best

    def ready(self, **params: Any) -> Any:
        given = {"database": self.memo, "transfer": self.transfer, **params}
        return self.runner.prepare("attmemo", given, np.concatenate(self.batches))


def profile_database(
    folder: Path, taus: Sequence[float], batch: int, repeats: int, transfer: str, tau: float, keep: bool,
    hardware: str | Hardware | None, files: tuple[Path, ...], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Hit rate, latency and error against the threshold on held-out text, and which layers pay at one of them.

    Raises
    ------
    DatabaseError, InputError
        If the database is of another model than it says, or there is no text that it does not hold.
    """
    memo = Memo(folder)
    name = memo.database.notes.get("model", memo.about.model)
    progress.stage(f"loading {name}")
    model = load_model(name, dtype=memo.about.dtype)
    engine = get_engine("numba")
    memo.check(model.config)
    batches = _batches(_held_out(memo, model, files), batch)
    chosen = machines.find(hardware) or machines.local("numba", cores(), memo.about.dtype, progress)
    bench = _Bench(memo, Runner(model, engine), batches, chosen, repeats, progress, transfer)
    levels = sorted({*taus, tau, 0.0}, reverse=True)
    baselines = {name: bench.runner.prepare(name) for name in ("dense", "flash")}
    everywhere = {level: bench.ready(tau=level, select="all") for level in levels}
    names = ("copy", "map") if can_map(memo.records(0)) else ("copy",)
    transfers = {f"0.0 {name}": bench.ready(tau=0.0, select="all", transfer=name) for name in names}
    runs = bench.passes({**baselines, **{str(level): ready for level, ready in everywhere.items()}, **transfers})
    layers = {level: _layers(bench, everywhere[level].parameters, runs, str(level)) for level in levels}
    chosen_layers = {level: paying(rows) for level, rows in layers.items()}
    where = {str(level): bench.ready(tau=level, layers=found) for level, found in chosen_layers.items() if found}
    again = bench.passes({"dense": baselines["dense"], **where}) if where else {}
    found = {
        "folder": str(folder), "model": name, "length": memo.about.length, "batch": batch, "transfer": transfer,
        "records": memo.count, "held_out": sum(map(len, batches)), "tau": tau, "hardware": chosen.name,
        "thresholds": [
            {
                **_threshold(bench, level, everywhere[level], runs, again), "selected": list(chosen_layers[level]),
                "layers": layers[level],
            }
            for level in levels
        ],
        "all_hit": [_all_hit(bench, runs, transfer) for transfer in names],
        "layers": layers[tau],
    }  # fmt: skip
    if keep:
        with Writer(folder) as writer:
            writer.note("profile", found)
            writer.commit()
    return found


def _held_out(memo: Memo, model: Model, files: tuple[Path, ...]) -> np.ndarray:
    if files:
        return np.concatenate([text_windows(model, read_text(path), memo.about.length) for path in files])
    if "held-out" not in memo.database:
        raise ConfigError(f"{memo.folder} has no text that was held out: give --input")
    return np.asarray(np.load(io.BytesIO(memo.database.file("held-out")), allow_pickle=False))


def _batches(ids: np.ndarray, batch: int) -> list[np.ndarray]:
    if len(ids) < batch:
        raise InputError(f"{len(ids)} windows are held out; a batch of {batch} needs more: give --batch or --input")
    return [ids[start : start + batch] for start in range(0, len(ids) - batch + 1, batch)]


def _threshold(
    bench: _Bench, tau: float, ready: Any, runs: dict[str, list[Run]], again: dict[str, list[Run]]
) -> dict[str, Any]:
    """One row: what hits, how long it takes in all layers and in selected ones, how far the output is off."""
    agreement, mine = Agreement(), runs[str(tau)]
    for run, exact in zip(mine, runs["dense"], strict=True):
        for output, reference in zip(run.output, exact.output, strict=True):
            agreement.add(output, reference)
    rates = ready.parameters.hit_rate or (0.0,) * bench.memo.about.layers
    cost = costmodel.estimate("attmemo", bench.runner.config, bench.workload, ready.parameters)
    exact_cost = costmodel.estimate("dense", bench.runner.config, bench.workload)
    theirs, predicted = (float(predict(one, bench.hardware).total.seconds) for one in (exact_cost, cost))
    return {
        "tau": tau, "hit_rate": float(np.mean(rates)), "hit_rates": [float(rate) for rate in rates],
        "seconds_per_batch": _seconds(mine) / len(mine), "speedup_dense": _seconds(runs["dense"]) / _seconds(mine),
        "speedup_flash": _seconds(runs["flash"]) / _seconds(mine), "predicted_speedup_dense": theirs / predicted,
        # In the layers that pay; where none does, that is dense attention.
        "selected_speedup_dense": _seconds(again["dense"]) / _seconds(again[str(tau)]) if str(tau) in again else 1.0,
        **{key: agreement.figures()[key] for key in ("rel_l2", "cosine")},
    }  # fmt: skip


def _seconds(runs: list[Run]) -> float:
    return sum(run.seconds for run in runs)


def _layers(bench: _Bench, parameters: Any, runs: dict[str, list[Run]], level: str) -> list[dict[str, Any]]:
    """What looking up gains in each layer, for a batch: the attention of `dense` less that with look-ups.

    As measured, with everything that a look-up takes (embedding, search, transfer, and taking a batch apart where some
    hit and others do not), and as predicted for the measured hit rate.
    """
    layers = bench.memo.about.layers
    exact, own = (np.mean([attention_seconds(run, layers) for run in runs[name]], axis=0) for name in ("dense", level))
    look_up = np.mean([attention_seconds(run, layers, (MEMO,)) for run in runs[level]], axis=0)
    rates = parameters.hit_rate or (0.0,) * layers
    predicted = {rate: _predicted_attention(bench, rate) for rate in {*rates}}
    predicted_exact = _predicted_attention(bench, None)[0]
    return [
        {
            "layer": layer, "hit_rate": float(rates[layer]), "dense_s": float(exact[layer]),
            "attention_s": float(own[layer]), "memo_s": float(look_up[layer]),
            "benefit_s": float(exact[layer] - own[layer]),
            "predicted_benefit_s": predicted_exact - predicted[rates[layer]][0],
        }
        for layer in range(layers)
    ]  # fmt: skip


def attention_seconds(run: Run, layers: int, components: Sequence[str] = SUBLAYER) -> np.ndarray:
    """Seconds of the attention sublayer of each layer, (L,); a layer ends with its output projection."""
    seconds, layer = np.zeros(layers), 0
    for call in run.calls:
        if call.component in components:
            seconds[layer] += call.seconds
        layer += int(call.component == OUTPUT and call.op == "linear")
        if layer == layers:
            break
    return seconds


def _predicted_attention(bench: _Bench, rate: float | None, transfer: str | None = None) -> tuple[float, float]:
    """Predicted seconds of a layer's attention at a hit rate, `dense` for None; in all, and of look-ups alone."""
    transfer = transfer or bench.transfer
    params = {"database": bench.memo, "transfer": transfer, "tau": 0.0, "select": "all", "hit_rate": rate}
    name, given = ("dense", None) if rate is None else ("attmemo", params)
    cost = costmodel.estimate(name, bench.runner.config, bench.workload, given)
    parts = predict(cost, bench.hardware).by_component()
    seconds = {one: float(part.seconds) / bench.memo.about.layers for one, part in parts.items()}
    return sum(seconds.get(one, 0.0) for one in SUBLAYER), seconds.get(MEMO, 0.0)


def _all_hit(bench: _Bench, runs: dict[str, list[Run]], transfer: str) -> dict[str, Any]:
    """How much shorter attention becomes where every sequence hits: measured, predicted, and at most.

    The ceiling is the prediction without what look-ups take: queries, keys, scores and softmax are all that a stored
    map can spare.
    """
    layers, mine = bench.memo.about.layers, runs[f"0.0 {transfer}"]
    exact, own = (np.mean([attention_seconds(run, layers).sum() for run in of]) for of in (runs["dense"], mine))
    predicted_exact, _ = _predicted_attention(bench, None)
    predicted, look_up = _predicted_attention(bench, 1.0, transfer)
    fetch = sum(call.seconds for run in mine for call in run.calls if call.op == "fetch")
    return {
        "transfer": transfer, "fetch_s": fetch / len(mine),
        "dense_s": float(exact), "attmemo_s": float(own), "reduction": float(1 - own / exact),
        "predicted_reduction": 1 - predicted / predicted_exact,
        "predicted_ceiling": 1 - (predicted - look_up) / predicted_exact,
        "pass_reduction": 1 - _seconds(mine) / _seconds(runs["dense"]),
    }  # fmt: skip
