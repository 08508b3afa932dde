"""Combined methods on the command line: names, parameters, refusals, curves, preparation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import effref as package
import pytest
from effref.curves import points
from effref.explanation import explain

import costmodel
from refimpl.config import Workload, override, preset
from refimpl.errors import ConfigError
from refimpl.methods import CATALOG
from refimpl.parameters.composition import combines

from .conftest import error_of

SIZES = {"layers": 4, "d_model": 24, "heads": 6, "kv_heads": 3, "d_ff": 20, "vocab": 50}
TINY = override(preset("smollm2-135m"), **SIZES)
SMALL = ["--model", "smollm2-135m"] + [w for n, size in SIZES.items() for w in (f"--{n.replace('_', '-')}", str(size))]
SET = ["--set", "reuse.group=4", "--set", "svd-softmax.window=6", "--set", "latte.kept=0.5"]
NAME = "reuse+svd-softmax+latte"


def test_estimate_names_the_members_and_their_parameters(effref) -> None:
    command = ["estimate", *SMALL, *SET, "--seq", "32", "--hardware", "xeon-8480"]
    found = json.loads(effref(*command, "--method", "latte+reuse+svd-softmax", "--format", "json").stdout)
    (result,) = found["results"]
    assert result["method"] == NAME
    assert list(result["params"]) == NAME.split("+")
    assert result["params"]["reuse"]["group"] == 4
    assert result["params"]["svd-softmax"]["window"] == 6
    assert found["config"]["method"] == [NAME]
    assert found["config"]["params"][NAME] == result["params"]
    given = {"reuse": {"group": 4}, "svd-softmax": {"window": 6}, "latte": {"kept": 0.5}}
    cost = costmodel.estimate(NAME, TINY, Workload(32, fills_cache=True), given)
    assert result["total"]["matmul_flops"] == cost.total.matmul_flops
    assert result["params_bytes"] == cost.params_bytes
    assert result["cache_bytes"] == cost.cache_bytes
    shown = effref(*command, "--method", NAME).stdout
    assert f"{NAME} (reuse.group=4, " in shown
    assert "svd-softmax.window=6" in shown
    rows = list(csv.DictReader(io.StringIO(effref(*command, "--method", NAME, "--format", "csv").stdout)))
    assert json.loads(rows[0]["params"]) == result["params"]


def test_one_name_however_it_is_written() -> None:
    given = {"model": TINY, "seq": 16, "hardware": "xeon-8480", "params": {"reuse": {"group": 4}}}
    names = ["svd-softmax+reuse", "reuse+svd-softmax", "dense+reuse", "reuse"]
    found = package.estimate(method=names, **given)["results"]
    assert [one["method"] for one in found] == ["reuse+svd-softmax", "reuse"]
    assert found[0]["params"]["reuse"] == found[1]["params"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "reuse+flash"], "flash and reuse cannot be combined: both replace 'context'"),
        (["--method", "folding+latte", "--model", "bert-base"], "folding and latte cannot be combined: both replace"),
        (["--method", "reuse+efficientasr"], "or put that part of efficientasr at off"),
        (["--method", "reuse+late"], "did you mean 'latte'"),
        (["--method", "reuse+"], "holds an empty name"),
        (["--method", "reuse+reuse"], "names reuse twice"),
        (["--method", "reuse+latte", "--model", "bert-base", "--set", "reuse.share=scores"], "which latte does not"),
        (["--method", "reuse+svd-softmax", "--set", "flash.x=1"], "parameters are given for 'flash'"),
        (["--method", "reuse+svd-softmax", "--set", "reuse.groop=1"], "unknown parameter of reuse 'groop'"),
        (["--method", "reuse+svd-softmax", "--model", "bert-base"], "head"),
    ],
)
def test_what_cannot_be_combined_is_one_line(effref, arguments: list[str], message: str) -> None:
    for command in ("estimate", "measure", "fidelity"):
        assert message in error_of(effref(command, *arguments))


def test_prepare_takes_one_method(effref, tmp_path: Path) -> None:
    error = error_of(effref("prepare", "--method", "kvsharer+latte", "--input", str(tmp_path / "text.txt")))
    assert "prepare them one by one" in error


def test_default_model_is_one_that_all_members_run_on() -> None:
    for name, model in (("reuse+svd-softmax", "smollm2-135m"), ("reuse+latte", "minilm-l6"), ("flash+latte", None)):
        if model is None:
            with pytest.raises(ConfigError, match="cannot be combined"):
                package.estimate(method=name, seq=8, hardware="xeon-8480")
            continue
        assert package.estimate(method=name, seq=8, hardware="xeon-8480")["config"]["model"]["name"] == model


def test_measure_prepares_every_member_as_alone_and_keeps_what_was_found(effref) -> None:
    """The second run reads what the first one kept; a member alone reads it, too."""
    options = ["--seq", "16", "--engine", "numpy", "--repeats", "1", "--hardware", "xeon-8480", "--format", "json"]
    settings = ["--set", "kvsharer.layers=1", "--set", "kvsharer.threshold=-1"]
    name = "svd-softmax+latte+kvsharer"
    first = effref("measure", *SMALL, *options, *settings, "--method", name)
    assert all(f"{one} was prepared in" in first.stderr for one in name.split("+"))
    (result,) = json.loads(first.stdout)["results"]
    assert result["method"] == name
    assert result["params"]["kvsharer"]["strategy"]
    assert result["params"]["latte"]["thresholds"]
    assert result["fidelity"]["rel_l2"] > 0
    assert {row["component"] for row in result["components"] if row["measured_s"]["n"]} >= {"attention", "head"}
    second = effref("measure", *SMALL, *options, *settings, "--method", f"{name},kvsharer")
    assert second.stderr.count("was prepared before") == 4
    together, alone = json.loads(second.stdout)["results"]
    assert together["params"]["kvsharer"]["strategy"] == alone["params"]["strategy"]


def test_fidelity_turns_the_knob_of_a_member(effref) -> None:
    command = ["fidelity", *SMALL, "--seq", "16", "--windows", "1", "--engine", "numpy", "--hardware", "xeon-8480"]
    knob = ["--over", "reuse.group=1,4", "--set", "svd-softmax.window=24"]
    found = json.loads(effref(*command, *knob, "--method", "reuse+svd-softmax", "--format", "json").stdout)
    ours = [one for one in found["results"] if one["method"] == "reuse+svd-softmax"]
    assert [(one["knob"], one["value"]) for one in ours] == [("reuse.group", 1), ("reuse.group", 4)]
    assert [one["params"]["reuse"]["group"] for one in ours] == [1, 4]
    assert {one["params"]["svd-softmax"]["window"] for one in ours} == {24}
    assert ours[0]["fidelity"]["rel_l2"] < 1e-4 < ours[1]["fidelity"]["rel_l2"]


def test_curves_of_a_combination_are_those_of_its_members() -> None:
    name = "reuse+svd-softmax"
    found = [one for one in points((name,), {}, {}, {}, TINY) if one.method == name]
    assert [one.knob for one in found if one.knob.startswith("reuse.")] == ["reuse.group"] * 4
    assert {one.knob.partition(".")[0] for one in found} == {"reuse", "svd-softmax"}
    assert all(set(one.params) == {one.knob.partition(".")[0]} for one in found)
    fixed = points((name,), {"reuse": {"group": 2}}, {}, {"svd-softmax": {"fused": (True, False)}}, TINY)
    curves = {one.curve for one in fixed if one.method == name}
    assert curves == {f"{name} svd-softmax.fused=true", f"{name} svd-softmax.fused=false"}
    with pytest.raises(ConfigError, match=r"--set and --over both decide reuse\+svd-softmax.reuse.group"):
        points((name,), {"reuse": {"group": 2}}, {"reuse": {"group": (1, 2)}}, {}, TINY)


@pytest.mark.parametrize("method", CATALOG)
def test_explain_says_what_a_method_combines_with(method: str) -> None:
    found = explain(method).as_dict()
    others = [other for other in CATALOG if other not in (method, "dense")]
    assert found["combines_with"] == {
        other: combines(method, other) for other in others if combines(method, other) != "no"
    }


def test_explain_of_a_combination(effref) -> None:
    shown = effref("explain", "--method", "latte+reuse").stdout
    assert "reuse: weights, keys, context; latte: map" in shown
    assert "combines with  svd-softmax" in shown
    assert "with some parts at off folding, efficientasr" in shown
    assert "reuse.group" in shown
    assert "latte.kept" in shown
    assert "compute layer" in shown
    found = json.loads(effref("explain", "--method", "reuse+latte", "--format", "json").stdout)
    assert found["replaces"] == {"reuse": ["weights", "keys", "context"], "latte": ["map"]}
    assert [layer["kind"] for layer in found["layers"]] == ["compute layer", "reuse layer"]
    listed = json.loads(effref("list", "methods", "--format", "json").stdout)["methods"]
    assert {row["method"]: row["replaces"] for row in listed}["latte"] == ["map"]
