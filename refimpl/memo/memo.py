"""A database as a method reads it: per layer the folded embedding, the features of the records, and the records."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import DatabaseError
from refimpl.memo.database import Database, Records
from refimpl.memo.index import GraphIndex
from refimpl.weights.layout import Weights


@dataclass(frozen=True)
class About:
    """What a database is of, and must agree with who uses it.

    Attributes
    ----------
    model : str
    weights : str
        Checksum of the model's weights; see `refimpl.preparation.checksum`.
    layers, heads, d_model : int
    length : int
        T: positions of every sequence.
    causal : bool
    dtype : str
    """

    model: str
    weights: str
    layers: int
    heads: int
    d_model: int
    length: int
    causal: bool
    dtype: str


class Memo:
    """An opened database; hashable by identity, so that it can be a parameter.

    Parameters
    ----------
    folder : str or Path

    Raises
    ------
    DatabaseError
        If there is no database, it is damaged, or its embedding is not trained yet.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.database = Database(folder)
        try:
            self.about = About(**self.database.about)
        except TypeError as error:
            raise DatabaseError(
                f"{folder} does not say of which model it is: build it with 'effref memo build'"
            ) from error
        self._tables = {layer: self._read(layer) for layer in range(self.about.layers) if self.count}
        self._graphs: dict[int, GraphIndex] = {}

    def __str__(self) -> str:
        return "own inputs" if self.is_temporary else str(self.folder)

    __repr__ = __str__

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return self  # it never changes

    @property
    def is_temporary(self) -> bool:
        """Whether its files have no names any more: it was built for one run."""
        return not self.folder.exists()

    @property
    def count(self) -> int:
        """Sequences that are kept."""
        return int(self.database.notes.get("sequences", 0))

    @cached_property
    def profile(self) -> dict[str, Any]:
        """What `effref memo profile` noted; empty before."""
        return dict(self.database.notes.get("profile", {}))

    def _read(self, layer: int) -> dict[str, Array]:
        name = f"index-{layer}"
        if name not in self.database:
            raise DatabaseError(f"{self.folder} has no index of layer {layer}: run 'effref memo build' on it again")
        with np.load(io.BytesIO(self.database.file(name)), allow_pickle=False) as archive:
            return {part: archive[part] for part in archive.files}

    def tables(self, layer: int) -> Weights:
        """What lookups of a layer read: weight (128, n) and bias (128,) of the embedding, points (N, 128)."""
        return Weights(**{name: self._tables[layer][name] for name in ("weight", "bias", "points")})

    def records(self, layer: int) -> Records:
        """The maps of a layer, (H, T, T) each."""
        return self.database.records(f"maps-{layer}")

    def graph(self, layer: int) -> GraphIndex:
        """The graph over the points of a layer: made, or read where the database has it."""
        if layer not in self._graphs:
            name = f"graph-{layer}"
            seed = self.database.file(name) if name in self.database else None
            self._graphs[layer] = GraphIndex(self._tables[layer]["points"], seed)
        return self._graphs[layer]

    def check(self, config: ModelConfig, weights: str | None = None) -> None:
        """Raise DatabaseError where the database is of another model; `weights` is the model's checksum."""
        own = {"layers": config.layers, "heads": config.heads, "d_model": config.d_model}
        if weights is not None:
            own["weights"] = weights  # type: ignore[assignment]
        for name, value in own.items():
            if getattr(self.about, name) != value:
                raise DatabaseError(
                    f"database {self.folder} was built on {self.about.model} ({name} {getattr(self.about, name)}), not "
                    f"on {config.name} as it is ({name} {value}): build one with 'effref memo build'"
                )
