"""Builds a database: sequences run through the exact model, then each layer's embedding is trained.

    1. capture   dense passes; of every sequence and layer the pooled hidden states that enter attention, and the map
    2. train     per layer, on pairs of sequences
    3. index     the features of all sequences by the trained embedding

Every batch and every epoch is committed. Whoever stops and starts again with the same inputs goes on there, and gets
the same bits.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, DatabaseError, InputError
from refimpl.memo.database import Database, Writer
from refimpl.memo.embedding import Network, inputs_of, pooled
from refimpl.memo.index import GraphIndex
from refimpl.memo.memo import About
from refimpl.memo.training import Settings, Training
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, Queries
from refimpl.methods.subject import Subject
from refimpl.model import Runner, check_inputs, sequence_length
from refimpl.preparation.checksum import checksum
from refimpl.recorder import At


@dataclass(frozen=True)
class Plan:
    """How to build.

    Attributes
    ----------
    training : Settings
    heads : {"all", "first"}
        Whose maps the training compares; records hold all.
    batch : int
        Sequences of a pass.
    index : {"flat", "hnsw"}
        Whether the graph of a Faiss index is kept as well.
    """

    training: Settings = field(default_factory=Settings)
    heads: str = "all"
    batch: int = 8
    index: str = "flat"


def build(
    folder: str | Path,
    subject: Subject,
    plan: Plan | None = None,
    *,
    lengths: Sequence[int] | None = None,
    durable: bool = True,
) -> None:
    """Build a database of the maps of the subject's inputs, or go on with one.

    Parameters
    ----------
    folder : str or Path
        New or empty, or that of a database of the same model and inputs.
    subject : Subject
        With inputs: rows are sequences of one length.
    plan : Plan, optional
    lengths : sequence of int, optional
        Positions of each sequence that are no padding; keys behind them are masked, and padding is left out when maps
        are compared.
    durable : bool, default True
        See `Writer`.

    Raises
    ------
    ConfigError, InputError
        Without inputs, or where the model's positions are relative to each other or it streams.
    DatabaseError
        If the folder cannot be written, or holds something else.
    """
    plan = plan or Plan()
    inputs, config = subject.inputs, subject.model.config
    refuse_unfit(config)
    if inputs is None or len(inputs) == 0:
        raise InputError("a database is built from inputs, and there are none: give at least one sequence")
    check_inputs(config, inputs)
    about = about_of(subject)
    with Writer(folder, asdict(about), durable) as writer:
        _check_inputs_are_the_same(writer, inputs, lengths)
        _capture(writer, subject, plan, about, lengths)
        for layer in range(config.layers):
            _train(writer, subject, plan, layer, lengths)
        writer.note("sequences", len(inputs))
        writer.commit()
    subject.progress("attmemo: done", 1.0)


def refuse_unfit(config: ModelConfig) -> None:
    """Raise ConfigError for models whose maps cannot be looked up one sequence at a time."""
    if config.position == "relative":
        raise ConfigError(
            f"{config.name} has relative positions, whose scores AttMemo does not replace: take a model without them, "
            "as minilm-l6"
        )
    if config.streams:
        raise ConfigError(f"{config.name} runs in chunks over a cache: AttMemo looks whole sequences up")


def about_of(subject: Subject) -> About:
    """What a database of the subject's inputs is of."""
    config, weights = subject.model.config, subject.model.weights
    return About(
        model=config.name,
        weights=weights_checksum(subject),
        layers=config.layers,
        heads=config.heads,
        d_model=config.d_model,
        length=sequence_length(config, subject.inputs),
        causal=subject.is_causal,
        dtype=weights.layers[0].attention.qkv.weight.dtype.name,
    )


def weights_checksum(subject: Subject) -> str:
    """Of the model's weights alone."""
    return checksum(subject.model.weights, np.empty(0))


def _check_inputs_are_the_same(writer: Writer, inputs: Array, lengths: Sequence[int] | None) -> None:
    digest = hashlib.sha256(np.ascontiguousarray(inputs).data)
    digest.update(repr(None if lengths is None else [int(n) for n in lengths]).encode())
    found = writer.manifest.notes.get("inputs", digest.hexdigest())
    if found != digest.hexdigest():
        raise DatabaseError(f"{writer.folder} was begun with other inputs: give those, or name a new folder")
    writer.note("inputs", digest.hexdigest())


# --- 1. capture -----------------------------------------------------------------------------------------------------


class _Capture(Dense):
    """Exact attention that keeps, layer by layer, pooled hidden states and maps."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, None)
        self.pooled: list[Array] = []  # (B, n) each
        self.maps: list[Array] = []  # (B, H, T, T) each

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        self.pooled.append(pooled(at("").to_numpy(x)))
        return super().attention(at, x, layer)

    def attention_map(self, at: At, q: Queries, k: Array, layer: Layer) -> Array:
        found = super().attention_map(at, q, k, layer)
        self.maps.append(at("").to_numpy(found))
        return found


def _capture(
    writer: Writer, subject: Subject, plan: Plan, about: About, lengths: Sequence[int] | None
) -> None:  # fmt: skip
    inputs, config = subject.inputs, subject.model.config
    assert inputs is not None
    runner = Runner(subject.model, subject.engine)
    done = min(writer.count(f"{kind}-{layer}") for kind in ("maps", "pooled") for layer in range(config.layers))
    for start in range(done, len(inputs), plan.batch):
        rows = slice(start, start + plan.batch)
        capture = _Capture(config)
        mask = None if lengths is None else key_mask(lengths[rows], about.length)
        runner(inputs[rows], capture, causal=about.causal, mask=mask, record=False)
        for layer in range(config.layers):
            writer.append(f"maps-{layer}", capture.maps[layer], aligned=True)
            writer.append(f"pooled-{layer}", capture.pooled[layer])
        writer.commit()
        seen = min(start + plan.batch, len(inputs))
        subject.progress(f"attmemo: {seen} of {len(inputs)} sequences", 0.5 * seen / len(inputs))


def key_mask(lengths: Sequence[int], positions: int) -> Array:
    """Which keys are no padding: bool (B, 1, 1, T)."""
    return (np.arange(positions) < np.asarray(lengths)[:, None])[:, None, None, :]


# --- 2. and 3. ------------------------------------------------------------------------------------------------------


def _train(
    writer: Writer, subject: Subject, plan: Plan, layer: int, lengths: Sequence[int] | None
) -> None:  # fmt: skip
    database = Database(writer.folder)
    records, states = database.records(f"maps-{layer}"), database.records(f"pooled-{layer}").array
    maps = records.array if plan.heads == "all" else records.array[:, :1]
    training = _training_of(database, plan, layer, states.shape[1], str(states.dtype))
    total, layers = plan.training.epochs, subject.model.config.layers
    real = None if lengths is None else np.asarray(lengths)
    while len(states) > 1 and not training.is_done:
        done = len(training.losses)

        def report(fraction: float, done: int = done) -> None:
            overall = (layer + (done + fraction) / total) / layers
            subject.progress(f"attmemo: layer {layer}, epoch {done + 1} of {total}", 0.5 + 0.5 * overall)

        training.epoch(states, maps, real, report)
        writer.put(f"training-{layer}", training.to_bytes())
        writer.note(f"loss-{layer}", training.losses)
        writer.note(f"heads-{layer}", plan.heads)
        writer.commit()
    _index(writer, plan, layer, training.network, states)
    database.close()


def _training_of(database: Database, plan: Plan, layer: int, inputs: int, dtype: str) -> Training:
    name = f"training-{layer}"
    if name in database and database.notes.get(f"heads-{layer}") == plan.heads:
        found = Training.from_bytes(database.file(name))
        if found.settings == plan.training:
            return found
    return Training.new(inputs, plan.training, "float64" if dtype == "float64" else "float32")


def _index(writer: Writer, plan: Plan, layer: int, network: Network, states: Array) -> None:
    weight, bias = (array.astype(states.dtype) for array in network.fold())
    points = states @ weight.T + bias  # (N, 128)
    stream = io.BytesIO()
    np.savez(stream, weight=weight, bias=bias, points=points)
    name, before = f"index-{layer}", writer.manifest.files.get(f"index-{layer}")
    writer.put(name, stream.getvalue())
    if writer.manifest.files[name] != before:  # what was found with other features is found no more
        writer.forget(f"graph-{layer}")
        writer.forget("profile")
    if plan.index == "hnsw":
        writer.put(f"graph-{layer}", GraphIndex(points).to_bytes())


def sizes(config: ModelConfig, length: int, itemsize: int = 4) -> dict[str, int]:
    """Bytes on disk of one sequence (maps, pooled states, features), and of the embeddings and their training."""
    from refimpl.memo.manifest import RecordFile

    n = inputs_of(length, config.d_model)
    record = RecordFile.of("", (config.heads, length, length), f"float{8 * itemsize}", aligned=True)
    network = (128 * n + 128 * 128 + 6 * 128 + 4) * itemsize
    return {
        "maps": config.layers * record.stride,
        "pooled": config.layers * n * itemsize,
        "features": config.layers * 128 * itemsize,
        "training": config.layers * (2 * network + (128 * n + 128) * itemsize),
    }


def describe(database: Database) -> dict[str, Any]:
    """A database in numbers, for people."""
    manifest = database.manifest
    return {
        **database.about,
        "sequences": database.notes.get("sequences", 0),
        "captured": min((one.count for name, one in manifest.records.items() if name.startswith("maps")), default=0),
        "record_bytes": next((one.stride for name, one in manifest.records.items() if name.startswith("maps")), 0),
        "maps_bytes": sum(one.bytes for name, one in manifest.records.items() if name.startswith("maps")),
        "pooled_bytes": sum(one.bytes for name, one in manifest.records.items() if name.startswith("pooled")),
        "files_bytes": sum(one.bytes for one in manifest.files.values()),
        "graphs": any(name.startswith("graph") for name in manifest.files),
        "loss": {name: losses[-1] for name, losses in database.notes.items() if name.startswith("loss")},
    }
