"""Text, recordings and arrays to what a model's stem takes.

Letters: B batch, T positions that leave the stem. Token ids are (B, T), feature frames (B, T_in, features), image
patches (B, T - 1, features).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.config import DTYPES, ModelConfig
from refimpl.errors import InputError, MissingDependencyError, unknown
from refimpl.images import SIDE, grid_side, patch_side, read_patches

if TYPE_CHECKING:
    from refimpl.weights import Model

SAMPLE_RATE = 16_000  # Hz, of every model that hears
RATES = (1_000, 768_000)  # Hz, of recordings that are read
HOP = 160  # samples from one frame to the next
WINDOW = 400  # samples of a frame
MELS = 80
SAMPLES = {  # name -> file in refimpl/data
    "speech": "speech.wav",
    "paragraph": "paragraph.txt",
    "moby-dick": "moby-dick.txt",
    "union": "union.txt",
    "photo": "photo.jpg",
}
# What a file holds; .npy holds what the model takes.
SUFFIXES = {".wav": "frames", ".txt": "tokens", ".png": "patches", ".jpg": "patches", ".jpeg": "patches"}
_POSITION_TABLES = ("learned", "sinusoidal")


@dataclass(frozen=True)
class Inputs:
    """What a model is given.

    Attributes
    ----------
    array : array
        Token ids (B, T) int64, frames (B, T_in, features) float32 or patches (B, T - 1, features) float32.
    kind : {"tokens", "frames", "patches"}
    notes : tuple of str
        What was changed on the way: cut, resampled, mixed to mono.
    valid_positions : int
        Positions that carry the input; the rest, up to T, is padding.
    """

    array: np.ndarray
    kind: str
    notes: tuple[str, ...]
    valid_positions: int


def sample(name: str) -> Path:
    """The path of an input that comes with effref: "speech", English in "paragraph", "moby-dick", "union", or "photo".

    Their sizes and sources are in ``refimpl/data/README.md``.
    """
    if name not in SAMPLES:
        raise unknown("sample", name, SAMPLES)
    return Path(__file__).parent / "data" / SAMPLES[name]


def load_input(model: Model, path: str | Path, seq: int | None = None) -> Inputs:
    """Read a file as input of `model`, one sequence long.

    Parameters
    ----------
    model : Model
        Decides what can be read: ``.txt`` for tokens, ``.wav`` for frames, ``.png`` and ``.jpg`` for patches, ``.npy``
        for any.
    path : str or Path
    seq : int, optional
        T. Text is repeated or cut to it, recordings are padded with silence or cut, photos are scaled to 1 + n^2
        positions, arrays are cut. Default: the text's own length, the window that the model was trained with, else the
        recording's own length; photos take 224 pixels.

    Returns
    -------
    inputs : Inputs

    Raises
    ------
    InputError
        If the file is of the wrong kind, empty or damaged, or `seq` does not suit the model.
    """
    path = Path(path)
    suffix = check_file(model.config, path)
    _check_seq(model, seq)
    readers = {"tokens": _text, "frames": _recording, "patches": _photo}
    return (_array if suffix == ".npy" else readers[SUFFIXES[suffix]])(model, path, seq)


def check_file(config: ModelConfig, path: Path) -> str:
    """The suffix of a file that a model can read; InputError where it is absent or holds something else."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if suffix not in (*SUFFIXES, ".npy"):
        raise InputError(f"{path}: cannot tell what it holds; allowed are .txt, .wav, .png, .jpg and .npy")
    if SUFFIXES.get(suffix, config.reads) != config.reads:
        raise InputError(f"{path} holds {SUFFIXES[suffix]}, but {config.name} reads {config.reads}")
    return suffix


def random_inputs(config: ModelConfig, seq: int, batch: int = 1, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Seeded random input of a given length.

    Parameters
    ----------
    config : ModelConfig
    seq, batch : int
        T, positions that leave the stem, and B.
    seed : int
    dtype : {"float16", "float32", "float64"}
        Of frames and patches.

    Returns
    -------
    array
        Uniform ids (B, T) int64; or normal frames (B, T * prod(strides), features), of a streaming model with those of
        the right context, or patches (B, T - 1, features).
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if seq < 1 or batch < 0:
        raise InputError(f"seq is {seq} and batch {batch}; at least 1 and 0 are needed")
    rng = np.random.default_rng(seed)
    if config.stem == "tokens":
        return rng.integers(config.vocab, size=(batch, seq))
    shape = (batch, config.stem_length(seq), config.features)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)


# --- text -----------------------------------------------------------------------------------------------------------


def text_ids(model: Model, text: str, seq: int | None = None, notes: list[str] | None = None) -> np.ndarray:
    """Token ids of a text, with the tokens that the model expects around it ([CLS] and [SEP] of BERT).

    Parameters
    ----------
    model : Model
    text : str
    seq : int, optional
        Exact number of tokens: the text is repeated or cut. Default: its own, at most the model's positions.
    notes : list of str, optional
        Receives a line if the text was cut or repeated.

    Returns
    -------
    ids : array, shape (1, T), int64

    Raises
    ------
    InputError
        If the text has no tokens, the model no tokenizer, or `seq` exceeds its positions.
    """
    notes = [] if notes is None else notes
    _check_seq(model, seq)
    before, body, after = encode(model, text)
    room = (seq or _limit(model) or math.inf) - len(before) - len(after)
    if len(body) > room:
        notes.append(f"the text has {len(body)} tokens; the first {max(room, 0)} are used")
    elif seq is not None and len(body) < room:
        notes.append(f"the text has {len(body)} tokens; it is repeated to {room}")
        body = body * -(-int(room) // len(body))
    kept = body[: max(int(min(room, len(body))), 0)]
    ids = np.array([(before + kept + after)[:seq]], np.int64)  # (1, T)
    if ids.max() >= model.config.vocab:
        raise InputError(f"token {ids.max()} is outside the vocabulary of {model.config.vocab}: wrong tokenizer.json?")
    return ids


def text_windows(model: Model, text: str, seq: int) -> np.ndarray:
    """A text cut into windows of exactly `seq` tokens, each with the tokens that the model expects around it.

    Windows follow each other without overlap; what remains at the end is left out.

    Returns
    -------
    ids : array, shape (N, seq), int64
        N is 0 where the text is shorter than one window.
    """
    _check_seq(model, seq)
    before, body, after = encode(model, text)
    room = seq - len(before) - len(after)
    if room < 1:
        raise InputError(f"--seq {seq} leaves no room beside the {len(before) + len(after)} tokens around a text")
    starts = range(0, len(body) - room + 1, room)
    return np.array([before + body[start : start + room] + after for start in starts], np.int64).reshape(-1, seq)


def encode(model: Model, text: str) -> tuple[list[int], list[int], list[int]]:
    """The ids of a text, and those that the tokenizer puts before and after it."""
    tokenizer = model.tokenizer()
    body = tokenizer.encode(text, add_special_tokens=False).ids
    if not body:
        raise InputError("the text is empty: at least one token is needed")
    whole = tokenizer.encode(text).ids
    start = next((at for at in range(len(whole)) if whole[at : at + len(body)] == body), 0)
    return whole[:start], body, whole[start + len(body) :]


def read_text(path: Path) -> str:
    """The text of a file; InputError where it is not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _text(model: Model, path: Path, seq: int | None) -> Inputs:
    notes: list[str] = []
    ids = text_ids(model, read_text(path), seq, notes)
    return Inputs(ids, "tokens", tuple(notes), ids.shape[1])


# --- speech ---------------------------------------------------------------------------------------------------------


def read_wav(path: str | Path, notes: list[str] | None = None) -> tuple[np.ndarray, int]:
    """Read a recording as mono at 16 kHz.

    Parameters
    ----------
    path : str or Path
        WAV: PCM of 8 to 64 bits or float, any rate, any number of channels (they are averaged).
    notes : list of str, optional
        Receives a line if channels were averaged or the rate was changed.

    Returns
    -------
    samples : array, shape (n,), float32
        In [-1, 1] for PCM; float recordings keep their scale.
    rate : int
        Always 16000.

    Raises
    ------
    InputError
        If the file is not WAV, truncated, empty, or holds NaN or infinite samples.
    """
    notes = [] if notes is None else notes
    rate, stored = _read_wav(Path(path))
    if stored.size == 0:
        raise InputError(f"{path} holds no samples")
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{path} says {rate} samples a second; {RATES[0]} to {RATES[1]} are read")
    samples = _to_float(stored)  # (n,) or (n, channels)
    _require_finite(path, samples, "samples")
    if samples.ndim == 2:
        if samples.shape[1] > 1:
            notes.append(f"{path}: {samples.shape[1]} channels averaged to one")
        samples = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        notes.append(f"{path}: resampled from {rate} to {SAMPLE_RATE} Hz")
        samples = _resample(samples, rate)
    return samples.astype(np.float32), SAMPLE_RATE


def log_mel(samples: np.ndarray, frames: int = 3000) -> np.ndarray:
    """Whisper's log-mel features of a recording.

    Parameters
    ----------
    samples : array, shape (n,), float
        Mono at 16 kHz; cut or padded with silence to ``160 * frames`` samples.
    frames : int, default 3000
        T_in, one each 10 ms; 3000 is the 30 s that Whisper always sees.

    Returns
    -------
    features : array, shape (1, T_in, 80), float32

    Raises
    ------
    InputError
        If there are fewer than two frames, or `samples` is empty, not a vector or not finite.

    Notes
    -----
    Power spectrum of periodic Hann windows of 400 samples, 80 Slaney mel bands, log10, at most 8 below the maximum,
    ``(L + 4) / 4``.

    References
    ----------
    .. [1] Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, arXiv 2212.04356,
       section 2.2.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise InputError(f"samples have shape {samples.shape}; one channel of finite samples is needed")
    if frames < 2:
        raise InputError(f"frames is {frames}; at least 2 are needed")
    signal = samples[: frames * HOP]
    signal = np.pad(signal, (0, frames * HOP - len(signal)))
    signal = np.pad(signal, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP][:frames]  # (T_in, 400)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2  # (T_in, 201)
    levels = np.log10(np.maximum(power @ mel_filters().T, 1e-10))  # (T_in, 80)
    levels = np.maximum(levels, levels.max() - 8)
    features: np.ndarray = ((levels + 4) / 4).astype(np.float32)
    return features[None]  # (1, T_in, 80)


@cache
def mel_filters() -> np.ndarray:
    """80 triangles of equal area on the Slaney mel scale, 0 to 8000 Hz: shape (80, 201), float64."""
    edges = _mel_to_hertz(np.linspace(0, _hertz_to_mel(SAMPLE_RATE / 2), MELS + 2))  # (82,)
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)  # (201,)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]  # (80, 201)
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))  # (80, 201)
    filters: np.ndarray = triangles * (2 / (edges[2:] - edges[:-2]))[:, None]
    filters.flags.writeable = False  # shared by all callers
    return filters


def _hertz_to_mel(hertz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    hertz: np.ndarray = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))
    return hertz


def _recording(model: Model, path: Path, seq: int | None) -> Inputs:
    config = model.config
    if config.features != MELS:
        raise InputError(f"{config.name} reads {config.features} features a frame; recordings give {MELS}")
    notes: list[str] = []
    samples, _ = read_wav(path, notes)
    per_position = HOP * config.reduction  # samples
    own = -(-len(samples) // per_position)
    positions = seq or _limit(model) or max(own, 2, config.chunk)
    frames = config.stem_length(positions)
    if len(samples) > frames * HOP:
        notes.append(
            f"{path} lasts {len(samples) / SAMPLE_RATE:.1f} s; the first {frames * HOP / SAMPLE_RATE:.1f} s are used"
        )
    valid = max(min(len(samples) // per_position, positions), 1)
    return Inputs(log_mel(samples, frames), "frames", tuple(notes), valid)


def _read_wav(path: Path) -> tuple[int, np.ndarray]:
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise MissingDependencyError("reading recordings needs SciPy: pip install scipy") from error
    try:
        with _incomplete_is_an_error():
            rate, samples = wavfile.read(path)
    except Exception as error:  # a damaged header makes SciPy divide by zero, and worse
        raise InputError(f"{path} is not a whole WAV file ({error})") from error
    return rate, samples


@contextmanager
def _incomplete_is_an_error() -> Iterator[None]:
    """SciPy warns of a file that ends early and hands out what is there; unknown chunks are harmless."""
    from scipy.io import wavfile

    with warnings.catch_warnings():
        warnings.simplefilter("error", wavfile.WavFileWarning)
        warnings.filterwarnings("ignore", message="Chunk", category=wavfile.WavFileWarning)
        yield


def _to_float(stored: np.ndarray) -> np.ndarray:
    """PCM to [-1, 1]; 8 bits are unsigned, 24 come in the upper bytes of 32."""
    if stored.dtype.kind == "f":
        return stored.astype(np.float64)
    middle = 128 if stored.dtype.kind == "u" else 0
    return (stored.astype(np.float64) - middle) / 2.0 ** (8 * stored.dtype.itemsize - 1)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    from scipy.signal import resample_poly

    shared = math.gcd(rate, SAMPLE_RATE)
    resampled: np.ndarray = resample_poly(samples, SAMPLE_RATE // shared, rate // shared)
    return resampled


# --- photos ---------------------------------------------------------------------------------------------------------


def _photo(model: Model, path: Path, seq: int | None) -> Inputs:
    patch = patch_side(model.config.features)
    if patch is None:
        raise InputError(f"{model.config.name} reads {model.config.features} numbers a patch; a photo gives 3 p^2")
    count = SIDE // patch if seq is None else grid_side(seq)
    if count is None:
        raise InputError(f"{path}: {seq} positions are no square of patches and a class token: give seq = 1 + n^2")
    _check_seq(model, 1 + count**2)
    array = read_patches(path, count * patch, patch)
    return Inputs(array, "patches", (f"{path.name} at {count * patch} pixels",), 1 + count**2)


# --- arrays ---------------------------------------------------------------------------------------------------------


def _array(model: Model, path: Path, seq: int | None) -> Inputs:
    array = _read_npy(path)
    notes: list[str] = []
    array = _ids(model, path, array) if model.config.stem == "tokens" else _features(model, path, array)
    whole = array.shape[1] - array.shape[1] % (model.config.stack or 1)  # rows that fill positions
    length = model.config.stem_length(seq) if seq else whole
    if array.shape[1] < length:
        raise InputError(f"{path} has {array.shape[1]} rows; seq={seq} needs {length}")
    if array.shape[1] > length:
        notes.append(f"{path} has {array.shape[1]} rows; the first {length} are used")
    array = np.ascontiguousarray(array[:, :length])
    positions = model.config.positions(array.shape[1])
    _check_seq(model, positions)
    return Inputs(array, model.config.reads, tuple(notes), positions)


def _read_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except Exception as error:  # a damaged header is parsed as Python, which fails in many ways
        raise InputError(f"{path} is not a .npy file of numbers ({error})") from error


def _ids(model: Model, path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise InputError(f"{path} is {array.dtype} {array.shape}; token ids are integers (T,) or (B, T)")
    if array.min() < 0 or array.max() >= model.config.vocab:
        raise InputError(
            f"{path} holds ids {array.min()} to {array.max()}; the vocabulary is 0 to {model.config.vocab - 1}"
        )
    return np.atleast_2d(array).astype(np.int64)


def _features(model: Model, path: Path, array: np.ndarray) -> np.ndarray:
    width = model.config.features
    if array.dtype.kind != "f" or array.ndim not in (2, 3) or array.size == 0 or array.shape[-1] != width:
        raise InputError(
            f"{path} is {array.dtype} {array.shape}; floats (rows, {width}) or (B, rows, {width}) are needed"
        )
    _require_finite(path, array, "values")
    return array.reshape(-1, *array.shape[-2:]).astype(np.float32)


def _require_finite(path: str | Path, array: np.ndarray, what: str) -> None:
    """Raise InputError for values that are not finite, or would not be in float32."""
    if not np.abs(array).max() <= np.finfo(np.float32).max:  # nan is not
        raise InputError(f"{path} holds NaN or infinite {what}, or such as are too large for float32")


# --- lengths --------------------------------------------------------------------------------------------------------


def _limit(model: Model) -> int:
    """Positions at most; 0 for no limit."""
    if model.config.position in _POSITION_TABLES:
        table: Sequence[Any] = model.weights.stem.positions
        return len(table)
    return model.config.max_positions


def _check_seq(model: Model, seq: int | None) -> None:
    if seq is not None and model.config.streams:
        model.config.check_chunks(seq)
    if seq is not None and seq < 1:
        raise InputError(f"seq is {seq}; it must be at least 1")
    if seq and model.config.position in _POSITION_TABLES and seq > _limit(model):
        raise InputError(
            f"{model.config.name} has {_limit(model)} positions; {seq} are asked for: take a shorter sequence"
        )
