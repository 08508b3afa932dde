"""What of several files is shown together: one group for each model, machine and kind of work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..curves import plain
from .reading import Document, Result

LONGEST = 28  # letters of a parameter's value in a label


@dataclass
class Series:
    """Results that one line of a chart joins: a method with its parameters, at rising lengths.

    Attributes
    ----------
    number : int
        Which colour and mark; the same for the same label on the whole page.
    method_number : int
        Which method of the page, for the filter.
    """

    label: str
    method: str
    results: list[Result]
    number: int = 0
    method_number: int = 0

    @property
    def longest(self) -> Result:
        return self.results[-1]


@dataclass
class Group:
    """Files of one model on one machine at one kind of work.

    Attributes
    ----------
    lines : list of Series
        Of ``measure`` and ``estimate``.
    curves : list of Series
        Of ``fidelity``: along a knob, or a single setting.
    """

    documents: list[Document] = field(default_factory=list)
    lines: list[Series] = field(default_factory=list)
    curves: list[Series] = field(default_factory=list)

    @property
    def first(self) -> Document:
        return self.documents[0]

    @property
    def model(self) -> str:
        return str(self.first.model["name"])

    @property
    def series(self) -> list[Series]:
        return [*self.lines, *self.curves]

    @property
    def measured(self) -> bool:
        """Whether anything was timed."""
        return any(result.total.measured_s for series in self.series for result in series.results)

    @property
    def axis(self) -> str:
        return next((series.results[0].axis for series in self.series), "T")

    @property
    def axis_label(self) -> str:
        return "cached positions S" if self.axis == "S" else "length T"

    @property
    def lengths(self) -> list[int]:
        """Of the lines."""
        return sorted({result.length for line in self.lines for result in line.results})


def machine_of(document: Document) -> str:
    """What the times are of: the machine that was measured or calibrated, else the hardware that was named."""
    hardware, context = document.part("hardware"), document.part("context")
    name = str(hardware.get("name") or "hardware that the file does not name")
    if document.kind == "estimate" and hardware.get("level") != "calibrated":
        return name
    fitted = hardware.get("fitted_on")
    known = fitted.get("machine") if isinstance(fitted, dict) else None
    own = context.get("gpu") if document.part("config").get("device") == "gpu" else context.get("cpu")
    return str(known or own or name)


def work_of(document: Document) -> str:
    """``decode, batch 1, float32``, and what is unusual about the passes."""
    config = document.part("config")
    batch = config.get("batch")
    words = [config.get("phase"), f"batch {batch}" if batch else None, config.get("dtype"), *passes_of(document)]
    return ", ".join(str(word) for word in words if word)


def passes_of(document: Document) -> list[str]:
    """What ``--graph``, ``--fuse`` and ``--l2 cold`` make of passes."""
    config = document.part("config")
    unusual = {
        "recorded": config.get("graph"),
        "fused pairs of ops": config.get("fuse"),
        "cold cache": config.get("l2") == "cold",
    }
    return [name for name, given in unusual.items() if given]


def runner_of(document: Document) -> str:
    """``numba, 2 threads``."""
    config = document.part("config")
    threads = config.get("threads")
    count = f"{threads} thread{'' if threads == 1 else 's'}" if threads else None
    return ", ".join(str(word) for word in (config.get("engine"), count) if word)


def grouped(documents: Sequence[Document]) -> list[Group]:
    """Groups in the order in which their first files were given, with series numbered over the whole page."""
    found: dict[str, Group] = {}
    for document in documents:
        found.setdefault(_key(document), Group()).documents.append(document)
    groups = list(found.values())
    varying = _varying([result for document in documents for result in document.results])
    for group in groups:
        group.lines = _lines([one for one in group.documents if one.kind != "fidelity"], varying)
        group.curves = _curves([one for one in group.documents if one.kind == "fidelity"])
    _number(groups)
    return groups


def _key(document: Document) -> str:
    """Equal for files whose figures stand side by side: same shape, same work, same machine, same roofs."""
    config, hardware = document.part("config"), document.part("hardware")
    model = {name: value for name, value in document.model.items() if name != "source"}
    work = [config.get(name) for name in ("phase", "steps", "dtype", "batch", "causal", "device", "engine", "threads")]
    work += passes_of(document)
    roofs = [hardware.get(name) for name in ("name", "level", "matmul_flops_per_s", "vector_flops_per_s", "memory")]
    return json.dumps([model, work, machine_of(document), roofs], sort_keys=True)


# --- series ---------------------------------------------------------------------------------------------------------


def _varying(results: Sequence[Result]) -> dict[str, list[str]]:
    """Method -> the parameters that differ between its results, and so belong into labels."""
    seen: dict[str, dict[str, set[str]]] = {}
    for result in results:
        if not result.curve:
            for name, value in result.params.items():
                seen.setdefault(result.method, {}).setdefault(name, set()).add(_canonical(value))
    return {method: [name for name, values in found.items() if len(values) > 1] for method, found in seen.items()}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _lines(documents: Sequence[Document], varying: Mapping[str, Sequence[str]]) -> list[Series]:
    """One per method and parameters; where files repeat a length, one per file."""
    found: dict[tuple[str, str], list[tuple[Document, list[Result]]]] = {}
    for document in documents:
        own: dict[tuple[str, str], list[Result]] = {}
        for result in document.results:
            own.setdefault((result.method, _canonical(dict(result.params))), []).append(result)
        for key, results in own.items():
            found.setdefault(key, []).append((document, results))
    lines = []
    for (method, _), parts in found.items():
        label = _label(parts[0][1][0], varying.get(method, ()))
        lengths = [result.length for _, results in parts for result in results]
        if len(set(lengths)) == len(lengths):
            lines.append(_series(label, method, [result for _, results in parts for result in results]))
        else:
            lines += [_series(f"{label} ({document.label})", method, results) for document, results in parts]
    return lines


def _curves(documents: Sequence[Document]) -> list[Series]:
    """One per curve of a method and its knob; where several files have it, one per file."""
    found: dict[tuple[str, str], list[tuple[Document, list[Result]]]] = {}
    for document in documents:
        own: dict[tuple[str, str], list[Result]] = {}
        for result in document.results:
            own.setdefault((result.curve or result.method, result.knob), []).append(result)
        for key, results in own.items():
            found.setdefault(key, []).append((document, results))
    curves = []
    for (curve, knob), parts in found.items():
        knobs = {other for name, other in found if name == curve}
        label = f"{curve} by {knob}" if len(knobs) > 1 else curve
        for document, results in parts:
            name = f"{label} ({document.label})" if len(parts) > 1 else label
            curves.append(Series(name, results[0].method, results))
    return curves


def _series(label: str, method: str, results: Sequence[Result]) -> Series:
    return Series(label, method, sorted(results, key=lambda result: result.length))


def _label(result: Result, varying: Sequence[str]) -> str:
    words = [f"{name}={_short(plain(result.params[name]))}" for name in varying if result.params.get(name) is not None]
    return " ".join([result.method, *words])


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def methods_of(groups: Sequence[Group]) -> list[str]:
    """All methods of the page, in the order in which they come."""
    return list(dict.fromkeys(series.method for group in groups for series in group.series))


def _number(groups: Sequence[Group]) -> None:
    """The baselines have numbers 0 and 1 in any case, so that they look the same on every page."""
    methods = methods_of(groups)
    labels = dict.fromkeys(["dense", "flash", *(series.label for group in groups for series in group.series)])
    numbers = {label: number for number, label in enumerate(labels)}
    for group in groups:
        for series in group.series:
            series.number = numbers[series.label]
            series.method_number = methods.index(series.method)
