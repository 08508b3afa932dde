"""Calibration: run small models of every recipe and method, time each op where it stands, fit the machine's constants.

The models are synthetic and their sizes are not those of any preset, so that a prediction for a preset is one for
shapes that were not fitted. Ops are timed inside forward passes, because there their operands are as warm or cold in
the caches as they will be later; alone in a loop they run faster than they ever do in a model.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from costmodel.closed_form import estimate
from costmodel.fit import Pass, Sample, fit
from costmodel.hardware import Hardware
from refimpl.config import DTYPES, ModelConfig, Workload
from refimpl.engines import ENGINES
from refimpl.engines import engine as get_engine
from refimpl.inputs import random_inputs
from refimpl.model import Runner
from refimpl.weights import load_model

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Cell:
    """One synthetic model at one length."""

    config: ModelConfig
    seq: int
    batch: int = 1
    methods: tuple[tuple[str, dict[str, Any]], ...] = field(
        default=(("dense", {}), ("flash", {}), ("reuse", {"groups": [[0, 1]]}))
    )


def _model(recipe: str, d_model: int, heads: int, d_ff: int, **changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "conformer": {"stem": "frames", "features": 48, "strides": (2, 2), "position": "relative", "conv_kernel": 23,
                      "activation": "silu", "final_norm": False},
        "post-norm": {"vocab": 3000, "token_types": 2, "position": "learned", "max_positions": 4096,
                      "embedding_norm": True, "final_norm": False},
        "pre-norm": {"stem": "frames", "features": 48, "strides": (1, 2), "position": "sinusoidal",
                     "max_positions": 4096},
        "decoder": {"recipe": "pre-norm", "vocab": 5000, "position": "rotary", "norm": "rms", "bias": False,
                    "activation": "silu", "gated": True, "causal": True, "head": True},
    }[recipe]  # fmt: skip
    return ModelConfig(
        **{"name": "calibration", "recipe": recipe, "layers": 2, "d_model": d_model, "heads": heads, "d_ff": d_ff,
           **base, **changes}
    )  # fmt: skip


# Widths, head widths and lengths on either side of what people run; no preset's own.
CELLS = (
    Cell(_model("conformer", 208, 4, 832), 90),
    Cell(_model("conformer", 320, 5, 1280), 640),
    Cell(_model("conformer", 144, 3, 576), 1700),
    Cell(_model("conformer", 240, 4, 960), 340, batch=2),
    Cell(_model("post-norm", 320, 10, 1280), 60),
    Cell(_model("post-norm", 640, 10, 2560), 420),
    Cell(_model("post-norm", 288, 9, 1152), 200, batch=3),
    Cell(_model("post-norm", 448, 14, 1792), 1100),
    Cell(_model("pre-norm", 320, 5, 1280), 1250),
    Cell(_model("pre-norm", 512, 8, 2048), 160),
    Cell(_model("pre-norm", 448, 7, 1792), 2600),
    Cell(_model("decoder", 512, 8, 1408, kv_heads=2), 330),
    Cell(_model("decoder", 448, 7, 1216), 900),
    Cell(_model("decoder", 768, 6, 2048, kv_heads=3, activation="gelu_tanh", gated=False), 60),
)


def calibrate(
    engine: str = "numba",
    threads: int | None = None,
    dtype: str = "float32",
    seconds: float = 12.0,
    progress: Progress | None = None,
) -> Hardware:
    """Fit the constants of this machine under one engine.

    Parameters
    ----------
    engine : {"numba", "numpy", "cupy"}
    threads : int, optional
        CPU threads; default the engine's own.
    dtype : {"float32", "float64", "float16"}
    seconds : float
        Time to spend on measuring, after compilation; more gives steadier medians.
    progress : callable, optional
        Called with a message and the fraction done.

    Returns
    -------
    hardware : Hardware
        A profile of level "calibrated"; its `about` holds what it was fitted on and the residuals.
    """
    say = progress or (lambda message, fraction: None)
    ops = get_engine(engine)
    if threads is not None and hasattr(ops, "set_threads"):
        ops.set_threads(threads)
    passes = list(_measure(ops, dtype, seconds, say))
    say("fitting", 1.0)
    return fit(passes, DTYPES[dtype], **_machine(engine, ops, dtype))


def _measure(ops: Any, dtype: str, seconds: float, say: Progress) -> Iterator[Pass]:
    """Every cell under every method, in rounds until the time is spent; medians over the rounds."""
    runs = [(cell, method, params) for cell in CELLS for method, params in cell.methods]
    runners = {id(cell): Runner(load_model(cell.config, dtype=dtype), ops) for cell in CELLS}
    inputs = {id(cell): random_inputs(cell.config, cell.seq, cell.batch, dtype=dtype) for cell in CELLS}
    seen: dict[int, list[tuple[list[Any], float]]] = defaultdict(list)
    for index, (cell, method, params) in enumerate(runs):  # compiles and warms up
        say("compiling and warming up", index / len(runs))
        runners[id(cell)](inputs[id(cell)], method, params, record=False)
    start = time.perf_counter()
    for round_ in range(1000):
        for index, (cell, method, params) in enumerate(runs):
            runner, given = runners[id(cell)], inputs[id(cell)]
            recorded = runner(given, method, params)
            plain = runner(given, method, params, record=False)
            seen[index].append((recorded.calls, plain.seconds))
            spent = (time.perf_counter() - start) / seconds
            say("measuring", min(spent, 1.0))
        if spent >= 1.0 and round_ >= 2:
            break
    for index, (cell, method, params) in enumerate(runs):
        work = Workload(cell.seq, cell.batch, dtype=dtype)
        yield Pass(
            estimate(method, cell.config, work, params),
            list(_samples([calls for calls, _ in seen[index]])),
            float(np.median([total for _, total in seen[index]])),
        )


def _samples(rounds: list[list[Any]]) -> Iterator[Sample]:
    """One sample per op and sizes of a pass: the median over rounds of the mean over its calls in a round."""
    times: dict[tuple[str, tuple[tuple[str, int], ...]], list[float]] = defaultdict(list)
    for calls in rounds:
        here: dict[tuple[str, tuple[tuple[str, int], ...]], list[float]] = defaultdict(list)
        for call in calls:
            here[call.op, call.sizes].append(call.seconds)
        for key, values in here.items():
            times[key].append(float(np.mean(values)))
    for (op, sizes), values in times.items():
        yield Sample(op, dict(sizes), float(np.median(values)), len(values))


def _machine(engine: str, ops: Any, dtype: str) -> dict[str, Any]:
    """What the profile says of where it was fitted."""
    device = ENGINES[engine][2]
    return {
        "kind": device,
        "about": {"engine": engine, "device": device, "threads": getattr(ops, "threads", None), "dtype": dtype},
    }
