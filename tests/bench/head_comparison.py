"""Time a large language head with its softmax: exact, by SVD-softmax, and exact in PyTorch, call by call in turn.

    python tests/bench/head_comparison.py --vocab 800000 --width 256 --window 32 --part 32

One hidden vector, float32. The head is synthetic, for no trained one of this size is at hand: A = G diag(s) Qᵀ with G
normal, Q a random rotation and s_j = j^-0.8, which puts about 93 % of the squared singular values into the first 32 of
256 directions; hidden vectors have the same decay. Time does not depend on the values; how many of the likeliest words
are found does, and is printed for this spectrum.

Prints the median milliseconds of each, those of the parts of SVD-softmax, and ratios over rounds of neighbouring calls:
the median, the 10th to 90th percentile, and `best`, that of the fastest calls. On a shared machine only ratios
mean something. No line is printed before the exact results agree. PyTorch is a comparison point here, never a
dependency.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from refimpl.engines.numba_engine import NumbaEngine
from refimpl.methods.svd_softmax import mixed_logits
from refimpl.weights.layout import Weights

try:
    import torch
except ImportError:
    torch = None

Array = Any

DECAY = 0.8
SETTLE_S = 0.005  # lets the idle threads of the library that ran before stop spinning
ROWS = 2**16  # words made at a time


def synthetic_head(vocab: int, width: int, window: int, seed: int = 0) -> tuple[Array, Weights, Array]:
    """A (V, D), the same turned into its basis, and hidden vectors (64, D)."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, width + 1, dtype=np.float32) ** np.float32(-DECAY)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)  # its rows are the directions
    head = np.empty((vocab, width), np.float32)
    for first in range(0, vocab, ROWS):
        rows = head[first : first + ROWS]
        rows[:] = (rng.standard_normal(rows.shape, dtype=np.float32) * scale) @ turn
    gram = sum(np.asarray(part.T @ part, np.float64) for part in np.array_split(head, 16))
    into = np.linalg.eigh(gram)[1][:, ::-1].astype(np.float32)  # the largest value first
    preview, full_view = np.empty((vocab, window), np.float32), np.empty((vocab, width - window), np.float32)
    for first in range(0, vocab, ROWS):
        turned = head[first : first + ROWS] @ into
        preview[first : first + ROWS], full_view[first : first + ROWS] = turned[:, :window], turned[:, window:]
    hidden = 4 * (rng.standard_normal((64, width), dtype=np.float32) * scale) @ turn
    return head, Weights(rotation=np.ascontiguousarray(into.T), preview=preview, full_view=full_view), hidden


def seconds(call: Callable[[], object]) -> float:
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Array]:
    """Seconds (repeats,) of each, in rounds in which each has its turn."""
    rounds = [[seconds(call) for call in calls.values()] for _ in range(repeats)]
    return dict(zip(calls, np.array(rounds).T, strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=800_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--part", type=int, default=32, help="N = V / part")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--repeats", type=int, default=25, help="rounds")
    options = parser.parse_args()

    engine = NumbaEngine()
    engine.set_threads(options.threads)
    head, turned, hidden = synthetic_head(options.vocab, options.width, options.window)
    candidates, h = options.vocab // options.part, hidden[:1]
    g = engine.linear(h, turned.rotation)
    leading, rest = g[:, : options.window], g[:, options.window :]
    z = engine.linear(leading, turned.preview)
    ids = engine.top(z, candidates)

    def softmax(logits: Array) -> Array:
        return engine.softmax(logits.reshape(1, 1, 1, -1))

    calls: dict[str, Callable[[], Any]] = {
        "exact": lambda: softmax(engine.linear(h, head)),
        "svd-softmax": lambda: softmax(mixed_logits(engine, h, turned, candidates)),
    }
    parts: dict[str, Callable[[], Any]] = {
        "rotation": lambda: engine.linear(h, turned.rotation),
        "preview": lambda: engine.linear(leading, turned.preview),
        "top": lambda: engine.top(z, candidates),
        "refine": lambda: engine.refine(z, ids, turned.full_view, rest),
        "softmax": lambda: softmax(z),
    }
    if torch is not None:
        torch.set_num_threads(options.threads)
        weight, state = torch.from_numpy(head), torch.from_numpy(h)
        with torch.inference_mode():
            theirs = torch.softmax(torch.nn.functional.linear(state, weight), -1)
        if not np.allclose(theirs.numpy().ravel(), calls["exact"]().ravel(), rtol=1e-3, atol=1e-9):
            raise SystemExit("the exact heads disagree; no timing is printed for a wrong result")
        calls["PyTorch"] = lambda: torch.softmax(torch.nn.functional.linear(state, weight), -1)

    for call in (*calls.values(), *parts.values()):
        call()  # compiles
    times = in_turns(calls, options.repeats)
    of_parts = in_turns(parts, options.repeats)

    norms = np.linalg.norm(np.concatenate([turned.preview, turned.full_view], 1), axis=0).astype(float) ** 2
    share = norms[: options.window].sum() / norms.sum()
    print(
        f"float32, V={options.vocab} D={options.width} W={options.window} N={candidates}, {options.threads} threads"
        f"{f', torch {torch.__version__}' if torch else ''}; {100 * share:.0f} % of the squared singular values in W"
    )
    for name, taken in {**times, **{f"  {name}": taken for name, taken in of_parts.items()}}.items():
        print(f"{name:>12} {1e3 * np.median(taken):8.2f} ms, at best {1e3 * taken.min():.2f}")
    for one, other in (("exact", "svd-softmax"), ("exact", "PyTorch")):
        if one in times and other in times:
            low, middle, high = np.percentile(times[one] / times[other], (10, 50, 90))
            best = times[one].min() / times[other].min()
            print(f"{one} / {other}: {middle:.2f}, {low:.2f}-{high:.2f}, best {best:.2f}")
    exact, mixed = engine.linear(hidden, head), mixed_logits(engine, hidden, turned, candidates)
    same = np.mean(exact.argmax(-1) == mixed.argmax(-1))
    ten = np.mean([len({*a} & {*b}) / 10 for a, b in zip(engine.top(exact, 10), engine.top(mixed, 10), strict=True)])
    print(f"{len(hidden)} such hidden vectors: same likeliest word {same:.2f}, of the likeliest ten {ten:.2f}")


if __name__ == "__main__":
    main()
