"""The state of a training as a file: NumPy arrays without pickle, with a checksum of all that is in it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import InputError
from refimpl.preparation.checksum import checksum
from refimpl.training.samples import Samples
from refimpl.training.thresholds import Recipe, State
from refimpl.weights import Model

VERSION = 1
FIELDS = ("thresholds", "mean", "square", "losses", "kept")


def key_of(model: Model, samples: Samples, recipe: Recipe) -> str:
    """What a training depends on, as a short text: weights, windows and recipe, but not the number of steps."""
    return checksum(model.weights, samples.inputs, model.config, sorted(asdict(recipe).items()))


def write(file: BinaryIO, state: State, key: str) -> None:
    """Write a state; `read` with the same key gives it back bit for bit."""
    arrays = {name: np.asarray(getattr(state, name), np.float64) for name in FIELDS}
    np.savez(file, version=VERSION, key=key, sha256=_sha256(arrays, key), **arrays)  # type: ignore[arg-type]


def read(path: Path, key: str) -> State:
    """The state of a file.

    Raises
    ------
    InputError
        If the file is no checkpoint, is damaged, or belongs to another training.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found: dict[str, Any] = {name: stored[name] for name in ("version", "key", "sha256", *FIELDS)}
    except Exception as error:  # damaged bytes raise a dozen kinds in NumPy and zipfile
        raise InputError(f"{path} is no checkpoint of a training, or it is damaged: remove it to start anew") from error
    arrays = {name: found[name] for name in FIELDS}
    if found["version"].item() != VERSION:
        raise InputError(
            f"{path} has version {found['version'].item()}; {VERSION} can be read: remove it to start anew"
        )
    if str(found["sha256"]) != _sha256(arrays, str(found["key"])):
        raise InputError(f"{path} is damaged, its checksum does not match: remove it to start anew")
    if str(found["key"]) != key:
        raise InputError(
            f"{path} is of a training with other weights, inputs or settings: give those again, or another --checkpoint"
        )
    losses, kept = (tuple(arrays[name].tolist()) for name in ("losses", "kept"))
    return State(arrays["thresholds"], arrays["mean"], arrays["square"], losses, kept)


def _sha256(arrays: dict[str, Array], key: str) -> str:
    digest = hashlib.sha256(key.encode())
    for name, array in arrays.items():
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
