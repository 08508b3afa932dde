"""Text, recordings and arrays: Whisper's features, BERT's tokens, exact lengths, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refimpl
from refimpl import inputs
from refimpl.config import ModelConfig, preset
from refimpl.errors import ConfigError, InputError
from refimpl.weights import Model, load_model, pretrained

wavfile = pytest.importorskip("scipy.io.wavfile")

FRAMES = ModelConfig("hears", "pre-norm", 1, 8, 2, 8, stem="frames", features=80, strides=(1, 2))
WINDOWED = replace(FRAMES, position="sinusoidal", max_positions=50)
TOKENS = ModelConfig("reads", "post-norm", 1, 8, 2, 8, vocab=9, position="learned", max_positions=8)
PATCHES = ModelConfig("sees", "pre-norm", 1, 8, 2, 8, stem="patches", features=12, position="learned", max_positions=5)

# 9 words in a vocabulary of their own, with BERT's tokens around a text
TOKENIZER = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
    "decoder": None,
    "model": {"type": "WordLevel", "unk_token": "[UNK]",
              "vocab": {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6, "d": 7, "e": 8}},
}  # fmt: skip


@pytest.fixture
def reader(tmp_path: Path) -> Model:
    """A tiny model with a tokenizer that would truncate and pad."""
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return replace(load_model(TOKENS), assets=tmp_path)


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Writes samples as a WAV file."""

    def write(samples: np.ndarray, rate: int = 16_000) -> Path:
        wavfile.write(tmp_path / "sound.wav", rate, samples)
        return tmp_path / "sound.wav"

    return write


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


# --- samples ----------------------------------------------------------------------------------------------------


def test_sample_speech_is_the_recording_that_the_readme_names() -> None:
    data = inputs.sample("speech").read_bytes()
    assert hashlib.sha256(data).hexdigest() in inputs.sample("speech").with_name("README.md").read_text("utf-8")
    samples, rate = inputs.read_wav(inputs.sample("speech"))
    assert (len(samples), rate, samples.dtype) == (113_600, 16_000, np.float32)


def test_sample_paragraph_is_a_paragraph() -> None:
    text = inputs.sample("paragraph").read_text("utf-8")
    assert text.startswith("Call me Ishmael.")
    assert len(text.split()) == 198


def test_sample_suggests_a_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'speech'"):
        inputs.sample("speach")


# --- features ---------------------------------------------------------------------------------------------------


def test_mel_filters_are_slaneys() -> None:
    filters = inputs.mel_filters()
    assert filters.shape == (80, 201)
    assert filters.sum() == pytest.approx(1.99902, abs=1e-5)
    assert (filters >= 0).all()


def test_log_mel_of_speech_has_known_values() -> None:
    features = inputs.log_mel(inputs.read_wav(inputs.sample("speech"))[0])
    assert (features.shape, features.dtype) == ((1, 3000, 80), np.float32)
    found = features.min(), features.max(), features.mean()
    assert found == pytest.approx((-0.72012, 1.27988, -0.55442), abs=6e-6)


def test_log_mel_finds_a_tone() -> None:
    features = inputs.log_mel(tone(1, hertz=1000.0), 100)
    centres = inputs.mel_filters().argmax(axis=1) * 40.0  # Hz
    assert abs(centres[features[0, 50].argmax()] - 1000) <= 40


@given(st.integers(1, 3000), st.integers(2, 20))
def test_log_mel_has_the_frames_asked_for(length: int, frames: int) -> None:
    features = inputs.log_mel(np.random.default_rng(length).standard_normal(length), frames)
    assert features.shape == (1, frames, 80)
    assert np.isfinite(features).all()
    assert np.ptp(features) <= 2 + 1e-6


def test_log_mel_of_silence_is_flat() -> None:
    assert np.ptp(inputs.log_mel(np.zeros(1600), 10)) == 0


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros((5, 2)), np.array([0.0, np.nan])])
def test_log_mel_refuses_what_is_no_recording(samples: np.ndarray) -> None:
    with pytest.raises(InputError, match="one channel of finite samples"):
        inputs.log_mel(samples)


def test_log_mel_refuses_one_frame() -> None:
    with pytest.raises(InputError, match="at least 2"):
        inputs.log_mel(np.ones(400), frames=1)


# --- recordings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [(np.uint8, 127, 128.5), (np.int16, 32767, 0), (np.int32, 2**31 - 1, 0), (np.float32, 1, 0), (np.float64, 1, 0)],
)
def test_read_wav_scales_every_format(dtype: Any, scale: float, shift: float, wav: Callable[..., Path]) -> None:
    notes: list[str] = []
    samples, rate = inputs.read_wav(wav((tone(0.1) * scale + shift).astype(dtype)), notes)
    assert (rate, samples.dtype, notes) == (16_000, np.float32, [])
    assert samples == pytest.approx(tone(0.1), abs=0.01)


def test_read_wav_reads_24_bits(tmp_path: Path) -> None:
    levels = (tone(0.1) * (2**23 - 1)).astype("<i4")
    data = levels.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, 16_000, 48_000, 3, 24)
    (tmp_path / "deep.wav").write_bytes(head + struct.pack("<4sI", b"data", len(data)) + data)
    assert inputs.read_wav(tmp_path / "deep.wav")[0] == pytest.approx(tone(0.1), abs=1e-6)


def test_read_wav_mixes_and_resamples_and_says_so(wav: Callable[..., Path]) -> None:
    left = tone(1, rate=8_000)
    notes: list[str] = []
    samples, rate = inputs.read_wav(wav(np.stack([left, 0 * left], 1).astype(np.float32), 8_000), notes)
    assert (rate, len(samples)) == (16_000, 16_000)
    assert samples[1000:-1000] == pytest.approx(tone(1)[1000:-1000] / 2, abs=1e-3)
    assert ["2 channels averaged" in notes[0], "resampled from 8000 to 16000 Hz" in notes[1]] == [True, True]


def test_read_wav_skips_chunks_that_it_does_not_need(tmp_path: Path, wav: Callable[..., Path]) -> None:
    whole = wav((tone(0.1) * 32767).astype(np.int16)).read_bytes()
    extra = b"LIST" + struct.pack("<I", 4) + b"abcd"
    path = tmp_path / "tagged.wav"
    path.write_bytes(whole[:4] + struct.pack("<I", len(whole) - 8 + len(extra)) + whole[8:36] + extra + whole[36:])
    assert len(inputs.read_wav(path)[0]) == 1600


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.array([0, np.nan], np.float32), "NaN or infinite"),
        (np.array([0, np.inf], np.float32), "NaN or infinite"),
        (np.array([0, -1e39]), "too large for float32"),
        (np.zeros(0, np.int16), "no samples|not a whole WAV"),
        (np.zeros((0, 2), np.float32), "no samples|not a whole WAV"),
    ],
)
def test_read_wav_refuses_unusable_samples(samples: np.ndarray, said: str, wav: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=said):
        inputs.read_wav(wav(samples))


@pytest.mark.parametrize("rate", [0, 1, 4_000_000_000])
def test_read_wav_refuses_impossible_rates(rate: int, wav: Callable[..., Path]) -> None:
    path = wav(np.zeros(100, np.int16))
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", rate)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"samples a second|not a whole WAV"):
        inputs.read_wav(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_read_wav_refuses_a_truncated_file(tmp_path: Path, data: st.DataObject) -> None:
    whole = inputs.sample("speech").read_bytes()[:2000]
    path = tmp_path / "cut.wav"
    path.write_bytes(whole[: data.draw(st.integers(0, 2000))])
    with pytest.raises(InputError, match="is not a whole WAV file"):
        inputs.read_wav(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 59), st.integers(0, 255))
def test_read_wav_of_a_damaged_header_is_read_or_refused(tmp_path: Path, at: int, value: int) -> None:
    buffer = io.BytesIO()
    wavfile.write(buffer, 16_000, np.zeros(2000, np.int16))
    damaged = bytearray(buffer.getvalue())
    damaged[at] = value
    path = tmp_path / "damaged.wav"
    path.write_bytes(damaged)
    with suppress(InputError):
        samples, rate = inputs.read_wav(path)
        assert rate == 16_000
        assert np.isfinite(samples).all()


@pytest.mark.parametrize("data", [b"", b"RIFF", b"ID3 this is no WAV", b"\0" * 100])
def test_read_wav_refuses_other_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"sound\.wav is not a whole WAV file"):
        inputs.read_wav(path)


def test_load_input_pads_a_recording_to_the_models_window(wav: Callable[..., Path]) -> None:
    given_ = inputs.load_input(load_model(WINDOWED), wav(tone(0.5)))
    assert (given_.array.shape, given_.kind, given_.notes) == ((1, 100, 80), "frames", ())
    assert given_.valid_positions == 8000 // 320


def test_load_input_cuts_a_recording_and_says_so(wav: Callable[..., Path]) -> None:
    given_ = inputs.load_input(load_model(WINDOWED), wav(tone(1.5)))
    assert given_.array.shape == (1, 100, 80)
    assert given_.valid_positions == 50
    assert "lasts 1.5 s; the first 1.0 s are used" in given_.notes[0]


def test_load_input_takes_a_recordings_own_length_where_there_is_no_window(wav: Callable[..., Path]) -> None:
    given_ = inputs.load_input(load_model(FRAMES), wav(tone(1.5)))
    assert (given_.array.shape, given_.valid_positions) == ((1, 150, 80), 75)
    conformer = replace(preset("conformer-m"), layers=1)
    given_ = inputs.load_input(load_model(conformer), inputs.sample("speech"), seq=100)
    assert (given_.array.shape, given_.valid_positions) == ((1, 400, 80), 100)


def test_whisper_hears_thirty_seconds() -> None:
    model = load_model(preset("whisper-tiny-en"))
    given_ = inputs.load_input(model, str(inputs.sample("speech")))
    assert (given_.array.shape, given_.valid_positions) == ((1, 3000, 80), 355)


# --- text -------------------------------------------------------------------------------------------------------


def test_text_ids_are_neither_truncated_nor_padded_by_the_file(reader: Model) -> None:
    ids = inputs.text_ids(reader, "a b c d e")
    assert (ids.tolist(), ids.dtype) == ([[1, 4, 5, 6, 7, 8, 2]], np.int64)
    assert inputs.text_ids(reader, "a").tolist() == [[1, 4, 2]]


def test_text_ids_cut_long_text_and_keep_the_last_token(reader: Model) -> None:
    notes: list[str] = []
    assert inputs.text_ids(reader, "a b c d e a b c", notes=notes).tolist() == [[1, 4, 5, 6, 7, 8, 4, 2]]
    assert notes == ["the text has 8 tokens; the first 6 are used"]


@given(words=st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), seq=st.integers(1, 8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_text_ids_have_an_exact_length(reader: Model, words: list[str], seq: int) -> None:
    ids = inputs.text_ids(reader, " ".join(words), seq)
    assert ids.shape == (1, seq)
    assert ids[0, 0] == 1
    if seq > 2:
        assert ids[0, -1] == 2
        assert ids[0, 1:-1].tolist() == ([" abcde".index(word) + 3 for word in words] * 8)[: seq - 2]


def test_text_ids_refuse_more_than_the_model_has(reader: Model) -> None:
    with pytest.raises(InputError, match="reads has 8 positions; 9 are asked for"):
        inputs.text_ids(reader, "a", seq=9)


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_text_ids_refuse_empty_text(text: str, reader: Model) -> None:
    with pytest.raises(InputError, match="the text is empty"):
        inputs.text_ids(reader, text)


def test_text_ids_refuse_another_models_tokenizer(reader: Model) -> None:
    smaller = replace(reader, config=replace(TOKENS, vocab=7))
    with pytest.raises(InputError, match="token 8 is outside the vocabulary of 7"):
        inputs.text_ids(smaller, "a e")


def test_load_input_reads_text(reader: Model, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeffa b\n", "utf-8")
    given_ = inputs.load_input(reader, path, seq=5)
    assert given_.array.tolist() == [[1, 4, 5, 4, 2]]
    assert (given_.kind, given_.valid_positions) == ("tokens", 5)
    assert given_.notes == ("the text has 2 tokens; it is repeated to 3",)


def test_load_input_refuses_bytes_that_are_no_text(reader: Model, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(b"a b \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        inputs.load_input(reader, path)


def test_a_model_without_a_tokenizer_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFREF_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"no tokenizer\.json here: effref models fetch minilm-l6"):
        load_model("minilm").tokenizer()
    with pytest.raises(InputError, match=r"or give token ids as \.npy"):
        load_model(TOKENS).tokenizer()
    with pytest.raises(InputError, match="reads frames, not text"):
        load_model(FRAMES).tokenizer()


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_a_damaged_tokenizer_is_named(text: str, reader: Model) -> None:
    assert reader.assets
    (reader.assets / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
        reader.tokenizer()


# --- arrays -----------------------------------------------------------------------------------------------------


def save(folder: Path, array: Any) -> Path:
    np.save(folder / "x.npy", array, allow_pickle=True)
    return folder / "x.npy"


@pytest.mark.parametrize(
    ("config", "array", "shape", "positions"),
    [
        (TOKENS, np.arange(5), (1, 5), 5),
        (TOKENS, np.ones((2, 3), np.uint8), (2, 3), 3),
        (FRAMES, np.ones((7, 80)), (1, 7, 80), 4),
        (FRAMES, np.ones((2, 6, 80), np.float16), (2, 6, 80), 3),
        (PATCHES, np.ones((4, 12)), (1, 4, 12), 5),
    ],
)
def test_load_input_reads_arrays(
    config: ModelConfig, array: np.ndarray, shape: tuple[int, ...], positions: int, tmp_path: Path
) -> None:
    model = load_model(config)
    given_ = inputs.load_input(model, save(tmp_path, array))
    assert (given_.array.shape, given_.valid_positions, given_.notes) == (shape, positions, ())
    assert refimpl.forward(model, given_.array).output.shape == (shape[0], positions, 8)


def test_load_input_cuts_arrays_to_the_length_asked_for(tmp_path: Path) -> None:
    given_ = inputs.load_input(load_model(FRAMES), save(tmp_path, np.ones((9, 80))), seq=3)
    assert (given_.array.shape, given_.valid_positions) == ((1, 6, 80), 3)
    assert "has 9 rows; the first 6 are used" in given_.notes[0]


@pytest.mark.parametrize(
    ("config", "array", "said"),
    [
        (TOKENS, np.ones(3), "token ids are integers"),
        (TOKENS, np.zeros((1, 0), np.int64), "token ids are integers"),
        (TOKENS, np.zeros((1, 1, 1), np.int64), "token ids are integers"),
        (TOKENS, np.array([0, 9]), "holds ids 0 to 9; the vocabulary is 0 to 8"),
        (TOKENS, np.array([-1, 3]), "holds ids -1 to 3"),
        (TOKENS, np.zeros(9, np.int64), "has 8 positions; 9"),
        (FRAMES, np.ones((5, 81)), r"floats \(rows, 80\)"),
        (FRAMES, np.ones((5, 80), np.int64), r"floats \(rows, 80\)"),
        (FRAMES, np.full((5, 80), np.nan), "NaN or infinite"),
        (FRAMES, np.full((5, 80), 1e39), "too large for float32"),
        (FRAMES, np.array([{"a": 1}], object), r"not a \.npy file of numbers"),
    ],
)
def test_load_input_refuses_arrays_that_do_not_fit(
    config: ModelConfig, array: np.ndarray, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        inputs.load_input(load_model(config), save(tmp_path, array))


def test_load_input_refuses_too_short_an_array(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 5 rows; seq=3 needs 6"):
        inputs.load_input(load_model(FRAMES), save(tmp_path, np.ones((5, 80))), seq=3)


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"text",
        header(b"{'descr': ("),
        header(b"(" * 5000),
        header(b"'\x00'"),
        header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-5,)}"),
    ],
)
def test_load_input_refuses_damaged_arrays(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"not a \.npy file of numbers"):
        inputs.load_input(load_model(FRAMES), tmp_path / "x.npy")


def test_load_input_refuses_several_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(InputError, match=r"not a \.npy file of numbers"):
        inputs.load_input(load_model(FRAMES), tmp_path / "x.npy")


# --- the wrong kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        (TOKENS, "speech", "holds frames, but reads reads tokens"),
        (FRAMES, "paragraph", "holds tokens, but hears reads frames"),
        (PATCHES, "speech", "holds frames, but sees reads patches"),
        (replace(FRAMES, features=40), "speech", "reads 40 features a frame; recordings give 80"),
    ],
)
def test_load_input_refuses_the_wrong_kind(config: ModelConfig, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        inputs.load_input(load_model(config), inputs.sample(name))


def test_load_input_refuses_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        inputs.load_input(load_model(FRAMES), tmp_path / "absent.wav")
    (tmp_path / "song.mp3").touch()
    with pytest.raises(InputError, match=r"allowed are \.txt, \.wav, \.png, \.jpg and \.npy"):
        inputs.load_input(load_model(FRAMES), tmp_path / "song.mp3")


@pytest.mark.parametrize("seq", [0, -3])
def test_load_input_refuses_lengths_below_one(seq: int) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        inputs.load_input(load_model(FRAMES), inputs.sample("speech"), seq)


# --- random inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape"), [(TOKENS, (2, 5)), (FRAMES, (2, 10, 80)), (PATCHES, (2, 4, 12))], ids=lambda x: str(x)[:20]
)
def test_random_inputs_fit_the_model(config: ModelConfig, shape: tuple[int, ...]) -> None:
    first, again, other = (inputs.random_inputs(config, 5, 2, seed) for seed in (0, 0, 1))
    assert first.shape == shape
    assert first.dtype == (np.int64 if config is TOKENS else np.float32)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert refimpl.forward(load_model(config), first).output.shape == (2, 5, 8)


def test_random_inputs_have_the_dtype_asked_for() -> None:
    assert inputs.random_inputs(FRAMES, 3, dtype="float16").dtype == np.float16
    with pytest.raises(ConfigError, match="unknown dtype"):
        inputs.random_inputs(FRAMES, 3, dtype="float8")


def test_random_inputs_refuse_lengths_below_one() -> None:
    with pytest.raises(InputError, match="seq is 0"):
        inputs.random_inputs(FRAMES, 0)


# --- fetched models ---------------------------------------------------------------------------------------------


@pytest.mark.models
def test_minilm_tokens_are_known() -> None:
    if pretrained.folder("minilm-l6") is None:
        pytest.skip("minilm-l6 is not on this machine: effref models fetch minilm-l6")
    model = load_model("minilm", weights="pretrained")
    ids = inputs.text_ids(model, "The cat sat on the warm windowsill, watching birds in the garden.")
    known = [101, 1996, 4937, 2938, 2006, 1996, 4010, 3645, 8591, 1010, 3666, 5055, 1999, 1996, 3871, 1012, 102]
    assert ids.tolist() == [known]
    paragraph = inputs.load_input(model, inputs.sample("paragraph"))
    assert paragraph.array[0, 0] == 101
    assert paragraph.array[0, -1] == 102
    assert 200 < paragraph.valid_positions < 300  # no truncation at 128, no padding
    assert inputs.load_input(model, inputs.sample("paragraph"), seq=512).array.shape == (1, 512)
