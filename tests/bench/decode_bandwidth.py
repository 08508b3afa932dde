"""Time one decode step of a SmolLM2-shaped model on the numba engine against the mere reading of its bytes.

    python tests/bench/decode_bandwidth.py --cached 256,1024 --batch 1,4

A step of batch B reads every weight once (538 MB of float32, the vocabulary's table included) and the keys and values
of all cached positions. Every layer has weights of its own, so that nothing is left in a cache from the step before.

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
from typing import Any, NamedTuple

import numba
import numpy as np

from refimpl.engines.numba_engine import NumbaEngine

Array = Any

LAYERS, d, H, HKV, D, F, V = 30, 576, 9, 3, 64, 1536, 49152
EPS = 1e-5
READ_BYTES = 5 * 2**28  # 1.25 GiB, more than any cache holds
SETTLE_S = 0.1  # lets BLAS's idle threads stop spinning
RNG = np.random.default_rng(0)


class Layer(NamedTuple):
    """The weights of one layer."""

    attention_norm: Array  # (d,)
    qkv: Array  # ((H + 2 Hkv) D, d)
    output: Array  # (d, H D)
    feed_forward_norm: Array  # (d,)
    gate_up: Array  # (2 F, d)
    down: Array  # (d, F)


def random(*shape: int) -> Array:
    """Small random numbers."""
    return RNG.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)


def step(engine: NumbaEngine, x: Array, layers: list[Layer], caches: list[Array], cached: int, head: Array) -> Array:
    """Hidden states (B, 1, d) of one position to logits (B, 1, V), its keys and values appended to the caches."""
    cos, sin = np.ones((1, D // 2), np.float32), np.zeros((1, D // 2), np.float32)
    norm = np.ones(d, np.float32)
    for layer, (keys, values) in zip(layers, caches, strict=True):
        h = engine.rms_norm(x, layer.attention_norm, EPS)
        q, k, v = engine.project(h, layer.qkv, None, (H * D, HKV * D, HKV * D))
        q, k = engine.split_heads(q, H), engine.split_heads(k, HKV)
        q, k = engine.rotary(q, cos, sin, False), engine.rotary(k, cos, sin, False)
        k = engine.append(keys, k, cached - 1)
        v = engine.append(values, engine.split_heads(v, HKV), cached - 1)
        o = engine.merge_heads(engine.attention(q, k, v, None, True))
        x = engine.add(x, engine.linear(o, layer.output))
        h = engine.rms_norm(x, layer.feed_forward_norm, EPS)
        gate, up = engine.project(h, layer.gate_up, None, (F, F))
        x = engine.add(x, engine.linear(engine.swiglu(gate, up), layer.down))
    return engine.linear(engine.rms_norm(x, norm, EPS), head)


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

    engine = NumbaEngine()
    engine.set_threads(options.threads)
    sizes = ((d,), ((H + 2 * HKV) * D, d), (d, H * D), (d,), (2 * F, d), (d, F))
    layers, head = [Layer(*(random(*size) for size in sizes)) for _ in range(LAYERS)], random(V, d)
    weight_bytes = head.nbytes + sum(weight.nbytes for layer in layers for weight in layer)
    large = np.ones((READ_BYTES // (4 * d), d), np.float32)
    vector = np.ones(d, np.float32)

    cases: dict[tuple[int, int], tuple[int, Callable[[], Array]]] = {}
    for batch in map(int, options.batch.split(",")):
        for cached in map(int, options.cached.split(",")):
            shape = (2, batch, HKV, cached + 16, D)  # keys and values, with room for more
            caches, x = [random(*shape) for _ in range(LAYERS)], random(batch, 1, d)
            n_bytes = weight_bytes + 2 * LAYERS * batch * HKV * cached * D * 4
            cases[batch, cached] = (
                n_bytes,
                lambda x=x, caches=caches, cached=cached: step(engine, x, layers, caches, cached, head),
            )
    readers: dict[str, Callable[[], Array]] = {
        "BLAS": lambda: large @ vector,
        "compiled sum": lambda: read(large.reshape(-1), options.threads),
        "engine": lambda: engine.linear(vector[None], large),
    }
    for call in (*readers.values(), *(call for _, call in cases.values())):
        call()  # compiles

    def beside_readings(call: Callable[[], Array]) -> list[float]:
        """Seconds of the readers and of the call, one after the other."""
        blas = seconds(readers["BLAS"])
        time.sleep(SETTLE_S)
        return [blas, seconds(readers["compiled sum"]), seconds(readers["engine"]), seconds(call)]

    rounds = [[beside_readings(call) for _, call in cases.values()] for _ in range(options.repeats)]
    times = np.array(rounds).transpose(2, 1, 0)  # (readers and step, cases, repeats)

    print(f"float32, {options.threads} threads, {weight_bytes / 1e6:.0f} MB of weights")
    for name, reading_s in zip(readers, times, strict=False):
        rates = large.nbytes / reading_s.ravel() / 1e9
        print(f"{name:>12} reads {np.median(rates):5.1f} GB/s, at best {rates.max():.1f}")
    reading_s = times[:3].min(0) / large.nbytes  # (cases, repeats), per byte
    print(f"{'B':>2} {'cached':>6} {'MB':>6} {'step ms':>8} {'GB/s':>5} {'ratio':>6}  {'p10-p90':9}  best")
    for ((batch, cached), (n_bytes, _)), step_s, byte_s in zip(cases.items(), times[3], reading_s, strict=True):
        low, middle, high = np.percentile(step_s / (byte_s * n_bytes), (10, 50, 90))
        best = step_s.min() / (reading_s.min() * n_bytes)
        columns = f"{n_bytes / 1e6:6.0f} {1e3 * np.median(step_s):8.1f} {n_bytes / np.median(step_s) / 1e9:5.1f}"
        print(f"{batch:2} {cached:6} {columns} {middle:6.2f}  {low:.2f}-{high:.2f}  {best:.2f}")


if __name__ == "__main__":
    main()
