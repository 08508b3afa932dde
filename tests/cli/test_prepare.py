"""``effref prepare``: what a method finds first, printed, written, kept and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from effref.preparation import prepared
from effref.progress import Progress

from refimpl.config import override, preset
from refimpl.inputs import sample
from refimpl.model import Runner
from refimpl.preparation import kvsharer
from refimpl.weights import load_model

from .conftest import error_of

Effref = Callable[..., Result]
TINY = [
    "--model", "smollm2-135m", "--layers", "5", "--d-model", "24", "--heads", "6", "--kv-heads", "3", "--d-ff", "20",
    "--vocab", "50",
]  # fmt: skip
SEARCH = ["prepare", "--method", "kvsharer", *TINY, "--engine", "numpy", "--threads", "1"]
TWO = ["--set", "kvsharer.layers=2", "--set", "kvsharer.threshold=-1"]


@pytest.fixture(autouse=True)
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every search; none is remembered within the process."""
    made: list[int] = []
    search = kvsharer.search_strategy

    def counted(*given: Any) -> Any:
        made.append(1)
        kvsharer._SEARCHES.clear()
        return search(*given)

    monkeypatch.setattr(kvsharer, "search_strategy", counted)
    return made


@pytest.fixture
def ids(tmp_path: Path) -> str:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 50, (3, 40)))
    return str(path)


def test_table_json_and_file_are_the_same_strategy(effref: Effref, ids: str, tmp_path: Path) -> None:
    place = tmp_path / "strategy.json"
    result = effref(*SEARCH, *TWO, "--input", ids, "--output", str(place))
    assert result.exit_code == 0, result.output
    written = json.loads(place.read_text("utf-8"))
    printed = json.loads(effref(*SEARCH, *TWO, "--input", ids, "--format", "json").stdout)
    assert printed == written
    assert (written["layers"], len(written["pairs"]), written["samples"], written["left_out"]) == (5, 2, 3, 0)
    table = result.stdout.splitlines()
    assert "kvsharer strategy: 2 pairs, 2 tried" in table[0]
    assert table[4].split() == ["layer", "source", "distance", "similarity", "accepted"]
    for line, row in zip(table[6:], written["tried"], strict=True):
        cells = line.split()
        assert cells[:2] == [str(row["layer"]), str(row["source"])]
        assert float(cells[2]) == pytest.approx(row["distance"], rel=0.01)
        assert float(cells[3]) == pytest.approx(row["similarity"], abs=0.001)
        assert cells[4] == "yes"
    assert "seeded random weights" in result.stderr
    assert f"wrote {place}" in result.stderr
    assert max(map(len, table)) <= 250


def test_a_written_strategy_is_used_and_named_in_results(effref: Effref, ids: str, tmp_path: Path) -> None:
    place = str(tmp_path / "strategy.json")
    assert effref(*SEARCH, *TWO, "--input", ids, "--output", place, "--quiet").exit_code == 0
    pairs = json.loads(Path(place).read_text())["pairs"]
    estimate = ["estimate", *TINY, "--method", "kvsharer", "--seq", "16", "--hardware", "xeon-8480", "--format", "json"]
    found = json.loads(effref(*estimate, "--set", f"kvsharer.strategy={place}").stdout)
    assert found["results"][0]["params"]["strategy"] == pairs
    other = effref(*estimate, "--set", f"kvsharer.strategy={place}", "--layers", "4")
    assert "strategy is for a model of 5 layers; smollm2-135m has 4" in error_of(other)


def test_the_same_request_is_answered_from_the_cache(
    effref: Effref, ids: str, cache: Path, searches: list[int]
) -> None:
    first, second = (effref(*SEARCH, *TWO, "--input", ids, "--format", "json") for _ in range(2))
    assert first.stdout == second.stdout
    assert len(searches) == 1
    assert "kvsharer was prepared in" in first.stderr
    assert "was prepared before, in" in second.stderr
    (kept,) = (cache / "prepared").iterdir()
    assert json.loads(kept.read_text("utf-8")) == json.loads(first.stdout)
    for other in (["--set", "kvsharer.order=similar"], ["--seed", "1"], ["--dtype", "float64"], ["--seq", "20"]):
        assert effref(*SEARCH, *TWO, "--input", ids, *other).exit_code == 0
    assert len(searches) == 5


def test_what_is_kept_is_for_causal_passes_or_for_others(ids: str, searches: list[int]) -> None:
    config = override(preset("smollm2-135m"), layers=5, d_model=24, heads=6, kv_heads=3, d_ff=20, vocab=50)
    model, params = load_model(config), {"layers": 2, "threshold": -1.0}
    for causal, made in ((True, 1), (None, 1), (False, 2), (False, 2), (True, 2)):
        prepared(Runner(model, "numpy"), "kvsharer", params, np.load(ids), Progress(), causal)
        assert len(searches) == made


@pytest.mark.parametrize("text", ["", "{", '{"effref": "kvsharer strategy", "version": 9}'])
def test_a_damaged_file_in_the_cache_is_replaced(
    effref: Effref, ids: str, cache: Path, searches: list[int], text: str
) -> None:
    first = effref(*SEARCH, *TWO, "--input", ids, "--format", "json")
    (kept,) = (cache / "prepared").iterdir()
    kept.write_text(text, "utf-8")
    second = effref(*SEARCH, *TWO, "--input", ids, "--format", "json")
    assert "found anew" in second.stderr
    assert json.loads(second.stdout)["pairs"] == json.loads(first.stdout)["pairs"]
    assert json.loads(kept.read_text("utf-8")) == json.loads(second.stdout)
    assert len(searches) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(effref: Effref, ids: str, cache: Path) -> None:
    cache.mkdir()
    (cache / "prepared").write_text("in the way", "utf-8")
    result = effref(*SEARCH, *TWO, "--input", ids)
    assert result.exit_code == 0, result.output
    assert "not kept for the next time" in result.stderr


def test_python_function_gives_the_document(ids: str) -> None:
    import effref as package

    sizes = {"layers": 5, "d_model": 24, "heads": 6, "kv_heads": 3, "d_ff": 20, "vocab": 50}
    document = package.prepare(
        ids, "smollm2-135m", params={"layers": 2, "threshold": -1}, overrides=sizes, engine="numpy", threads=1
    )
    assert document["effref"] == "kvsharer strategy"
    assert len(document["pairs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dense"], "'dense' finds nothing before it runs; these do: svd-softmax, latte, kvsharer"),
        (["--method", "kvshare"], "did you mean 'kvsharer'"),
        (["--set", "kvsharer.layers=5"], "at most 4 can share"),
        (["--set", "kvsharer.layers=0"], "nothing is left to find"),
        (["--set", "kvsharer.strategy=[[2,1]]"], "nothing is left to find"),
        (["--set", "kvsharer.strategy=absent.json"], "absent.json"),
        (["--set", "reuse.group=2"], "not among the methods"),
        (["--set", "kvsharer.threshold=1.5"], "only 0 of 10 pairs"),
        (["--engine", "nunpy"], "did you mean 'numpy'"),
        (["--input", "absent.npy"], "absent.npy"),
        (["--input", str(sample("speech"))], "reads tokens"),
        (["--seq", "100"], "has 40 rows"),
    ],
)
def test_bad_requests_are_one_line(effref: Effref, ids: str, arguments: list[str], message: str) -> None:
    assert message in error_of(effref(*SEARCH, "--input", ids, *arguments))


def test_an_output_that_cannot_be_written_is_refused_before_the_search(
    effref: Effref, ids: str, tmp_path: Path, searches: list[int]
) -> None:
    result = effref(*SEARCH, *TWO, "--input", ids, "--output", str(tmp_path / "absent" / "strategy.json"))
    assert "there is no folder" in error_of(result)
    assert searches == []


def test_an_interrupted_write_leaves_nothing(
    effref: Effref, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or not at all: neither in the place asked for nor beside it."""
    place = tmp_path / "out"
    place.mkdir()

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    assert "No space left" in error_of(effref(*SEARCH, *TWO, "--input", ids, "--output", str(place / "s.json")))
    assert list(place.iterdir()) == []


def test_input_is_required(effref: Effref) -> None:
    assert "--input" in error_of(effref(*SEARCH))
