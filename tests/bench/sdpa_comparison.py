"""Time the fused CPU attention against PyTorch's, call by call in turn, at equal thread counts.

    python tests/bench/sdpa_comparison.py --seq 512,1024,2048,4096

Prints, for each length, the median milliseconds of both and the ratio fused / PyTorch over pairs of
neighbouring calls: its median and its 10th to 90th percentile; `best` compares the fastest call of each. On
a shared machine only ratios mean something. No line is printed before both results agree. PyTorch is a
comparison point here, never a dependency.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import numba
import numpy as np

from refimpl.engines.numba_kernels.attention import fused_attention

try:
    import torch
except ImportError:
    torch = None

_SETTLE_S = 0.005  # lets the idle threads of the library that ran before stop spinning


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", default="512,1024,2048,4096", help="lengths T, comma-separated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--repeats", type=int, default=15, help="pairs of calls per length")
    parser.add_argument("--causal", action="store_true")
    return parser.parse_args()


def _seconds(call: Callable[[], object]) -> float:
    time.sleep(_SETTLE_S)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _check_equal(fused: np.ndarray, reference: np.ndarray) -> None:
    """Raise if two float32 results differ by more than rounding can explain."""
    worst = float(np.abs(fused - reference).max())
    if not worst < 1e-4:
        raise SystemExit(f"results differ by {worst:.1e}; no timing is printed for a wrong result")


def _compare(T: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of both, each shape (repeats,), for one length."""
    rng = np.random.default_rng(0)
    shape = (3, options.batch, T, options.heads, options.head_dim)
    q, k, v = rng.standard_normal(shape, dtype=np.float32).transpose(0, 1, 3, 2, 4)  # each (B, H, T, D)
    scale = 1 / math.sqrt(options.head_dim)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ours() -> np.ndarray:
        return fused_attention(q, k, v, scale, options.causal)

    def theirs() -> torch.Tensor:
        return sdpa(*tensors, is_causal=options.causal)

    with torch.inference_mode():
        _check_equal(ours(), theirs().numpy())
        pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(options.repeats)]
    fused_s, torch_s = np.array(pairs).T
    return fused_s, torch_s


def main() -> int:
    """Print the table; 2 if PyTorch is absent."""
    options = _parse_arguments()
    if torch is None:
        print(
            "PyTorch is absent: pip install torch --index-url https://download.pytorch.org/whl/cpu",
            file=sys.stderr,
        )
        return 2
    numba.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    shape = f"B={options.batch} H={options.heads} D={options.head_dim}"
    print(f"float32, {shape}, {options.threads} threads, torch {torch.__version__}")
    print(f"{'T':>6} {'fused ms':>9} {'torch ms':>9} {'ratio':>6}  {'p10-p90':9}  best")
    for T in map(int, options.seq.split(",")):
        fused_s, torch_s = _compare(T, options)
        low, middle, high = np.percentile(fused_s / torch_s, (10, 50, 90))
        medians = f"{1e3 * np.median(fused_s):9.2f} {1e3 * np.median(torch_s):9.2f}"
        best = fused_s.min() / torch_s.min()
        print(f"{T:6} {medians} {middle:6.2f}  {low:.2f}-{high:.2f}  {best:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
