"""Central differences in float64, the truth that gradients are tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

STEP = 1e-5  # error of a central difference: about step^2 from the curve and 1e-16 / step from rounding


def central_differences(f: Callable[[Any], float], x: Any) -> Any:
    """df/dx for every element of x, float64."""
    gradient = np.empty_like(x)
    for place in np.ndindex(*x.shape):
        ends = []
        for sign in (1.0, -1.0):
            moved = x.copy()
            moved[place] += sign * STEP
            ends.append(f(moved))
        gradient[place] = (ends[0] - ends[1]) / (2.0 * STEP)
    return gradient


def assert_gradient(found: Any, f: Callable[[Any], float], x: Any, name: str = "") -> None:
    """The gradient found equals central differences of f at x within 1e-7 of its largest element."""
    expected = central_differences(f, x)
    assert found.shape == x.shape, name
    size = float(np.abs(expected).max(initial=0.0))
    worst = float(np.abs(found - expected).max(initial=0.0))
    assert worst <= 1e-7 * size + 1e-9, f"{name} {x.shape}: off by {worst:.2e} where the largest is {size:.2e}"
