"""Parameters of SVD-softmax, and the basis in which it looks at the words of a language head."""

from __future__ import annotations

import base64
import hashlib
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, read_json, require_choice, require_int

Array = Any
FORMAT, VERSION = "svd-softmax basis", 1  # of a file
MAKE = "make one with 'effref prepare --method svd-softmax'"


class Basis(str):
    """Directions of a head's hidden states, the most telling first: a text, its checksum, that holds the directions.

    Attributes
    ----------
    into : array, shape (D, D), float64
        ``R = A into``: the head's matrix A (V, D) in this basis.
    record : dict
        What it was found on and with, and the spectrum.
    """

    into: Array
    record: Mapping[str, Any]

    def __new__(cls, into: Array, record: Mapping[str, Any] | None = None) -> Basis:
        into = np.ascontiguousarray(into, np.float64)
        made = super().__new__(cls, _checksum(into)[:16])
        made.into, made.record = into, dict(record or {})
        return made

    def __deepcopy__(self, memo: Any) -> Basis:
        return self

    @property
    def orthogonal(self) -> bool:
        """Whether it is a rotation."""
        return bool(self.record.get("weighting", "none") == "none")

    @property
    def onto(self) -> Array:
        """``g = onto h``, so that ``R g = A h``: the inverse of `into`, of a rotation its transpose; (D, D)."""
        return np.ascontiguousarray(self.into.T) if self.orthogonal else np.linalg.inv(self.into)


@dataclass(frozen=True)
class SVDSoftmaxParameters:
    """SVD-softmax; `window` = D or `candidates` = V is the exact head, but for rounding."""

    FILE: ClassVar[str] = "basis"  # the parameter that takes what `effref prepare` writes

    window: int | None = parameter(None, "W, directions of the preview of all words; default D // 8, D is exact")
    candidates: int | None = parameter(None, "N, words that are seen in full; default V // 16, V is exact")
    full_view: Literal["incremental", "replace"] = parameter(
        "incremental",
        "incremental: add the products of the D - W directions left; replace: all D once more, from a second copy",
    )
    decomposition: Literal["auto", "svd", "gram"] = parameter(
        "auto", "of the head A: its SVD, or the eigenvectors of A^T A (gram); auto: gram above 2^24 weights"
    )
    weighting: Literal["none", "activations"] = parameter(
        "none", "none: directions of A alone; activations: those that matter for hidden states of the inputs"
    )
    basis: Basis | None = parameter(  # noqa: RUF009  # a field like the others
        None, "instead of a decomposition: a file of 'effref prepare'"
    )
    fused: bool = parameter(True, "attention as one fused op in all layers, as in flash; false: as in dense")

    def __post_init__(self) -> None:
        for name in ("window", "candidates"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        require_choice("full_view", self.full_view, ("incremental", "replace"))
        require_choice("decomposition", self.decomposition, ("auto", "svd", "gram"))
        require_choice("weighting", self.weighting, ("none", "activations"))
        if self.weighting == "activations" and self.decomposition == "svd":
            raise ConfigError(
                "decomposition='svd' is of the head alone; weighting='activations' goes by the Gram matrix: leave out "
                "one"
            )
        require_choice("fused", self.fused, (True, False))
        if self.basis is not None:
            object.__setattr__(self, "basis", _as_basis(self.basis))

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Narrowing windows."""
        d = config.d_model
        return {"window": tuple(sorted({max(1, d // n) for n in (1, 2, 4, 8, 16)}, reverse=True))}

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        if not config.head:
            raise ConfigError(
                f"svd-softmax changes the language head; {config.name} has none: take a model with one, as smollm2-135m"
            )
        for name, most, what in (("window", config.d_model, "wide"), ("candidates", config.vocab, "words high")):
            value = getattr(self, name)
            if value is not None and isinstance(most, int) and value > most:  # a symbol has no size
                raise ConfigError(f"{name}={value}; the head of {config.name} is {most} {what}: give 1 to {most}")
        if self.basis is not None and self.basis.into.shape != (config.d_model, config.d_model):
            raise ConfigError(
                f"basis has {len(self.basis.into)} directions; {config.name} is {config.d_model} wide: {MAKE} for it"
            )

    def is_complete(self, config: ModelConfig) -> bool:
        """Whether nothing has to be decomposed."""
        return self.basis is not None

    @property
    def PER_CAUSALITY(self) -> bool:  # as PER_LENGTH of other methods
        """Whether something is looked for in passes, which are causal or not."""
        return self.basis is None and self.weighting == "activations"

    def preview_width(self, config: ModelConfig) -> int:
        """W."""
        return max(1, config.d_model // 8) if self.window is None else self.window

    def full_views(self, config: ModelConfig) -> int:
        """N."""
        return max(1, config.vocab // 16) if self.candidates is None else self.candidates

    def remaining(self, config: ModelConfig) -> int:
        """Directions of a full view: D - W, or with ``full_view="replace"`` D; 0 where the preview is the full view."""
        left = config.d_model - self.preview_width(config)
        return config.d_model if left and self.full_view == "replace" else left

    def found_in(self, weights: Any, inputs: Array) -> tuple[Any, ...]:
        """What decides the basis: weights, inputs, and settings; neither W nor N is among them."""
        settings = (type(self).__name__, self.weighting, self.decomposition)
        if self.weighting == "activations":
            return weights, inputs, *settings
        return weights.stem.embedding, inputs[:0], *settings

    def to_document(self) -> dict[str, Any]:
        """The basis as JSON; `basis` reads it.

        Raises
        ------
        ConfigError
            If there is none.
        """
        if self.basis is None:
            raise ConfigError("there is no basis yet: it is found by decomposing the head of a model")
        into = self.basis.into.astype("<f8")
        directions = base64.b64encode(into.tobytes()).decode("ascii")
        document = {"effref": FORMAT, "version": VERSION, **self.basis.record}
        return document | {"sha256": _checksum(into), "width": len(into), "directions": [directions]}


# --- what a basis may be given as -----------------------------------------------------------------------------------


def _as_basis(given: Any) -> Basis:
    if isinstance(given, Basis):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _read(given)
    raise ConfigError(f"basis={reprlib.repr(given)}; it must be a file of 'effref prepare'")


def _read(path: str | os.PathLike[str]) -> Basis:
    """The basis of a file; ConfigError where it holds none of a version that is known here, or is damaged."""
    found = read_json("basis", path, MAKE, f"is damaged or not a JSON file: {MAKE}")
    if not isinstance(found, dict) or found.get("effref") != FORMAT:
        raise ConfigError(f"basis='{path}' holds no {FORMAT}: {MAKE}")
    if found.get("version") != VERSION:
        raise ConfigError(f"basis='{path}' has version {reprlib.repr(found.get('version'))}; {VERSION} can be read")
    into = _directions(found)
    if into is None:
        raise ConfigError(f"basis='{path}' is damaged, its directions do not have the checksum beside them: {MAKE}")
    about = {name: value for name, value in found.items() if name not in ("effref", "version", "directions", "sha256")}
    return Basis(into, about)


def _directions(found: Mapping[str, Any]) -> Array | None:
    """The matrix (D, D) of a document; None where it is not what was written."""
    width, lines = found.get("width"), found.get("directions")
    if not isinstance(width, int) or not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return None
    try:
        data = base64.b64decode("".join(lines), validate=True)
    except ValueError:
        return None
    into = np.frombuffer(data, "<f8") if len(data) == 8 * width * width else np.empty(0)
    sound = into.size and _checksum(into) == found.get("sha256") and bool(np.isfinite(into).all())
    return into.reshape(width, width) if sound else None


def _checksum(into: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(into, "<f8").tobytes()).hexdigest()
