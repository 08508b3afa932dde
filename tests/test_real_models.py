"""Real weights on real text and speech, against values that other runners gave (tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl import Model, Runner, forward, load_model
from refimpl.diagnostics import attention_maps, diagonality
from refimpl.inputs import load_input, sample
from refimpl.language import generate, negative_log_likelihood, perplexity, windows
from refimpl.preparation.svd_softmax import gram_matrix, spectrum

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


@pytest.fixture(scope="module")
def vit() -> Model:
    return _pretrained("dinov2-s")


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


# --- SmolLM2 --------------------------------------------------------------------------------------------------------

DASHWOOD = (
    "The family of Dashwood had long been settled in Sussex. Their estate was large, and their residence was at "
    "Norland Park, in the centre of their property, where, for many generations, they had lived in so respectable a "
    "manner as to engage the general good opinion of their surrounding acquaintance."
)
TEXTS = {"moby-dick": 54.835, "union": 20.796}  # perplexities by transformers


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return _pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def dashwood(smollm2: Model) -> np.ndarray:
    return np.array([smollm2.tokenizer().encode(DASHWOOD).ids])  # (1, 59)


def test_smollm2_weights_are_those_of_the_file(smollm2: Model) -> None:
    """Three tensors, as another reader decoded their blocks."""
    weights = smollm2.weights
    embedding, queries = weights.stem.embedding[0, :4], weights.layers[0].attention.qkv.weight[0, :4]
    np.testing.assert_allclose(embedding, [-0.10654, 0.03298, 0.04820, -0.02283], atol=5e-6)
    np.testing.assert_allclose(queries, [-0.09631, 0.15735, -0.09631, -0.73047], atol=5e-6)
    np.testing.assert_allclose(weights.final_norm.weight[:4], [1.7578, 1.8203, 1.7813, 1.6016], atol=5e-5)


def test_smollm2_tokens_equal_those_of_transformers(smollm2: Model, dashwood: np.ndarray) -> None:
    """A sentence and both shipped texts, 5,400 tokens; no token is added."""
    tokenizer = smollm2.tokenizer()
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    with np.load(DATA / "smollm2_reference.npz") as reference:
        np.testing.assert_array_equal(dashwood[0], reference["ids"])
        for name in TEXTS:
            text = sample(name).read_text("utf-8")
            given = load_input(smollm2, sample(name))
            np.testing.assert_array_equal(given.array[0], reference[f"{name.replace('-', '_')}_ids"])
            assert given.notes == ()
            assert len(text) == 12_000
            assert tokenizer.decode(given.array[0]) == text


@pytest.mark.parametrize(
    "text", ["", " ", "a  b\n\n\tc ", "12345 3.14", "naïve — 中文 🙂", "<|im_start|>user<|im_end|>"]
)
def test_smollm2_tokens_give_back_the_text(smollm2: Model, text: str) -> None:
    tokenizer = smollm2.tokenizer()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert all(index > 16 for index in ids)  # 0 to 16 are control tokens


@pytest.mark.parametrize("method", ["dense", "flash"])
@pytest.mark.parametrize("engine", ENGINES)
def test_smollm2_equals_transformers(smollm2: Model, dashwood: np.ndarray, engine: str, method: str) -> None:
    """Logits within 2e-4 of values up to 34, the same most probable token at every position, and the perplexity."""
    logits = forward(smollm2, dashwood, method, engine=engine).output
    assert logits.shape == (1, 59, 49_152)
    with np.load(DATA / "smollm2_reference.npz") as reference:
        assert np.abs(logits[0, ::8, ::32] - reference["logits"]).max() < 2e-4
        assert np.abs(logits[0, -1, ::32] - reference["last"]).max() < 2e-4
        np.testing.assert_array_equal(logits[0].argmax(axis=-1), reference["top"])
    assert int(logits[0, -1].argmax()) == 198
    assert logits[0, -1, 198] == pytest.approx(7.2973, abs=1e-4)
    assert logits[0, -1, :4] == pytest.approx([-2.7577, -6.4668, -0.9335, -7.0169], abs=1e-4)
    assert perplexity(logits[:, :-1], dashwood[:, 1:]) == pytest.approx(44.206, abs=1e-3)


@pytest.mark.parametrize("method", ["dense", "flash"])
def test_smollm2_goes_on_as_in_transformers(smollm2: Model, method: str) -> None:
    """Greedy tokens with a cache: " Paris.", an empty line, "The answer is: 201"."""
    prompt = np.array([smollm2.tokenizer().encode("The capital of France is").ids])
    assert prompt.tolist() == [[504, 3575, 282, 4649, 314]]
    found = generate(Runner(smollm2, "numba"), prompt, 12, method)
    assert found.tolist() == [[7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33]]


def test_smollm2_maps_equal_transformers(smollm2: Model, dashwood: np.ndarray) -> None:
    maps = attention_maps(smollm2, dashwood, "numba", rows=np.array([58]))
    with np.load(DATA / "smollm2_reference.npz") as reference:
        for expected, layer in zip(reference["map_rows"], (0, 14, 29), strict=True):
            np.testing.assert_allclose(maps[layer][0, :, 0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_smollm2_perplexity_of_2048_tokens_equals_transformers(smollm2: Model, name: str) -> None:
    """Two windows of 1024 tokens behind <|endoftext|>: every token's likelihood, and the perplexity to five digits."""
    ids = windows(smollm2, sample(name).read_text("utf-8"), length=1024, count=2)
    likelihoods = np.array(
        [
            negative_log_likelihood(forward(smollm2, one[:-1][None], "flash", engine="numba").output, one[None, 1:])[0]
            for one in ids
        ]
    )  # (2, 1024)
    with np.load(DATA / "smollm2_reference.npz") as reference:
        np.testing.assert_allclose(likelihoods, reference[f"{name.replace('-', '_')}_nll"], atol=5e-4)
    assert np.exp(likelihoods.mean()) == pytest.approx(TEXTS[name], rel=5e-5)


@pytest.mark.parametrize(
    ("name", "shares", "centred"),
    [
        ("smollm2-135m", (0.589, 0.633, 0.711, 0.838), (0.257, 0.337, 0.477, 0.708)),
        ("whisper-tiny-en", (0.894, 0.907, 0.928, 0.962), (0.379, 0.454, 0.579, 0.775)),
    ],
)
def test_spectra_of_language_heads_are_those_of_the_page(
    name: str, shares: tuple[float, ...], centred: tuple[float, ...]
) -> None:
    """docs/methods/svd-softmax.md; Whisper's decoder is read for its head alone."""
    head = _pretrained(name).weights.stem.embedding if name == "smollm2-135m" else _decoder_embedding(name)
    found = spectrum(head, gram_matrix(head))
    assert tuple(found["shares"].values()) == pytest.approx(shares, abs=6e-4)
    assert tuple(found["centred_shares"].values()) == pytest.approx(centred, abs=6e-4)


def _decoder_embedding(name: str) -> Any:
    from refimpl.weights import pretrained
    from refimpl.weights.readers import CTRANSLATE2, CTranslate2File

    folder = pretrained.folder(name)
    if folder is None:
        pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
    return CTranslate2File(folder / CTRANSLATE2).read("decoder/embeddings/weight")  # (V, D)


# --- photos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "method"), [("numpy", "dense"), ("numba", "dense"), ("numba", "flash")])
def test_vit_equals_onnxruntime(vit: Model, engine: str, method: str) -> None:
    """Hidden states of the shipped photo within 1e-5 relative."""
    found = forward(vit, load_input(vit, sample("photo")).array, method, engine=engine).output[0]
    with np.load(DATA / "vit_reference.npz") as reference:
        assert _relative(found[::16], reference["hidden"]) < 1e-5


def test_vit_maps_equal_onnxruntime(vit: Model) -> None:
    maps = attention_maps(vit, load_input(vit, sample("photo")).array)
    with np.load(DATA / "vit_reference.npz") as reference:
        np.testing.assert_allclose(maps[0][0, :, 0, :], reference["map_first"], atol=2e-6)
        np.testing.assert_allclose(maps[11][0, :, 0, :], reference["map_last"], atol=2e-5)
