"""``effref memo``: databases built from texts, inspected, profiled, and used by the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from effref import machines
from effref.memo import attention_seconds

import costmodel
from costmodel.predict import predict
from refimpl.config import Workload
from refimpl.inputs import text_windows
from refimpl.memo.database import Database
from refimpl.memo.memo import Memo
from refimpl.model import Run
from refimpl.recorder import Call
from refimpl.weights import load_model

from .conftest import error_of

TEXT = " ".join(f"word{n % 7} and word{n % 5} went to place{n % 3} on day {n % 11}." for n in range(120))
WINDOW = ["--seq", "16", "--epochs", "2", "--batch", "8"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a small BERT and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "model"
    folder.mkdir()
    words = sorted(set(TEXT.replace(".", " .").split()))
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: n for n, word in enumerate(words, 1)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4,
        "intermediate_size": 40, "vocab_size": 64, "max_position_embeddings": 32, "type_vocab_size": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(bert(2, 24, 40, 64, 32), folder / "model.safetensors")
    return folder


def bert(layers: int, d: int, f: int, vocab: int, positions: int) -> dict[str, np.ndarray]:
    """Seeded random weights under the names of a BERT checkpoint."""
    rng = np.random.default_rng(0)

    def linear(name: str, d_out: int, d_in: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": 0.3 * rng.standard_normal((d_out, d_in)), f"{name}.bias": np.zeros(d_out)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.ones(d), f"{name}.bias": np.zeros(d)}

    rows = {"word": vocab, "position": positions, "token_type": 2}
    tensors = {f"embeddings.{what}_embeddings.weight": rng.standard_normal((n, d)) for what, n in rows.items()}
    tensors |= norm("embeddings.LayerNorm")
    for at in (f"encoder.layer.{layer}" for layer in range(layers)):
        for part in ("query", "key", "value"):
            tensors |= linear(f"{at}.attention.self.{part}", d, d)
        tensors |= linear(f"{at}.attention.output.dense", d, d) | norm(f"{at}.attention.output.LayerNorm")
        tensors |= linear(f"{at}.intermediate.dense", f, d) | linear(f"{at}.output.dense", d, f)
        tensors |= norm(f"{at}.output.LayerNorm")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def in_json(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_build_inspect_profile_and_use(effref: Any, tmp_path: Path, text: Path, model: Path) -> None:
    place = str(tmp_path / "maps")
    built = in_json(
        effref("memo", "build", place, "--model", str(model), "--input", str(text), *WINDOW, "--format", "json")
    )
    again = in_json(effref("memo", "inspect", place, "--format", "json"))
    assert again["verified"]
    assert built["sequences"] == again["sequences"] == built["captured"]
    windows = len(text_windows(load_model(str(model)), TEXT, 16))
    assert built["sequences"] == windows - round(0.2 * windows)
    assert built["record_bytes"] == 4096  # 4 x 16 x 16 float32
    assert built["maps_bytes"] == 2 * 4096 * built["sequences"]

    words = ["--taus", "1,0.9,0.5", "--batch", "2", "--repeats", "1", "--hardware", "xeon-8480"]
    found = in_json(effref("memo", "profile", place, *words, "--format", "json"))
    rates = [row["hit_rate"] for row in found["thresholds"]]
    assert [row["tau"] for row in found["thresholds"]] == [1, 0.9, 0.5, 0]
    assert rates[-1] == 1
    assert found["thresholds"][-1]["rel_l2"] > 0
    for row in found["layers"]:
        assert row["benefit_s"] == pytest.approx(row["dense_s"] - row["attention_s"])
        assert 0 < row["memo_s"] < row["attention_s"]
    for row in found["thresholds"]:
        gaining = [one for one in row["layers"] if one["benefit_s"] > 0.05 * one["dense_s"]]
        assert row["selected"] == [one["layer"] for one in gaining if one["hit_rate"]]
        assert row["selected"] or row["selected_speedup_dense"] == 1.0
    assert in_json(effref("memo", "inspect", place, "--format", "json"))["profile"]["tau"] == 0.9
    shown = [line.split() for line in effref("memo", "inspect", place).stdout.splitlines()]
    assert ["causal", "no"] in shown
    assert ["verified", "yes"] in shown

    text_form = effref("memo", "profile", place, *words, "--dry")
    assert text_form.exit_code == 0
    assert "x dense" in text_form.stdout
    assert "benefit ms" in text_form.stdout


def test_the_ceiling_is_the_prediction_without_look_ups(effref: Any, tmp_path: Path, text: Path, model: Path) -> None:
    """Against sums over the components of two estimates; and the measured times against each other."""
    place = str(tmp_path / "maps")
    assert effref("memo", "build", place, "--model", str(model), "--input", str(text), *WINDOW).exit_code == 0
    words = ["--taus", "0.9", "--batch", "2", "--repeats", "1", "--hardware", "xeon-8480"]
    rows = in_json(effref("memo", "profile", place, *words, "--format", "json"))["all_hit"]
    assert rows[0]["transfer"] == "copy"
    config, workload = load_model(str(model)).config, Workload(seq=16, batch=2)
    hardware = machines.find("xeon-8480")
    for row in rows:
        looked_up = {"database": Memo(place), "tau": 0.0, "transfer": row["transfer"]}
        costs = (
            costmodel.estimate("dense", config, workload),
            costmodel.estimate("attmemo", config, workload, looked_up),
        )
        exact, own = (
            {name: float(part.seconds) for name, part in predict(cost, hardware).by_component().items()}
            for cost in costs
        )
        for parts in (exact, own):
            for name in ("stem", "feed-forward", "norm", "residual"):
                parts.pop(name)
        assert row["predicted_reduction"] == pytest.approx(1 - sum(own.values()) / sum(exact.values()))
        assert row["predicted_ceiling"] == pytest.approx(1 - (sum(own.values()) - own["memo"]) / sum(exact.values()))
        assert row["predicted_reduction"] < row["predicted_ceiling"] < 1
        assert row["reduction"] == pytest.approx(1 - row["attmemo_s"] / row["dense_s"])
        assert 0 < row["fetch_s"] < row["attmemo_s"]
    shown = effref("memo", "profile", place, *words, "--dry").stdout
    assert "ceiling %, pred." in shown


def test_attention_is_timed_layer_by_layer() -> None:
    """A layer ends with its output projection; what follows, and other components, count for none."""
    calls = [
        Call(component, op, (), seconds)
        for component, op, seconds in (
            ("stem", "embed", 64.0), ("memo", "nearest", 1.0), ("qkv", "linear", 2.0), ("output", "linear", 4.0),
            ("feed-forward", "linear", 64.0), ("scores", "scores", 8.0), ("output", "linear", 16.0),
            ("qkv", "linear", 64.0),
        )
    ]  # fmt: skip
    run = Run(np.zeros(1), 1.0, calls)
    assert attention_seconds(run, 2).tolist() == [7.0, 24.0]
    assert attention_seconds(run, 2, ("memo",)).tolist() == [1.0, 0.0]


def test_a_build_that_is_run_again_changes_nothing(effref: Any, tmp_path: Path, text: Path, model: Path) -> None:
    place = tmp_path / "maps"
    words = ["memo", "build", str(place), "--model", str(model), "--input", str(text), *WINDOW, "--sequences", "9"]
    for _ in range(2):
        assert effref(*words).exit_code == 0
    with Database(place, verify=True) as database:
        assert len(database.records("maps-1")) == 9
        assert len(database.notes["loss-0"]) == 2


def test_what_cannot_be_served_is_one_line(effref: Any, tmp_path: Path, text: Path, model: Path) -> None:
    place = str(tmp_path / "maps")
    assert "holds no database" in error_of(effref("memo", "inspect", place))
    assert "there is no file" in error_of(effref("memo", "build", place, "--model", str(model), "--input", "gone.txt"))
    assert "end in .txt" in error_of(effref("memo", "build", place, "--model", str(model), "--input", "a.wav"))
    words = ["--model", str(model), "--input", str(text), *WINDOW]
    assert effref("memo", "build", place, *words, "--sequences", "6", "--held-out", "0").exit_code == 0
    assert "of 8 needs more" in error_of(effref("memo", "profile", place, "--hardware", "xeon-8480"))
    assert "give numbers from 0 to 1" in error_of(effref("memo", "profile", place, "--taus", "high"))
    records = tmp_path / "maps" / "maps-0.records"
    data = bytearray(records.read_bytes())
    data[100] ^= 1
    records.write_bytes(data)
    assert "is damaged (wrong checksum of records 0 to" in error_of(effref("memo", "inspect", place))
    records.write_bytes(data[:-1])
    assert "bytes are there" in error_of(effref("memo", "inspect", place))


def test_measure_names_the_database(effref: Any, tmp_path: Path, text: Path, model: Path) -> None:
    """One that was built, and one of the run's own inputs for each length."""
    place = str(tmp_path / "maps")
    assert effref("memo", "build", place, "--model", str(model), "--input", str(text), *WINDOW).exit_code == 0
    words = ["measure", "--method", "attmemo", "--model", str(model), "--hardware", "xeon-8480", "--engine", "numpy"]
    words += ["--format", "json", "--repeats", "1", "--set", "attmemo.epochs=0"]
    for given, lengths, named in (([f"attmemo.database={place}"], "16", place), ([], "8,16", "own inputs")):
        sets = [word for one in given for word in ("--set", one)]
        rows = in_json(effref(*words, *sets, "--seq", lengths, "--batch", "2"))["results"]
        mine = [row for row in rows if row["method"] == "attmemo"]
        assert [row["params"]["database"] for row in mine] == [named] * len(lengths.split(","))
        if not given:
            assert all(row["fidelity"]["rel_l2"] == 0 for row in mine)
