"""What running something here says about each claim, through the same functions as the other commands."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.hardware import Hardware
from refimpl.components import HEAD
from refimpl.config import DTYPES, ModelConfig
from refimpl.errors import UnsupportedError
from refimpl.model import Runner
from refimpl.weights import Model, load_model, resolve_config
from refimpl.weights.layout import Weights

from .. import machines
from ..material import Wanted
from ..measurement import DECODE_REPEATS, REPEATS, Source, Timing, measured
from ..progress import Progress
from ..request import BASELINES, resolve
from .claims import Reading
from .closed_forms import SELF_ATTENTION, efficientasr_params, efficientasr_words, encoder, one_head

Settings = Mapping[str, Any]
Entry = Mapping[str, Any]


@dataclass
class Lab:
    """Where measurements are made, and what several claims share.

    Attributes
    ----------
    hardware : Hardware
        Of the predictions, which no verdict looks at.
    engine, device, threads, seed
        As for `effref.measure`.
    model : str or Path, optional
        Instead of the models that the claims name.
    seconds : float
        For the timed passes of the claim that is looked at.
    done : dict
        What was run for an earlier claim and says something about another one.
    interrupted : bool
        Whether a run was stopped and gave what it had seen until then.
    gpu : str, optional
        What ran them, where NVIDIA's management library tells it.
    """

    hardware: Hardware
    engine: str
    device: str
    threads: int
    seed: int
    progress: Progress
    model: str | Path | None = None
    seconds: float = 60.0
    done: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    gpu: str | None = None

    def choose(self, own: str | ModelConfig) -> str | Path | ModelConfig:
        """The model that was asked for, else the claim's own."""
        return own if self.model is None else self.model

    def load(self, own: str | ModelConfig) -> Model:
        """Its weights: trained ones where they were fetched."""
        given = self.choose(own)
        self.progress.stage(f"loading {resolve_config(given).name}")
        return load_model(given, seed=self.seed)

    def timed(
        self, model: str | Path | ModelConfig, method: str, params: Settings, seq: int | None = None, **given: Any
    ) -> dict[str, Any]:
        """A method and the exact ones, timed in turns; the document of ``effref measure``."""
        request = resolve(
            model, seq, (*BASELINES, method), {method: params}, device=self.device, engine=self.engine,
            threads=self.threads, **given,
        )  # fmt: skip
        timing = Timing(DECODE_REPEATS if request.decodes else REPEATS, 1, self.seconds, self.seed)
        document = self.whole(measured(request, self.hardware, Source(), timing, self.progress))
        begin = f"{request.config.name}: "  # of the note that says what weights ran
        source = next((note for note in reversed(document["notes"]) if note.startswith(begin)), begin)
        document["config"]["weights"] = source.removeprefix(begin)
        return document

    def whole(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document, after a look whether its run was stopped; UnsupportedError where memory ran out."""
        if "out_of_memory" in document:
            raise UnsupportedError(document["out_of_memory"])
        self.interrupted = self.interrupted or "interrupted" in document
        self.gpu = document["context"].get("gpu_state", {}).get("name") or self.gpu
        return document

    def once(self, key: str, run: Callable[[], Any]) -> Any:
        """What `run` gives, kept for the claims that follow."""
        if key not in self.done:
            self.done[key] = run()
        return self.done[key]


# --- attention map reuse --------------------------------------------------------------------------------------------


def reuse_speedup(s: Settings, lab: Lab) -> list[Reading]:
    """Whole passes, and the components of self-attention of recorded ones."""
    length, whole, parts = s["measured_length"], [], []
    model = lab.choose(s["model"])
    name, groups = resolve_config(model).name, s["measured_groups"]
    lab.seconds /= len(groups)
    for group in groups:
        document = lab.timed(model, "reuse", {"group": group}, length)
        where = f"{name}, G={group}, T={length}, on a {lab.device.upper()}"
        figures = {"speedup_flash": _result(document, "reuse")["speedup"]["flash"]["measured"]}
        whole.append(_faster(document, "reuse", "time of the model", where, figures=figures))
        part = f"self-attention alone, {where}"
        parts.append(_faster(document, "reuse", "time of self-attention", part, SELF_ATTENTION))
        if lab.interrupted:
            break
    return whole + parts


def nothing(s: Settings, lab: Lab) -> list[Reading]:
    """For claims about what effref does not do."""
    return []


def _result(document: Entry, method: str) -> Entry:
    found: Entry = next((one for one in document["results"] if one["method"] == method), {})
    if not found:
        raise UnsupportedError(f"{method} was not measured: the run was stopped before")
    return found


def _faster(
    document: Entry, method: str, of: str, condition: str, parts: Sequence[str] = (),
    figures: Mapping[str, float | None] | None = None,
) -> Reading:  # fmt: skip
    """How many times as fast as dense: plain passes, or components of recorded ones."""
    own, dense = (_result(document, name) for name in (method, "dense"))
    kept = {name: value for name, value in (figures or {}).items() if value is not None}
    ratio = _seconds(dense, "median", parts) / _seconds(own, "median", parts)
    return Reading(
        ratio, f"{of}, dense / {method}", condition, "ratio",
        passes=own["total"]["measured_s"]["n"], counted="passes", weights=document["config"]["weights"], figures=kept,
        low=_seconds(dense, "p10", parts) / _seconds(own, "p90", parts),
    )  # fmt: skip


def _seconds(result: Entry, statistic: str, parts: Sequence[str] = ()) -> float:
    """Of plain passes, or of the components of recorded ones; of a single pass there is no spread."""
    if not parts:
        return _statistic(result["total"]["measured_s"], statistic)
    return sum(_statistic(row["measured_s"], statistic) for row in result["components"] if row["component"] in parts)


def _statistic(seconds: Entry, statistic: str) -> float:
    return float(seconds[statistic] or seconds["median"] or 0.0)


# --- folding --------------------------------------------------------------------------------------------------------


def folding_size(s: Settings, lab: Lab) -> list[Reading]:
    """Bytes of the weights that a prepared model holds; those of its companions are taken from its preset."""
    model = lab.load(s["model"])
    companions = sum(part.parameters for part in model.config.companions)
    words = {name: {"setting": name} for name in s["measured"]}
    whole = _held(Runner(model, "numpy").weights) + companions * DTYPES["float32"]
    return [
        Reading(spared / whole, "bytes of held weights that are spared", f"{model.config.name}, our setting {name}",
                weights=model.source, pretrained=model.pretrained)
        for name, spared in _spared(model, "folding", words)
    ]  # fmt: skip


def folding_chunk(s: Settings, lab: Lab) -> list[Reading]:
    """Time of a chunk: no power, but what the claim says must not rise."""
    setting = s["measured"]
    document = lab.timed(lab.choose(s["model"]), "folding", {"setting": setting}, phase="decode")
    name = document["config"]["model"]["name"]
    return [_beside(_faster(document, "folding", "time of a chunk", f"{name}, our setting {setting}"))]


def _beside(reading: Reading) -> Reading:
    """The reading as one that decides nothing."""
    return Reading(**{**vars(reading), "comparable": False})


def _spared(model: Model, method: str, choices: Mapping[Any, Settings]) -> Iterator[tuple[Any, int]]:
    """For each choice of parameters how many bytes of weights the exact model holds more."""
    runner = Runner(model, "numpy")
    exact = _held(runner.weights)
    for key, params in choices.items():
        yield key, exact - _held(runner.prepare(method, params).weights)


def _held(weights: Any) -> int:
    """Bytes of all arrays, each memory once."""
    return sum(dict(_arrays(weights)).values())


def _arrays(node: Any) -> Iterator[tuple[int, int]]:
    """Address and bytes of every array below a node."""
    if isinstance(node, np.ndarray):
        yield node.__array_interface__["data"][0], node.nbytes
    elif isinstance(node, (list, tuple)):
        for one in node:
            yield from _arrays(one)
    elif isinstance(node, Weights):
        yield from _arrays(list(vars(node).values()))


# --- SVD-softmax ----------------------------------------------------------------------------------------------------


def svd_softmax_guideline(s: Settings, lab: Lab) -> list[Reading]:
    """The fewest multiplications that find the likeliest word of a trained head as often as is asked for."""
    from ..guidance import found, planned

    readings = []
    for weighting in ("none", "activations"):
        plan = planned(
            lab.choose(s["model"]), s["agreement"], 1, {"weighting": weighting}, None, None, s["positions"], lab.seed,
            device=lab.device, engine=lab.engine, threads=lab.threads,
        )  # fmt: skip
        document = found(plan, lab.hardware, lab.progress)
        config, chosen = document["config"], document["chosen"]
        name, vocab = (config["model"][key] for key in ("name", "vocab"))
        condition = (
            f"{name}, V={vocab:,}, top-1 agreement of {100 * s['agreement']:g} %, weighting={weighting}: "
            f"W={chosen['window']}, N={chosen['candidates']:,}"
        )
        readings.append(
            Reading(chosen["multiplications"], "multiplications of the head", condition, passes=config["positions"],
                    counted="positions", weights=config["weights"], pretrained=config["pretrained"],
                    figures={"top1_agreement": chosen["agreement"], "kl_nats": chosen["kl_nats"]})
        )  # fmt: skip
    return readings


def svd_softmax_speedup(s: Settings, lab: Lab) -> list[Reading]:
    """Time of the head at one position, on random weights: it does not depend on the values."""
    params = {"window": s["window"], "candidates": s["candidates"]}
    config = lab.choose(one_head(s))
    document = lab.timed(config, "svd-softmax", params, phase="decode", kv_len=s["kv_len"])
    sizes = f"D={s['width']}, W={s['window']}, N={s['candidates']:,}"
    where = f"{sizes}, on a {lab.device.upper()}, logits of one position"
    return [_faster(document, "svd-softmax", "time of the head", where, (HEAD,))]


# --- AttMemo --------------------------------------------------------------------------------------------------------


def attmemo_latency(s: Settings, lab: Lab) -> list[Reading]:
    """Time on text that was held out, beside the error, over thresholds; a database of the texts that come along."""
    profile = lab.once("memo", lambda: _memo_profile(s["memo"], lab))
    readings = []
    for row in profile["thresholds"]:
        condition = (
            f"{profile['model']}, T={profile['length']}, batch {profile['batch']}, {profile['records']} records, "
            f"tau={row['tau']:g}: {100 * row['hit_rate']:.0f} % of the maps found, on a CPU"
        )
        figures = {name: row[name] for name in ("cosine", "rel_l2", "hit_rate", "speedup_flash")}
        readings.append(
            Reading(1 - 1 / row["speedup_dense"], "time that is spared against dense", condition,
                    comparable=row["hit_rate"] > 0,  # without a hit a difference is noise
                    passes=profile["passes"], counted="passes", weights=profile["weights"],
                    pretrained=profile["pretrained"], figures=figures)
        )  # fmt: skip
    return readings


def _memo_profile(s: Settings, lab: Lab) -> dict[str, Any]:
    from refimpl.memo.building import Plan
    from refimpl.memo.training import Settings as Training

    from ..memo import Source as Texts
    from ..memo import build_database, profile_database

    if lab.device != "cpu":
        raise UnsupportedError("databases of maps are measured on the CPU alone: leave --device gpu away")
    model, repeats = lab.choose(s["model"]), 3
    known = load_model(model, seed=lab.seed)
    with tempfile.TemporaryDirectory(prefix="effref-audit-") as place:
        folder, texts = Path(place) / "maps", Texts((), s["length"], None, 0.2)
        plan = Plan(Training(s["epochs"], seed=lab.seed))
        build_database(folder, str(model), texts, plan, lab.seed, "float32", lab.progress)
        machines.started("numba", lab.threads, lab.progress)
        with machines.disturbances_noted("measuring", lab.progress):
            profile = profile_database(
                folder, s["taus"], s["batch"], repeats, "copy", max(s["taus"]), False, lab.hardware, (), lab.progress
            )  # fmt: skip
    batches = profile["held_out"] // s["batch"]
    return {**profile, "weights": known.source, "pretrained": known.pretrained, "passes": repeats * batches}


# --- LATTE ----------------------------------------------------------------------------------------------------------


def latte_language(s: Settings, lab: Lab) -> list[Reading]:
    """Filtered share of the visible pairs, and how much the perplexity rises by it."""
    document = _latte(s, lab, s["length"])
    readings = []
    for entry in _points(document, "latte"):
        seen = entry["fidelity"]
        rise = seen["perplexity"] - seen["perplexity_exact"]
        perplexities = f"perplexity {seen['perplexity_exact']:.1f} becomes {seen['perplexity']:.1f}"
        condition = f"{_where(document)}, kept={entry['value']:g}: {perplexities}"
        readings.append(
            Reading(1 - entry["value"], "visible pairs that are filtered", condition,
                    **_seen(document), figures={"perplexity_rise": rise, "top1_agreement": seen["top1_agreement"]})
        )  # fmt: skip
    return readings


def latte_vision(s: Settings, lab: Lab) -> list[Reading]:
    """How far the hidden states turn; there is no classifier whose accuracy could fall."""
    document = _latte(s, lab, None)
    return [
        Reading(entry["fidelity"]["cosine"], "cosine with the exact hidden states",
                f"{_where(document)}, {100 * (1 - entry['value']):.2f} % filtered", "number", False, **_seen(document),
                figures={"rel_l2": entry["fidelity"]["rel_l2"]})
        for entry in _points(document, "latte")
    ]  # fmt: skip


def _latte(s: Settings, lab: Lab, length: int | None) -> dict[str, Any]:
    return _compared(lab, s["model"], "latte", {"nibble": "round"}, {"kept": s["over"]}, Wanted(length=length), False)


def _compared(
    lab: Lab, own: str, method: str, params: Settings, over: Mapping[str, Sequence[Any]], wanted: Wanted,
    measure: bool, kv_len: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The document of ``effref fidelity``."""
    from ..comparison import compared, planned

    plan = planned(
        lab.choose(own), method, {method: params}, {method: over}, {}, wanted, kv_len, measure,
        Timing(REPEATS, 0, lab.seconds, lab.seed), DECODE_REPEATS,
        device=lab.device, engine=lab.engine, threads=lab.threads,
    )  # fmt: skip
    return lab.whole(compared(plan, lab.hardware, lab.progress))


def _points(document: Entry, method: str) -> list[Entry]:
    return [entry for entry in document["results"] if entry["method"] == method]


def _where(document: Entry) -> str:
    config = document["config"]
    return f"{config['model']['name']}, {config['input']}"


def _seen(document: Entry) -> dict[str, Any]:
    config = document["config"]
    positions = config["sequences"] * config["valid_positions"]
    return {
        "passes": positions, "counted": "positions", "weights": config["weights"], "pretrained": config["pretrained"],
    }  # fmt: skip


# --- KVSharer -------------------------------------------------------------------------------------------------------


def kvsharer_computation(s: Settings, lab: Lab) -> list[Reading]:
    """Share of the cache that is not filled, and what that does to the perplexity."""
    document = lab.once("kvsharer", lambda: _kvsharer(s, lab))
    (exact,) = _points(document, "dense")
    return [
        Reading(1 - entry["cache_bytes"] / exact["cache_bytes"], "keys and values that are spared",
                _sharing(document, entry), **_seen(document), figures=_sharing_figures(entry))
        for entry in _points(document, "kvsharer")
    ]  # fmt: skip


def kvsharer_speedup(s: Settings, lab: Lab) -> list[Reading]:
    """Time of a decoding step."""
    document = lab.once("kvsharer", lambda: _kvsharer(s, lab))
    readings = []
    (exact,) = _points(document, "dense")
    for entry in _points(document, "kvsharer"):
        step, ran = entry["decode"], _seen(document)
        ratio = step["speedup"]["dense"]["measured"]
        if ratio is None:
            continue
        condition = f"{_sharing(document, entry)}, S={step['kv_len']}, batch 1, on a {lab.device.upper()}"
        figures = {**_sharing_figures(entry), "speedup_flash": step["speedup"]["flash"]["measured"]}
        ran |= {"passes": step["measured_s"]["n"], "counted": "passes"}
        of = "time of a decoding step, dense / kvsharer"
        spread = (_statistic(exact["decode"]["measured_s"], "p10"), _statistic(step["measured_s"], "p90"))
        readings.append(Reading(ratio, of, condition, "ratio", **ran, figures=figures, low=spread[0] / spread[1]))
    return readings


def _kvsharer(s: Settings, lab: Lab) -> dict[str, Any]:
    wanted = Wanted(length=256)
    return _compared(lab, s["model"], "kvsharer", {}, {"layers": s["measured"]}, wanted, True, s["measured_kv_len"])


def _sharing(document: Entry, entry: Entry) -> str:
    model, seen = document["config"]["model"], entry["fidelity"]
    perplexities = f"perplexity {seen['perplexity_exact']:.1f} becomes {seen['perplexity']:.0f}"
    return f"{model['name']}, {entry['value']} of {model['layers']} layers share: {perplexities}"


def _sharing_figures(entry: Entry) -> dict[str, float]:
    seen = entry["fidelity"]
    return {"perplexity": seen["perplexity"], "perplexity_ratio": seen["perplexity"] / seen["perplexity_exact"]}


# --- DirectShare and EfficientASR -----------------------------------------------------------------------------------


def headshare_ratio(s: Settings, lab: Lab) -> list[Reading]:
    """Heads that are really replaced when the matches of a model's weights are taken."""
    model = lab.load(s["model"])
    runner, heads = Runner(model, "numpy"), model.config.layers * model.config.heads
    words = {
        "repo": "chains left as the published code leaves them",
        "transitive": "chains followed to their end",
    }
    readings = []
    for chains, meaning in words.items():
        ready = runner.prepare("headshare", {"ratio": s["ratio"], "chains": chains})
        share = ready.parameters.replaced(model.config) / heads
        readings.append(
            Reading(share, "heads without weights of their own", f"{model.config.name}, {heads} heads, {meaning}",
                    weights=model.source, pretrained=model.pretrained)
        )  # fmt: skip
    return readings


def efficientasr_parameters(s: Settings, lab: Lab) -> list[Reading]:
    """Bytes of the weights that a prepared encoder holds."""
    model = lab.load(encoder(s))
    exact = _held(Runner(model, "numpy").weights)
    choices = {tuple(choice): efficientasr_params(*choice) for choice in s["measured"]}
    return [
        Reading(spared / exact, "bytes of held weights that are spared", efficientasr_words(model.config, *choice),
                weights=model.source, pretrained=model.pretrained)
        for choice, spared in _spared(model, "efficientasr", choices)
    ]  # fmt: skip


# claim -> how it is measured
MEASUREMENTS: dict[str, Callable[[Settings, Lab], list[Reading]]] = {
    "reuse-speedup": reuse_speedup,
    "reuse-training-time": nothing,
    "folding-size": folding_size,
    "folding-power": folding_chunk,
    "svd-softmax-multiplications": svd_softmax_guideline,
    "svd-softmax-speedup": svd_softmax_speedup,
    "attmemo-latency-mean": attmemo_latency,
    "attmemo-latency-max": attmemo_latency,
    "latte-vision": latte_vision,
    "latte-language": latte_language,
    "kvsharer-computation": kvsharer_computation,
    "kvsharer-speedup": kvsharer_speedup,
    "headshare-ratio": headshare_ratio,
    "efficientasr-parameters": efficientasr_parameters,
}
