"""Linear and logarithmic scales: numbers to pixels, and where the ticks stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Linear:
    """`low` to `high` onto pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten: as many as there is room for, one at least where `most` >= 2."""

        def inside(step: float) -> range:
            return range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)

        power = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(one * power for one in STEPS if len(inside(one * power)) <= most + 1)
        return [place * step for place in inside(step)]


@dataclass(frozen=True)
class Log:
    """The logarithms of `low` to `high` onto pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Powers of ten; less than two of them are helped out with 2 and 5, too many are thinned."""
        low, high = math.log10(self.low), math.log10(self.high)
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(powers) >= 3:
            every = math.ceil(len(powers) / most)
            return [10.0**power for power in powers if (power - powers[0]) % every == 0]
        fine = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in STEPS[:3]]
        inside = [tick for tick in fine if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]
        if len(inside) >= 2:
            return inside
        return [tick for tick in Linear(self.low, self.high, 0, 1).ticks(4) if tick > 0]


def around(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """A logarithmic range that holds positive `values` with some room; a factor of 1.5 at least."""
    low, high = min(values), max(values)
    room = max((high / low) ** share, 1.02)
    if high / low < 1.5:
        room = max(room, math.sqrt(1.5 * low / high))
    return low / room, high * room
