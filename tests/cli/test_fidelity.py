"""``effref fidelity``: figures against plain re-statements, curves, costs beside them, requests that are refused."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import effref as package
import numpy as np
import pytest
from effref.agreement import Agreement, NextToken
from effref.curves import points
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr, softmax

from refimpl import Model, forward, load_model
from refimpl.config import override, preset
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.inputs import load_input, sample
from refimpl.language import perplexity, windows
from refimpl.methods import CATALOG
from refimpl.model import Runner
from refimpl.training.filter import Rule
from refimpl.training.passes import TrainableModel

from .conftest import error_of

OWN_CACHE = os.environ.get("EFFREF_CACHE")  # before the tests' own
SIZES = {"layers": 4, "d_model": 24, "heads": 6, "kv_heads": 3, "d_ff": 20, "vocab": 50}
TINY = override(preset("smollm2-135m"), **SIZES)
ON_NUMPY = ["--engine", "numpy", "--threads", "1", "--hardware", "xeon-8480"]
OVERRIDES = [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
LANGUAGE = ["fidelity", "--model", "smollm2-135m", *OVERRIDES, *ON_NUMPY]
REUSE = [*LANGUAGE, "--method", "reuse", "--over", "reuse.group=1,2,4", "--seq", "9"]


def in_json(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Two sequences of 13 tokens."""
    place = tmp_path / "ids.npy"
    np.save(place, np.random.default_rng(5).integers(50, size=(2, 13)))
    return place


# --- figures --------------------------------------------------------------------------------------------------------


def restated(model: Any, sequences: np.ndarray, params: dict[str, Any]) -> dict[str, float]:
    """The figures of reuse against dense, position by position."""
    divergences, agreed, surprise, surprise_exact, outputs, exacts = [], [], [], [], [], []
    for row in sequences:
        output = forward(model, row[None, :-1], "reuse", params).output[0].astype(np.float64)
        exact = forward(model, row[None, :-1], "dense").output[0].astype(np.float64)
        outputs.append(output)
        exacts.append(exact)
        for q, p, token in zip(softmax(output, axis=-1), softmax(exact, axis=-1), row[1:], strict=True):
            divergences.append(rel_entr(p, q).sum())
            agreed.append(q.argmax() == p.argmax())
            surprise.append(-math.log(q[token]))
            surprise_exact.append(-math.log(p[token]))
    x, y = np.ravel(outputs), np.ravel(exacts)
    return {
        "rel_l2": np.linalg.norm(x - y) / np.linalg.norm(y),
        "cosine": x @ y / np.linalg.norm(x) / np.linalg.norm(y),
        "max_abs": np.abs(x - y).max(),
        "kl_nats": np.mean(divergences),
        "top1_agreement": np.mean(agreed),
        "perplexity": math.exp(np.mean(surprise)),
        "perplexity_exact": math.exp(np.mean(surprise_exact)),
    }


def test_figures_of_a_language_model_are_their_definitions(ids: Path) -> None:
    found = package.fidelity(TINY, over={"reuse": {"group": [4]}}, input_file=ids, engine="numpy", hardware="xeon-8480")
    *_, of_reuse = found["results"]
    expected = restated(load_model(TINY), np.load(ids), {"group": 4})
    assert of_reuse["fidelity"].pop("reference") == "dense"
    assert of_reuse["fidelity"].pop("positions") == 24
    assert of_reuse["fidelity"] == pytest.approx(expected, rel=1e-9)
    assert set(of_reuse["fidelity"]) == set(expected)
    assert expected["rel_l2"] > 0.01
    assert expected["top1_agreement"] < 1


def test_divergence_is_of_the_method_from_exact_attention() -> None:
    """KL(p || q) with p exact: swapping the two gives another number."""
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.8, 0.1, 0.1]])
    tokens = NextToken()
    tokens.add(np.log(q), np.log(p) + 7.0, np.array([2]))
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    assert tokens.figures() == pytest.approx(
        {"kl_nats": expected, "top1_agreement": 1.0, "perplexity": 10.0, "perplexity_exact": 4.0}
    )
    assert expected != pytest.approx(0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25), rel=0.01)


LOGITS = hnp.arrays(np.float32, (3, 2, 5), elements=st.floats(-(2.0**10), 2.0**10, width=32))


@given(LOGITS, LOGITS, hnp.arrays(np.int64, (3, 2), elements=st.integers(0, 4)))
def test_sums_over_sequences_are_those_of_all_positions(logits: Any, exact: Any, following: Any) -> None:
    tokens, outputs = NextToken(), Agreement()
    for row, other, ids in zip(logits, exact, following, strict=True):
        tokens.add(row, other, ids)
        outputs.add(row, other)
    q, p = (log_softmax(x.astype(np.float64).reshape(6, 5), axis=-1) for x in (logits, exact))
    surprise = -np.take_along_axis(q, following.reshape(6, 1), axis=-1).mean()
    found = tokens.figures()
    assert found["kl_nats"] == pytest.approx((np.exp(p) * (p - q)).sum() / 6, rel=1e-9, abs=1e-12)
    assert found["kl_nats"] >= -1e-9
    assert found["perplexity"] == (pytest.approx(math.exp(surprise), rel=1e-9) if surprise < 709 else None)
    assert outputs.figures()["max_abs"] == np.abs(logits.astype(np.float64) - exact).max()


def test_wide_outputs_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures whatever the number of positions at a time."""
    from effref import agreement

    rng = np.random.default_rng(0)
    logits, exact, following = rng.normal(size=(7, 11)), rng.normal(size=(7, 11)), rng.integers(11, size=7)

    def figures() -> dict[str, Any]:
        tokens, outputs = NextToken(), Agreement()
        tokens.add(logits, exact, following)
        outputs.add(logits, exact)
        return {**tokens.figures(), **outputs.figures()}

    whole = figures()
    monkeypatch.setattr(agreement, "_BLOCK", 22)
    assert figures() == pytest.approx(whole, rel=1e-12)


ROUNDED = ("svd-softmax", "local")  # in another basis, and fused: exact but for rounding
LONG = {"local": "300", "linformer": "300"}  # positions above every value of the knob


@pytest.mark.parametrize("method", [name for name, row in CATALOG.items() if not row.exact and name != "linear"])
def test_every_method_starts_exact(effref, method: str) -> None:
    """On its own model: the first value of its own knob is off, bit for bit or in another basis; the others are not."""
    sizes = ["--layers", "4", "--d-model", "24", "--heads", "6", "--d-ff", "32", "--seq", LONG.get(method, "8")]
    off = [word for name, value in CATALOG[method].off_with.items() for word in ("--set", f"{method}.{name}={value}")]
    words = ["--method", method, *off, *sizes, *ON_NUMPY, "--format", "json"]
    found = in_json(effref("fidelity", *words))["results"]
    dense, _, off, *others = found
    assert dense["method"] == "dense"
    assert off["knob"]
    for exact in (dense, off):
        rounding = 1e-5 if exact["method"] in ROUNDED else 0
        assert exact["fidelity"]["rel_l2"] <= rounding
        assert exact["fidelity"]["max_abs"] <= rounding
        assert exact["fidelity"].get("kl_nats", 0) <= rounding
        assert exact["fidelity"].get("top1_agreement", 1) == 1
        expected = pytest.approx(exact["fidelity"].get("perplexity_exact", 1), rel=rounding, abs=0)
        assert exact["fidelity"].get("perplexity", 1) == expected
    assert others
    own = method == "attmemo"  # its database is of the input that is judged, so that every map is the exact one
    assert all((other["fidelity"]["rel_l2"] == 0) == own for other in others)


def test_flash_is_exact_up_to_rounding(effref) -> None:
    found = in_json(effref(*REUSE, "--format", "json"))["results"]
    assert 0 < found[1]["fidelity"]["rel_l2"] < 1e-5
    assert found[1]["fidelity"]["top1_agreement"] == 1


def test_kept_share_is_that_of_the_filter(ids: Path) -> None:
    """Measured, against the filter that thresholds are trained with; and what is predicted is for that share."""
    model, rows, gammas = load_model(TINY), np.load(ids), [0.0, 0.6, 1.0]
    found = package.fidelity(
        TINY, "latte", over={"latte": {"gamma": gammas}}, input_file=ids, engine="numpy", hardware="xeon-8480"
    )["results"]
    assert ["kept" in one["fidelity"] for one in found] == [False, False, True, True, True]
    pairs = 4 * 6 * rows.shape[0] * 12 * 13 // 2  # layers, heads
    for one, gamma in zip(found[2:], gammas, strict=True):
        thresholds = np.full((4, 6), -math.log(gamma) if gamma else math.inf)
        kept = [TrainableModel(model, Rule())(row[None, :-1], thresholds, gradient=False).kept for row in rows]
        assert one["fidelity"]["kept"] == pytest.approx(np.mean(kept), abs=2 / pairs)  # two ties, at most
        expected = package.estimate(
            TINY, 12, "latte", {"latte": {"kept": one["fidelity"]["kept"]}}, hardware="xeon-8480"
        )
        assert one["total"]["matmul_flops"] == expected["results"][-1]["total"]["matmul_flops"]
    assert found[2]["fidelity"]["kept"] == 1.0
    assert 12 * 4 * 6 * 2 / pairs <= found[4]["fidelity"]["kept"] < found[3]["fidelity"]["kept"] < 1.0


def test_padding_is_left_out() -> None:
    """A recording of 355 positions in a window of 400: the figures are those of the first 355."""
    sizes = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 16}
    config = override(preset("whisper-tiny-en"), **sizes)
    found = package.fidelity(config, over={"reuse": {"group": [2]}}, seq=400, engine="numpy", hardware="xeon-8480")
    model = load_model(config)
    frames = load_input(model, sample("speech"), 400)
    assert frames.valid_positions == 355
    x, y = (
        forward(model, frames.array, name, params).output[0].astype(np.float64)
        for name, params in (("reuse", {"group": 2}), ("dense", {}))
    )
    figures = found["results"][-1]["fidelity"]
    assert figures["positions"] == 355
    assert figures["rel_l2"] == pytest.approx(np.linalg.norm((x - y)[:355]) / np.linalg.norm(y[:355]), rel=1e-9)
    assert figures["rel_l2"] != pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-6)
    assert "355 positions and padding to 400" in found["config"]["input"]
    assert "kl_nats" not in figures
    assert "decode" not in found["results"][-1]


def test_output_that_is_no_number_is_refused(effref, monkeypatch) -> None:
    from refimpl.engines.numpy_engine import NumpyEngine

    original = NumpyEngine.softmax
    monkeypatch.setattr(NumpyEngine, "softmax", lambda self, *args, **kwargs: original(self, *args, **kwargs) * np.nan)
    assert "the output of dense holds NaN" in error_of(effref(*REUSE))


# --- what is read ---------------------------------------------------------------------------------------------------

WORDS = {"<|endoftext|>": 0, "<s>": 1, "a": 2, "b": 3, "c": 4}


def tokenizer(words: dict[str, int]) -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "unk_token": "a", "vocab": words},
    }  # fmt: skip


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that counts as pretrained and reads words, in the place of the one that is asked for; its folder."""
    pytest.importorskip("tokenizers")
    from effref import comparison

    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(WORDS)))

    def loaded(given: Any, **options: Any) -> Any:
        return replace(load_model(given, **options), assets=folder, pretrained=True)

    monkeypatch.setattr(comparison, "load_model", loaded)
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def text_of(tokens: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(["a", "b", "c"], size=tokens))


def test_text_is_cut_into_windows_and_the_next_token_is_scored(reader: Path) -> None:
    """Perplexity over windows with a start token in front, from logits and the tokens behind them."""
    place = write(reader, "text.txt", text_of(40, 1))
    found = package.fidelity(TINY, over={"reuse": {"group": [2]}}, input_file=place, seq=11, windows=3, engine="numpy")
    model = replace(load_model(TINY), assets=reader)
    rows = windows(model, place.read_text(), 11, 3)
    assert (rows[:, 0] == 0).all()
    assert rows.shape == (3, 12)
    figures = found["results"][-1]["fidelity"]
    assert figures["positions"] == 33
    for name, params, key in (("reuse", {"group": 2}, "perplexity"), ("dense", {}, "perplexity_exact")):
        logits = forward(model, rows[:, :-1], name, params).output
        assert figures[key] == pytest.approx(perplexity(logits, rows[:, 1:]), rel=1e-6)
        assert figures[key] != pytest.approx(perplexity(logits, rows[:, :-1]), rel=1e-3)
    assert found["config"]["input"] == "3 windows of 11 tokens of text.txt"


def test_default_windows_are_as_many_as_there_are(reader: Path) -> None:
    for tokens, expected in ((700, (1, 512)), (1100, (2, 512)), (5, (1, 5))):
        place = write(reader, "text.txt", text_of(tokens, 1))
        found = package.fidelity(TINY, over={"reuse": {"group": [1]}}, input_file=place, engine="numpy")
        assert (found["config"]["sequences"], found["config"]["seq"][0]) == expected


def test_start_token_is_the_one_that_the_tokenizer_has(reader: Path, monkeypatch) -> None:
    from effref import material

    (reader / "tokenizer.json").write_text(json.dumps(tokenizer({"<s>": 1, "a": 2, "b": 3, "c": 4})))
    started = []
    original = windows

    def noted(*arguments: Any) -> Any:
        started.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(material, "windows", noted)
    package.fidelity(TINY, over={"reuse": {"group": [1]}}, input_file=write(reader, "x.txt", "a b c"), engine="numpy")
    assert set(started) == {"<s>"}


def test_methods_are_prepared_on_another_text(reader: Path, monkeypatch, effref) -> None:
    from effref import comparison

    seen = []
    original = comparison.prepared

    def noted(runner: Any, method: str, params: Any, inputs: Any, progress: Any) -> Any:
        seen.append((method, inputs))
        return original(runner, method, params, inputs, progress)

    monkeypatch.setattr(comparison, "prepared", noted)
    judged, other = write(reader, "judged.txt", text_of(70, 1)), write(reader, "other.txt", text_of(330, 2))
    given = ["--input", str(judged), "--calibration", str(other), "--over", "kvsharer.layers=0,1"]
    result = effref(*LANGUAGE, "--method", "kvsharer", *given, "--format", "json")
    found = in_json(result)
    rows = windows(replace(load_model(TINY), assets=reader), other.read_text(), 64, 5)
    assert [method for method, _ in seen] == ["kvsharer", "kvsharer"]
    for _, inputs in seen:
        np.testing.assert_array_equal(inputs, rows[:, :-1])
    assert "methods are prepared on: 5 windows of 64 tokens of other.txt" in result.stderr
    assert found["config"]["calibration"] == "5 windows of 64 tokens of other.txt"
    assert len(found["results"][-1]["params"]["strategy"]) == 1


def test_the_same_text_for_both_is_said(reader: Path, effref) -> None:
    judged = str(write(reader, "judged.txt", text_of(70, 1)))
    result = effref(
        *LANGUAGE, "--method", "kvsharer", "--input", judged, "--calibration", judged, "--over", "kvsharer.layers=1"
    )
    assert "the text that is judged" in result.stderr


def test_other_models_are_prepared_on_their_input(effref, monkeypatch) -> None:
    result = effref(
        "fidelity", "--model", "minilm", "--layers", "3", "--d-model", "24", "--heads", "6", "--seq", "7", "--method",
        "headshare", *ON_NUMPY,
    )  # fmt: skip
    assert result.exit_code == 0
    assert "7 random tokens, seed 0" in result.stderr
    assert "methods are prepared on: the input that is judged" in result.stderr


def test_random_weights_are_said_to_mean_nothing(effref) -> None:
    assert "figures of the mechanism, not of quality" in effref(*REUSE).stderr
    said = effref("fidelity", "--model", "minilm", "--seq", "4", "--over", "reuse.group=2", *ON_NUMPY).stderr
    assert "'effref models fetch minilm-l6' gets trained weights" in said


# --- curves ---------------------------------------------------------------------------------------------------------


def curve_of(*found: Any) -> list[tuple[str, Any]]:
    return [(point.curve, point.value) for point in found]


def test_default_curve_is_that_of_the_parameters() -> None:
    dense, flash, *rest = points(("reuse",), {}, {}, {}, TINY)
    assert (dense.name, flash.name) == ("dense", "flash")
    assert curve_of(*rest) == [("reuse", group) for group in (1, 2, 3, 4)]
    assert rest[-1].name == "reuse, group=4"


def test_named_baselines_come_once() -> None:
    assert [point.name for point in points(("flash", "dense"), {}, {}, {}, TINY)] == ["dense", "flash"]


def test_knob_that_is_set_is_not_turned() -> None:
    (point,) = points(("reuse",), {"reuse": {"group": 3}}, {}, {}, TINY)[2:]
    assert (point.params, point.knob, point.name) == ({"group": 3}, "", "reuse")


def test_what_was_found_before_is_one_point() -> None:
    given = {"kvsharer": {"strategy": [[2, 0]]}}
    (point,) = points(("kvsharer",), given, {}, {}, TINY)[2:]
    assert (point.params, point.knob) == ({"strategy": [[2, 0]]}, "")


def test_vary_gives_a_curve_for_each_combination() -> None:
    vary = {"reuse": {"share": ["scores", "probabilities"], "heads": [0, 6]}}
    found = points(("reuse",), {}, {"reuse": {"group": [1, 2]}}, vary, TINY)[2:]
    assert [point.curve for point in found[::2]] == [
        f"reuse share={share} heads={heads}" for share in ("scores", "probabilities") for heads in (0, 6)
    ]
    assert found[-1].params == {"share": "probabilities", "heads": 6, "group": 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"over": {"folding": {"fold": [1]}}}, "not among the methods"),
        ({"over": {"reuse": {"group": []}}}, "must be a list of values"),
        ({"over": {"reuse": {"group": 4}}}, "must be a list of values"),
        ({"vary": {"reuse": {"share": "scores"}}}, "must be a list of values"),
        ({"vary": {"reuse": {"grup": [1]}}}, "group"),
        ({"params": {"reuse": {"group": 2}}, "over": {"reuse": {"group": [1]}}}, "--set and --over both decide"),
        ({"vary": {"reuse": {"group": [2]}}, "over": {"reuse": {"group": [1]}}}, "--over and --vary both decide"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], said: str) -> None:
    given = {"params": {}, "over": {}, "vary": {}, **options}
    with pytest.raises(ConfigError, match=said):
        points(("reuse",), config=TINY, **given)


def test_several_methods_and_curves(effref) -> None:
    words = ["--method", "reuse,kvsharer", "--vary", "kvsharer.order=dissimilar,random", "--seq", "6"]
    found = in_json(effref(*LANGUAGE, *words, "--over", "kvsharer.layers=0,1", "--format", "json"))
    named = [(one["curve"], one["knob"], one["value"]) for one in found["results"]]
    assert named == [
        ("dense", None, None),
        ("flash", None, None),
        *(("reuse", "group", group) for group in (1, 2, 3, 4)),
        *((f"kvsharer order={order}", "layers", layers) for order in ("dissimilar", "random") for layers in (0, 1)),
    ]
    assert [one["params"]["order"] for one in found["results"][6:]] == ["dissimilar"] * 2 + ["random"] * 2
    assert found["config"]["vary"] == {"kvsharer": {"order": ["dissimilar", "random"]}}


# --- cost -----------------------------------------------------------------------------------------------------------


def test_schema(effref) -> None:
    found = in_json(effref(*REUSE, "--kv-len", "20", "--measure", "--repeats", "2", "--format", "json"))
    assert found["schema_version"] == 1
    assert {"context", "config", "hardware", "results", "notes"} <= set(found)
    for one in found["results"]:
        assert (one["seq"], one["batch"], one["phase"], one["components"]) == (9, 1, "prefill", [])
        assert one["decode"]["kv_len"] == 20
        for work in (one["total"], one["decode"]):
            seen = work["measured_s"]["median"]
            assert work["measured_s"]["n"] == 2
            assert work["rel_error"] == pytest.approx((work["predicted_s"] - seen) / seen)
        assert one["decode"]["tokens_per_s"]["measured"] == pytest.approx(1 / one["decode"]["measured_s"]["median"])
        for work in (one, one["decode"]):
            assert set(work["speedup"]) == {"dense", "flash"}
            assert all(ratio > 0 for ratios in work["speedup"].values() for ratio in ratios.values())
    dense, *_, reuse = found["results"]
    assert dense["cache_bytes"] == 20 * 4 * 2 * 12 * 4
    assert reuse["cache_bytes"] == 20 * (2 + 3) * 12 * 4  # one layer keeps keys and values, three values alone
    assert reuse["params_bytes"] < dense["params_bytes"]
    assert reuse["speedup"]["dense"]["predicted"] == pytest.approx(
        dense["total"]["predicted_s"] / reuse["total"]["predicted_s"]
    )
    assert reuse["decode"]["speedup"]["dense"]["measured"] == pytest.approx(
        dense["decode"]["measured_s"]["median"] / reuse["decode"]["measured_s"]["median"]
    )
    assert found["config"]["decode"] == {"kv_len": 20, "steps": 1}
    assert found["config"]["pretrained"] is False


def test_predictions_are_those_of_estimate(effref) -> None:
    found = in_json(effref(*REUSE, "--format", "json"))["results"]
    given = {"params": {"reuse": {"group": 4}}, "hardware": "xeon-8480", "engine": "numpy", "threads": 1}
    prefill = package.estimate(TINY, 9, "reuse", **given)["results"][0]
    step = package.estimate(TINY, None, "reuse", phase="decode", kv_len=9, **given)["results"][0]
    assert found[-1]["total"] == prefill["total"]
    assert found[-1]["decode"]["predicted_s"] == step["total"]["predicted_s"]
    for name in ("params_bytes", "peak_bytes", "cache_bytes"):
        assert found[-1][name] == prefill[name]


def test_nothing_is_timed_on_the_reference_engine_unless_asked(effref) -> None:
    for one in in_json(effref(*REUSE, "--format", "json"))["results"]:
        assert "measured_s" not in one["total"]
        assert "measured_s" not in one["decode"]
        assert one["speedup"]["dense"]["measured"] is None


@pytest.mark.parametrize("kv_len", [3, 9, 14])
def test_steps_are_timed_behind_so_many_positions(effref, monkeypatch, kv_len: int) -> None:
    held = []
    original = Runner.decode

    def noted(self: Any, ids: Any, method: Any, cache: Any, **options: Any) -> Any:
        held.append((cache.length, cache.capacity, ids.shape))
        return original(self, ids, method, cache, **options)

    monkeypatch.setattr(Runner, "decode", noted)
    result = effref(*REUSE, "--kv-len", str(kv_len), "--measure", "--repeats", "3")
    assert result.exit_code == 0
    assert held == [(kv_len, max(9, kv_len + 1), (1, 1))] * 5 * 4  # the first of each is not counted


def test_settings_take_turns(effref, monkeypatch) -> None:
    """Every round runs all of them, so that a change of the machine's speed meets all."""
    from effref import comparison

    turns = []
    original = comparison.Bench._turns

    def noted(self: Any, what: str, repeats: int, seconds: float, turn: Any) -> None:
        def named(one: Any) -> None:
            turns.append(one.point.name)
            turn(one)

        original(self, what, repeats, seconds, named)

    monkeypatch.setattr(comparison.Bench, "_turns", noted)
    assert effref(*REUSE, "--measure", "--repeats", "2").exit_code == 0
    names = ["dense", "flash", "reuse, group=1", "reuse, group=2", "reuse, group=4"]
    assert turns == names * 4
    turns.clear()
    assert effref(*REUSE, "--measure", "--repeats", "50", "--max-seconds", "1e-9").exit_code == 0
    assert turns == names * 2


def test_a_full_position_table_leaves_room_for_a_step(effref) -> None:
    sizes = ["--layers", "2", "--d-model", "8", "--heads", "2", "--vocab", "9"]
    words = ["fidelity", "--model", "gpt2", *sizes, *ON_NUMPY, "--seq", "1024", "--over", "reuse.group=1", "--measure"]
    found = in_json(effref(*words, "--windows", "1", "--repeats", "1", "--format", "json"))
    assert found["results"][0]["decode"]["kv_len"] == 1023


# --- output ---------------------------------------------------------------------------------------------------------


def test_csv_is_flat(effref) -> None:
    words = [*REUSE, "--vary", "reuse.share=scores,probabilities"]
    rows = list(csv.DictReader(io.StringIO(effref(*words, "--format", "csv").stdout)))
    results = in_json(effref(*words, "--format", "json"))["results"]
    assert len(rows) == len(results) == 8
    for row, result in zip(rows, results, strict=True):
        assert (row["method"], row["curve"]) == (result["method"], result["curve"])
        assert row["value"] == ("" if result["value"] is None else str(result["value"]))
        assert json.loads(row["params"]) == result["params"]
        for name in ("rel_l2", "kl_nats", "top1_agreement", "perplexity", "perplexity_exact"):
            assert float(row[name]) == result["fidelity"][name]
        assert float(row["predicted_s"]) == result["total"]["predicted_s"]
        assert float(row["decode_predicted_s"]) == result["decode"]["predicted_s"]
        assert float(row["decode_speedup_flash_predicted"]) == result["decode"]["speedup"]["flash"]["predicted"]
        assert int(row["cache_bytes"]) == result["cache_bytes"]
        assert int(row["kv_len"]) == 9
        assert row["measured_median_s"] == ""


def test_one_screen(effref) -> None:
    words = ["--method", "kvsharer", "--vary", "kvsharer.order=dissimilar,similar", "--over", "kvsharer.layers=0,1"]
    result = effref(*LANGUAGE, *words, "--seq", "6", "--measure", "--repeats", "1")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 120
    for text in ("perplexity", "KL nats", "top-1 %", "x dense", "x flash", "cache KiB", "weights KiB", "KV read kB"):
        assert text in result.stdout
    assert "kvsharer order=similar, layers=0 to 1: perplexity" in result.stdout


def test_one_baseline(effref) -> None:
    text = effref(*REUSE, "--baseline", "dense").stdout
    assert "x dense" in text
    assert "x flash" not in text


def test_markdown(effref) -> None:
    text = effref(*REUSE, "--format", "md").stdout
    assert "|" in text
    assert "fidelity perplexity" in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize("timed", [True, False])
def test_plot(effref, tmp_path: Path, suffix: str, timed: bool) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / f"plot.{suffix}"
    words = ["--vary", "reuse.share=scores,probabilities", "--plot", str(place), "--repeats", "1"]
    result = effref(*REUSE, *words, *(["--measure"] if timed else []))
    assert result.exit_code == 0, result.stderr
    data = place.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert b"reuse share=scores group=4: " in data  # the plot in words
    assert (b"measured time" if timed else b"predicted time") in data
    assert b"perplexity against" in data
    if suffix == "svg":
        assert b"reuse share=probabilities, by group" in data  # the legend
    assert list(tmp_path.glob(".*")) == []


def test_plot_of_a_filter_is_over_what_it_kept(effref, tmp_path: Path) -> None:
    """Curves of two knobs share the axis of the measured share; files of thresholds are a curve of their own."""
    pytest.importorskip("matplotlib")
    plot, place = tmp_path / "plot.svg", tmp_path / "thresholds.json"
    place.write_text(
        json.dumps({"schema_version": 1, "method": "latte", "nibble": "floor", "thresholds": [[0.3] * 6] * 4})
    )
    over = ["--over", "latte.kept=0.5,0.2", "--over", "latte.gamma=0.9,0.5", "--over", f"latte.thresholds={place}"]
    result = effref(*LANGUAGE, "--method", "latte", *over, "--seq", "9", "--plot", str(plot))
    assert result.exit_code == 0, result.stderr
    assert "kept %" in result.stdout
    data = plot.read_text()
    assert data.count("kept share of the visible pairs, %") == 3
    for words in ("same quantile of each head", "one threshold for all heads", "thresholds of files", "% kept"):
        assert words in data
    assert "size of the cache" not in data


def test_plot_of_a_model_without_a_head(effref, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / "plot.svg"
    words = ["fidelity", "--model", "deit-s", "--layers", "2", "--d-model", "12", "--heads", "2"]
    over = ["--over", "reuse.groups=[[0,1]],[[0],[1]]"]
    result = effref(*words, *over, *ON_NUMPY, "--plot", str(place), "--format", "json")
    found = in_json(result)
    assert [one["value"] for one in found["results"][2:]] == [[[0, 1]], [[0], [1]]]
    assert "input: photo.jpg" in result.stderr
    data = place.read_text()
    assert "rel. L2 against predicted time of a pass over T=197 and weights size" in data
    assert "[[0,1]]" in data


# --- what is refused, and what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--over reuse.grup=1,2", "group"),
        ("--over reuse.group", "is not METHOD.PARAMETER=VALUE"),
        ("--over reuse.group=0", "group=0"),
        ("--over reuse.group=1,two", "group='two'"),
        ("--over ruse.group=1", "reuse"),
        ("--over folding.fold=1", "not among the methods"),
        ("--vary reuse.share=maps", "share='maps'"),
        ("--vary reuse.share=scores --set reuse.share=scores", "both decide reuse.share"),
        ("--method ruse", "reuse"),
        ("--input absent.txt", "no such file"),
        (f"--input {sample('speech')}", "holds frames, but smollm2-135m reads tokens"),
        (f"--input {sample('paragraph')}", "has no tokenizer.json"),
        (f"--calibration {sample('speech')}", "holds frames"),
        ("--seq 9000", "8192 positions"),
        ("--kv-len 8192", "leaves no room for a step"),
        ("--kv-len 0", "--kv-len"),
        ("--windows 0", "--windows"),
        ("--engine nump", "numpy"),
        ("--plot plot.pdf", ".svg or .png"),
        ("--output /nowhere/at/all.csv", "no folder"),
        ("--hardware h100-sxm", "is a gpu"),
        ("--max-seconds 0", "--max-seconds"),
        ("--set kvsharer.layers=1", "not among the methods"),
    ],
)
def test_hostile_requests_get_one_line(effref, words: str, said: str) -> None:
    assert said in error_of(effref(*LANGUAGE, *words.split()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"--model whisper --input {sample('paragraph')}", "holds tokens, but whisper-tiny-en reads frames"),
        ("--model whisper --windows 2", "has no language head"),
        ("--model whisper --kv-len 5", "is no language model"),
        ("--model whisper --seq 1501", "has 1500 positions"),
        ("--model minilm --seq 513", "has 512 positions"),
        ("--model nothing", "unknown model"),
        (f"--model minilm --input {sample('paragraph')}", "effref models fetch minilm-l6"),
    ],
)
def test_hostile_requests_of_other_models(effref, words: str, said: str) -> None:
    assert said in error_of(effref("fidelity", *ON_NUMPY, *words.split()))


@pytest.mark.parametrize(
    ("array", "words", "said"),
    [
        (np.ones((2, 5), np.int64), "--seq 5", "2 sequences of 5 ids; 2 of 6 are needed"),
        (np.ones((2, 5), np.int64), "--windows 3", "3 of 5 are needed"),
        (np.ones((2, 1), np.int64), "", "2 of 2 are needed"),
        (np.full((1, 5), 50), "", "vocabulary is 0 to 49"),
        (np.ones((2, 5)), "", "token ids are integers"),
    ],
)
def test_ids_that_do_not_fit(effref, tmp_path: Path, array: np.ndarray, words: str, said: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    assert said in error_of(effref(*LANGUAGE, "--input", str(tmp_path / "ids.npy"), *words.split()))


def test_text_that_is_too_short(effref, reader: Path) -> None:
    place = str(write(reader, "short.txt", "a b c"))
    assert "the text has 3 tokens; 1 windows of 9 need 9" in error_of(effref(*LANGUAGE, "--input", place, "--seq", "9"))
    empty = str(write(reader, "empty.txt", " "))
    assert "holds no tokens" in error_of(effref(*LANGUAGE, "--input", empty))


def test_memory_is_checked_before_anything_is_loaded(effref, monkeypatch) -> None:
    from effref import comparison, context

    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(context, "available_bytes", lambda device: 2**30)
    monkeypatch.setattr(comparison, "load_model", loaded)
    said = error_of(effref("fidelity", "--model", "smollm2-135m", "--windows", "40", *ON_NUMPY))
    assert "the exact outputs of 40 sequences need" in said
    assert "1.00 GiB are available: lower --seq, --windows or --layers" in said


def test_memory_for_the_caches_is_counted(monkeypatch) -> None:
    """One that suffices without timing does not suffice with it."""
    from effref import context

    given = {"over": {"reuse": {"group": [1] * 40}}, "seq": 9, "engine": "numpy", "hardware": "xeon-8480"}
    found = package.fidelity(TINY, **given)["results"][0]
    enough = found["peak_bytes"] + found["params_bytes"] + 2 * 9 * 50 * 4
    monkeypatch.setattr(context, "available_bytes", lambda device: enough)
    package.fidelity(TINY, **given)
    with pytest.raises(UnsupportedError, match="lower --seq"):
        package.fidelity(TINY, **given, measure=True)


def test_setting_for_which_nothing_is_found_is_left_out(effref) -> None:
    words = [*LANGUAGE, "--method", "kvsharer", "--set", "kvsharer.threshold=2", "--seq", "5", "--format", "json"]
    result = effref(*words, "--over", "kvsharer.layers=0,1")
    found = in_json(result)
    assert [one["value"] for one in found["results"]] == [None, None, 0]
    assert "kvsharer, layers=1 is left out: layers=1, but only 0 of" in result.stderr
    assert any("left out" in note for note in found["notes"])
    assert "lower layers or threshold" in error_of(effref(*words, "--over", "kvsharer.layers=1,2"))


@pytest.mark.parametrize("passes", [2, 5, 9])
def test_interrupt_keeps_what_was_compared(effref, monkeypatch, tmp_path: Path, passes: int) -> None:
    """Two sequences for each setting: as many settings as were finished are shown."""
    count = 0
    original = Runner.__call__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > passes:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "__call__", interrupted)
    place = tmp_path / "partial.json"
    result = effref(*REUSE, "--output", str(place))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    found = json.loads(place.read_text())
    assert found["interrupted"] is True
    assert len(found["results"]) == passes // 2


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_interrupt_while_timing(effref, monkeypatch, form: str, tmp_path: Path) -> None:
    from effref import comparison

    original = Runner.decode

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = original(self, *args, **kwargs)
        steps.append(run)
        if len(steps) > 7:
            raise KeyboardInterrupt
        return run

    steps: list[Any] = []
    monkeypatch.setattr(comparison.Runner, "decode", interrupted)
    place = tmp_path / "plot.svg"
    result = effref(*REUSE, "--measure", "--repeats", "2", "--format", form, "--plot", str(place))
    assert result.exit_code == 130, result.stderr
    assert "reuse" in result.stdout
    assert place.is_file()
    if form == "json":
        found = json.loads(result.stdout)["results"]
        assert all(one["total"]["measured_s"]["n"] == 2 for one in found)
        assert ["measured_s" in one["decode"] for one in found] == [True, True, False, False, False]


def test_interrupt_before_the_first_result(effref, monkeypatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "__call__", interrupted)
    assert "interrupted" in error_of(effref(*REUSE), code=130)


def test_quiet(effref) -> None:
    assert effref(*REUSE, "--quiet").stderr == ""


# --- real models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads real weights from the cache that was there before the tests' own."""
    from refimpl.weights import pretrained

    monkeypatch.delenv("EFFREF_CACHE")
    if OWN_CACHE is not None:
        monkeypatch.setenv("EFFREF_CACHE", OWN_CACHE)

    def load(name: str) -> Model:
        if pretrained.folder(name) is None:
            pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
        return load_model(name, weights="pretrained")

    return load


def relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64) - y) / np.linalg.norm(y.astype(np.float64)))


@pytest.mark.models
@pytest.mark.parametrize(("name", "positions"), [("minilm-l6", 243), ("whisper-tiny-en", 355)])
def test_real_models_without_a_head(fetched, name: str, positions: int) -> None:
    """On the shipped paragraph and recording: off is exact, larger groups are further away, and by how much."""
    model = fetched(name)
    place = sample("paragraph" if name == "minilm-l6" else "speech")
    given = load_input(model, place, None if name == "minilm-l6" else 360)
    groups = {"reuse": {"group": [1, 2, 4]}}
    options = {"engine": "numpy", "hardware": "xeon-8480", "input_file": place, "seq": 243 if positions == 243 else 360}
    found = package.fidelity(name, "reuse", over=groups, **options)
    assert found["config"]["pretrained"] is True
    _, _, off, two, four = (one["fidelity"] for one in found["results"])
    assert off["rel_l2"] == 0
    assert two["positions"] == positions
    x, y = (forward(model, given.array, method).output[0, :positions] for method in ("reuse", "dense"))
    assert two["rel_l2"] == pytest.approx(relative(x, y), rel=1e-6)
    assert 0.1 < two["rel_l2"] < four["rel_l2"]
    assert two["cosine"] > four["cosine"]


@pytest.mark.models
@pytest.mark.slow
def test_real_language_model(fetched) -> None:
    """SmolLM2 on the shipped text: its perplexity, which reuse without training ruins."""
    model = fetched("smollm2-135m")
    found = package.fidelity(
        "smollm2", "reuse", over={"reuse": {"group": [1, 2]}}, seq=64, windows=2, engine="numpy", hardware="xeon-8480"
    )
    rows = windows(model, sample("moby-dick").read_text(), 64, 2)
    exact, _, off, two = (one["fidelity"] for one in found["results"])
    expected = perplexity(forward(model, rows[:, :-1]).output, rows[:, 1:])
    assert exact["perplexity"] == pytest.approx(expected, rel=1e-4)  # one sequence at a time
    assert off == exact
    assert 10 < exact["perplexity"] < 200
    assert two["perplexity"] > 2 * exact["perplexity"] == 2 * two["perplexity_exact"]
    assert two["kl_nats"] > 0.5
    assert two["top1_agreement"] < 0.7
    assert found["results"][3]["cache_bytes"] < found["results"][0]["cache_bytes"]
