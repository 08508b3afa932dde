"""What fidelity is judged on: sequences of real input, the tokens that follow, and other input to calibrate on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, InputError
from refimpl.images import patch_side
from refimpl.inputs import MELS, Inputs, check_file, load_input, random_inputs, read_text, sample
from refimpl.language import START, windows
from refimpl.model import sequence_length
from refimpl.weights import Model

WINDOWS, TOKENS = 2, 512  # of the text that is judged, where nothing else is asked for
CALIBRATION = (30, 64)  # sequences and their tokens, as KVSharer's (arXiv 2410.18517, "Settings")
RANDOM_LENGTH = 256
# What stands in front of a text: SmolLM2 and GPT-2, Llama 2, Llama 3.
STARTS = (START, "<s>", "<|begin_of_text|>")


@dataclass(frozen=True)
class Wanted:
    """What was asked for; None takes the default.

    Attributes
    ----------
    input_file, calibration_file : Path or None
    length : int or None
        T of a sequence.
    windows : int or None
        Sequences of a text, for language models.
    seed : int
        Of random input.
    """

    input_file: Path | None = None
    calibration_file: Path | None = None
    length: int | None = None
    windows: int | None = None
    seed: int = 0

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError or InputError for what this model cannot be given; nothing is loaded."""
        for name in ("length", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.windows is not None and not config.generates:
            raise ConfigError(f"--windows cuts a text for a language model; {config.name} has no language head")
        if config.max_positions and (self.length or 0) > config.max_positions:
            raise ConfigError(f"{config.name} has {config.max_positions} positions; --seq asks for {self.length}")
        for path in (self.input_file, self.calibration_file):
            if path is not None:
                check_file(config, path)


@dataclass(frozen=True)
class Material:
    """Sequences of one length, each as the model's stem takes it.

    Attributes
    ----------
    sequences : array, shape (K, ...)
    valid : int
        Positions of each sequence that are no padding.
    following : array of int, shape (K, T), or None
        The token behind each position, where the model says how probable it is.
    calibration : array, shape (N, ...)
        What a method may look at before it is judged.
    length : int
        T.
    source, calibration_source : str
        What they are, in words.
    notes : tuple of str
    """

    sequences: np.ndarray
    valid: int
    following: np.ndarray | None
    calibration: np.ndarray
    length: int
    source: str
    calibration_source: str
    notes: tuple[str, ...] = ()


def gather(model: Model, wanted: Wanted) -> Material:
    """Read what `wanted` names, or what comes with effref and suits the model; random where nothing does.

    Raises
    ------
    InputError
        If a file is of the wrong kind, damaged or too short, or the model has no tokenizer to read it with.
    """
    wanted.check(model.config)
    return _language(model, wanted) if model.config.generates else _other(model, wanted)


# --- language models ------------------------------------------------------------------------------------------------


def _language(model: Model, wanted: Wanted) -> Material:
    """Windows of a text, and windows of another text to calibrate on."""
    limit = model.config.max_positions or TOKENS
    path = wanted.input_file or (sample("moby-dick") if model.pretrained else None)
    other = wanted.calibration_file or (sample("union") if model.pretrained else None)
    count, tokens = CALIBRATION
    ids, source = _ids(model, path, (wanted.windows, wanted.length), (WINDOWS, min(TOKENS, limit)), wanted.seed)
    seen, seen_source = _ids(model, other, (None, None), (count, min(tokens, limit)), wanted.seed + 1)
    own = path is not None and other is not None and path.samefile(other)
    return Material(
        sequences=ids[:, :-1],
        valid=ids.shape[1] - 1,
        following=ids[:, 1:],
        calibration=seen[:, :-1],
        length=ids.shape[1] - 1,
        source=source,
        calibration_source=seen_source + (", the text that is judged" if own else ""),
    )


def _ids(
    model: Model, path: Path | None, asked: tuple[int | None, int | None], usual: tuple[int, int], seed: int
) -> tuple[np.ndarray, str]:
    """Sequences (K, T + 1), the last token only to be predicted, and what they are. `asked` and `usual`: K and T."""
    if path is None:
        count, length = (given or default for given, default in zip(asked, usual, strict=True))
        return random_inputs(model.config, length + 1, count, seed), f"{count} x {length} random tokens, seed {seed}"
    if check_file(model.config, path) == ".npy":
        ids = _stored_ids(model, path, *asked)
    else:
        ids = _text_ids(model, path, asked, usual)
    count, length = ids.shape
    return ids, f"{count} window{'s' if count > 1 else ''} of {length - 1} tokens of {path.name}"


def _stored_ids(model: Model, path: Path, count: int | None, length: int | None) -> np.ndarray:
    ids = load_input(model, path).array
    rows, columns = count or ids.shape[0], (length or ids.shape[1] - 1) + 1
    if rows > ids.shape[0] or not 2 <= columns <= ids.shape[1]:
        raise InputError(
            f"{path} holds {ids.shape[0]} sequences of {ids.shape[1]} ids; {rows} of {max(columns, 2)} are needed, the "
            "last of them to be predicted"
        )
    kept: np.ndarray = ids[:rows, :columns]
    return kept


def _text_ids(model: Model, path: Path, asked: tuple[int | None, int | None], usual: tuple[int, int]) -> np.ndarray:
    """As many windows as asked for; where nothing is, the usual ones as far as the text reaches."""
    text, tokenizer = read_text(path), model.tokenizer()
    tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
    if not tokens:
        raise InputError(f"{path} holds no tokens: give a text")
    length = asked[1] or min(usual[1], tokens)
    count = asked[0] or max(min(usual[0], tokens // length), 1)
    start = next((one for one in STARTS if tokenizer.token_to_id(one) is not None), START)
    ids: np.ndarray = windows(model, text, length, count, start)
    return ids


# --- all others -----------------------------------------------------------------------------------------------------


def _other(model: Model, wanted: Wanted) -> Material:
    """One input, or the rows of an array; methods calibrate on the same unless another file is given."""
    path = wanted.input_file or _sample_for(model)
    if path is None:
        given, source = _random(model, wanted)
    else:
        given, source = load_input(model, path, wanted.length), path.name
    length = sequence_length(model.config, given.array)
    seen, seen_source, notes = given.array, "the input that is judged", given.notes
    if wanted.calibration_file:
        other = load_input(model, wanted.calibration_file, wanted.length)
        seen, seen_source, notes = other.array, wanted.calibration_file.name, (*notes, *other.notes)
    if given.valid_positions < length:
        source += f", {given.valid_positions} positions and padding to {length}"
    return Material(given.array, given.valid_positions, None, seen, length, source, seen_source, notes)


def _sample_for(model: Model) -> Path | None:
    """The text where weights and tokenizer are real; the recording or the photo where the features are those of one."""
    config = model.config
    if config.reads == "tokens" and model.pretrained:
        return sample("moby-dick")
    if config.reads == "patches" and patch_side(config.features):
        return sample("photo")
    return sample("speech") if config.reads == "frames" and config.features == MELS else None


def _random(model: Model, wanted: Wanted) -> tuple[Inputs, str]:
    length = wanted.length or min(RANDOM_LENGTH, model.config.max_positions or RANDOM_LENGTH)
    array = random_inputs(model.config, length, 1, wanted.seed)
    return Inputs(array, model.config.reads, (), length), f"{length} random {model.config.reads}, seed {wanted.seed}"
