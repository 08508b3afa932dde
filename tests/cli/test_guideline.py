"""``effref guideline``: the least candidates for a wished agreement, against mixed logits that are really computed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from effref.agreement import NextToken
from effref.guidance import candidate_counts, outcomes
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.inputs import sample
from refimpl.methods.svd_softmax import mixed_logits
from refimpl.weights.layout import Weights

SMALL = [
    "--layers", "2", "--d-model", "32", "--heads", "2", "--kv-heads", "1", "--d-ff", "64", "--vocab", "300",
    "--engine", "numpy", "--hardware", "xeon-8480", "--positions", "40",
]  # fmt: skip


def _head(words: int, width: int, seed: int) -> tuple[Any, Any]:
    """A turned head with falling columns, and hidden states."""
    rng = np.random.default_rng(seed)
    turned = rng.standard_normal((words, width)) * np.arange(1, width + 1) ** -0.8
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return Weights(rotation=rotation, preview=turned), 3 * rng.standard_normal((5, width))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 99), st.data())
def test_outcomes_are_those_of_mixed_logits(words: int, width: int, seed: int, data: st.DataObject) -> None:
    head, states = _head(words, width, seed)
    window, top = data.draw(st.integers(1, width)), data.draw(st.integers(1, min(words, 7)))
    counts = candidate_counts(words)
    agreement, divergence = (found[0] for found in outcomes(states, head, [window], counts, top))
    exact = states @ head.rotation.T @ head.preview.T
    for i, n in enumerate(counts):
        parts = SimpleNamespace(
            rotation=head.rotation, preview=head.preview[:, :window], full_view=head.preview[:, window:]
        )
        mixed = mixed_logits(NumpyEngine(), states, parts, n)
        sets = [[set(np.argsort(-row)[:top]) for row in logits] for logits in (mixed, exact)]
        found = np.mean([len(a & b) / top for a, b in zip(*sets, strict=True)])
        assert agreement[i] == pytest.approx(found)
        tokens = NextToken()
        tokens.add(mixed, exact)
        assert divergence[i] == pytest.approx(tokens.figures()["kl_nats"], abs=1e-9)


def test_numbers_of_candidates_end_with_all_words() -> None:
    counts = candidate_counts(49152)
    assert counts[-1] == 49152
    assert counts[0] == 48
    assert candidate_counts(2) == [1, 2]


def test_the_cheapest_row_that_does_is_chosen(effref: Any) -> None:
    result = effref("guideline", *SMALL, "--agreement", "0.8", "--top", "3", "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    rows = found["rows"]
    assert [row["window"] for row in rows] == [2, 4, 6, 8, 12, 16, 24, 32]
    assert all(row["agreement"] >= 0.8 for row in rows)
    assert found["chosen"] == min(rows, key=lambda row: row["multiplications"])
    for row in rows:
        W, N = row["window"], row["candidates"]
        assert row["multiplications"] == pytest.approx((32**2 + 300 * W + N * (32 - W) * (W < 32)) / (300 * 32))
    assert found["config"]["positions"] == 40
    assert "seeded random" in result.stderr


def test_a_table_says_what_to_set(effref: Any) -> None:
    result = effref("guideline", *SMALL, "--agreement", "1", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "top-1 agreement of 100 % or more over 40 positions" in result.stdout
    assert "--set svd-softmax.window=" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agreement", "1.01"], "agreement=1.01; it must be above 0"),
        (["--agreement", "0"], "agreement=0"),
        (["--agreement", "nan"], "agreement=nan"),
        (["--top", "301"], "top=301; the head of smollm2-135m has 300 words"),
        (["--model", "minilm"], "minilm-l6 has none"),
        (["--set", "svd-softmax.window=3"], "window is what a guideline finds"),
        (["--set", "reuse.group=2"], "which is not among the methods"),
        (["--set", "svd-softmax.windw=3"], "did you mean"),
        (["--input", "absent.txt"], "absent.txt"),
        (["--input", str(sample("speech"))], "speech"),
    ],
)
def test_bad_requests_are_one_line(effref: Any, arguments: list[str], message: str) -> None:
    small = [word for word in SMALL if "--model" not in arguments or word in ("--engine", "numpy")]
    result = effref("guideline", *small, *arguments, "--quiet")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_what_was_found_is_kept_whatever_the_window(effref: Any, cache: Any) -> None:
    """One decomposition for all windows and candidates; a damaged file is said in a line and found anew."""
    run = ["fidelity", "--method", "svd-softmax", *SMALL[:-2], "--seq", "12", "--no-measure", "--format", "json"]
    first = effref(*run)
    assert first.exit_code == 0, first.stderr
    (kept,) = (cache / "prepared").iterdir()
    assert first.stderr.count("which counts for no pass") == 1
    assert first.stderr.count("was prepared before") == 4
    again = effref(*run)
    assert "which counts for no pass" not in again.stderr
    kept.write_text(kept.read_text("utf-8").replace('"sha256": "', '"sha256": "0'), "utf-8")
    anew = effref(*run)
    assert anew.exit_code == 0
    assert anew.stderr.count("is damaged") == 1
    assert anew.stderr.count("which counts for no pass") == 1
    runs = [json.loads(one.stdout)["results"] for one in (first, again, anew)]
    figures = [[row["fidelity"]["kl_nats"] for row in rows] for rows in runs]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], abs=1e-9)
    assert figures[0][2] < 1e-6 < figures[0][-1]
