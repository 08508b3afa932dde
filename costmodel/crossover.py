"""Where one method overtakes another: the ratio of two predictions, its band, and where it passes 1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from costmodel.hardware import Band
from costmodel.predict import Prediction, kind_of

Interval = tuple[int, int]  # first and last place
STEPS_PER_OCTAVE = 4  # of the grid on which changes are looked for


@dataclass(frozen=True)
class Advantage:
    """How a method stands against a baseline at one place (a length, a batch).

    Attributes
    ----------
    speedup : float
        Seconds of the baseline / seconds of the method.
    low, high : float
        Its band; both are `speedup` where the hardware has no bands.
    """

    method_s: float
    baseline_s: float
    low: float
    high: float

    @property
    def speedup(self) -> float:
        return self.baseline_s / self.method_s


def advantage(method: Prediction, baseline: Prediction) -> Advantage:
    """Compare two predictions of the same work.

    What both execute alike cancels, and so does its error. A kind of op of which they execute different amounts keeps
    the error that its band gives to the difference D of its seconds; errors of different kinds count as independent::

        speedup = b / (b + sum D),   band: b / (b + sum D -+ sqrt(sum error(D)^2))
    """
    difference: dict[str, float] = defaultdict(float)
    spread: dict[str, Band | None] = {}
    for prediction, sign in ((method, 1.0), (baseline, -1.0)):
        for op, seconds in prediction.by_op:
            kind = kind_of(op.name, op.sizes)
            difference[kind] += sign * float(seconds.seconds)
            spread[kind] = prediction.hardware.bands.get(kind)
    slower = faster = 0.0
    for kind, more in difference.items():
        band = spread[kind]
        ends = [more * (end - 1.0) for end in (band.low, band.high)] if band else [0.0]
        slower += max(*ends, 0.0) ** 2
        faster += min(*ends, 0.0) ** 2
    own, other = float(method.total.seconds), float(baseline.total.seconds)
    return Advantage(
        own, other, other / (own + math.sqrt(slower)), other / max(own - math.sqrt(faster), own * 1e-3)
    )  # fmt: skip


def places(first: int, last: int) -> list[int]:
    """Whole numbers from `first` to `last`, about evenly apart as logarithms."""
    steps = max(1, math.ceil(math.log2(last / first) * STEPS_PER_OCTAVE))
    return sorted({round(first * (last / first) ** (step / steps)) for step in range(steps + 1)})


def wins(ahead: Callable[[int], bool], grid: Sequence[int]) -> list[Interval]:
    """Where `ahead` holds, as intervals of whole numbers within the ends of `grid`.

    Between neighbours of the grid that differ the place of the change is found by bisection; one that comes and goes
    between two neighbours is not seen.
    """
    return [(first, last) for first, last, holds in _stretches(ahead, grid) if holds]


def _stretches(ahead: Callable[[int], bool], grid: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    start, before, state = grid[0], grid[0], ahead(grid[0])
    for place in grid[1:]:
        if ahead(place) != state:
            changed = first_that_differs(ahead, before, place, state)
            yield start, changed - 1, state
            start, state = changed, not state
        before = place
    yield start, grid[-1], state


def first_that_differs(ahead: Callable[[int], bool], low: int, high: int, state: bool) -> int:
    """The first place whose `ahead` is not `state`; it is `state` at `low` and is not at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ahead(middle) == state else (low, middle)
    return high


def begins(intervals: Sequence[Interval], last: int) -> int | None:
    """The place from which on the method is ahead up to `last`; None where it is not ahead there."""
    return intervals[-1][0] if intervals and intervals[-1][1] == last else None
