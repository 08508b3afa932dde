"""Training of head-wise thresholds by Adam: LATTE's idea (arXiv 2404.07519) under a recipe of ours.

    loss = task loss + weight (kept - target_kept)^2

with the task loss of `refimpl.training.samples.task_loss` and kept the mean share of visible pairs that all heads keep.
After every step thresholds below 0 are set to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq

from refimpl.engines.protocol import Array
from refimpl.methods.subject import Progress
from refimpl.parameters.base import require_choice, require_int, require_number
from refimpl.training.filter import Rule
from refimpl.training.passes import TrainableModel
from refimpl.training.samples import Samples, task_loss

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam: arXiv 1412.6980, algorithm 1
CALIBRATION = 4  # windows that starting thresholds are found on, at most
NEAR = 5e-4  # of a kept share, where one is matched
LARGEST = 100.0  # threshold that is tried; a key that far from the best one has e^-100 of its weight


@dataclass(frozen=True)
class Recipe:
    """How thresholds are trained; all of it ours.

    Attributes
    ----------
    target_kept : float
        The share of visible pairs to keep.
    weight : float
        Of the squared distance from it in the loss.
    rate : float
        Of Adam, in units of scores.
    batch : int
        Windows a step.
    seed : int
        Of the order of the windows.
    start : {"quantile", "global"}
        Thresholds before the first step: for each head that which keeps `target_kept` of its pairs, layer after layer
        with the filter on, or one for all heads.
    rule : Rule
    """

    target_kept: float = 0.15
    weight: float = 1000.0
    rate: float = 0.2
    batch: int = 1
    seed: int = 0
    start: Literal["quantile", "global"] = "quantile"
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        require_number("target_kept", self.target_kept, 1e-4, 1.0)
        require_number("weight", self.weight, 0.0, 1e9)
        require_number("rate", self.rate, 1e-9, 1e3)
        require_int("batch", self.batch, 1)
        require_int("seed", self.seed, 0)
        require_choice("start", self.start, ("quantile", "global"))


@dataclass(frozen=True)
class State:
    """Where a training stands; the same state goes on in the same way.

    Attributes
    ----------
    thresholds, mean, square : array, shape (L, H), float64
        Thresholds, and Adam's running means of their gradient and its square.
    losses, kept : tuple of float
        Of each step so far: the task loss, and the mean kept share, before the step was taken.
    """

    thresholds: Array
    mean: Array
    square: Array
    losses: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)


def begin(model: TrainableModel, samples: Samples, recipe: Recipe) -> State:
    """The state before the first step."""
    find = {"quantile": quantile_thresholds, "global": global_threshold}[recipe.start]
    thresholds = find(model, samples[:CALIBRATION], recipe.target_kept)
    return State(thresholds, np.zeros_like(thresholds), np.zeros_like(thresholds))


def train(
    model: TrainableModel, samples: Samples, recipe: Recipe, state: State, steps: int, progress: Progress
) -> Iterator[State]:
    """Take steps until there are `steps`; yields the state after each.

    Parameters
    ----------
    model : TrainableModel
        With the recipe's rule.
    samples : Samples
    recipe : Recipe
    state : State
        From `begin`, or of an interrupted training.
    steps : int
        In all, those that were taken before included.
    progress : callable
        Given a message and the fraction done.
    """
    while state.step < steps:
        chosen = order(len(samples), state.step, recipe)
        gradient, loss, kept = gradient_of(model, samples[chosen], state.thresholds, recipe)
        state = replace(adam(state, gradient, recipe.rate), losses=(*state.losses, loss), kept=(*state.kept, kept))
        done = f"step {state.step} of {steps}, loss {loss:.4f}, kept {kept:.3f}"
        progress(done, state.step / steps)
        yield state


def order(count: int, step: int, recipe: Recipe) -> list[int]:
    """The windows of a step: all windows in a random order, then all in another one, and so on."""
    chosen = []
    for place in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, at = divmod(place, count)
        chosen.append(int(np.random.default_rng([recipe.seed, epoch]).permutation(count)[at]))
    return chosen


def gradient_of(
    model: TrainableModel, samples: Samples, thresholds: Array, recipe: Recipe
) -> tuple[Array, float, float]:
    """The loss's gradient (L, H), the task loss, and the mean kept share."""
    found = model(samples.inputs, thresholds)
    loss, doutput = task_loss(found.output, samples.targets)
    kept = float(found.kept.mean())
    dkept = np.full_like(found.kept, 2.0 * recipe.weight * (kept - recipe.target_kept) / found.kept.size)
    return found.backward(doutput, dkept), loss, kept


def adam(state: State, gradient: Array, rate: float) -> State:
    """One step of Adam (arXiv 1412.6980, algorithm 1), then the projection onto thresholds of at least 0."""
    step = state.step + 1
    mean = BETAS[0] * state.mean + (1.0 - BETAS[0]) * gradient
    square = BETAS[1] * state.square + (1.0 - BETAS[1]) * gradient**2
    move = mean / (1.0 - BETAS[0] ** step) / (np.sqrt(square / (1.0 - BETAS[1] ** step)) + EPSILON)
    return replace(state, thresholds=np.maximum(state.thresholds - rate * move, 0.0), mean=mean, square=square)


# --- thresholds without training ------------------------------------------------------------------------------------


def quantile_thresholds(model: TrainableModel, samples: Samples, kept: float) -> Array:
    """For each head the threshold below which this share of its distances lies: (L, H).

    Layer after layer in one pass, so that a layer sees what the filtered ones before it give.
    """

    def choose(layer: int, distances: Array) -> Array:
        of_heads = np.moveaxis(distances, 1, 0)  # (H, B, T, T)
        return np.array([np.quantile(one[np.isfinite(one)], kept) for one in of_heads])

    return model(samples.inputs, choose, gradient=False).thresholds


def global_threshold(model: TrainableModel, samples: Samples, kept: float) -> Array:
    """One threshold for all heads that keeps this mean share of the samples: (L, H), all the same."""
    shape = (model.config.layers, model.config.heads)
    return matching(model, samples, kept, lambda theta: np.full(shape, theta), 0.0, LARGEST)


def kept_share(model: TrainableModel, samples: Samples, thresholds: Array) -> float:
    """The mean kept share of all windows, layers and heads."""
    return float(kept_of_heads(model, samples, thresholds).mean())


def kept_of_heads(model: TrainableModel, samples: Samples, thresholds: Array) -> Array:
    """The kept share of each head, the mean over all windows: (L, H)."""
    shares: Any = [model(samples.inputs[[at]], thresholds, gradient=False).kept for at in range(len(samples))]
    return np.mean(shares, axis=0)


def matching(
    model: TrainableModel, samples: Samples, kept: float, family: Callable[[float], Array], low: float, high: float
) -> Array:
    """Of thresholds that grow with a number from `low` to `high`, those that keep this mean share, within `NEAR`.

    Those of the nearer end where none do.
    """

    @cache  # the ends are asked for twice
    def beyond(x: float) -> float:
        difference = kept_share(model, samples, family(x)) - kept
        return 0.0 if abs(difference) < NEAR else difference

    if beyond(low) >= 0.0:
        return family(low)
    if beyond(high) <= 0.0:
        return family(high)
    return family(brentq(beyond, low, high, xtol=1e-4 * (high - low)))
