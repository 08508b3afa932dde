"""``effref maps``: figures of attention maps and the grouping they suggest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from refimpl.inputs import sample
from refimpl.methods import parameters
from refimpl.weights import resolve_config

from .conftest import error_of


def test_maps_of_the_default_model(effref) -> None:
    result = effref("maps", "--seq", "24", "--format", "json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert len(found["layers"]) == 18
    assert len(found["groups"]) == 9
    assert all(0 <= value <= 1 for row in found["layers"] for value in row["cad"])
    np.testing.assert_allclose(np.diag(found["similarity"]), 1.0, atol=1e-5)
    parameters("reuse", {"groups": found["groups"]}, resolve_config("conformer-m"))  # what --set takes
    assert "seeded random" in result.stderr


def test_maps_as_tables(effref) -> None:
    result = effref("maps", "--seq", "9", "--compute-layers", "4", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "4 compute layers" in result.stdout
    assert "--set reuse.groups=[[" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute-layers", "19", "--seq", "4"], "18 layers"),
        (["--model", "minilm-l7"], "did you mean"),
        (["--input", "absent.wav"], "absent.wav"),
        (["--input", str(sample("paragraph"))], "reads frames"),
    ],
)
def test_bad_requests(effref, arguments: list[str], message: str) -> None:
    result = effref("maps", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()[-1:]) == 1


def test_maps_that_do_not_fit_into_memory_are_refused_before_weights_are_made(effref, monkeypatch) -> None:
    from effref import diagnosis

    assert "--seq" in error_of(effref("maps --seq 1000000000"))
    monkeypatch.setattr(diagnosis, "available_bytes", lambda device: 2**30)
    monkeypatch.setattr(diagnosis, "load_model", None)
    assert "maps of llama-2-7b at T=256 need 24." in error_of(effref("maps --model llama-2-7b"))


def test_maps_of_a_long_input_are_refused_before_they_are_made(effref, monkeypatch, tmp_path: Path) -> None:
    """The length of a file is known once it is read."""
    from effref import diagnosis

    monkeypatch.setattr(diagnosis, "available_bytes", lambda device: 2**30)
    np.save(tmp_path / "long.npy", np.zeros((40_000, 80), np.float32))
    said = error_of(effref("maps", "--model", "conformer-m", "--input", str(tmp_path / "long.npy")))
    assert "maps of conformer-m at T=10000 need" in said
