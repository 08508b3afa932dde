"""Models to run: a shape with weights, either pretrained and checksummed or seeded random ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refimpl.config import DTYPES, ModelConfig, config_from_huggingface, preset, presets
from refimpl.errors import ConfigError, InputError, MissingDependencyError, WeightsError, unknown
from refimpl.weights.layout import Weights, assemble

__all__ = ["Model", "Weights", "load_model", "resolve_config"]

Source = Literal["auto", "pretrained", "random"]
SOURCES = ("auto", "pretrained", "random")


@dataclass(frozen=True)
class Model:
    """A shape with its weights.

    Attributes
    ----------
    config : ModelConfig
    weights : Weights
        NumPy arrays by attribute, see `refimpl.weights.layout`.
    source : str
        Where the weights are from, in words.
    pretrained : bool
        False for random weights.
    assets : Path or None
        Folder that holds ``tokenizer.json`` and the like, or a GGUF file.
    """

    config: ModelConfig
    weights: Weights
    source: str
    pretrained: bool
    assets: Path | None = None

    def tokenizer(self) -> Any:
        """The model's ``tokenizers.Tokenizer``, which neither truncates nor pads.

        Raises
        ------
        InputError
            If the model has no tokenizer, or its file cannot be read.
        MissingDependencyError
            If the package ``tokenizers`` is not installed.
        """
        return _tokenizer(self)


def load_model(
    name_or_path: str | Path | ModelConfig,
    *,
    seed: int = 0,
    dtype: str = "float32",
    weights: str = "auto",
    positions: int = 0,
) -> Model:
    """A model by name, from a checkpoint folder, or of a given shape.

    Parameters
    ----------
    name_or_path : str, Path or ModelConfig
        Preset name or alias, checkpoint folder, path of a ``config.json`` (the shape only), or a shape.
    seed : int, default 0
        Of random weights.
    dtype : {"float16", "float32", "float64"}
        Of the returned arrays.
    weights : {"auto", "pretrained", "random"}
        "auto" takes the pretrained weights if they are on this machine and their position table is long enough, else
        random ones; `Model.source` says which.
    positions : int
        Rows that the position table must have; default the model's own.

    Returns
    -------
    model : Model

    Raises
    ------
    ConfigError
        If the name, path or dtype is unknown.
    WeightsError
        If pretrained weights are asked for and are absent, or are damaged or do not fit the model.
    MissingDependencyError
        If a package that reads the file is not installed.

    Examples
    --------
    >>> from refimpl.weights import load_model
    >>> model = load_model("conformer-m")
    >>> model.source, model.weights.layers[0].attention.qkv.weight.shape
    ('seeded random weights, seed 0', (768, 256))
    """
    if weights not in SOURCES:
        raise unknown("weights", weights, SOURCES)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    found = _Location.of(name_or_path)
    if weights == "random":
        return _random(found, seed, dtype, positions)
    if found.folder is None:
        if weights == "pretrained":
            raise WeightsError(found.absent)
        return _random(found, seed, dtype, positions)
    if not _too_short(found.config, positions):
        return _pretrained(found, dtype)
    limit = found.config.max_positions
    if weights == "auto" and found.preset:
        return _random(found, seed, dtype, positions, f"; the pretrained ones have {limit} positions")
    raise WeightsError(
        f"{found.config.name} has {limit} positions, {positions} are needed: shorten the input or take weights='random'"
    )


def resolve_config(name_or_path: str | Path | ModelConfig) -> ModelConfig:
    """The shape that `load_model` would use; no weights are read.

    Raises
    ------
    ConfigError
        If the name or the path is unknown, or the file is not a model's ``config.json``.
    """
    if name_or_path in presets():  # nothing is looked for on disk
        return preset(str(name_or_path))
    return _Location.of(name_or_path).config


@dataclass(frozen=True)
class _Location:
    """What a name or path stands for: a shape, and where its pretrained weights are."""

    config: ModelConfig
    folder: Path | None = None  # where tokenizer and weights are
    preset: str = ""  # name under which they can be fetched
    absent: str = ""  # what to say when pretrained weights are asked for and there are none

    @staticmethod
    def of(given: str | Path | ModelConfig) -> _Location:
        if isinstance(given, ModelConfig):
            return _Location(given, absent=f"{given.name}: a shape has no pretrained weights; name a model or a folder")
        name = _canonical(str(given))
        if name in presets():
            return _named(name)
        path = Path(os.path.expanduser(given))  # unlike the methods of Path, these never raise
        if name and os.path.isdir(path):
            return _checkpoint(path)
        if os.path.isfile(path) and path.suffix == ".gguf":
            raise ConfigError(f"{path} is a file: give the folder that holds it")
        if os.path.isfile(path):
            absent = f"{path} holds a shape only: give the folder that holds the weights"
            return _Location(config_from_huggingface(path), absent=absent)
        if _looks_like_path(str(given)):
            raise ConfigError(f"no such file or folder: {path}; give a model name, a folder or a config.json")
        raise unknown("model", str(given), [*presets(), *_aliases()])


def _aliases() -> dict[str, str]:
    from refimpl.weights import pretrained

    return {entry.alias: name for name, entry in pretrained.available().items()}


def _canonical(name: str) -> str:
    return name if name in presets() else _aliases().get(name, name)


def _named(name: str) -> _Location:
    from refimpl.weights import pretrained

    if name not in pretrained.available():
        absent = f"no pretrained weights can be fetched for {name}; there are for: {', '.join(pretrained.available())}"
        return _Location(preset(name), absent=absent)
    absent = f"{name} is not on this machine: effref models fetch {name}"
    return _Location(preset(name), pretrained.folder(name), name, absent=absent)


def _checkpoint(folder: Path) -> _Location:
    from refimpl.weights import readers

    return _Location(readers.config_of(folder), folder)


def _looks_like_path(text: str) -> bool:
    return text.endswith(".json") or text.startswith((".", "~")) or any(mark in text for mark in (os.sep, "/"))


def _too_short(config: ModelConfig, positions: int) -> bool:
    return config.position in ("learned", "sinusoidal") and positions > config.max_positions


def _random(found: _Location, seed: int, dtype: str, positions: int, why: str = "") -> Model:
    from refimpl.weights.random import random_weights

    tensors = _cast(random_weights(found.config, seed, positions), dtype)
    weights = assemble(found.config, tensors, positions)
    return Model(found.config, weights, f"seeded random weights, seed {seed}{why}", False, found.folder)


def _pretrained(found: _Location, dtype: str) -> Model:
    from refimpl.weights import pretrained, readers

    assert found.folder is not None
    if found.preset:
        entry = pretrained.available()[found.preset]
        pretrained.verify(found.preset)
        source = f"{entry.upstream}, from the package {entry.package} {entry.version}"
    else:
        source = f"checkpoint {found.folder}"
    checkpoint = readers.read_checkpoint(found.folder, found.config)
    config = replace(found.config, **checkpoint.changes)
    weights = assemble(config, _cast(checkpoint.tensors, dtype))
    return Model(config, weights, source + checkpoint.note, True, found.folder)


def _cast(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The tensors in another precision, refusing a finite value that becomes infinite."""
    return {name: _cast_one(name, values, dtype) for name, values in tensors.items()}


def _cast_one(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype == "float16" and np.isinf(cast).any() and np.isfinite(values).all():
        raise WeightsError(
            f"'{name}' holds values up to {np.abs(values).max():.3g}, too large for float16: use float32"
        )
    return cast


def _tokenizer(model: Model) -> Any:
    if model.config.stem != "tokens":
        raise InputError(f"{model.config.name} reads {model.config.stem}, not text: it has no tokenizer")
    path = _tokenizer_file(model.assets) if model.assets else None
    if path is None:
        raise InputError(f"{model.config.name} has no tokenizer.json here: {_how_to_get_tokenizer(model)}")
    if path.suffix == ".gguf":
        from refimpl.weights import gguf_reader

        return gguf_reader.tokenizer(gguf_reader.GGUFFile(path))
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("reading text needs tokenizers: pip install 'effref[models]'") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path}: not a tokenizer file ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tokenizer_file(folder: Path) -> Path | None:
    """``tokenizer.json``, or the GGUF file, which holds a tokenizer too."""
    from refimpl.weights import readers

    path = folder / "tokenizer.json"
    return path if path.is_file() else readers.gguf_file(folder)


def _how_to_get_tokenizer(model: Model) -> str:
    from refimpl.weights import pretrained

    if model.config.name in pretrained.available() and pretrained.folder(model.config.name) is None:
        return f"effref models fetch {model.config.name}"
    return "use a model that has one, or give token ids as .npy"
