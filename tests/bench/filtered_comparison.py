"""Time filtered attention on the CPU, quantisation included, against fused exact attention, call by call in turn.

    python tests/bench/filtered_comparison.py --seq 1024,2048,4096 --kept 0.15

Thresholds of each head are set first such that about the given part of the pairs is kept. Prints for each length the
milliseconds of both (of processor time with --processor-time, for one thread on a busy machine) and the ratio exact /
filtered over pairs of neighbouring calls: its median and its 10th to 90th percentile; `best` compares the fastest call
of each. `estimates` is a call that keeps the ties of the maximum alone: what is paid before any kept pair.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from refimpl.engines.numba_engine import NumbaEngine

ENGINE = NumbaEngine()
_SETTLE_S = 0.005  # lets threads that ran before go to sleep
_HALVINGS = 20  # of the interval that a threshold is searched in


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", default="1024,2048,4096", help="lengths T, comma-separated")
    parser.add_argument("--kept", type=float, default=0.15)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--repeats", type=int, default=15, help="rounds of calls per length")
    parser.add_argument("--stage2", choices=["int8", "float"], default="int8")
    parser.add_argument("--processor-time", action="store_true")
    return parser.parse_args()


def _filtered(q: Any, k: Any, v: Any, thresholds: Any, stage2: str) -> tuple[Any, Any]:
    (q_codes, q_scale), (k_codes, k_scale) = ENGINE.quantize(q), ENGINE.quantize(k)
    scale = q.shape[3] ** -0.5
    return ENGINE.filtered_attention(
        q, k, v, q_codes, k_codes, q_scale, k_scale, thresholds, scale, False, None, "floor", stage2
    )


def _thresholds(q: Any, k: Any, v: Any, part: float) -> Any:
    """One for each head, by halving."""
    low, high = np.zeros(q.shape[1]), np.full(q.shape[1], 30.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        few = _filtered(q, k, v, middle, "int8")[1][0] < part * q.shape[2] * k.shape[2]
        low, high = np.where(few, middle, low), np.where(few, high, middle)
    return high


def _compare(T: int, options: argparse.Namespace) -> None:
    clock: Callable[[], float] = time.process_time if options.processor_time else time.perf_counter
    rng = np.random.default_rng(0)
    shape = (3, 1, T, options.heads, options.head_dim)
    q, k, v = rng.standard_normal(shape, dtype=np.float32).transpose(0, 1, 3, 2, 4)  # each (1, H, T, D)
    q = 2 * q  # scores of standard deviation 2
    thresholds = _thresholds(q, k, v, options.kept)
    calls: dict[str, Callable[[], Any]] = {
        "exact": lambda: ENGINE.attention(q, k, v),
        "filtered": lambda: _filtered(q, k, v, thresholds, options.stage2),
        "estimates": lambda: _filtered(q, k, v, np.zeros(options.heads), options.stage2),
        "quantize": lambda: (ENGINE.quantize(q), ENGINE.quantize(k)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            time.sleep(_SETTLE_S)
            start = clock()
            call()
            seconds[name].append(clock() - start)
    kept = calls["filtered"]()[1].sum() / (options.heads * T * T)
    ratios = np.array(seconds["exact"]) / np.array(seconds["filtered"])
    best = min(seconds["exact"]) / min(seconds["filtered"])
    low, high = np.quantile(ratios, [0.1, 0.9])
    times = "  ".join(f"{name} {1e3 * min(found):.1f}" for name, found in seconds.items())
    print(f"T={T} kept {kept:.3f}  ms: {times}  ratio {np.median(ratios):.2f} ({low:.2f}-{high:.2f}) best {best:.2f}")


def main() -> None:
    """Compare at each length."""
    options = _parse_arguments()
    ENGINE.set_threads(options.threads)
    for T in map(int, options.seq.split(",")):
        _compare(T, options)


if __name__ == "__main__":
    main()
