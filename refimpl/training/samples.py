"""What thresholds are trained and judged on: equal windows of a file, with what the model should make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import InputError
from refimpl.inputs import check_file, encode, load_input, read_text
from refimpl.language import windows
from refimpl.training.blocks import cross_entropy, relative_squared_error
from refimpl.training.filter import Rule
from refimpl.training.passes import TrainableModel
from refimpl.weights import Model

HELD_OUT = 0.25  # of the windows of each file, the last ones


@dataclass(frozen=True)
class Samples:
    """Windows and their targets.

    Attributes
    ----------
    inputs : array, shape (N, ...)
    targets : array
        Of a causal language model the next tokens (N, T); of others the output of exact attention (N, T, d).
    """

    inputs: Array
    targets: Array

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, chosen: slice | list[int]) -> Samples:
        return Samples(self.inputs[chosen], self.targets[chosen])


def task_loss(output: Array, targets: Array) -> tuple[float, Array]:
    """The loss of an output and its gradient: cross-entropy of ids, or squared error relative to an exact output."""
    if targets.dtype.kind in "iu":
        return cross_entropy(output, targets)
    return relative_squared_error(output, targets)


def with_targets(model: Model, inputs: Array) -> Samples:
    """Samples from windows: those of a causal language model are one token longer than what it is given."""
    if model.config.generates:
        return Samples(inputs[:, :-1], inputs[:, 1:])
    exact = TrainableModel(model, Rule(estimate="exact", stage2="float"))
    everything = np.full((model.config.layers, model.config.heads), np.inf)
    outputs = [exact(inputs[at : at + 1], everything, gradient=False).output for at in range(len(inputs))]
    return Samples(inputs, np.concatenate(outputs))


def read_samples(model: Model, paths: tuple[Path, ...], seq: int | None) -> tuple[Samples, Samples]:
    """Windows of files, those to train on and those held out.

    Parameters
    ----------
    model : Model
    paths : tuple of Path
        Text is cut into windows of `seq` positions that follow each other, as rows of token ids in a .npy are; a row of
        frames or patches in a .npy is a window. What does not fill a window is left out.
    seq : int, optional
        T; needed for tokens.

    Returns
    -------
    training, held_out : Samples
        Of each file the last quarter of its windows is held out, at least one.

    Raises
    ------
    InputError
        If a file cannot be read or does not fit the model, has fewer than two windows, as a recording and a photo have,
        or windows of another length than those of the file before.
    """
    parts: list[tuple[Array, Array]] = []
    for path in paths:
        cut = _windows(model, path, seq)
        if len(cut) < 2:
            more = "a longer input or a shorter seq" if model.config.stem == "tokens" else "an .npy of several rows"
            raise InputError(
                f"{path} gives {len(cut)} window(s) of {seq or 'its own'} positions; at least 2 are needed, to train "
                f"on one and hold one out: take {more}"
            )
        if parts and cut.shape[1:] != parts[0][0].shape[1:]:
            raise InputError(
                f"{path} gives windows of {cut.shape[1]} rows, {paths[0]} of {parts[0][0].shape[1]}: give seq, or "
                "files of one length"
            )
        last = max(1, round(HELD_OUT * len(cut)))
        parts.append((cut[:-last], cut[-last:]))
    training, held_out = (np.concatenate(sides) for sides in zip(*parts, strict=True))
    return with_targets(model, training), with_targets(model, held_out)


def _windows(model: Model, path: Path, seq: int | None) -> Array:
    """All windows of a file: (N, ...)."""
    config = model.config
    suffix = check_file(config, path)
    if config.stem != "tokens":
        return load_input(model, path, seq).array
    if seq is None or seq < 1:
        raise InputError(f"seq is {seq}; tokens are cut into windows: give their length")
    if suffix == ".npy":
        return _pieces(load_input(model, path).array, seq + int(config.generates))
    before, body, after = encode(model, read_text(path))
    if config.generates:
        return windows(model, read_text(path), seq, max(len(body) // seq, 1))
    room = seq - len(before) - len(after)
    if room < 1:
        raise InputError(f"seq is {seq}; {config.name} puts {len(before) + len(after)} tokens around a text: take more")
    pieces = _pieces(np.array([body]), room)
    return np.array([[*before, *piece, *after] for piece in pieces.tolist()], np.int64).reshape(-1, seq)


def _pieces(rows: Array, length: int) -> Array:
    """Rows (B, T) cut into pieces that follow each other: (N, length); what does not fill one is left out."""
    count = rows.shape[1] // length
    return rows[:, : count * length].reshape(-1, length)
