"""``effref crossover``: places against a scan of all lengths, and the search against a clock that is known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import effref as package
import numpy as np
import pytest
from effref.crossing import CLOSE
from effref.measurement import Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import estimate, load_hardware, predict
from costmodel.crossover import advantage, begins, places, wins
from refimpl.config import Workload, preset

from .conftest import TINY, error_of, profile

MINILM = preset("minilm-l6")
RUN = ["crossover", *TINY, "--engine", "numpy", "--threads", "1"]


# --- solving --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(41, 400), st.lists(st.integers(1, 400), max_size=4))
def test_intervals_are_those_of_a_scan(first: int, last: int, changes: list[int]) -> None:
    """Where a change is not missed between two places of the grid, and the grid here holds all places."""

    def ahead(place: int) -> bool:
        return sum(place >= change for change in changes) % 2 == 1

    inside = {place for low, high in wins(ahead, range(first, last + 1)) for place in range(low, high + 1)}
    assert inside == {place for place in range(first, last + 1) if ahead(place)}


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2, 10**6))
def test_one_change_is_found_on_a_coarse_grid(first: int, more: int, change: int) -> None:
    last = first + more
    grid = places(first, last)
    assert grid[0] == first
    assert grid[-1] == last
    found = wins(lambda place: place >= change, grid)
    assert begins(found, last) == (max(first, change) if change <= last else None)
    assert begins(wins(lambda place: place < change, grid), last) == (first if change > last else None)


@pytest.mark.parametrize("method", ["reuse", "latte", "kvsharer"])
@pytest.mark.parametrize("machine", ["spec", "calibrated"])
def test_speedup_is_the_ratio_of_the_totals(method: str, machine: str) -> None:
    hardware = load_hardware("xeon-8480") if machine == "spec" else profile()
    model = preset("smollm2-135m")
    own, other = (predict(estimate(name, model, Workload(300)), hardware) for name in (method, "flash"))
    found = advantage(own, other)
    assert found.speedup == pytest.approx(float(other.total.seconds) / float(own.total.seconds))
    assert found.low <= found.speedup <= found.high
    assert (found.low < found.high) == (machine == "calibrated")


def test_what_both_execute_has_no_error() -> None:
    """The band comes from what differs alone: none against itself, less than that of the totals against another."""
    own, other = (predict(estimate(name, MINILM, Workload(300)), profile()) for name in ("reuse", "dense"))
    same = advantage(own, own)
    assert same.low == same.speedup == same.high == 1.0
    found = advantage(own, other)
    whole = [float(other.total.seconds) / float(end) for end in (own.total.high, own.total.low)]
    assert whole[0] < found.low < found.high < whole[1]


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["dense", "flash"]), st.sampled_from([1, 2, 3]), st.integers(16, 60), st.integers(80, 160))
def test_predicted_place_is_that_of_a_scan(baseline: str, group: int, first: int, last: int) -> None:
    hardware = profile(bands={})
    found = package.crossover(
        MINILM, "reuse", {"reuse": {"group": group}}, baseline=baseline, limits=(first, last), hardware=hardware
    )
    (row,) = found["results"]
    seconds = [
        [
            float(predict(estimate(name, MINILM, Workload(length), given), hardware).total.seconds)
            for length in range(first, last + 1)
        ]
        for name, given in (("reuse", {"group": group}), (baseline, {}))
    ]
    ahead = np.array(seconds[1]) / np.array(seconds[0]) > 1.0
    behind = np.flatnonzero(~ahead)
    wanted = None if not len(behind) or not ahead[-1] else first + int(behind[-1]) + 1
    assert row["predicted"]["from"] == wanted
    words = {(True, True): "always", (False, False): "never", (False, True): "from", (True, False): "until"}
    assert row["predicted"]["outcome"] == words[bool(ahead[0]), bool(ahead[-1])]


# --- measuring ------------------------------------------------------------------------------------------------------


def _clock(monkeypatch: pytest.MonkeyPatch, own: Any, other: Any, noise: float = 0.01) -> list[tuple[str, int]]:
    """Passes that take the seconds of these functions of a place; the list holds which ones ran."""
    rng, ran = np.random.default_rng(0), []

    def run(self: Any, name: str, length: int, record: bool) -> Any:
        place = length if self.request.batch == 1 else self.request.batch
        ran.append((name, place))
        seconds = (own if name == "reuse" else other)(place) * float(np.exp(noise * rng.standard_normal()))
        return SimpleNamespace(seconds=seconds, output=np.ones((1, 2, 2)), breakdown={})

    monkeypatch.setattr(Bench, "_pass", run)
    return ran


def _measured(*more: str) -> list[str]:
    return [*RUN, "--measure", "--baseline", "flash", "--range", "16:4096", "--format", "json", *more]


@pytest.mark.parametrize("place", [40, 500, 3000])
def test_search_finds_where_a_known_clock_crosses(effref, calibrated, monkeypatch, place: int) -> None:
    ran = _clock(monkeypatch, lambda t: 1e-3 + 1e-6 * t, lambda t: 1e-3 + 1e-6 * place * (t / place) ** 2)
    found = json.loads(effref(*_measured()).stdout)["results"][0]["measured"]
    assert found["outcome"] == "from"
    assert found["from"] == pytest.approx(place, rel=0.03)
    assert found["low"] <= place <= found["high"]
    assert len(found["probes"]) == len({place for _, place in ran}) < 12
    inner = [probe["at"] for probe in found["probes"]]
    low, high = max(at for at in inner if at <= found["from"]), min(at for at in inner if at >= found["from"])
    assert high / low <= CLOSE or not all(probe["clear"] for probe in found["probes"])


@pytest.mark.parametrize(("factor", "outcome"), [(0.5, "always"), (2.0, "never")])
def test_none_and_all(effref, calibrated, monkeypatch, factor: float, outcome: str) -> None:
    _clock(monkeypatch, lambda t: factor * 1e-6 * t, lambda t: 1e-6 * t)
    row = json.loads(effref(*_measured()).stdout)["results"][0]
    assert row["measured"]["outcome"] == outcome
    assert row["measured"]["clear"]
    assert row["measured"]["from"] is None
    assert row["agree"] == (row["predicted"]["outcome"] == outcome)


def test_the_batch_varies(effref, calibrated, monkeypatch) -> None:
    _clock(monkeypatch, lambda b: 1e-3 + 1e-5 * b, lambda b: 1e-4 * b)
    result = effref(*RUN, "--measure", "--baseline", "flash", "--over", "batch", "--range", "2:64", "--seq", "9")
    assert result.exit_code == 0, result.stderr
    assert "from B=11 on" in result.stdout


def test_interrupted_keeps_what_was_measured(effref, calibrated, monkeypatch) -> None:
    ran = _clock(monkeypatch, lambda t: 1e-3 + 1e-6 * t, lambda t: 4e-6 * t)
    original = Bench._pass

    def interrupted(self: Any, *given: Any, **named: Any) -> Any:
        if len({place for _, place in ran}) > 3:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    monkeypatch.setattr(Bench, "_pass", interrupted)
    result = effref(*_measured())
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert found["interrupted"]
    assert len(found["results"][0]["measured"]["probes"]) == 3


def test_too_long_is_left_away(effref, calibrated, monkeypatch) -> None:
    _clock(monkeypatch, lambda t: 1e-6 * t, lambda t: 2e-6 * t)
    result = effref(*_measured("--max-seconds", "0.05"))
    found = json.loads(result.stdout)
    assert found["config"]["range"][1] < 4096
    assert "looked at up to" in result.stderr
    assert "raise --max-seconds" in error_of(effref(*_measured("--max-seconds", "1e-6")))


def test_really_measured(effref, calibrated, tmp_path) -> None:
    plot = tmp_path / "crossover.svg"
    result = effref(*RUN, "--measure", "--range", "4:40", "--max-seconds", "2", "--plot", str(plot))
    assert result.exit_code == 0, result.stderr
    assert "reuse against dense: predicted" in result.stdout
    assert "measured" in result.stdout
    assert "reuse against flash" in plot.read_text()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--over", "depth"], "unknown axis 'depth'"),
        (["--range", "64"], "give both ends"),
        (["--range", "64:16"], "two rising whole numbers"),
        (["--range", "0:16"], "outside 1 to"),
        (["--seq", "64"], "give --range FROM:TO"),
        (["--method", "flash", "--baseline", "flash"], "name another method"),
        (["--over", "batch", "--seq", "8,16"], "at one length"),
        (["--method", "kvsharr"], "unknown method 'kvsharr'"),
        (["--model", "smollm2", "--method", "headshare"], "headshare"),
    ],
)
def test_refused(effref, more: list[str], said: str) -> None:
    assert said in error_of(effref("crossover", *more))


def test_the_range_ends_where_the_positions_of_a_model_end(effref) -> None:
    found = json.loads(effref("crossover", "--model", "minilm", "--method", "reuse", "--format", "json").stdout)
    assert found["config"]["range"] == [16, 512]


@pytest.mark.parametrize("more", [(), ("--measure",)])
def test_an_input_that_is_not_there_is_refused_before_anything(effref, monkeypatch, tmp_path, more) -> None:
    """Also where nothing is measured, and not behind a calibration where something is."""
    from effref import machines

    monkeypatch.setattr(machines, "started", None)
    monkeypatch.setattr(machines, "choose", None)
    missing = str(tmp_path / "missing.wav")
    assert "missing.wav: no such file" in error_of(effref("crossover", "--input", missing, *more))
    (tmp_path / "text.txt").write_text("a text")
    said = error_of(effref("crossover", "--input", str(tmp_path / "text.txt"), *more))
    assert "holds tokens, but conformer-m reads frames" in said
