"""``effref train-thresholds``: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import refimpl.training.thresholds
from refimpl import load_model
from refimpl.config import override, preset
from refimpl.inputs import sample
from refimpl.preparation.checksum import checksum

from .conftest import error_of

Effref = Callable[..., Result]
SIZES = {"layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "d_ff": 12, "vocab": 40}
TINY = [word for name, size in SIZES.items() for word in ("--" + name.replace("_", "-"), str(size))]
TRAIN = ["train-thresholds", "--model", "smollm2-135m", *TINY, "--seq", "8", "--threads", "1", "--target-kept", "0.5"]


@pytest.fixture
def ids(tmp_path: Path) -> str:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 40, (2, 40)))
    return str(path)


def test_the_document_is_what_latte_reads(effref: Effref, ids: str, tmp_path: Path) -> None:
    place = tmp_path / "thresholds.json"
    words = [*TRAIN, "--input", ids, "--steps", "3", "--seed", "2", "--nibble", "round", "--compare"]
    result = effref(*words, "--output", str(place))
    assert result.exit_code == 0, result.output
    document = json.loads(place.read_text("utf-8"))
    model = load_model(override(preset("smollm2-135m"), **SIZES), seed=2)
    expected = {
        "schema_version": 1, "method": "latte", "model": "smollm2-135m", "layers": 2, "heads": 4, "nibble": "round",
        "source": "trained", "target_kept": 0.5, "weights_sha256": checksum(model.weights, np.empty(0)),
    }  # fmt: skip
    assert {name: document[name] for name in expected} == expected
    for name in ("thresholds", "kept"):
        assert np.shape(document[name]) == (2, 4)
        assert np.min(document[name]) >= 0.0
    training = document["training"]
    assert (training["steps"], training["windows"], training["held_out_windows"]) == (3, 6, 2)
    assert len(training["losses"]) == len(training["kept"]) == 3
    assert list(document["held_out"]) == ["all", "trained", "global", "quantile"]
    assert document["held_out"]["all"]["kept"] == 1.0
    assert "wrote" in result.stderr
    printed = json.loads(effref(*words, "--format", "json").stdout)
    assert printed == document  # the same training again gives the same numbers
    table = result.stdout.splitlines()
    assert "4 heads, 0.5 of the visible pairs to keep" in table[0]
    assert table[-4].split()[:2] == ["all", "100.0"]
    assert float(table[-3].split()[1]) == pytest.approx(100 * document["held_out"]["trained"]["kept"], abs=0.06)


def test_an_interrupted_training_goes_on_and_ends_the_same(
    effref: Effref, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the fourth step: exit 130, the checkpoint of the third, and the same thresholds in the end."""
    place, words = tmp_path / "training.npz", [*TRAIN, "--input", ids, "--steps", "6", "--format", "json"]
    whole = json.loads(effref(*words).stdout)
    monkeypatch.setattr(refimpl.training.thresholds, "gradient_of", _interrupted(3))
    stopped = effref(*words, "--checkpoint", str(place))
    assert error_of(stopped, 130) == "effref: error: interrupted"
    assert f"stopped after step 3 of 6; the same command goes on from {place}" in stopped.stderr
    assert [path.name for path in tmp_path.iterdir() if "training" in path.name] == ["training.npz"]
    monkeypatch.undo()
    resumed = effref(*words, "--checkpoint", str(place))
    assert f"going on from {place} at step 3 of 6" in resumed.stderr
    assert json.loads(resumed.stdout) == whole
    longer = effref(*[*words, "--steps", "7"], "--checkpoint", str(place))
    assert "at step 6 of 7" in longer.stderr
    assert "step 7; steps=6 is before that" in error_of(effref(*words, "--checkpoint", str(place)))


def _interrupted(after: int) -> Any:
    """`gradient_of` that is interrupted after so many steps."""
    real, calls = refimpl.training.thresholds.gradient_of, iter(range(after))

    def gradient_of(*given: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*given)

    return gradient_of


def test_without_a_checkpoint_an_interrupted_training_says_so(
    effref: Effref, ids: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refimpl.training.thresholds, "gradient_of", _interrupted(1))
    stopped = effref(*TRAIN, "--input", ids)
    assert stopped.exit_code == 130
    assert "stopped after step 1 of 100; nothing was kept, since no --checkpoint was given" in stopped.stderr


def test_a_damaged_or_strange_checkpoint_is_one_line(effref: Effref, ids: str, tmp_path: Path) -> None:
    place = tmp_path / "training.npz"
    words = [*TRAIN, "--input", ids, "--steps", "1", "--checkpoint", str(place)]
    assert effref(*words).exit_code == 0
    sound = place.read_bytes()
    for data in (b"", sound[: len(sound) // 2], b"text"):
        place.write_bytes(data)
        assert f"{place} is no checkpoint of a training, or it is damaged" in error_of(effref(*words, "--quiet"))
        assert place.read_bytes() == data
    place.write_bytes(sound)
    assert "other weights, inputs or settings" in error_of(effref(*words, "--lr", "0.3", "--quiet"))


def test_an_interrupted_write_leaves_the_checkpoint_of_before(
    effref: Effref, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "training.npz"
    words = [*TRAIN, "--input", ids, "--checkpoint", str(place)]
    assert effref(*words, "--steps", "1").exit_code == 0
    before = place.read_bytes()

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    assert "No space left" in error_of(effref(*words, "--steps", "2", "--quiet"))
    assert place.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["ids.npy", "training.npz"]


def test_python_function_gives_the_document(ids: str) -> None:
    import effref as package

    document = package.train_thresholds(ids, seq=8, steps=1, overrides=SIZES, threads=1)
    assert (document["method"], document["training"]["steps"]) == ("latte", 1)
    assert list(document["held_out"]) == ["all", "trained"]


def test_an_encoder_is_judged_by_its_cosine(effref: Effref, ids: str) -> None:
    words = ["train-thresholds", "--model", "minilm-l6", *TINY, "--kv-heads", "4", "--input", ids, "--seq", "8"]
    result = effref(*words, "--steps", "2", "--threads", "1", "--format", "json")
    assert result.exit_code == 0, result.output
    judged = json.loads(result.stdout)["held_out"]
    assert set(judged["trained"]) == {"kept", "loss", "cosine"}
    assert judged["all"]["cosine"] > judged["trained"]["cosine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-kept", "0"], "target_kept=0.0; it must be a number from 0.0001 to 1"),
        (["--target-kept", "1.1"], "target_kept=1.1"),
        (["--lr", "0"], "rate=0.0"),
        (["--nibble", "ceil"], "nibble='ceil'; it must be one of 'floor', 'round'"),
        (["--estimate", "fp8"], "estimate='fp8'"),
        (["--start", "zero"], "start='zero'"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--steps", "0"], "--steps"),
        (["--model", "smolm2"], "unknown model 'smolm2'"),
        (["--model", "conformer-m", "--kv-heads", "4"], "thresholds are trained for post-norm and pre-norm"),
        (["--input", "absent.npy"], "absent.npy: no such file"),
        (["--input", str(sample("speech"))], "reads tokens"),
        (["--seq", "40"], "gives 0 window(s)"),
        (["--output", "absent/t.json"], "there is no folder absent"),
        (["--checkpoint", "absent/c.npz"], "there is no folder absent"),
    ],
)
def test_bad_requests_are_one_line(effref: Effref, ids: str, arguments: list[str], message: str) -> None:
    assert message in error_of(effref(*TRAIN, "--input", ids, "--quiet", *arguments))


def test_input_is_required(effref: Effref) -> None:
    assert "--input" in error_of(effref(*TRAIN))
