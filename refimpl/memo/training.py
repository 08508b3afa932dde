"""Siamese training of the embedding: all pairs of each mini-batch, stochastic gradient descent with momentum.

Batch size, rate and momentum are those of the published code of the authors' group.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import DatabaseError, InputError
from refimpl.memo.embedding import Network, Tensors
from refimpl.memo.similarity import pair_distances
from refimpl.parameters.base import require_int

FORMAT, VERSION = "memo training", 1


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    epochs, batch : int
        Of a batch all pairs are taken: there are none below 2.
    rate, momentum : float
        Of stochastic gradient descent: ``v = momentum v + g``, ``w = w - rate v``.
    seed : int
        Of first weights and of the order of the sequences.
    """

    epochs: int = 6
    batch: int = 32
    rate: float = 0.1
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        require_int("epochs", self.epochs, 0)
        require_int("batch", self.batch, 2)
        require_int("seed", self.seed, 0)


@dataclass
class Training:
    """How far the training of one network is; going on from `to_bytes` gives the same bits as never stopping.

    Attributes
    ----------
    network : Network
    velocity : dict of array
        Of every trained array.
    losses : list of float
        The mean of each epoch that is done.
    """

    settings: Settings
    network: Network
    velocity: Tensors
    generator: np.random.Generator
    losses: list[float] = field(default_factory=list)

    @classmethod
    def new(cls, inputs: int, settings: Settings, dtype: str = "float32") -> Training:
        """With random weights."""
        generator = np.random.default_rng(settings.seed)
        network = Network.random(inputs, generator, dtype=dtype)
        velocity = {name: np.zeros_like(array) for name, array in network.weights.items()}
        return cls(settings, network, velocity, generator)

    @property
    def is_done(self) -> bool:
        return len(self.losses) >= self.settings.epochs

    def epoch(
        self, inputs: Array, maps: Array, lengths: Array | None = None, report: Callable[[float], None] | None = None
    ) -> float:
        """See every sequence once, in a new order.

        Parameters
        ----------
        inputs : array, shape (N, n)
            Pooled hidden states; see `refimpl.memo.embedding.pooled`.
        maps : array, shape (N, H, T, T)
            Their attention maps.
        lengths : array of int, shape (N,), optional
            Positions that are no padding.
        report : callable, optional
            Told the fraction of the epoch that is done.

        Returns
        -------
        loss : float
            The mean over the mini-batches.

        Raises
        ------
        InputError
            If there are fewer than two sequences: no pair.
        """
        if len(inputs) < 2:
            raise InputError(f"{len(inputs)} sequence is given; training needs pairs, so at least 2")
        losses = []
        for rows in self._batches(len(inputs)):
            targets = pair_distances(maps[rows], None if lengths is None else lengths[rows])
            losses.append(self._step(inputs[rows], targets))
            if report:
                report(min(1.0, len(losses) * self.settings.batch / len(inputs)))
        self.losses.append(float(np.mean(losses)))
        return self.losses[-1]

    def _batches(self, count: int) -> Iterator[Array]:
        """Rows of each mini-batch; a last one of a single row is left out."""
        order = self.generator.permutation(count)
        for start in range(0, count, self.settings.batch):
            rows = np.sort(order[start : start + self.settings.batch])
            if len(rows) > 1:
                yield rows

    def _step(self, x: Array, targets: Array) -> float:
        loss, gradient, batch = self.network.loss(x, targets)
        for name, array in self.network.weights.items():
            velocity = self.velocity[name]
            velocity *= self.settings.momentum
            velocity += gradient[name].astype(array.dtype)
            array -= self.settings.rate * velocity
        self.network.follow(batch)
        return loss

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All of it as an .npz archive."""
        state = {
            "effref": FORMAT, "version": VERSION, "settings": asdict(self.settings), "losses": self.losses,
            "generator": self.generator.bit_generator.state,
        }  # fmt: skip
        groups = {"weights": self.network.weights, "statistics": self.network.statistics, "velocity": self.velocity}
        arrays = {f"{group}/{name}": array for group, held in groups.items() for name, array in held.items()}
        stream = io.BytesIO()
        np.savez(stream, state=np.frombuffer(json.dumps(state).encode(), np.uint8), **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Training:
        """What `to_bytes` gave; DatabaseError where it is something else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            state: dict[str, Any] = json.loads(arrays.pop("state").tobytes())
        except Exception as error:  # zipfile, zlib and NumPy have many
            raise DatabaseError("a checkpoint of the embedding is damaged: build the database anew") from error
        if state.get("effref") != FORMAT or state.get("version") != VERSION:
            raise DatabaseError(
                f"a checkpoint is {state.get('effref')} {state.get('version')}; {FORMAT} {VERSION} is read"
            )
        groups: dict[str, Tensors] = {"weights": {}, "statistics": {}, "velocity": {}}
        for name, array in arrays.items():
            group, _, leaf = name.partition("/")
            groups[group][leaf] = array
        generator = np.random.default_rng()
        generator.bit_generator.state = state["generator"]
        network = Network(groups["weights"], groups["statistics"])
        return cls(Settings(**state["settings"]), network, groups["velocity"], generator, state["losses"])
