"""The report: what is read, what is drawn, and how the page behaves in a browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from effref.reporting.grouping import grouped, work_of
from effref.reporting.page import accuracy_of, page, report
from effref.reporting.reading import read_all
from effref.reporting.roofline import roofs_of
from effref.reporting.scales import Linear, Log
from effref.reporting.speedup import crossovers
from effref.results import errors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costmodel.hardware import presets
from refimpl.errors import InputError

from .conftest import error_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STORED = sorted(RESULTS.glob("xeon-*.json"))  # of measure and fidelity
MEASURED = RESULTS / "xeon-2-cores-numba-float32-conformer-m.json"
FIDELITY = RESULTS / "xeon-2-cores-numba-float32-smollm2-135m-kvsharer-fidelity.json"
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<b>"
VOID = {"meta", "input", "br", "hr"}
Run = Callable[..., Result]
Change = Callable[[dict[str, Any]], Any]


class Element:
    """A tag of a page with its attributes, children and text."""

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name, self.attributes, self.children, self.text = name, attributes, list[Element](), ""

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Every element below with these attributes; a class counts among several."""
        found = []
        for child in self.children:
            wanted = all(
                value in child.attributes.get(key.rstrip("_").replace("_", "-"), "").split()
                for key, value in attributes.items()
            )
            found += [child] if child.name == name and wanted else []
            found += child.all(name, **attributes)
        return found

    @property
    def words(self) -> str:
        return " ".join([self.text, *(child.words for child in self.children)])


class Tree(HTMLParser):
    """A page as a tree; every element must be closed where it was opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(html)
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is given twice"
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def tree(*paths: Path) -> Element:
    return Tree(report(paths)).root


def changed(path: Path, tmp_path: Path, change: Change, name: str = "changed.json") -> Path:
    """A copy of a result with a change."""
    document = json.loads(path.read_text("utf-8"))
    change(document)
    place = tmp_path / name
    place.write_text(json.dumps(document), "utf-8")
    return place


@pytest.fixture
def estimated(effref: Run, tmp_path: Path) -> Path:
    place = tmp_path / "estimate.json"
    asked = ["--model", "bert-base", "--seq", "128,512,2048", "--hardware", "xeon-8480"]
    assert effref("estimate", *asked, "--output", str(place), "--quiet").exit_code == 0
    return place


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_accuracy_is_that_of_the_file(path: Path) -> None:
    """Counted again from the results that were read."""
    (document,) = read_all([path])
    totals, components = accuracy_of(document)
    written = document.part("accuracy")
    if document.kind == "fidelity":
        assert not written
        return
    assert errors(totals) == pytest.approx(written["totals"])
    assert errors(components) == pytest.approx(written["components"])


BAD = {
    "no JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "NaN": ('{"schema_version": 1, "results": [NaN]}', "NaN is no number in JSON"),
    "a list": ("[]", "is a file of another kind, not a result"),
    "text": ('"result"', "is a file of another kind, not a result"),
    "another kind": ('{"schema_version": 1, "points": []}', "is a file of another kind, not a result"),
    "a profile": ('{"profile_schema": 2, "name": "local"}', "is a hardware profile, not a result"),
    "deep": ("[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep object": ('{"a":' * 80 + "1" + "}" * 80, "nested too deeply"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_result_is_refused(effref: Run, tmp_path: Path, kind: str) -> None:
    text, reason = BAD[kind]
    place = tmp_path / "bad.json"
    place.write_text(text, "utf-8")
    message = error_of(effref("report", str(place), "-o", str(tmp_path / "page.html")))
    assert "bad.json" in message
    assert reason in message
    assert not (tmp_path / "page.html").exists()


def first(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["results"][0]
    return found


WRONG: dict[str, tuple[Change, str]] = {
    "version": (lambda d: d.update(schema_version=2), "schema_version is 2; this effref reads 1"),
    "no results": (lambda d: d.update(results=[]), "results is empty"),
    "results": (lambda d: d.update(results={}), "results is {}; it must be a list"),
    "notes": (lambda d: d.update(notes=-1), "notes is -1; it must be a list"),
    "a result": (lambda d: d.update(results=[1]), "results[0] is 1; it must be an object"),
    "no model": (lambda d: d["config"].pop("model"), "config.model is missing"),
    "no method": (lambda d: first(d).pop("method"), "results[0].method is missing"),
    "method": (lambda d: first(d).update(method=3), "results[0].method is 3; it must be text"),
    "length": (lambda d: first(d).update(seq=0), "results[0].seq is 0; it must be a whole number"),
    "huge length": (lambda d: first(d).update(seq=10**400), "it must be a whole number"),
    "no total": (lambda d: first(d).pop("total"), "results[0].total is missing"),
    "no component": (lambda d: first(d)["components"][1].pop("component"), "components[1].component is missing"),
    "infinite": (lambda d: first(d)["total"].update(predicted_s=1e999), "results[0].total.predicted_s is"),
    "negative": (lambda d: first(d)["total"].update(predicted_s=-1.0), "total.predicted_s is -1.0; it must be 0, or"),
    "tiny": (lambda d: first(d)["total"]["measured_s"].update(median=1e-300), "median is 1e-300; it must be 0, or"),
    "text": (lambda d: first(d)["total"].update(bytes_read="many"), 'bytes_read is "many"; it must be 0, or'),
    "true": (lambda d: first(d)["total"].update(bytes_read=True), "bytes_read is true; it must be 0, or"),
    "agreement": (lambda d: first(d)["fidelity"].update(top1_agreement=2), "it must be a share from 0 to 1"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_value_is_named(effref: Run, tmp_path: Path, kind: str) -> None:
    change, reason = WRONG[kind]
    place = tmp_path / "wrong.json"
    document = json.loads(MEASURED.read_text("utf-8"))
    change(document)
    place.write_text(json.dumps(document).replace("Infinity", "1e999"), "utf-8")
    message = error_of(effref("report", str(MEASURED), str(place), "-o", str(tmp_path / "page.html")))
    assert "wrong.json" in message
    assert reason in message
    assert not (tmp_path / "page.html").exists()


ODD = (None, 0, -1, 1e30, 1e-30, 1e31, True, "", "text", [], {}, [1], {"a": 1}, {"median": None})


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key or index of every object and list, with what holds it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("path", [MEASURED, FIDELITY], ids=["measure", "fidelity"])
@given(share=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3), odd=st.sampled_from(ODD))
@settings(max_examples=40, deadline=None)
def test_whatever_stands_in_a_file_makes_a_page_or_one_line(path: Path, share: list[float], odd: Any) -> None:
    document = json.loads(path.read_text("utf-8"))
    document["results"] = document["results"][1::4]
    document["hardware"]["residuals"] = None
    known = list(places(document))
    for one in share:
        held, key = known[int(one * len(known))]
        held[key] = odd
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "odd.json"
        place.write_text(json.dumps(document), "utf-8")
        try:
            made = report([place])
        except InputError as error:
            made = f"refused: {error}"
    if made.startswith("refused"):
        assert "odd.json" in made
        assert "\n" not in made
    else:
        assert not re.search(r"[ M,(\"](nan|-?inf)\b", made)


def test_files_that_cannot_be_read_are_named(effref: Run, tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    assert "is not text in UTF-8" in error_of(effref("report", str(tmp_path / "bytes.json")))
    assert "cannot read" in error_of(effref("report", str(tmp_path / "missing.json")))
    assert "cannot read" in error_of(effref("report", str(tmp_path)))
    assert "is given twice" in error_of(effref("report", str(MEASURED), str(MEASURED)))
    assert "Missing argument" in error_of(effref("report"))


def test_fields_of_later_versions_are_ignored(tmp_path: Path) -> None:
    def add(document: dict[str, Any]) -> None:
        document["later"] = {"a": [1]}
        for result in document["results"]:
            result["later"] = result["total"]["later"] = result["components"][0]["later"] = {"a": [None]}

    name = "same.json"
    (tmp_path / "plain").mkdir()
    plain = changed(MEASURED, tmp_path / "plain", lambda document: None, name)
    assert report([changed(MEASURED, tmp_path, add, name)]) == report([plain])


def test_output_is_whole_or_not_at_all(effref: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "page.html"
    place.write_text("before")
    (tmp_path / "bad.json").write_text("{")
    error_of(effref("report", str(MEASURED), str(tmp_path / "bad.json"), "-o", str(place)))
    assert place.read_text() == "before"
    source = changed(MEASURED, tmp_path, lambda document: None)
    kept = source.read_text()
    assert "ends in .html" in error_of(effref("report", str(source), "-o", str(source)))
    assert source.read_text() == kept
    assert "no folder" in error_of(effref("report", str(source), "-o", str(tmp_path / "no" / "page.html")))

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    assert "No space left" in error_of(effref("report", str(source), "-o", str(place)))
    assert place.read_text() == "before"
    assert not list(tmp_path.glob(".page*"))


def test_the_page_goes_to_stdout_or_into_a_file(effref: Run, tmp_path: Path) -> None:
    shown = effref("report", str(MEASURED), str(FIDELITY))
    written = effref("report", str(MEASURED), str(FIDELITY), "-o", str(tmp_path / "page.html"))
    assert shown.exit_code == written.exit_code == 0
    assert written.stdout == ""
    assert (tmp_path / "page.html").read_text("utf-8") == shown.stdout


# --- what is shown --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything() -> str:
    return report(STORED)


@pytest.fixture(scope="module")
def whole(everything: str) -> Element:
    return Tree(everything).root


def test_all_stored_results_make_one_page_that_is_always_the_same(everything: str, whole: Element) -> None:
    html, root = everything, whole
    assert html == report(STORED)
    assert len(root.all("section", class_="group")) >= 8
    ids = [one.attributes["id"] for one in every(root) if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    assert len(html) < 200_000 * len(STORED)


def every(element: Element) -> Iterator[Element]:
    for child in element.children:
        yield child
        yield from every(child)


def test_the_page_refers_to_nothing_outside_itself(whole: Element) -> None:
    for element in every(whole):
        assert element.name not in ("link", "iframe", "object", "embed", "base", "img", "image")
        for name, value in element.attributes.items():
            assert name not in ("src", "srcset", "xlink:href"), f"{element.name} has {name}={value}"
            assert name != "href" or value.startswith("#"), f"{element.name} refers to {value}"
            assert not name.startswith("on")
    assert "@import" not in report([MEASURED])
    assert "http" not in (Path(__file__).parents[2] / "cli" / "reporting" / "report.css").read_text()


def test_every_chart_has_a_name_and_a_description(whole: Element) -> None:
    charts = whole.all("svg", role="img")
    assert len(charts) > 60
    for chart in charts:
        title, description = chart.children[:2]
        assert (title.name, description.name) == ("title", "desc")
        assert chart.attributes["aria-labelledby"] == title.attributes["id"]
        assert chart.attributes["aria-describedby"] == description.attributes["id"]
        assert len(title.text) > 10
        assert len(description.text) > 10


def test_text_of_files_stays_text(tmp_path: Path) -> None:
    """Names from files in every place: model, method, parameter, component, note, flag, machine, file name."""

    def spoil(document: dict[str, Any]) -> None:
        document["config"]["model"]["name"] = document["context"]["cpu"] = document["hardware"]["name"] = HOSTILE
        document["hardware"]["fitted_on"]["machine"] = document["config"][HOSTILE] = HOSTILE
        document["notes"] = [HOSTILE, "a\ud800b", "turned \u202e round"]
        for result in document["results"][:4]:
            result["method"], result["flags"], result["params"] = HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}
            result["components"][0]["component"] = result["components"][1]["bound"] = HOSTILE

    place = changed(MEASURED, tmp_path, spoil, "<b>&.json")
    html = report([place])
    html.encode("utf-8")
    assert "\u202e" not in html
    assert html.count("<script") == html.count("</script") == 1
    assert "<img" not in html
    assert "<b>" not in html
    root = Tree(html).root
    (heading,) = [one for one in root.all("h2") if "Overview" not in one.text]
    assert heading.text == HOSTILE
    assert HOSTILE in [one.text for one in root.all("li")]


def test_bars_are_as_high_as_the_times_are_long() -> None:
    """Stacks of a panel over one another, in pixels, are the seconds of the file over one another."""
    document = json.loads(MEASURED.read_text("utf-8"))
    section = tree(MEASURED).all("section", id="g0")[0]
    for place, method in enumerate(("dense", "flash", "reuse")):
        (panel,) = section.all("svg", aria_labelledby=f"g0-breakdown-{place}a-t")
        results = [result for result in document["results"] if result["method"] == method]
        for kind, key in (("p", "predicted_s"), ("m", "measured_s")):
            bars = panel.all("rect", class_=kind)
            columns: dict[str, float] = {}
            for bar in bars:
                x = bar.attributes["x"]
                columns[x] = columns.get(x, 0.0) + float(bar.attributes["height"])
            heights = [columns[x] for x in sorted(columns, key=float)]
            seconds = [
                sum(row[key] if kind == "p" else row[key]["median"] for row in result["components"])
                for result in results
            ]
            assert len(heights) == len(seconds)
            for height, second in zip(heights, seconds, strict=True):
                assert height / heights[-1] == pytest.approx(second / seconds[-1], abs=0.01)


def test_shares_of_a_pass_add_up_to_the_whole_panel() -> None:
    panels = [one for one in tree(MEASURED).all("svg", role="img") if "share" in one.attributes["class"].split()]
    assert len(panels) == 3
    for panel in panels:
        columns: dict[str, float] = {}
        for bar in panel.all("rect", class_="bar"):
            columns[bar.attributes["x"]] = columns.get(bar.attributes["x"], 0.0) + float(bar.attributes["height"])
        assert len(columns) == 8
        for height in columns.values():
            assert height == pytest.approx(max(columns.values()), abs=0.5)


def test_a_component_has_one_colour_in_all_charts() -> None:
    """Legends, bars, marks under the roofs and of the scatter carry the component's class and no other."""
    root = tree(MEASURED)
    classes = {name for one in every(root) for name in one.attributes.get("class", "").split() if name.startswith("k-")}
    used = {row["component"] for result in json.loads(MEASURED.read_text())["results"] for row in result["components"]}
    hatched_in_defs = {"k-stem", "k-cache", "k-memo", "k-attention", "k-convolution", "k-residual", "k-head", "k-other"}
    assert {f"k-{name}" for name in used} <= classes <= {f"k-{name}" for name in used} | hatched_in_defs


def test_estimates_alone_give_breakdown_and_speed_up(estimated: Path) -> None:
    section = tree(estimated).all("section", id="g0")[0]
    titles = [one.text for one in section.all("h3")]
    assert titles == ["Where the time goes", "Speed-up", "Roofline", "Where this is from"]
    assert not section.all("rect", class_="p"), "there is nothing that predicted bars must be told from"
    speedups = section.all("figure", id="g0-speedup")[0]
    assert "reuse against dense: faster at all 3 lengths" in speedups.words
    assert "measured)" not in speedups.words


def test_results_without_any_measured_median_are_drawn_as_predictions(tmp_path: Path) -> None:
    def forget(document: dict[str, Any]) -> None:
        for result in document["results"]:
            for row in (*result["components"], result["total"]):
                row["measured_s"], row["rel_error"] = {"median": None, "p10": None, "p90": None, "n": 0}, None
            result["speedup"] = {}
            result.pop("fidelity")

    html = report([changed(MEASURED, tmp_path, forget)])
    assert "Where the time goes" in html
    assert "Predicted against measured" not in html


def test_files_of_one_model_and_machine_are_put_together(tmp_path: Path) -> None:
    """Methods of two files share charts; where a length is repeated the file is named."""

    def keep(*methods: str) -> Change:
        return lambda d: d.update(results=[result for result in d["results"] if result["method"] in methods])

    one = changed(MEASURED, tmp_path, keep("dense", "flash"), "one.json")
    two = changed(MEASURED, tmp_path, keep("reuse", "dense"), "two.json")
    (group,) = grouped(read_all([one, two]))
    assert [line.label for line in group.lines] == ["dense (one)", "dense (two)", "flash", "reuse"]
    elsewhere = changed(two, tmp_path, lambda d: d["hardware"]["fitted_on"].update(machine="another"), "three.json")
    longer = changed(two, tmp_path, lambda d: d["config"]["model"].update(layers=19), "four.json")
    assert len(grouped(read_all([one, elsewhere, longer, two]))) == 3
    recorded, cold = (
        changed(two, tmp_path, lambda d, options=options: d["config"].update(options), f"{place}.json")
        for place, options in enumerate([{"graph": True, "fuse": True}, {"l2": "cold"}])
    )
    plain, *others = grouped(read_all([one, recorded, cold]))
    assert [line.label for line in plain.lines] == ["dense", "flash"]
    assert [work_of(group.first) for group in others] == [
        "prefill, batch 1, float32, recorded, fused pairs of ops",
        "prefill, batch 1, float32, cold cache",
    ]
    contents = [link.text for link in Tree(report([one, recorded, cold])).root.all("nav")[0].all("a")]
    assert contents == [
        f"conformer-m, prefill{more}" for more in ("", ", recorded, fused pairs of ops", ", cold cache")
    ]


def test_parameters_that_differ_are_in_labels(tmp_path: Path) -> None:
    def regroup(document: dict[str, Any]) -> None:
        for result in document["results"]:
            if result["method"] == "reuse":
                result["params"]["group"] = 3

    groups = grouped(read_all([MEASURED, changed(MEASURED, tmp_path, regroup, "three.json")]))
    assert [line.label for line in groups[0].lines if line.method == "reuse"] == ["reuse group=2", "reuse group=3"]


def test_roofs_are_those_of_the_file_else_of_the_preset_else_left_out(tmp_path: Path, estimated: Path) -> None:
    (document,) = read_all([MEASURED])
    roofs = roofs_of(document)
    assert roofs is not None
    assert roofs.matmul_flops_per_s == document.part("hardware")["matmul_flops_per_s"]["float32"]
    assert [name for name, _ in roofs.levels] == ["cache", "memory"]

    def forget(name: str) -> Change:
        def change(document: dict[str, Any]) -> None:
            document["hardware"] = {"name": name, "level": "spec"}

        return change

    def halve(document: dict[str, Any]) -> None:
        document["hardware"]["matmul_flops_per_s"]["float32"] /= 2

    own = roofs_of(read_all([changed(estimated, tmp_path, halve, "own.json")])[0])
    assert own is not None
    assert own.matmul_flops_per_s == presets()["xeon-8480"].matmul_flops_per_s["float32"] / 2
    (named,) = read_all([changed(estimated, tmp_path, forget("h100-sxm"), "named.json")])
    preset = roofs_of(named)
    assert preset is not None
    assert preset.matmul_flops_per_s == presets()["h100-sxm"].matmul_flops_per_s["float32"]
    place = changed(estimated, tmp_path, forget("a machine of mine"), "unnamed.json")
    assert roofs_of(read_all([place])[0]) is None
    card = tree(place).all("figure", id="g0-roofline")[0]
    assert "Left out: the file holds no peaks" in card.words
    assert not card.all("svg", role="img")


def test_intensity_under_the_roofs_is_flops_over_bytes() -> None:
    rows = tree(MEASURED).all("figure", id="g0-roofline")[0].all("tbody")[0].all("tr")
    shown = {(cells[0].text, cells[2].text): cells[3].text for cells in (row.all("td") for row in rows)}
    for result in json.loads(MEASURED.read_text())["results"]:
        if result["seq"] != 2048:
            continue
        for row in result["components"]:
            flops = row["matmul_flops"] + row["vector_flops"]
            intensity = flops / (row["bytes_read"] + row["bytes_written"])
            assert float(shown[result["method"], row["component"]]) == pytest.approx(intensity, rel=0.01, abs=5e-4)


# --- arithmetic -----------------------------------------------------------------------------------------------------


@given(st.floats(10, 1e5), st.floats(0.05, 3), st.booleans(), st.lists(st.integers(2, 10**6), min_size=2, unique=True))
@example(300.0, 1.0, True, [256, 512])
def test_crossover_of_a_power_law_is_where_it_is_one(
    where: float, power: float, rises: bool, lengths: list[int]
) -> None:
    """ratio = (T / T0)^k is 1 at T0 alone; a straight line between logarithms finds it from any two lengths around."""
    sign = power if rises else -power
    curve = [(float(length), (length / where) ** sign) for length in sorted(lengths)]
    found = crossovers([point for point in curve if point[1] != 1.0])
    if min(lengths) < where < max(lengths):
        assert [(one.length, one.rises) for one in found] == [(pytest.approx(where, rel=1e-6), rises)]
    else:
        assert found == []


def test_curve_that_touches_one_and_turns_back_crosses_nothing() -> None:
    assert crossovers([(256.0, 1.2), (512.0, 1.0), (1024.0, 1.1)]) == []
    assert crossovers([(256.0, 1.0), (512.0, 1.0)]) == []
    assert [one.rises for one in crossovers([(1.0, 0.5), (2.0, 2.0), (4.0, 0.5)])] == [True, False]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_linear_ticks_are_round_and_inside(low: float, span: float, most: int) -> None:
    scale = Linear(low, low + max(span, abs(low) * 1e-6), 10, 90)
    ticks = scale.ticks(most)
    assert 1 <= len(ticks) <= most + 1
    room = (scale.high - scale.low) * 1e-6
    assert all(scale.low - room <= tick <= scale.high + room for tick in ticks)
    assert scale(scale.low) == pytest.approx(10)
    assert scale(scale.high) == pytest.approx(90)


@given(st.floats(1e-30, 1e30), st.floats(1.05, 1e40))
def test_logarithmic_ticks_rise_and_stay_inside(low: float, ratio: float) -> None:
    scale = Log(low, low * ratio, 10, 90)
    ticks = scale.ticks()
    assert ticks == sorted(set(ticks))
    assert 1 <= len(ticks) <= 9
    assert all(10 - 1e-3 <= scale(tick) <= 90 + 1e-3 for tick in ticks)
    assert scale(math.sqrt(scale.low) * math.sqrt(scale.high)) == pytest.approx(50)


# --- in a browser ---------------------------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium of the system, or Playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install 'effref[browser-test]'")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own if os.path.exists(own) else None)
        if path is None:
            pytest.skip(f"needs Chromium: {', '.join(NAMES)} or 'playwright install chromium'")
        unsafe = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has no sandbox
        browser = playwright.chromium.launch(executable_path=path, args=unsafe)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two models: measured, and fidelity."""
    found = tmp_path_factory.mktemp("report") / "page.html"
    found.write_text(page(read_all([MEASURED, FIDELITY])), "utf-8")
    return found


@pytest.fixture
def opened(chromium: Any, place: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end nothing was asked of a network, and nothing was said on the console."""
    contexts, said, asked = [], [], []

    def open_page(path: Path = place, width: int = 1280, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith("file://") and url.endswith(".html") for url in asked), asked
    assert len(asked) == len(contexts)


def test_charts_are_there_with_accessible_names(opened: Callable[..., Any]) -> None:
    tab = opened()
    for name in (
        "reuse: seconds of a pass by component against length T",
        "Speed-up against flash over length T, conformer-m",
        "Predicted against measured seconds of totals, conformer-m",
        "Roofline of flash at T=2048",
        "perplexity against measured time of a decoding step, share of dense, smollm2-135m",
    ):
        chart = tab.get_by_role("img", name=name, exact=True)
        assert chart.count() == 1, name
        assert chart.bounding_box()["height"] > 100
    details = tab.get_by_text("Figures as a table").first
    details.focus()
    tab.keyboard.press("Enter")
    assert tab.get_by_role("table", name="Seconds by component, conformer-m").is_visible()


def test_filters_work_by_keyboard(opened: Callable[..., Any]) -> None:
    tab = opened()
    panel = tab.get_by_role("img", name="reuse: seconds of a pass by component against length T")
    other = tab.get_by_role("img", name="flash: seconds of a pass by component against length T")
    box = tab.get_by_role("checkbox", name="reuse")
    assert panel.is_visible()
    box.focus()
    tab.keyboard.press("Space")
    assert not box.is_checked()
    assert panel.count() == 0  # what is hidden has no role
    assert other.is_visible()
    marks = tab.locator("#g0-speedup svg[role=img] .m2")
    assert marks.count() > 0
    assert not any(mark.is_visible() for mark in marks.all())
    assert tab.get_by_text("3 of 4 methods").is_visible()
    tab.keyboard.press("Space")
    assert panel.is_visible()
    tab.get_by_role("radio", name="seconds").focus()
    tab.keyboard.press("ArrowRight")
    assert panel.count() == 0
    assert tab.get_by_role("img", name="reuse: share of the pass by component against length T").is_visible()
    tab.get_by_role("combobox", name="Model").select_option("smollm2-135m")
    assert not tab.locator("#g0").is_visible()
    assert tab.locator("#g1").is_visible()
    tab.get_by_role("button", name="Reset").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.getElementById('shown').textContent === '4 of 4 methods'")
    assert tab.locator("#g0").is_visible()


GROUND = "getComputedStyle(document.body).backgroundColor"
CARD = "getComputedStyle(document.querySelector('.card')).backgroundColor"
WORDS = "getComputedStyle(document.querySelector('.panel text')).fill"


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    shares = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_dark_mode_is_dark_and_both_can_be_read(opened: Callable[..., Any]) -> None:
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert luminance(light.evaluate(GROUND)) > 0.8
    assert luminance(dark.evaluate(GROUND)) < 0.05
    for tab in (light, dark):
        shades = sorted([luminance(tab.evaluate(CARD)), luminance(tab.evaluate(WORDS))])
        assert (shades[1] + 0.05) / (shades[0] + 0.05) > 4.5  # WCAG AA


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(opened: Callable[..., Any], width: int) -> None:
    tab = opened(width=width)
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    size = tab.evaluate("document.querySelector('.panel').getBoundingClientRect().width") / 340 * 11
    assert size >= 9, "text of charts in pixels"


def test_print_is_light_and_without_filters(opened: Callable[..., Any]) -> None:
    tab = opened(color_scheme="dark")
    assert tab.locator("#filters").is_visible()
    tab.emulate_media(media="print", color_scheme="dark")
    assert not tab.locator("#filters").is_visible()
    assert luminance(tab.evaluate(CARD)) > 0.8


def test_hostile_names_do_nothing_in_a_browser(opened: Callable[..., Any], tmp_path: Path) -> None:
    def spoil(document: dict[str, Any]) -> None:
        document["config"]["model"]["name"], document["notes"] = HOSTILE, [HOSTILE]
        for result in document["results"]:
            result["method"] += HOSTILE

    path = tmp_path / "hostile.html"
    path.write_text(report([changed(MEASURED, tmp_path, spoil)]), "utf-8")
    tab = opened(path)
    assert tab.get_by_role("heading", name=HOSTILE).is_visible()
    assert tab.locator("img").count() == 0
