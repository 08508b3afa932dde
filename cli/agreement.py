"""How far one output lies from another: sums over positions, in float64, a few positions at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 2**20  # elements that are compared at a time, in float64


def agreement(output: Any, exact: Any, positions: int | None = None) -> dict[str, float]:
    """Relative L2 error, cosine similarity and largest deviation.

    Parameters
    ----------
    output, exact : array, shape (B, T, d)
    positions : int, optional
        Compare the first ones only; the rest is padding.

    Returns
    -------
    errors : dict
        ``rel_l2`` is |output - exact| / |exact|, ``cosine`` of the two as vectors, ``max_abs`` the largest deviation.
    """
    found = Agreement()
    for own, theirs in zip(output, exact, strict=True):
        found.add(own[:positions], theirs[:positions])
    return found.figures()


@dataclass
class Agreement:
    """Sums over what was added; the figures are those of everything together, as two long vectors x and y.

    Attributes
    ----------
    squared, product, own, theirs, largest : float
        ``sum (x - y)^2``, ``sum x y``, ``sum x^2``, ``sum y^2``, ``max |x - y|``, where y is the exact one.
    """

    squared: float = 0.0
    product: float = 0.0
    own: float = 0.0
    theirs: float = 0.0
    largest: float = 0.0

    def add(self, output: Any, exact: Any) -> None:
        """Take in the positions of one sequence: two arrays (T, d)."""
        for part in _blocks(exact):
            x, y = (np.asarray(array[part], np.float64) for array in (output, exact))
            self.squared += float(np.sum((x - y) ** 2))
            self.product += float(np.sum(x * y))
            self.own += float(np.sum(x * x))
            self.theirs += float(np.sum(y * y))
            self.largest = max(self.largest, float(np.max(np.abs(x - y))))

    def figures(self) -> dict[str, float]:
        """``rel_l2`` |x - y| / |y|, ``cosine`` x y / (|x| |y|), ``max_abs``."""
        own, theirs = self.own, self.theirs
        return {
            "rel_l2": (self.squared / theirs) ** 0.5 if theirs else self.squared**0.5,
            "cosine": self.product / (own * theirs) ** 0.5 if own and theirs else float(own == theirs),
            "max_abs": self.largest,
        }


@dataclass
class NextToken:
    """Sums over positions of what a language head says of the next token: q under a method, p under exact attention.

    Attributes
    ----------
    positions : int
        That were added.
    divergence, agreed : float, int
        ``sum KL(p || q)`` in nats, and positions whose likeliest token is the same (of equal ones the first).
    surprise, surprise_exact : float
        ``sum -ln q[next]`` and ``sum -ln p[next]`` in nats, of the tokens that did follow.
    scored : int
        Positions whose next token was given.
    """

    positions: int = 0
    divergence: float = 0.0
    agreed: int = 0
    surprise: float = 0.0
    surprise_exact: float = 0.0
    scored: int = 0

    def add(self, logits: Any, exact: Any, following: Any = None) -> None:
        """Take in the positions of one sequence: logits (T, V) of both, and the tokens that followed (T,)."""
        from scipy.special import log_softmax

        for part in _blocks(exact):
            q, p = (log_softmax(np.asarray(array[part], np.float64), axis=-1) for array in (logits, exact))  # (n, V)
            self.positions += len(p)
            self.divergence += float(np.sum(np.exp(p) * (p - q)))
            self.agreed += int(np.sum(logits[part].argmax(axis=-1) == exact[part].argmax(axis=-1)))
            if following is not None:
                each = np.arange(len(p)), following[part]
                self.surprise -= float(np.sum(q[each]))
                self.surprise_exact -= float(np.sum(p[each]))
                self.scored += len(p)

    def figures(self) -> dict[str, float | None]:
        """Means over positions: ``kl_nats``, ``top1_agreement``, ``perplexity`` exp(mean surprise) of both."""
        found: dict[str, float | None] = {
            "kl_nats": self.divergence / self.positions,
            "top1_agreement": self.agreed / self.positions,
        }
        if self.scored:
            found["perplexity"] = _exp(self.surprise / self.scored)
            found["perplexity_exact"] = _exp(self.surprise_exact / self.scored)
        return found


def _exp(value: float) -> float | None:
    """None where it is beyond the largest number."""
    try:
        return math.exp(value)
    except OverflowError:
        return None


def _blocks(array: Any) -> Iterator[slice]:
    """The rows of (T, d), about `_BLOCK` elements at a time."""
    rows = max(_BLOCK // max(array.shape[1], 1), 1)
    for start in range(0, array.shape[0], rows):
        yield slice(start, start + rows)
