"""Result files, checked: what comes out of `read` can be drawn without asking again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from refimpl.errors import InputError

from ..request import BASELINES
from ..results import SCHEMA_VERSION, SMALL, length_of, place_of

WRITERS = "'effref measure', 'estimate' or 'fidelity' with --format json"
SMALLEST, LARGEST = 1e-30, 1e30  # of numbers, in SI units
ERRORS = ("rel_l2", "max_abs", "kl_nats", "top1_agreement", "perplexity")  # figures of fidelity that are never negative
DEEPEST = 64  # levels of lists and objects; those of effref have seven


@dataclass(frozen=True)
class Work:
    """What a component, a pass or a decoding step costs.

    Attributes
    ----------
    predicted_s, low_s, high_s : float
        The prediction and its band.
    measured_s, p10_s, p90_s : float or None
        The median and its spread; None where nothing, or too little, was timed.
    """

    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float | None
    p10_s: float | None
    p90_s: float | None
    samples: int
    matmul_flops: float
    vector_flops: float
    bytes_moved: float
    bound: str

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.vector_flops

    @property
    def rel_error(self) -> float | None:
        """(predicted - measured) / measured."""
        return (self.predicted_s - self.measured_s) / self.measured_s if self.measured_s else None


Ratio = tuple[float | None, float | None]  # predicted, measured


@dataclass(frozen=True)
class Result:
    """One method at one length.

    Attributes
    ----------
    axis, length : str, int
        S cached positions of a decoding pass, or T.
    step : Work or None
        A decoding step, in files of ``fidelity`` on language models; `step_speedup` belongs to it.
    speedup, step_speedup : mapping
        Baseline -> how many times faster.
    curve, knob, value
        Where a result of ``fidelity`` stands; empty elsewhere.
    """

    method: str
    params: Mapping[str, Any]
    axis: str
    length: int
    components: Mapping[str, Work]
    total: Work
    speedup: Mapping[str, Ratio]
    fidelity: Mapping[str, float]
    params_bytes: float | None
    cache_bytes: float | None
    step: Work | None
    step_speedup: Mapping[str, Ratio]
    step_length: int | None
    curve: str
    knob: str
    value: Any
    flags: tuple[str, ...]

    def judged(self) -> Iterator[tuple[str, Work]]:
        """The components that take a share of the measured time worth judging."""
        whole = sum(work.measured_s or 0.0 for work in self.components.values())
        for name, work in self.components.items():
            if work.measured_s and work.measured_s >= SMALL * whole:
                yield name, work


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes
    ----------
    kind : {"estimate", "measure", "fidelity"}
    label : str
        The name as short as it can be: without what all files of the page begin with.
    raw : mapping
        The file, for what is only shown: context, config, hardware.
    """

    name: str
    label: str
    kind: str
    raw: Mapping[str, Any]
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    def part(self, name: str) -> Mapping[str, Any]:
        """`context`, `config`, `hardware` or `accuracy`; empty where the file has none."""
        found = self.raw.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.part("config")["model"]
        return found


def read_all(paths: Sequence[Path]) -> list[Document]:
    """Read result files, in the order given.

    Raises
    ------
    InputError
        If a file is given twice, cannot be read, or is not a result; the message names it.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        whole = path.resolve()
        if whole in seen:
            raise InputError(f"{path} is given twice: give each file once")
        seen[whole] = path
    ambiguous = len({path.name for path in paths}) < len(paths)
    names = [str(path) if ambiguous else path.name for path in paths]
    return [read(path, name, label) for path, name, label in zip(paths, names, _labels(names), strict=True)]


def _labels(names: Sequence[str]) -> list[str]:
    """``gpt2`` and ``minilm`` for ``xeon-gpt2.json`` and ``xeon-minilm.json``."""
    stems = [name.removesuffix(".json") for name in names]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*stems, strict=False))
    shared = "".join(letters[0] for letters in same) if len(stems) > 1 else ""
    cut = max(shared.rfind(mark) for mark in "-_/ ") + 1
    return [stem[cut:] for stem in stems] if all(stem[cut:] for stem in stems) else stems


def read(path: Path, name: str, label: str) -> Document:
    """Read one result file, called `name` on the page, and `label` where there is little room.

    Raises
    ------
    InputError
        If the file cannot be read or is not a result of this version.
    """
    where = _printable(str(path))
    try:
        given = _cleaned(json.loads(path.read_text("utf-8"), parse_constant=_no_constant))
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not text in UTF-8: give a file of {WRITERS}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where} is not JSON ({reason}): give a file of {WRITERS}") from error
    return _document(_Field(given, where), _printable(name), _printable(label))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _cleaned(value: Any, depth: int = 0) -> Any:
    """The same with all text printable, so that no name can turn the page around it or break its encoding."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, list):
        return [_cleaned(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {_printable(key): _cleaned(one, depth + 1) for key, one in value.items()}
    return value


def _printable(text: str) -> str:
    """Control characters, lone surrogates and marks of direction become the replacement character."""
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "\ufffd" for letter in text)


# --- fields ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """A value of the file and where it stands, for messages."""

    value: Any
    where: str
    key: str = ""

    def wrong(self, wanted: str) -> InputError:
        shown = json.dumps(self.value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        return InputError(f"{self.where}: {self.key or 'the file'} is {shown}; {wanted}")

    def at(self, key: str) -> _Field:
        """A key that must be there."""
        if not isinstance(self.value, dict):
            raise self.wrong("it must be an object")
        if key not in self.value:
            raise InputError(f"{self.where}: {self._below(key)} is missing; give a file of {WRITERS}")
        return self.get(key)

    def get(self, key: str) -> _Field:
        """A key that may be missing, as None."""
        if not isinstance(self.value, dict):
            raise self.wrong("it must be an object")
        return _Field(self.value.get(key), self.where, self._below(key))

    def _below(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key else key

    def items(self) -> list[_Field]:
        if not isinstance(self.value, list):
            raise self.wrong("it must be a list")
        return [_Field(one, self.where, f"{self.key}[{place}]") for place, one in enumerate(self.value)]

    def names(self) -> list[str]:
        """The keys of an object; none where there is no object."""
        if self.value is None:
            return []
        if not isinstance(self.value, dict):
            raise self.wrong("it must be an object")
        return list(self.value)

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong("it must be text")
        return self.value

    def number(self) -> float:
        """0, or a number of a size that can be drawn."""
        found = _finite(self.value)
        if found is None or (found and not SMALLEST <= found <= LARGEST):
            raise self.wrong(f"it must be 0, or a number from {SMALLEST:g} to {LARGEST:g}")
        return found

    def count(self) -> int:
        """A whole number of at least 1."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not 1 <= self.value <= 2**53:
            raise self.wrong("it must be a whole number of at least 1")
        return self.value

    def maybe(self) -> float | None:
        """A number, or None."""
        return None if self.value is None else self.number()


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _document(given: _Field, name: str, label: str) -> Document:
    if not isinstance(given.value, dict) or not {"schema_version", "results"} <= given.value.keys():
        profile = isinstance(given.value, dict) and "profile_schema" in given.value
        kind = "a hardware profile" if profile else "a file of another kind"
        raise InputError(f"{given.where} is {kind}, not a result: give a file of {WRITERS}")
    version = given.at("schema_version").value
    if version != SCHEMA_VERSION:
        raise given.at("schema_version").wrong(f"this effref reads {SCHEMA_VERSION}: run the command again")
    given.at("config").at("model").at("name").text()
    entries = given.at("results").items()
    if not entries:
        raise InputError(f"{given.where}: results is empty, so there is nothing to show; run the command again")
    found = tuple(_result(entry) for entry in entries)
    listed = given.get("notes")
    notes = [note.value for note in (listed.items() if listed.value else []) if isinstance(note.value, str)]
    if given.value.get("interrupted"):
        notes.append("the run was interrupted; what was seen until then is shown")
    return Document(name, label, _kind(entries, found), given.value, found, tuple(dict.fromkeys(notes)))


def _kind(entries: Sequence[_Field], found: Sequence[Result]) -> str:
    if any("curve" in entry.names() for entry in entries):
        return "fidelity"
    return "measure" if any("measured_s" in entry.get("total").names() for entry in entries) else "estimate"


def _result(given: _Field) -> Result:
    given.at("seq").count()
    decodes = given.get("kv_len").value is not None
    if decodes:
        given.at("kv_len").count()
    step = given.get("decode")
    rows = given.at("components").items()
    flags = given.get("flags").value
    return Result(
        method=given.at("method").text(),
        params=_params(given.get("params")),
        axis=place_of(given.value)[0],
        length=length_of(given.value),
        components={row.at("component").text(): _work(row) for row in rows},
        total=_work(given.at("total")),
        speedup=_speedup(given.get("speedup")),
        fidelity=_figures(given.get("fidelity")),
        params_bytes=given.get("params_bytes").maybe(),
        cache_bytes=given.get("cache_bytes").maybe(),
        step=_work(step) if step.value is not None else None,
        step_speedup=_speedup(step.get("speedup")) if step.value is not None else {},
        step_length=step.at("kv_len").count() if step.value is not None else None,
        curve=_words(given.get("curve")),
        knob=_words(given.get("knob")),
        value=given.get("value").value,
        flags=tuple(flag for flag in flags if isinstance(flag, str)) if isinstance(flags, list) else (),
    )


def _params(given: _Field) -> Mapping[str, Any]:
    return {name: given.value[name] for name in given.names()}


def _words(given: _Field) -> str:
    return "" if given.value is None else given.text()


def _work(given: _Field) -> Work:
    predicted = given.at("predicted_s").number()
    low, high = (given.get(f"predicted_{end}_s").maybe() for end in ("low", "high"))
    seen = given.get("measured_s")
    median, p10, p90 = (seen.get(name).maybe() if seen.value else None for name in ("median", "p10", "p90"))
    samples = seen.get("n").maybe() if seen.value else None
    return Work(
        predicted_s=predicted,
        low_s=predicted if low is None else low,
        high_s=predicted if high is None else high,
        measured_s=median or None,
        p10_s=p10,
        p90_s=p90,
        samples=int(samples or 0),
        matmul_flops=given.at("matmul_flops").number(),
        vector_flops=given.at("vector_flops").number(),
        bytes_moved=given.at("bytes_read").number() + given.at("bytes_written").number(),
        bound=_words(given.get("bound")),
    )


def _speedup(given: _Field) -> Mapping[str, Ratio]:
    found = {}
    for name in given.names():
        if name in BASELINES and given.get(name).value is not None:
            one = given.get(name)
            found[name] = (one.get("predicted").maybe() or None, one.get("measured").maybe() or None)
    return found


def _figures(given: _Field) -> Mapping[str, float]:
    """The figures of fidelity that are numbers; a perplexity may have overflowed to null."""
    found = {name: given.get(name).number() for name in ERRORS if given.names() and given.get(name).value is not None}
    if found.get("top1_agreement", 0.0) > 1.0:
        raise given.get("top1_agreement").wrong("it must be a share from 0 to 1")
    cosine = _finite(given.value.get("cosine")) if given.names() else None
    if cosine is not None:
        found["cosine"] = cosine
    return {name: value for name, value in found.items() if value or name != "perplexity"}
