"""Time what the methods that select do on a device against what they replace: SVD-softmax, LATTE, AttMemo's gathers.

    python tests/bench/gpu_selection.py --vocab 800000 --d-model 256 --rows 1,4,16

First table: probabilities of a vocabulary, by a preview, selection, full views and a softmax, against the whole product
and a softmax. Second: attention over kept keys, codes included, against `attention`. Third: records of a database on
the device, gathered, against a copy of as many bytes. Medians over pairs of neighbouring calls, by events on one
stream; no line is printed before results agree. ``--engine numba`` runs the same on the CPU, without the third table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import refimpl
from refimpl.errors import MissingDependencyError
from refimpl.methods.svd_softmax import mixed_logits

Array = Any


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("cupy", "numba"), default="cupy")
    parser.add_argument("--vocab", type=int, default=800_000)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=25_000)
    parser.add_argument("--rows", default="1,4,16", help="hidden vectors of a call, comma-separated")
    parser.add_argument("--seq", default="512,2048,8192", help="lengths T, comma-separated")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float32", help="of attention and of records"
    )
    parser.add_argument("--megabytes", type=int, default=512, help="of the records that a batch takes")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of calls")
    return parser.parse_args()


def _medians(
    engine: Any, ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Median seconds of both, called in turn, after two calls of each."""

    def seconds(call: Callable[[], object]) -> float:
        start = engine.mark()
        call()
        return float(engine.elapsed_s(start, engine.mark()))

    for call in (ours, theirs, ours, theirs):
        call()
    ours_s, theirs_s = np.median([(seconds(ours), seconds(theirs)) for _ in range(repeats)], axis=0)
    return float(ours_s), float(theirs_s)


def _print_heads(engine: Any, options: argparse.Namespace) -> None:
    """A head whose directions fall off as 1, 1/2, 1/3 ...: the rotation is then that of the identity."""
    rng = np.random.default_rng(0)
    turned = rng.standard_normal((options.vocab, options.d_model), dtype=np.float32)
    turned /= np.arange(1, options.d_model + 1, dtype=np.float32)
    whole, first = engine.asarray(turned), options.window
    parts = np.eye(options.d_model, dtype=np.float32), turned[:, :first], turned[:, first:]
    head = SimpleNamespace(
        **{
            n: engine.asarray(np.ascontiguousarray(x))
            for n, x in zip(("rotation", "preview", "full_view"), parts, strict=True)
        }
    )
    print(f"{'rows':>5} {'svd ms':>8} {'full ms':>8} {'full / svd':>10} {'top ms':>8}")
    for rows in map(int, options.rows.split(",")):
        h = engine.asarray(rng.standard_normal((1, rows, options.d_model), dtype=np.float32))

        def probabilities(logits: Array, rows: int = rows) -> Array:
            return engine.softmax(engine.reshape(logits, (1, rows, 1, options.vocab)))

        def ours(h: Array = h) -> Array:
            return probabilities(mixed_logits(engine, h, head, options.candidates))

        def theirs(h: Array = h) -> Array:
            return probabilities(engine.linear(h, whole))

        found, exact = engine.to_numpy(ours()), engine.to_numpy(theirs())
        if not (found.argmax(-1) == exact.argmax(-1)).all():
            raise SystemExit("the likeliest words differ; no timing is printed for a wrong result")
        z = engine.linear(h[..., :first], head.preview)
        ours_s, theirs_s = _medians(engine, ours, theirs, options.repeats)
        top_s, _ = _medians(engine, lambda z=z: engine.top(z, options.candidates), lambda: None, options.repeats)
        print(
            f"{rows:5} {1e3 * ours_s:8.3f} {1e3 * theirs_s:8.3f} {theirs_s / ours_s:10.2f} {1e3 * top_s:8.3f}",
            flush=True,
        )


def _print_filtered(engine: Any, options: argparse.Namespace) -> None:
    print(f"\n{'T':>6} {'kept':>6} {'filtered ms':>11} {'fused ms':>9} {'fused / filtered':>16}")
    rng = np.random.default_rng(0)
    for length in map(int, options.seq.split(",")):
        shape = (3, 1, options.heads, length, 64)
        q, k, v = (engine.asarray(x) for x in 1.5 * rng.standard_normal(shape, dtype=np.float32).astype(options.dtype))
        for theta in (np.inf, 5.0, 2.0):
            thresholds = engine.asarray(np.full(options.heads, theta))

            def ours(q: Array = q, k: Array = k, v: Array = v, thresholds: Array = thresholds) -> tuple[Array, Array]:
                (q_codes, q_scale), (k_codes, k_scale) = engine.quantize(q), engine.quantize(k)
                return engine.filtered_attention(q, k, v, q_codes, k_codes, q_scale, k_scale, thresholds, 0.125)

            def theirs(q: Array = q, k: Array = k, v: Array = v) -> Array:
                return engine.attention(q, k, v)

            context, kept = (engine.to_numpy(x) for x in ours())
            if theta == np.inf and not np.abs(context - engine.to_numpy(theirs())).max() < 0.2:  # eight bits
                raise SystemExit("with all keys kept the contexts differ; no timing is printed for a wrong result")
            ours_s, theirs_s = _medians(engine, ours, theirs, options.repeats)
            share = kept.sum() / (options.heads * length**2)
            ratio = theirs_s / ours_s
            print(f"{length:6} {share:6.1%} {1e3 * ours_s:11.3f} {1e3 * theirs_s:9.3f} {ratio:16.2f}", flush=True)


def _print_gathers(engine: Any, options: argparse.Namespace) -> None:
    print(f"\n{'T':>6} {'records':>7} {'gather GB/s':>11} {'copy GB/s':>9} {'share':>6}")
    for length in (64, 128, 256, 512):
        record = options.heads * length**2 * np.dtype(options.dtype).itemsize
        count = max(1, (options.megabytes << 20) // record)
        maps = np.resize(np.arange(1 << 12).astype(options.dtype), (count, options.heads, length, length))
        layout = SimpleNamespace(shape=maps.shape[1:], dtype=maps.dtype)
        records = _Records(maps, layout)
        rows = tuple(int(row) for row in np.random.default_rng(0).permutation(count))
        if not engine.hold_records(records):
            raise SystemExit(f"{maps.nbytes} bytes of records do not fit beside what is there: give --megabytes")
        found = engine.fetch(records, rows, "copy")
        if not (engine.to_numpy(found[-1]) == maps[rows[-1]]).all():
            raise SystemExit("a record differs; no timing is printed for a wrong result")
        other = engine.xp.empty_like(found)

        def ours(records: Any = records, rows: Any = rows) -> Array:
            return engine.fetch(records, rows, "copy")

        def theirs(other: Array = other, found: Array = found) -> None:
            engine.xp.copyto(other, found)

        ours_s, theirs_s = _medians(engine, ours, theirs, options.repeats)
        rate, reached = (2 * maps.nbytes / s / 1e9 for s in (ours_s, theirs_s))
        print(f"{length:6} {count:7} {rate:11.0f} {reached:9.0f} {rate / reached:6.2f}", flush=True)


class _Records:
    """What `fetch` reads of a database."""

    def __init__(self, array: Array, layout: Any) -> None:
        self.array, self.layout = array, layout


def main() -> int:
    """Print the tables; 2 without a GPU."""
    options = _parse_arguments()
    try:
        engine: Any = refimpl.engine(options.engine)
    except MissingDependencyError as error:
        print(error, file=sys.stderr)
        return 2
    name = engine.device_name() if options.engine == "cupy" else options.engine
    sizes = f"V={options.vocab} D={options.d_model} W={options.window} N={options.candidates}"
    print(f"{name}, head float32 {sizes}; attention and records {options.dtype}, H={options.heads}\n")
    _print_heads(engine, options)
    _print_filtered(engine, options)
    if options.engine == "cupy":
        _print_gathers(engine, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
