"""Perplexities against closed forms and SciPy, and windows of a text."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax
from strategies import decoders, inputs_for

from refimpl import Runner, forward
from refimpl.config import ModelConfig, Workload, override, preset
from refimpl.errors import ConfigError, InputError, ShapeError
from refimpl.inputs import sample
from refimpl.language import generate, negative_log_likelihood, perplexity, windows
from refimpl.weights import Model, load_model

WORDS = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "<s>": 4}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": {"type": "BertProcessing", "sep": ["<s>", 4], "cls": ["<s>", 4]},  # not wanted in windows
    "decoder": None, "model": {"type": "WordLevel", "unk_token": "a", "vocab": WORDS},
}  # fmt: skip
TINY = ModelConfig("tiny", "pre-norm", 1, 8, 2, 8, vocab=5, causal=True, head=True)


@pytest.fixture
def reader(tmp_path: Path) -> Model:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return replace(load_model(TINY), assets=tmp_path)


# --- perplexity -----------------------------------------------------------------------------------------------------


def test_likelihood_of_known_probabilities() -> None:
    """Logits that are log-probabilities, shifted row by row: -ln p of the given token."""
    p = np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])
    ids = np.array([[1, 2]])
    found = negative_log_likelihood(np.log(p) + np.array([[[3.0], [-700.0]]]), ids)
    np.testing.assert_allclose(found, [[math.log(4), -math.log(0.7)]], rtol=1e-12)
    assert perplexity(np.log(p), ids) == pytest.approx(math.sqrt(4 / 0.7), rel=1e-12)  # the geometric mean of 1 / p


@given(
    hnp.arrays(np.float32, (2, 3, 7), elements=st.floats(-(2.0**17), 2.0**17, width=32)),
    hnp.arrays(np.int64, (2, 3), elements=st.integers(0, 6)),
)
def test_likelihood_equals_scipy_in_float64(logits: np.ndarray, ids: np.ndarray) -> None:
    kept = logits.copy()
    found = negative_log_likelihood(logits, ids)
    expected = -np.take_along_axis(log_softmax(logits.astype(np.float64), axis=-1), ids[..., None], axis=-1)[..., 0]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.array_equal(logits, kept)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_perplexity_of_equal_logits_is_the_vocabulary(dtype: type) -> None:
    logits = np.full((2, 4, 300), 60_000, dtype)  # exp of these overflows in every dtype
    assert perplexity(logits, np.zeros((2, 4), np.int32)) == pytest.approx(300, rel=1e-12)


def test_perplexity_sums_a_large_vocabulary_in_float64() -> None:
    """A 1 beside 2^22 terms of e^-18: added in float32, they would be off by more."""
    logits = np.full((1, 1, 2**22 + 1), -18.0, np.float32)
    logits[0, 0, 0] = 0
    expected = math.log1p(2**22 * math.exp(-18))
    assert negative_log_likelihood(logits, np.array([[0]]))[0, 0] == pytest.approx(expected, rel=1e-12)


def test_an_impossible_token_has_infinite_perplexity() -> None:
    logits = np.array([[[0.0, -np.inf], [0.0, -1e4]]], np.float32)
    assert np.array_equal(negative_log_likelihood(logits, np.array([[0, 0]])), [[0.0, 0.0]])
    assert perplexity(logits[:, :1], np.array([[1]])) == math.inf
    assert perplexity(logits[:, 1:], np.array([[1]])) == math.inf  # e^10000


def test_likelihood_makes_no_second_copy_of_the_logits() -> None:
    logits = np.zeros((1, 64, 10_000), np.float32)
    ids = np.zeros((1, 64), np.int64)
    tracemalloc.start()
    negative_log_likelihood(logits, ids)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < logits.nbytes / 4


@pytest.mark.parametrize(("logits", "ids"), [((1, 3, 5), (1, 4)), ((3, 5), (3,)), ((2, 3, 5), (3,))])
def test_shapes_that_disagree_are_refused(logits: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\(B, T, V\) and \(B, T\) are needed"):
        perplexity(np.zeros(logits), np.zeros(ids, int))


@pytest.mark.parametrize("ids", [[[0, 5]], [[-1, 0]]])
def test_ids_outside_of_the_vocabulary_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(InputError, match="the vocabulary is 0 to 4"):
        perplexity(np.zeros((1, 2, 5)), np.array(ids))
    with pytest.raises(InputError, match="whole numbers"):
        perplexity(np.zeros((1, 2, 5)), np.array(ids, float))


@pytest.mark.parametrize("row", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_without_a_maximum_are_refused(row: list[float]) -> None:
    with pytest.raises(InputError, match=r"the logits at \(0, 1\)"):
        perplexity(np.array([[[0.0, 1.0], row]]), np.zeros((1, 2), int))


def test_no_token_has_no_perplexity() -> None:
    with pytest.raises(InputError, match="no token is given"):
        perplexity(np.zeros((1, 0, 5)), np.zeros((1, 0), int))


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"), [("moby-dick", "CHAPTER 1. Loomings.\n\nCall me Ishmael."), ("union", "Thank you. Mr. Speaker")]
)
def test_texts_for_perplexities_are_as_long_as_their_readme_says(name: str, start: str) -> None:
    text = sample(name).read_text("utf-8")
    assert text.startswith(start)
    assert len(text) == 12_000


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_follow_each_other_behind_a_start_token(reader: Model) -> None:
    found = windows(reader, "a b c b a a c", length=3, count=2)
    assert found.dtype == np.int64
    assert found.tolist() == [[0, 1, 2, 3], [0, 2, 1, 1]]
    assert windows(reader, "a b", 1, 2, start="<s>").tolist() == [[4, 1], [4, 2]]


def test_windows_refuse_what_cannot_be_cut(reader: Model) -> None:
    with pytest.raises(InputError, match="has 7 tokens; 2 windows of 4 need 8"):
        windows(reader, "a b c b a a c", 4, 2)
    with pytest.raises(InputError, match=r"tokenizer of tiny has no token '<eos>'"):
        windows(reader, "a", 1, 1, start="<eos>")
    for length, count in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="at least 1"):
            windows(reader, "a", length, count)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        windows(load_model(TINY), "a", 1, 1)


# --- continuation ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(config=decoders(), count=st.integers(1, 5), method=st.sampled_from(["dense", "flash", "reuse"]))
def test_continuation_with_a_cache_is_that_of_whole_passes(config: ModelConfig, count: int, method: str) -> None:
    """Greedy tokens one by one equal the argmax of a forward pass over everything so far."""
    config = replace(config, head=True, d_out=0)
    model = load_model(config, dtype="float64")
    ids = inputs_for(config, Workload(4, batch=2))
    found = generate(Runner(model, "numpy"), ids, count, method)
    assert found.shape == (2, count)
    for step in range(count):
        logits = forward(model, np.concatenate([ids, found[:, :step]], axis=1), method).output[:, -1]  # (B, V)
        chosen = np.take_along_axis(logits, found[:, step : step + 1], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, logits.max(axis=1), rtol=1e-9, atol=1e-12)


def test_continuation_refuses_what_it_cannot_do() -> None:
    runner = Runner(load_model(override(preset("smollm2-135m"), layers=1, d_model=18, d_ff=8, vocab=20)), "numpy")
    ids = np.arange(3)[None, :]
    with pytest.raises(InputError, match="count is 0"):
        generate(runner, ids, 0)
    with pytest.raises(ConfigError, match="no causal language model"):
        generate(Runner(load_model(override(preset("minilm-l6"), layers=1, vocab=20)), "numpy"), ids, 1)
    gpt2 = replace(override(preset("gpt2"), layers=1, d_model=24, heads=2, d_ff=8, vocab=20), max_positions=5)
    with pytest.raises(InputError, match="position table"):
        generate(Runner(load_model(gpt2), "numpy"), ids, 4)
