"""The calibration of LATTE's thresholds: for each head the one that keeps a given part of its visible pairs.

One pass over the samples. In every layer, with the layers before it filtering by what was found for them, the gaps

    g_ij = scale sigma_q sigma_k (max_j m~_ij - m~_ij)

of all visible pairs of a head are taken, from the 4-bit estimates that the filter itself compares; theta is the gap
below which the wanted part of them lies. The source has trained thresholds and says nothing of how they start: this is
ours.
"""

from __future__ import annotations

import time
from numbers import Real
from typing import Any

import numpy as np

from refimpl.components import ATTENTION
from refimpl.config import ModelConfig
from refimpl.engines.numpy_engine import upper_nibble
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, InputError
from refimpl.methods.latte import Latte
from refimpl.methods.steps import Layer
from refimpl.methods.subject import Subject
from refimpl.model import Runner, check_inputs, sequence_length
from refimpl.parameters.latte import LatteParameters, Thresholds
from refimpl.preparation.checksum import checksum
from refimpl.recorder import At

ABOVE = 1 + 1e-9  # a threshold lies just above the gap that it keeps, so that rounding cannot drop it


def calibrate_thresholds(parameters: LatteParameters, subject: Subject) -> Thresholds:
    """Find the threshold of every head.

    Parameters
    ----------
    parameters : LatteParameters
        `kept` is what the thresholds are to keep.
    subject : Subject
        With inputs: their rows are the samples; rows of more than `sample_tokens` tokens are cut.

    Returns
    -------
    thresholds : Thresholds
        Its record holds the parts kept on the samples.

    Raises
    ------
    ConfigError, InputError
        If there are no inputs to calibrate on.
    """
    config = subject.model.config
    samples = calibration_samples(parameters, config, subject.inputs)
    program = _Calibration(parameters, subject)
    Runner(subject.model, subject.engine)(samples, program, causal=subject.is_causal, record=False)
    subject.progress("latte: calibrated", 1.0)
    record = {
        "model": config.name,
        "weights_sha256": checksum(subject.model.weights, np.empty(0)),
        "layers": config.layers,
        "heads": config.heads,
        "nibble": parameters.nibble,
        "source": "quantile",
        "target_kept": parameters.kept if isinstance(parameters.kept, Real) else [list(row) for row in parameters.kept],
        "kept": program.kept,
        "stage2": parameters.stage2,
        "samples": len(samples),
        "sample_length": sequence_length(config, samples),
    }
    return Thresholds(program.found, record)


def calibration_samples(parameters: LatteParameters, config: ModelConfig, inputs: Array | None) -> Array:
    """At most `samples` rows; those of tokens are cut into pieces of `sample_tokens`, what remains is left out."""
    if inputs is None:
        raise ConfigError(
            "latte calibrates its thresholds on inputs, and there are none: prepare it with inputs, or give thresholds "
            "or gamma"
        )
    check_inputs(config, inputs)
    if len(inputs) == 0:
        raise InputError(f"inputs have shape {inputs.shape}; latte needs at least one row to calibrate on")
    if config.stem == "tokens":
        size = min(parameters.sample_tokens, inputs.shape[1])
        whole = inputs.shape[1] // size * size
        inputs = inputs[:, :whole].reshape(-1, size)
    elif config.streams:
        inputs = inputs[:, : config.stem_length(min(config.chunk, sequence_length(config, inputs)))]
    return inputs[: parameters.samples]


class _Calibration(Latte):
    """A pass that finds each layer's thresholds when it comes to it, and goes on with what they keep."""

    def __init__(self, parameters: LatteParameters, subject: Subject) -> None:
        config = subject.model.config
        self.config, self.parameters = config, parameters
        self.target = parameters.target(config)
        self.progress, self.began_s = subject.progress, time.perf_counter()
        self.found: list[list[float]] = []
        self.kept: list[list[float]] = []

    def thetas_of(
        self, at: At, layer: Layer, queries: tuple[Array, Array], keys: tuple[Array, Array]
    ) -> tuple[float, ...]:
        spent = time.perf_counter() - self.began_s
        self.progress(f"latte: calibrating layer {layer.index}, {spent:.0f} s", layer.index / self.config.layers)
        host = at(ATTENTION).to_numpy
        (q, q_scale), (k, k_scale) = ([host(part) for part in parts] for parts in (queries, keys))
        gaps = _Gaps(q, q_scale, k, k_scale, layer, self.parameters.nibble)
        pairs = [gaps.of_head(head) for head in range(self.config.heads)]
        thetas = [_quantile(each, part) for each, part in zip(pairs, self.target[layer.index], strict=True)]
        self.found.append(thetas)
        self.kept.append([float(np.mean(each <= theta)) for each, theta in zip(pairs, thetas, strict=True)])
        return tuple(thetas)


class _Gaps:
    """How far the estimates of a layer lie below the largest of their row."""

    def __init__(self, q: Array, q_scale: Array, k: Array, k_scale: Array, layer: Layer, nibble: str) -> None:
        self.q, self.k = (upper_nibble(np, codes, nibble).astype(np.float32) for codes in (q, k))  # whole, exact
        self.group = q.shape[1] // k.shape[1]
        self.step = 256.0 * layer.scale * q_scale.astype(np.float64) * np.repeat(k_scale, self.group, axis=1)
        self.visible = np.ones((q.shape[2], k.shape[2]), bool)
        if layer.causal:
            self.visible = np.tril(self.visible, k.shape[2] - q.shape[2])

    def of_head(self, head: int) -> Array:
        """The gaps of all visible pairs of a head, in the scale of scores: one axis."""
        found: list[Any] = []
        for b in range(len(self.q)):
            estimates = self.q[b, head] @ self.k[b, head // self.group].T  # (T, S)
            largest = np.where(self.visible, estimates, -np.inf).max(axis=1, keepdims=True)
            found.append((largest - estimates)[self.visible].astype(np.float64) * self.step[b, head, 0, 0])
        return np.concatenate(found)


def _quantile(gaps: Array, part: float) -> float:
    """The least threshold that keeps at least this part of the gaps."""
    count = max(1, int(np.ceil(part * gaps.size - 1e-9)))
    return np.inf if count >= gaps.size and part >= 1 else float(np.partition(gaps, count - 1)[count - 1] * ABOVE)
