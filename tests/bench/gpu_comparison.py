"""Time the CuPy engine against what the device allows: memory-bound ops against a copy, fused attention against others.

    python tests/bench/gpu_comparison.py --dtype float16 --seq 512,1024,2048,4096,8192

First table: bytes that an op must move (`costmodel.ops`) per second, as a share of what a plain copy of an array of the
same size reaches in the same run. Then `attention` against PyTorch's and cuDNN's, where these are installed, on the
same device memory (DLPack): the median ratio over pairs of neighbouring calls, and its 10th to 90th percentile. No line
is printed before both results agree. Times are events on one stream.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import refimpl
from costmodel.ops import FORMULAS
from refimpl.engines.protocol import SIZES
from refimpl.errors import EffrefError, MissingDependencyError

Array = Any
Case = tuple[str, tuple[Any, ...]]  # op and its arguments


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--megabytes", type=int, default=512, help="of the largest array of a memory-bound op")
    parser.add_argument("--seq", default="512,1024,2048,4096,8192", help="lengths T, comma-separated")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20, help="pairs of calls")
    parser.add_argument("--causal", action="store_true")
    return parser.parse_args()


def _seconds(engine: Any, call: Callable[[], object]) -> float:
    start = engine.mark()
    call()
    return float(engine.elapsed_s(start, engine.mark()))


def _pairs(engine: Any, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> np.ndarray:
    """Seconds of both in turn, shape (repeats, 2), after two calls of each."""
    for call in (ours, theirs, ours, theirs):
        call()
    return np.array([(_seconds(engine, ours), _seconds(engine, theirs)) for _ in range(repeats)])


# --- memory-bound ops -----------------------------------------------------------------------------------------------


def _memory_bound(engine: Any, dtype: str, n_bytes: int) -> Iterator[Case]:
    """Ops whose largest array has about `n_bytes`, rows as models have them."""
    elements = n_bytes // np.dtype(dtype).itemsize

    some = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32).astype(dtype)

    def array(*shape: int) -> Array:
        return engine.asarray(np.resize(some, shape))

    for width in (768, 4096):
        x, weight, bias = array(1, elements // width, width), array(width), array(width)
        yield "layer_norm", (x, weight, bias, 1e-5)
        yield "rms_norm", (x, weight, 1e-5)
        yield "gelu", (x,)
        yield "add", (x, x)
    for length in (512, 4096):
        yield "softmax", (array(1, max(1, elements // length**2), length, length),)
    sequences = array(16, elements // 16)
    yield "take_rows", (sequences, tuple(range(15, -1, -1)))


def _print_memory_bound(engine: Any, options: argparse.Namespace) -> None:
    print(f"{'op':12} {'shape':24} {'GB/s':>7} {'copy GB/s':>9} {'share':>6}")
    for op, arguments in _memory_bound(engine, options.dtype, options.megabytes << 20):
        x = arguments[0]
        moved = FORMULAS[op](x.dtype.itemsize, **SIZES[op](*arguments))
        copy = engine.xp.empty_like(x)
        pairs = _pairs(
            engine,
            lambda op=op, arguments=arguments: getattr(engine, op)(*arguments),
            lambda copy=copy, x=x: engine.xp.copyto(copy, x),
            options.repeats,
        )
        ours_s, copy_s = np.median(pairs, axis=0)
        rate, reached = moved.bytes_moved / ours_s / 1e9, 2 * x.nbytes / copy_s / 1e9
        print(f"{op:12} {x.shape!s:24} {rate:7.0f} {reached:9.0f} {rate / reached:6.2f}", flush=True)


# --- fused attention ------------------------------------------------------------------------------------------------


def _torch_call(engine: Any, q: Array, k: Array, v: Array, causal: bool) -> Callable[[], Array]:
    """PyTorch's attention of the same memory, on the engine's stream."""
    import torch

    tensors = [torch.from_dlpack(x) for x in (q, k, v)]
    stream = torch.cuda.ExternalStream(engine.xp.cuda.get_current_stream().ptr)

    def call() -> Array:
        with torch.inference_mode(), torch.cuda.stream(stream):
            out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
        return engine.xp.from_dlpack(out)

    return call


def _cudnn_call(engine: Any, q: Array, k: Array, v: Array, causal: bool) -> Callable[[], Array]:
    """cuDNN's, by the engine that offers it."""
    other = refimpl.engine("cupy-cudnn")
    return lambda: other.attention(q, k, v, causal=causal)


OPPONENTS = {"PyTorch": _torch_call, "cuDNN": _cudnn_call}


def _print_attention(engine: Any, name: str, options: argparse.Namespace) -> None:
    print(f"\n{'T':>6} {'fused ms':>9} {name + ' ms':>10} {'TFLOP/s':>8} {'ratio':>6}  p10-p90")
    for length in map(int, options.seq.split(",")):
        rng = np.random.default_rng(0)
        shape = (3, options.batch, options.heads, length, options.head_dim)
        q, k, v = (engine.asarray(x) for x in rng.standard_normal(shape, dtype=np.float32).astype(options.dtype))
        theirs = OPPONENTS[name](engine, q, k, v, options.causal)

        def ours(q: Array = q, k: Array = k, v: Array = v) -> Array:
            return engine.attention(q, k, v, causal=options.causal)

        worst = float(np.abs(engine.to_numpy(ours()).astype(np.float64) - engine.to_numpy(theirs())).max())
        if not worst < (5e-3 if options.dtype == "float16" else 1e-4):
            raise SystemExit(f"results differ by {worst:.1e}; no timing is printed for a wrong result")
        pairs = _pairs(engine, ours, theirs, options.repeats)
        ours_s, theirs_s = np.median(pairs, axis=0)
        low, middle, high = np.percentile(pairs[:, 0] / pairs[:, 1], (10, 50, 90))
        visible = length * (length + 1) // 2 if options.causal else length**2
        rate = 4 * options.batch * options.heads * visible * options.head_dim / ours_s / 1e12
        times = f"{1e3 * ours_s:9.3f} {1e3 * theirs_s:10.3f}"
        print(f"{length:6} {times} {rate:8.1f} {middle:6.2f}  {low:.2f}-{high:.2f}", flush=True)


def main() -> int:
    """Print the tables; 2 without a GPU."""
    options = _parse_arguments()
    try:
        engine: Any = refimpl.engine("cupy")
    except MissingDependencyError as error:
        print(error, file=sys.stderr)
        return 2
    shape = f"B={options.batch} H={options.heads} D={options.head_dim}"
    print(f"{engine.device_name()}, {options.dtype}, attention {shape}{' causal' if options.causal else ''}\n")
    _print_memory_bound(engine, options)
    for name in OPPONENTS:
        try:
            _print_attention(engine, name, options)
        except (ImportError, EffrefError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
