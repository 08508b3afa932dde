"""The page: head, filters, overview, a section for each group, and what the results are from."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..render import NONE, SECONDS, percent, quantity, small, times
from ..results import errors
from . import breakdown, fidelity, palette, roofline, scatter, speedup
from .card import Card, Row, Table
from .grouping import Group, Series, grouped, machine_of, methods_of, passes_of, runner_of, work_of
from .markup import Markup, joined, tag
from .reading import Document, read_all

TITLE = "effref report"
CHARTS = (
    ("breakdown", breakdown.card),
    ("speedup", speedup.card),
    ("accuracy", scatter.card),
    ("roofline", roofline.card),
)
MOST_REMARKS = 6
RIVALS = {"bare_roofline": "bare roofline", "global_efficiency": "one factor"}  # keys of accuracy in files


def report(paths: Sequence[str | Path]) -> str:
    """Result files as one HTML page with charts, which needs no network and no other file.

    Parameters
    ----------
    paths : sequence of str or Path
        What ``effref measure``, ``estimate`` or ``fidelity`` wrote with ``--format json``.

    Returns
    -------
    html : str
        The same for the same files.

    Raises
    ------
    InputError
        If a file cannot be read, is given twice, or is not a result of this version.
    """
    return page(read_all([Path(path) for path in paths]))


def page(documents: Sequence[Document]) -> str:
    """The HTML of results that were read."""
    groups = grouped(documents)
    script, style = _asset("report.js"), joined(_asset("report.css"), Markup(palette.styles()))
    body = tag(
        "body",
        palette.hatches(),
        tag("a", "Skip to the charts", href="#overview", class_="skip"),
        tag("header", tag("h1", TITLE), tag("p", _lead(groups), class_="lead"), _contents(groups), class_="page"),
        _filters(groups),
        tag("main", _overview(groups), [_section(group, groups) for group in groups], class_="page"),
        tag("footer", _footer(documents), class_="page"),
        tag("script", script),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"effref {__version__}"),
        tag("title", _title(groups)),
        tag("style", style),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en', data_scale='absolute')}\n"


def _asset(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text("utf-8"))


def _policy(script: str) -> str:
    """Nothing is loaded from anywhere, and no script runs but the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


# --- head -----------------------------------------------------------------------------------------------------------


def models_of(groups: Sequence[Group]) -> list[str]:
    """All models, in the order in which they come."""
    return list(dict.fromkeys(group.model for group in groups))


def _title(groups: Sequence[Group]) -> str:
    return f"{TITLE}: {', '.join(models_of(groups))}"


def _lead(groups: Sequence[Group]) -> str:
    documents = [document for group in groups for document in group.documents]
    machines = list(dict.fromkeys(machine_of(document) for document in documents))
    kinds = [
        f"{count} {'files' if count > 1 else 'file'} of {kind}"
        for kind in ("measure", "estimate", "fidelity")
        if (count := sum(document.kind == kind for document in documents))
    ]
    methods, models = methods_of(groups), models_of(groups)
    what = models[0] if len(models) == 1 else f"{len(models)} models"
    subject = f"{len(methods)} methods" if len(methods) > 1 else methods[0]
    return f"What {subject} cost and save on {what}. From {', '.join(kinds)}; {'; '.join(machines)}."


def _contents(groups: Sequence[Group]) -> Markup | None:
    if len(groups) < 2:
        return None
    links = [
        tag("li", tag("a", f"{group.model}, {_short_work(group)}", href=f"#g{place}"))
        for place, group in enumerate(groups)
    ]
    return tag("nav", tag("ul", links), aria_label="Contents")


def _short_work(group: Group) -> str:
    """What tells groups of one model apart."""
    kind = "fidelity" if not group.lines else str(group.first.part("config").get("phase") or "results")
    work = ", ".join([kind, *passes_of(group.first)])
    return work if group.measured else f"{work}, predicted on {machine_of(group.first)}"


def _filters(groups: Sequence[Group]) -> Markup:
    models, methods = models_of(groups), methods_of(groups)
    choices = [tag("option", "all", value="")]
    choices += [tag("option", name, value=f"model-{place}") for place, name in enumerate(models)]
    boxes = [
        tag("label", tag("input", type="checkbox", name="method", value=f"m{place}", checked=True), name)
        for place, name in enumerate(methods)
    ]
    scales = [
        tag("label", tag("input", type="radio", name="scale", value=value, checked=value == "absolute"), text)
        for value, text in (("absolute", "seconds"), ("share", "share of the pass"))
    ]
    return tag(
        "form",
        tag(
            "div",
            tag("label", tag("span", "Model", class_="name"), tag("select", choices, name="model"))
            if len(models) > 1 else None,
            tag("fieldset", tag("legend", "Methods"), boxes),
            tag("fieldset", tag("legend", "Breakdown"), scales) if any(group.lines for group in groups) else None,
            tag("button", "Reset", type="reset"),
            tag("output", id="shown"),
            class_="page",
        ),
        id="filters", hidden=True, aria_label="Filters",
    )  # fmt: skip


# --- overview -------------------------------------------------------------------------------------------------------


def _overview(groups: Sequence[Group]) -> Markup:
    cards = [_wide("At the greatest length", "One row for each method. Speed-ups are measured where they can be.",
                   _summary(groups))]  # fmt: skip
    accuracy = _accuracy(groups)
    if accuracy.rows:
        about = (
            "Errors are (predicted - measured) / measured: median and 90th percentile of their size, and the signed "
            "median (bias), in %. Components count from 2 % of a pass. Beside this cost model: a bare roofline, and "
            "that times one factor."
        )
        cards.append(_wide("How far predictions lie from measurements", about, accuracy))
    return tag("section", tag("h2", "Overview"), cards, id="overview", class_="overview")


def _wide(title: str, reading: str, table: Table) -> Markup:
    return tag("div", tag("h3", title), tag("p", reading, class_="reading"), table.html(), class_="card wide")


def _summary(groups: Sequence[Group]) -> Table:
    headers = ["model", "work", "method", "at", "measured", "predicted", "error %", "× dense", "× flash", "rel. L2"]
    rows = []
    for group in groups:
        for line in group.lines:
            result = line.longest
            ratios = [result.speedup.get(baseline, (None, None)) for baseline in ("dense", "flash")]
            rows.append(Row([
                group.model, work_of(group.first), line.label, f"{result.axis}={result.length}",
                quantity(result.total.measured_s, SECONDS) if result.total.measured_s else NONE,
                quantity(result.total.predicted_s, SECONDS), percent(result.total.rel_error, signed=True),
                *(times(ratio[1] or ratio[0]) for ratio in ratios), small(result.fidelity.get("rel_l2")),
            ], _classes(line, group, groups)))  # fmt: skip
        rows += [_curve_row(curve, group, groups) for curve in group.curves]
    return Table(headers, rows, 4, "Every method at its greatest length")


def _curve_row(curve: Series, group: Group, groups: Sequence[Group]) -> Row:
    """The last setting of a knob."""
    result = curve.longest
    work, ratios = (result.step, result.step_speedup) if result.step else (result.total, result.speedup)
    where = f"S={result.step_length}" if result.step else f"{result.axis}={result.length}"
    where = f"{where}, {result.knob}={fidelity.elided(result)}" if result.knob else where
    seconds = quantity(work.measured_s, SECONDS) if work.measured_s else NONE
    kind = work_of(group.first)
    kind = kind.replace(str(group.first.part("config").get("phase")), "decoding step") if result.step else kind
    speedups = [ratios.get(baseline, (None, None)) for baseline in ("dense", "flash")]
    return Row([
        group.model, kind, curve.label, where, seconds, quantity(work.predicted_s, SECONDS),
        percent(work.rel_error, signed=True), *(times(ratio[1] or ratio[0]) for ratio in speedups),
        small(result.fidelity.get("rel_l2")),
    ], _classes(curve, group, groups))  # fmt: skip


def _classes(series: Series, group: Group, groups: Sequence[Group]) -> str:
    return f"group-row m{series.method_number} {_model_class(group, groups)}"


def _model_class(group: Group, groups: Sequence[Group]) -> str:
    return f"model-{models_of(groups).index(group.model)}"


def _accuracy(groups: Sequence[Group]) -> Table:
    headers = ["file", *2 * ("median", "p90", "bias", "n"), *RIVALS.values()]
    over = [("", 1), ("totals", 4), ("components", 4), ("median of totals by", len(RIVALS))]
    rows, every = [], ([], [])  # type: tuple[list[Row], tuple[list[float], list[float]]]
    for group in groups:
        for document in group.documents:
            if document.kind != "measure":
                continue
            found = accuracy_of(document)
            for all_, own in zip(every, found, strict=True):
                all_ += own
            cells = [cell for own in found for cell in _error_cells(own)]
            rows.append(Row([document.label, *cells, *_rivals(document)], _model_class(group, groups)))
    if len(rows) > 1:
        rows.append(Row(["all files", *(cell for own in every for cell in _error_cells(own)), NONE, NONE], "sum"))
    return Table(headers, rows, 1, "Accuracy of predictions by file", over)


def accuracy_of(document: Document) -> tuple[list[float], list[float]]:
    """Relative errors of totals and of components of one file, as its own ``accuracy`` counts them."""
    totals = [result.total.rel_error for result in document.results]
    parts = [work.rel_error for result in document.results for _, work in result.judged()]
    return [error for error in totals if error is not None], [error for error in parts if error is not None]


def _error_cells(relative: Sequence[float]) -> list[str]:
    found = errors(relative)
    cells = [percent(found["median_abs"]), percent(found["p90_abs"]), percent(found["bias"], signed=True)]
    return [*cells, str(found["n"])]


def _rivals(document: Document) -> list[str]:
    cells = []
    for name in RIVALS:
        rival = document.part("accuracy").get(name)
        totals = rival.get("totals") if isinstance(rival, Mapping) else None
        value = totals.get("median_abs") if isinstance(totals, Mapping) else None
        cells.append(percent(value) if isinstance(value, float) else NONE)
    return cells


# --- groups ---------------------------------------------------------------------------------------------------------


def _section(group: Group, groups: Sequence[Group]) -> Markup:
    place = groups.index(group)
    cards: list[Card | None] = [chart(group, f"g{place}-{name}") for name, chart in CHARTS]
    cards += fidelity.cards(group, f"g{place}-fidelity")
    flags = dict.fromkeys(flag for series in group.series for result in series.results for flag in result.flags)
    notes = dict.fromkeys(note for document in group.documents for note in document.notes)
    return tag(
        "section",
        tag("h2", group.model),
        tag("ul", [tag("li", fact) for fact in _facts(group)], class_="facts"),
        [one.html() for one in cards if one],
        tag(
            "div",
            tag("h3", "Where this is from"),
            _remarks(list(dict.fromkeys([*flags, *notes]))),
            tag("div", _settings(group), class_="settings"),
            class_="card wide",
        ),
        id=f"g{place}", class_=f"group {_model_class(group, groups)}",
        aria_label=f"{group.model}, {_short_work(group)}",
    )  # fmt: skip


def _remarks(remarks: Sequence[str]) -> Markup | None:
    """What a reader should know; folded where it is much."""
    if not remarks:
        return None
    every = tag("ul", [tag("li", remark) for remark in remarks], class_="notes")
    return every if len(remarks) <= MOST_REMARKS else tag("details", tag("summary", f"{len(remarks)} remarks"), every)


def _facts(group: Group) -> list[str]:
    document, model = group.first, group.first.model
    hardware = document.part("hardware")
    meaning = {"spec": "lower bounds from a spec sheet", "calibrated": "forecasts of a calibrated profile"}
    level = meaning.get(str(hardware.get("level")))
    heads = f"{model['heads']} heads" if model.get("heads") else None
    if heads and model.get("kv_heads") and model["kv_heads"] != model["heads"]:
        heads += f" ({model['kv_heads']} of keys)"
    shape = [f"{model['layers']} layers" if model.get("layers") else None,
             f"d {model['d_model']}" if model.get("d_model") else None, heads]  # fmt: skip
    causal = "causal" if document.part("config").get("causal") else None
    facts = [work_of(document), ", ".join(filter(None, shape)), causal, runner_of(document), machine_of(document)]
    facts += [f"hardware {hardware.get('name')}: {level}" if level else None]
    facts += [one.name for one in group.documents]
    return [fact for fact in facts if fact]


def _settings(group: Group) -> Markup:
    """Every resolved input and the machine, one column for each file."""
    columns = [{**_flat("", _about(document))} for document in group.documents]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [Row([name, *(column.get(name, NONE) for column in columns)]) for name in names]
    table = Table(["", *(document.name for document in group.documents)], rows, 1 + len(columns),
                  f"Machine, versions and settings, {group.model}")  # fmt: skip
    return tag("details", tag("summary", "Machine, versions and settings"), table.html())


def _about(document: Document) -> dict[str, Any]:
    hardware = {name: value for name, value in document.part("hardware").items() if name != "residuals"}
    return {"context": document.part("context"), "hardware": hardware, "config": document.part("config")}


def _flat(name: str, value: Any) -> dict[str, str]:
    """``config.model.layers``: ``18``; numbers in lists on one line."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= _flat(f"{name}.{key}" if name else key, inner)
        return found
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        found = {}
        for place, inner in enumerate(value):
            found |= _flat(f"{name}[{place}]", inner)
        return found
    if value is None or value in ({}, [], ""):
        return {}
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return {name: text}


def _footer(documents: Sequence[Document]) -> Markup:
    files = ", ".join(document.name for document in documents)
    return tag("p", f"Made by effref {__version__} from {files}. This page loads nothing and sends nothing.")
