"""Real weights on real text and speech, against values that other runners gave (tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl import Model, forward, load_model
from refimpl.diagnostics import attention_maps, diagonality
from refimpl.inputs import load_input, sample

pytestmark = pytest.mark.models
DATA = Path(__file__).parent / "data"
ENGINES = ["numpy", "numba"]


def _pretrained(name: str) -> Model:
    from refimpl.weights import pretrained

    if pretrained.folder(name) is None:
        pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
    return load_model(name, weights="pretrained")


@pytest.fixture(scope="module")
def minilm() -> Model:
    return _pretrained("minilm-l6")


@pytest.fixture(scope="module")
def whisper() -> Model:
    return _pretrained("whisper-tiny-en")


def _relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("method", ["dense", "flash"])
@pytest.mark.parametrize("engine", ENGINES)
def test_minilm_equals_transformers(minilm: Model, engine: str, method: str) -> None:
    """Hidden states within 1e-5 relative, for a sentence and for the shipped paragraph (243 tokens)."""
    with np.load(DATA / "minilm_reference.npz") as reference:
        found = forward(minilm, reference["ids"][None, :], method, engine=engine).output[0]
        assert _relative(found, reference["hidden"]) < 1e-5
        given = load_input(minilm, sample("paragraph"))
        np.testing.assert_array_equal(given.array[0], reference["paragraph_ids"])
        found = forward(minilm, given.array, method, engine=engine).output[0]
        assert _relative(found[::16], reference["paragraph_hidden"]) < 1e-5


def test_minilm_map_equals_transformers(minilm: Model) -> None:
    with np.load(DATA / "minilm_reference.npz") as reference:
        weights = attention_maps(minilm, reference["ids"][None, :])[0]
        np.testing.assert_allclose(weights[0, 0, 0], reference["map_row"], atol=2e-6)


def test_minilm_sentences_keep_their_meaning(minilm: Model) -> None:
    """Mean over all tokens, normalised: two sentences on cats are alike, one on interest rates is not."""
    sentences = [
        "The cat sat on the warm windowsill, watching birds in the garden.",
        "A kitten was looking at sparrows from the window.",
        "Interest rates rose by half a percent after the central bank's meeting.",
    ]
    tokenizer = minilm.tokenizer()
    means = [
        forward(minilm, np.array([tokenizer.encode(text).ids]), "flash", engine="numba").output[0].mean(axis=0)
        for text in sentences
    ]
    unit = np.array([mean / np.linalg.norm(mean) for mean in means])
    cosines = unit @ unit.T
    assert cosines[0, 1] == pytest.approx(0.5608, abs=2e-4)
    assert cosines[0, 2] == pytest.approx(0.0264, abs=2e-4)
    assert cosines[1, 2] == pytest.approx(0.0230, abs=2e-4)


@pytest.mark.parametrize(("engine", "method"), [("numpy", "dense"), ("numba", "dense"), ("numba", "flash")])
def test_whisper_equals_ctranslate2(whisper: Model, engine: str, method: str) -> None:
    """The encoder on 7.1 s of real speech at T = 1500, within 2e-3 of values up to 12.7."""
    given = load_input(whisper, sample("speech"))
    found = forward(whisper, given.array, method, engine=engine).output
    assert found.shape == (1, 1500, 384)
    assert given.valid_positions == 355
    with np.load(DATA / "whisper_reference.npz") as reference:
        assert np.abs(found[0, reference["rows"]] - reference["encoder"]).max() < 2e-3


@pytest.mark.parametrize(("name", "text"), [("minilm-l6", "paragraph"), ("whisper-tiny-en", "speech")])
def test_reuse_on_real_weights_keeps_some_fidelity_and_off_is_exact(name: str, text: str) -> None:
    """Not converted by training, reuse costs fidelity; more reuse costs more; group 1 costs nothing."""
    model = _pretrained(name)
    given = load_input(model, sample(text))
    rows = slice(0, given.valid_positions)
    exact = forward(model, given.array, "dense", engine="numba").output[0, rows]
    errors = [
        _relative(forward(model, given.array, "reuse", {"group": group}, "numba").output[0, rows], exact)
        for group in (1, 2, 4)
    ]
    assert errors[0] == 0.0
    assert 0.01 < errors[1] < errors[2] < 2.0


def test_real_maps_are_more_diagonal_than_uniform_ones(whisper: Model) -> None:
    given = load_input(whisper, sample("speech"))
    rows = np.arange(0, given.valid_positions, 3)
    maps = attention_maps(whisper, given.array, "numba", rows=rows)
    assert all(diagonality(weights, rows).mean() > 0.9 for weights in maps)
