"""Trained thresholds beside untrained ones that keep as much: how good a model is under each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.training.passes import TrainableModel
from refimpl.training.samples import Samples, task_loss
from refimpl.training.thresholds import CALIBRATION, global_threshold, matching, quantile_thresholds


@dataclass(frozen=True)
class Quality:
    """What a model does under thresholds, with the hard filter.

    Attributes
    ----------
    kept : float
        Share of visible pairs.
    loss : float
        Mean task loss of all windows: cross-entropy in nats, or squared error relative to the exact output.
    losses : tuple of float
        Of each window.
    perplexity : float or None
        Of a causal language model.
    cosine : float or None
        Of others: of their output and the exact one, the mean over positions.
    """

    kept: float
    loss: float
    losses: tuple[float, ...]
    perplexity: float | None = None
    cosine: float | None = None

    def to_document(self) -> dict[str, Any]:
        """As JSON; what does not apply is left out."""
        shown = {"kept": self.kept, "loss": self.loss, "perplexity": self.perplexity, "cosine": self.cosine}
        return {name: value for name, value in shown.items() if value is not None}


def evaluate(model: TrainableModel, samples: Samples, thresholds: Array) -> Quality:
    """Judge thresholds (L, H) on samples, window by window; infinite ones keep everything."""
    losses, kept, cosines = [], [], []
    speaks = model.config.generates
    for at in range(len(samples)):
        one = samples[[at]]
        found = model(one.inputs, thresholds, gradient=False)
        losses.append(task_loss(found.output, one.targets)[0])
        kept.append(found.kept.mean())
        if not speaks:
            cosines.append(_cosine(found.output, one.targets))
    loss = float(np.mean(losses))
    perplexity = math.exp(min(loss, 700.0)) if speaks else None
    cosine = None if speaks else float(np.mean(cosines))
    return Quality(float(np.mean(kept)), loss, tuple(losses), perplexity, cosine)


def _cosine(output: Array, target: Array) -> float:
    norms = np.linalg.norm(output, axis=-1) * np.linalg.norm(target, axis=-1)  # (B, T)
    return float(((output * target).sum(axis=-1) / norms).mean())


def global_thresholds(model: TrainableModel, training: Samples, held_out: Samples, kept: float) -> Array:
    """One threshold for all heads that keeps this mean share of the held-out windows."""
    return global_threshold(model, held_out, kept)


def quantile_of_heads(model: TrainableModel, training: Samples, held_out: Samples, kept: float) -> Array:
    """For each head the same quantile of its distances on training windows, which keeps this share of held-out ones."""
    few = training[:CALIBRATION]
    low, high = kept / 3.0, min(3.0 * kept, 1.0)
    return matching(model, held_out, kept, lambda share: quantile_thresholds(model, few, share), low, high)


# Their one number is set on the held-out windows themselves, which favours them.
UNTRAINED = {"global": global_thresholds, "quantile": quantile_of_heads}
