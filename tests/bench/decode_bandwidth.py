"""Time one decode step of SmolLM2-135M's shape on the numba engine against the mere reading of its bytes.

    python tests/bench/decode_bandwidth.py --cached 256,1024 --batch 1,4

A step of batch B reads every weight once (538 MB of float32, the vocabulary's table included) and the keys and values
of all cached positions. It is timed as a recorded step, one compiled call, and as an ordinary one, op by op.

First the bandwidth at which this machine reads more than 1 GB on the same threads, in three ways: BLAS's matrix-vector
product, a compiled sum, and the engine's own product with one row. Then, for each case, the median milliseconds of a
step, its bytes per second and its ratio to the time in which the fastest of the three, measured right before it, reads
as many bytes: the median over the repeats, its 10th to 90th percentile, and the fastest step against the fastest
reading. On a shared machine only ratios mean something.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

import costmodel
import refimpl
from refimpl.config import Workload, preset

Array = Any

METHOD = "flash"
READ_BYTES = 5 * 2**28  # 1.25 GiB, more than any cache holds
SETTLE_S = 0.1  # lets BLAS's idle threads stop spinning


def steps(runner: refimpl.Runner, batch: int, cached: int) -> dict[str, Callable[[], object]]:
    """A recorded and an ordinary step behind `cached` positions, each of which stays there."""
    ready = runner.prepare(METHOD)
    cache = runner.new_cache(cached + 1, ready, batch=batch)
    ids = np.random.default_rng(0).integers(runner.config.vocab, size=(batch, cached + 1))
    runner(ids[:, :cached], ready, record=False, cache=cache)

    def ordinary() -> None:
        runner(ids[:, cached:], ready, record=False, cache=cache)
        cache.truncate(cached)

    return {"recorded": runner.recorded(ids[:, cached:], ready, cache=cache), "ordinary": ordinary}


@numba.njit(parallel=True, fastmath=True, nogil=True)
def read(x: Array, parts: int) -> Array:
    """Sums of parts of x: as much as reading it takes."""
    totals = np.zeros(parts, x.dtype)
    for part in numba.prange(parts):
        piece, total = x[part * x.size // parts : (part + 1) * x.size // parts], x.dtype.type(0)
        for i in range(piece.size):
            total += piece[i]
        totals[part] = total
    return totals


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", default="256,1024", help="positions in the cache, comma-separated")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    config = preset("smollm2-135m")
    runner = refimpl.Runner(refimpl.load_model(config, weights="random"), "numba")
    engine = runner.engine
    engine.set_threads(options.threads)
    large = np.ones((READ_BYTES // (4 * config.d_model), config.d_model), np.float32)
    vector = np.ones(config.d_model, np.float32)

    cases: dict[tuple[int, int, str], tuple[int, Callable[[], object]]] = {}
    for batch in map(int, options.batch.split(",")):
        for cached in map(int, options.cached.split(",")):
            cost = costmodel.estimate(METHOD, config, Workload(phase="decode", kv_len=cached, batch=batch)).total
            for kind, step in steps(runner, batch, cached).items():
                cases[batch, cached, kind] = int(cost.weight_bytes + cost.kv_bytes), step
    readers: dict[str, Callable[[], object]] = {
        "BLAS": lambda: large @ vector,
        "compiled sum": lambda: read(large.reshape(-1), options.threads),
        "engine": lambda: engine.linear(vector[None], large),
    }
    for call in (*readers.values(), *(call for _, call in cases.values())):
        call()  # compiles

    def beside_readings(call: Callable[[], object]) -> list[float]:
        """Seconds of the readers and of the call, one after the other."""
        blas = seconds(readers["BLAS"])
        time.sleep(SETTLE_S)
        return [blas, seconds(readers["compiled sum"]), seconds(readers["engine"]), seconds(call)]

    rounds = [[beside_readings(call) for _, call in cases.values()] for _ in range(options.repeats)]
    times = np.array(rounds).transpose(2, 1, 0)  # (readers and step, cases, repeats)

    print(f"float32, {options.threads} threads, {METHOD}")
    for name, reading_s in zip(readers, times, strict=False):
        rates = large.nbytes / reading_s.ravel() / 1e9
        print(f"{name:>12} reads {np.median(rates):5.1f} GB/s, at best {rates.max():.1f}")
    print(f"{'B':>2} {'cached':>6} {'step':8} {'MB':>6} {'ms':>6} {'GB/s':>5} {'ratio':>6}  {'p10-p90':9}  best")
    reading_s = times[:3].min(0) / large.nbytes  # (cases, repeats), per byte
    for (case, (n_bytes, _)), step_s, byte_s in zip(cases.items(), times[3], reading_s, strict=True):
        low, middle, high = np.percentile(step_s / (byte_s * n_bytes), (10, 50, 90))
        best = step_s.min() / (reading_s.min() * n_bytes)
        columns = f"{n_bytes / 1e6:6.0f} {1e3 * np.median(step_s):6.1f} {n_bytes / np.median(step_s) / 1e9:5.1f}"
        batch, cached, kind = case
        print(f"{batch:2} {cached:6} {kind:8} {columns} {middle:6.2f}  {low:.2f}-{high:.2f}  {best:.2f}")


if __name__ == "__main__":
    main()
