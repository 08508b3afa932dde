from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import effref as package
import numpy as np
import pytest
from effref import calibration

from refimpl.engines.recorded_step import RecordedStep
from refimpl.errors import InputError, MissingDependencyError

from .conftest import RUN, TINY, error_of, profile

MEASURE = ["measure", *RUN]


def in_json(result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_schema(effref, calibrated) -> None:
    result = effref(*MEASURE, "--format", "json")
    found = in_json(result)
    assert calibrated == [("numpy", 1, "float32", {})]
    assert "calibrated in" in result.stderr
    assert "seeded random weights" in result.stderr
    assert [(one["method"], one["seq"]) for one in found["results"]] == [
        (name, seq) for name in ("dense", "flash", "reuse") for seq in (8, 16)
    ]
    for one in found["results"]:
        assert set(one["total"]["measured_s"]) == {"median", "p10", "p90", "n"}
        assert one["total"]["measured_s"]["n"] == 2
        for row in [*one["components"], one["total"]]:
            seen = row["measured_s"]["median"]
            assert row["rel_error"] == pytest.approx((row["predicted_s"] - seen) / seen)
        assert {"rel_l2", "cosine", "max_abs"} <= set(one["fidelity"])
    for accuracy in (found["accuracy"], found["accuracy"]["bare_roofline"], found["accuracy"]["global_efficiency"]):
        assert set(accuracy["totals"]) == set(accuracy["components"]) == {"median_abs", "p90_abs", "bias", "n"}
    assert found["config"]["repeats"] == 2
    assert found["context"]["threads"] == 1


STEP = [
    "--phase", "decode", "--kv-len", "4,9", "--model", "smollm2-135m", "--layers", "2", "--d-model", "24",
    "--heads", "6", "--kv-heads", "3", "--d-ff", "20", "--vocab", "50", "--threads", "1",
]  # fmt: skip
DECODE = ["measure", *STEP, "--engine", "numpy", "--repeats", "2"]


def test_decoding(effref, calibrated) -> None:
    """Steps after the cached positions: rates, cache, and the same logits from every exact method."""
    found = in_json(effref(*DECODE, "--steps", "3", "--batch", "2", "--format", "json"))
    assert [(one["method"], one["kv_len"]) for one in found["results"]] == [
        (name, kv_len) for name in ("dense", "flash", "reuse") for kv_len in (4, 9)
    ]
    for one in found["results"]:
        assert one["tokens_per_s"]["measured"] == pytest.approx(6 / one["total"]["measured_s"]["median"])
        assert {"cache", "head"} <= {row["component"] for row in one["components"]}
        assert one["fidelity"]["rel_l2"] < 1e-6 or one["method"] == "reuse"
    text = effref(*DECODE, "--quiet").stdout
    assert "S=4" in text
    assert "measured tokens/s" in text


def test_recorded_steps_are_timed(effref, calibrated, monkeypatch) -> None:
    """Totals of one compiled call a step, components of ordinary steps, the same numbers from both."""
    recorded = []
    original = RecordedStep.__call__
    monkeypatch.setattr(RecordedStep, "__call__", lambda self, ids, at: recorded.append(at) or original(self, ids, at))
    words = [*DECODE, "--engine", "numba", "--method", "dense,reuse", "--graph"]
    found = in_json(effref(*words, "--format", "json"))
    assert found["config"]["graph"]
    assert recorded.count(4) == 3 * (1 + 2)  # of dense, flash and reuse: a warm-up and two repeats
    assert recorded.count(9) in (3 * 2, 3 * (1 + 2))
    assert all(one["components"][0]["measured_s"]["n"] == 2 for one in found["results"] if one["method"] == "dense")
    assert {one["fidelity"]["max_abs"] for one in found["results"] if one["method"] == "dense"} == {0}
    assert any("recorded and run as one compiled call" in note for note in found["notes"])


def test_recorded_steps_are_predicted(effref, calibrated) -> None:
    """Totals and what follows from them; components are of ordinary steps, as they are measured."""
    words = [*STEP, "--engine", "numba", "--method", "dense,reuse", "--format", "json"]
    plain, graph = (in_json(effref("measure", *words, *more))["results"] for more in ([], ["--graph"]))
    estimated = in_json(effref("estimate", *words, "--graph"))
    assert estimated["config"]["graph"]
    alone = sorted(estimated["results"], key=lambda one: one["method"])  # which come by lengths
    for before, after, said in zip(plain, graph, alone, strict=True):
        rows = zip(before["components"], after["components"], strict=True)
        assert all(ordinary["predicted_s"] == row["predicted_s"] for ordinary, row in rows)
        calls, total = after["total"]["calls"], after["total"]["predicted_s"]
        ordinary = before["total"]["predicted_s"]
        assert total == pytest.approx(1e-5 + 0.5 * (ordinary - calls * 1e-6) + calls * 1e-7)
        assert after["total"]["predicted_high_s"] == pytest.approx(1.1 * total)
        assert after["tokens_per_s"]["predicted"] == pytest.approx(1 / total)
        assert (said["total"]["predicted_s"], said["speedup"]["dense"]["predicted"]) == (
            total, after["speedup"]["dense"]["predicted"]
        )  # fmt: skip
        assert after["method"] == "dense" or after["speedup"] != before["speedup"]
    assert "totals of recorded passes, and fidelity" in effref("measure", *words[:-2], "--graph").stdout


def test_a_profile_without_recorded_steps_is_refused_at_once(effref, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "calibrate", lambda *given, **named: profile(recorded=None))
    said = error_of(effref(*DECODE, "--engine", "numba", "--graph"))
    assert "the profile 'local' knows no recorded passes; run 'effref calibrate' again" in said


def test_what_cannot_be_recorded_is_refused_before_calibrating(effref, calibrated) -> None:
    error_of(effref(*DECODE, "--engine", "numba", "--graph", "--method", "latte"))
    assert calibrated == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--method", "latte"],
            "latte: the step cannot be recorded on the CPU: the op 'quantize' has no instruction",
        ),
        (["--steps", "2"], "--graph replays one pass: give --steps 1"),
        (["--batch", "9"], "the step cannot be recorded on the CPU: it has 9 sequences, and up to 8 can be recorded"),
        (["--engine", "numpy"], "--graph is for GPUs and, on the CPU, for decoding with the engine 'numba'"),
        (["--fuse"], "--fuse is for GPUs: add --device gpu"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line(effref, calibrated, words, said) -> None:
    assert said in error_of(effref(*DECODE, "--engine", "numba", "--graph", *words))


def test_cache_is_not_grown_by_passes(effref, calibrated, monkeypatch) -> None:
    """Every pass starts behind the same positions: the closed form holds for each of them."""
    from effref.measurement import Bench

    seen = []
    original = Bench._pass

    def noted(self, name, length, record):
        run = original(self, name, length, record)
        seen.append((self.caches[name].length, self.caches[name].capacity, length))
        return run

    monkeypatch.setattr(Bench, "_pass", noted)
    assert effref(*DECODE).exit_code == 0
    assert seen
    assert all(held == capacity == length + 1 for held, capacity, length in seen)


def test_prefill_of_a_language_model_fills_its_cache(effref, calibrated) -> None:
    words = [word for word in DECODE if word not in ("--phase", "decode", "--kv-len", "4,9")]
    found = in_json(effref(*words, "--seq", "7", "--method", "dense", "--format", "json"))
    (one,) = found["results"]
    assert one["cache_bytes"] == 7 * 2 * 2 * 12 * 4
    assert next(row["calls"] for row in one["components"] if row["component"] == "cache") == 4


def test_profile_is_made_once(effref, calibrated) -> None:
    for _ in range(2):
        assert effref(*MEASURE).exit_code == 0
    assert len(calibrated) == 1


def test_named_hardware_is_not_calibrated(effref, calibrated) -> None:
    found = in_json(effref(*MEASURE, "--hardware", "xeon-8480", "--format", "json"))
    assert calibrated == []
    assert "bare_roofline" not in found["accuracy"]


def test_one_screen(effref, calibrated) -> None:
    result = effref("measure", *RUN, "--seq", "4,8,16,32")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 120
    for text in ("scores", "total", "speed-up", "bare roofline", "roofline x one factor"):
        assert text in result.stdout


def test_baselines_are_run_for_the_ratios_only() -> None:
    found = package.measure(
        seq=8, method="reuse", hardware=profile(), engine="numpy", threads=1, repeats=1,
        overrides={"layers": 2, "d_model": 32, "heads": 2, "d_ff": 64},
    )  # fmt: skip
    (result,) = found["results"]
    assert result["method"] == "reuse"
    assert result["speedup"]["dense"]["measured"] > 0
    assert result["speedup"]["flash"]["measured"] > 0
    assert 0 < result["fidelity"]["rel_l2"] < 1
    assert result["fidelity"]["reference"] == "dense"


def test_method_switched_off_equals_dense() -> None:
    found = package.measure(
        seq=8, method="reuse", params={"reuse": {"group": 1}}, hardware=profile(), engine="numpy", threads=1, repeats=1,
        overrides={"layers": 2, "d_model": 32, "heads": 2},
    )  # fmt: skip
    assert found["results"][0]["fidelity"]["rel_l2"] == 0
    assert found["results"][0]["total"]["measured_s"] == {
        **found["results"][0]["total"]["measured_s"], "p10": None, "p90": None, "n": 1,
    }  # fmt: skip


def test_time_limit_still_measures_everything_once(effref, calibrated) -> None:
    found = in_json(effref(*MEASURE, "--max-seconds", "1e-6", "--repeats", "50", "--format", "json"))
    assert [one["total"]["measured_s"]["n"] for one in found["results"]] == [1] * 6


def test_gate(effref, calibrated) -> None:
    assert effref(*MEASURE, "--fail-above", "1e9").exit_code == 0
    failed = effref(*MEASURE, "--fail-above", "0")
    assert failed.exit_code == 1
    assert "above 0 %" in failed.stderr
    assert "total" in failed.stdout


def test_interrupt_keeps_what_was_measured(effref, calibrated, monkeypatch, tmp_path: Path) -> None:
    from refimpl.model import Runner

    passes = []
    original = Runner.__call__

    def interrupted(self, inputs, *args, **kwargs):
        passes.append(inputs.shape)
        if len(passes) > 12:
            raise KeyboardInterrupt
        return original(self, inputs, *args, **kwargs)

    monkeypatch.setattr(Runner, "__call__", interrupted)
    place = tmp_path / "partial.json"
    result = effref(*MEASURE, "--output", str(place))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    found = json.loads(place.read_text())
    assert found["interrupted"] is True
    assert {one["seq"] for one in found["results"]} == {8}


def test_interrupt_before_the_first_result(effref, calibrated, monkeypatch) -> None:
    from refimpl.model import Runner

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "__call__", interrupted)
    assert "interrupted" in error_of(effref(*MEASURE), code=130)


def test_interrupted_table_is_printed(effref, calibrated, monkeypatch) -> None:
    import effref.measurement as measurement

    original = measurement.Bench._measure_length

    def interrupted(self, seq):
        if seq == 16:
            raise KeyboardInterrupt
        original(self, seq)

    monkeypatch.setattr(measurement.Bench, "_measure_length", interrupted)
    result = effref(*MEASURE)
    assert result.exit_code == 130
    assert "T=8" in result.stdout
    assert "T=16" not in result.stdout


def test_memory_is_checked_before_anything_is_allocated(effref, calibrated, monkeypatch) -> None:
    from effref import context, measurement

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(context, "available_bytes", lambda device: 2**30)
    monkeypatch.setattr(measurement, "load_model", loaded)
    said = error_of(effref("measure", "--engine", "numpy", "--seq", "65536", "--method", "dense"))
    assert "dense needs" in said
    assert "1.00 GiB are available" in said
    assert "lower --seq" in said


def test_baseline_that_does_not_fit_is_left_out(effref, monkeypatch) -> None:
    from effref import context

    needed = package.estimate(seq=64, method=("dense", "flash"), hardware="l4", overrides={"layers": 1})["results"]
    dense, flash = (one["peak_bytes"] for one in needed)
    monkeypatch.setattr(context, "available_bytes", lambda device: (dense + flash) // 2)
    arguments = ["--engine", "numpy", "--seq", "64", "--layers", "1", "--hardware", "xeon-8480", "--repeats", "1"]
    result = effref("measure", *arguments, "--method", "flash", "--format", "json")
    found = in_json(result)["results"][0]
    assert "no ratio to it" in result.stderr
    assert found["speedup"]["dense"]["measured"] is None
    assert found["fidelity"]["reference"] == "flash"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--repeats 0", "--repeats"),
        ("--max-seconds 0", "--max-seconds"),
        ("--fail-above -1", "--fail-above"),
        ("--input nothing.wav", "no such file"),
        ("--plot plot.pdf", ".svg or .png"),
        ("--output /", "is a folder"),
        ("--output /nowhere/at/all.json", "no folder"),
        ("--output /dev/null", "not a plain file"),
        ("--plot /nowhere/at/all.svg", "no folder"),
    ],
)
def test_hostile_requests_get_one_line(effref, calibrated, arguments: str, said: str) -> None:
    assert said in error_of(effref(*MEASURE, *arguments.split()))


def test_missing_device(effref, monkeypatch) -> None:
    from effref import machines

    def missing(name):
        raise MissingDependencyError("no NVIDIA GPU:\n install cupy-cuda12x")

    monkeypatch.setattr(machines, "get_engine", missing)
    assert error_of(effref("measure --device gpu")).endswith("no NVIDIA GPU: install cupy-cuda12x")


def test_missing_matplotlib(effref, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "effref[plot]" in error_of(effref("estimate --plot x.svg"))


def test_unwritable_folder(effref, tmp_path: Path, monkeypatch) -> None:
    import os

    monkeypatch.setattr(os, "access", lambda *args: False)
    assert "no permission" in error_of(effref("estimate", "--output", str(tmp_path / "x.csv")))


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    import os

    from effref.files import OutputError, write_text

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_text(tmp_path / "x.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_still_measures(effref, calibrated, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    result = effref(*MEASURE)
    assert result.exit_code == 0
    assert "for this run only" in result.stderr


def test_quiet(effref, calibrated) -> None:
    assert effref(*MEASURE, "--quiet").stderr == ""


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(effref, calibrated, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / f"plot.{suffix}"
    assert effref(*MEASURE, "--plot", str(place)).exit_code == 0
    data = place.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert b"reuse at T=16" in data  # the plot in words
    assert list(tmp_path.glob(".*")) == []


def test_input_file_decides_the_length(effref, calibrated, tmp_path: Path) -> None:
    place = tmp_path / "frames.npy"
    np.save(place, np.ones((40, 80), np.float32))
    found = in_json(
        effref("measure", *TINY, "--engine", "numpy", "--threads", "1", "--input", str(place), "--format", "json")
    )
    assert {one["seq"] for one in found["results"]} == {10}
    assert found["config"]["input"] == str(place)
    cut = in_json(effref(*MEASURE, "--seq", "5", "--input", str(place), "--format", "json", "--batch", "3"))
    assert {(one["seq"], one["batch"]) for one in cut["results"]} == {(5, 3)}


def test_nan_in_the_output_is_refused(effref, calibrated, monkeypatch) -> None:
    from refimpl.engines.numpy_engine import NumpyEngine

    original = NumpyEngine.softmax
    monkeypatch.setattr(NumpyEngine, "softmax", lambda self, *args, **kwargs: original(self, *args, **kwargs) * np.nan)
    assert "holds NaN" in error_of(effref(*MEASURE, "--method", "dense"))


def test_nan_in_the_input_is_refused(effref, calibrated, tmp_path: Path) -> None:
    place = tmp_path / "frames.npy"
    np.save(place, np.full((40, 80), np.nan, np.float32))
    assert "NaN" in error_of(effref(*MEASURE, "--input", str(place)))


def test_above_the_roof_is_flagged(effref, calibrated) -> None:
    slow = profile(matmul_flops_per_s={"float32": 1.0})
    found = package.measure(seq=8, method="dense", hardware=slow, engine="numpy", threads=1, repeats=1)
    assert any(flag.startswith("scores: ") for flag in found["results"][0]["flags"])
    from effref import profiles

    profiles.save(slow, "numpy", 1, "float32")
    assert "Above the roof" in effref(*MEASURE).stdout


def test_errors_of_a_perfect_prediction_are_zero() -> None:
    from effref.results import errors

    assert errors([0.0, 0.0]) == {"median_abs": 0.0, "p90_abs": 0.0, "bias": 0.0, "n": 2}
    assert errors([-0.5, 0.1, 0.2]) == {"median_abs": 0.2, "p90_abs": pytest.approx(0.44), "bias": 0.1, "n": 3}
    assert errors([])["n"] == 0


def test_agreement_leaves_padding_out() -> None:
    from effref.agreement import agreement

    exact = np.ones((1, 600, 4), np.float32)
    other = exact.copy()
    other[:, 500:] = 7
    assert agreement(other, exact, 500) == {"rel_l2": 0.0, "cosine": pytest.approx(1.0), "max_abs": 0.0}
    assert agreement(other, exact)["max_abs"] == 6
    assert agreement(2 * exact, exact)["rel_l2"] == pytest.approx(1.0)


def test_input_error_is_an_effref_error() -> None:
    with pytest.raises(InputError):
        package.measure(seq=8, engine="numpy", input_file="nothing.txt", model="bert-base", overrides={"layers": 1})
