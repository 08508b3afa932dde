"""What a method may look at before it runs: the exact model and real inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refimpl.engines.protocol import Array, Engine

if TYPE_CHECKING:
    from refimpl.weights import Model

Progress = Callable[[str, float], None]  # message, fraction done


def _silent(message: str, fraction: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Subject:
    """A model on an engine, with inputs to calibrate on.

    Attributes
    ----------
    model : Model
        With the weights of the exact model, as NumPy arrays.
    engine : Engine
    inputs : array or None
        As `refimpl.forward` takes them; None where a method is prepared without.
    progress : callable
        Told of long work.
    causal : bool or None
        Whether passes will be causal; None where they are as the model is.
    """

    model: Model
    engine: Engine
    inputs: Array | None = None
    progress: Progress = _silent
    causal: bool | None = None

    @property
    def is_causal(self) -> bool:
        """Whether passes will be causal."""
        return self.model.config.causal if self.causal is None else self.causal
