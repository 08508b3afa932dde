"""One benchmark per op, at the sizes of a Conformer-M layer with T = 512 (float32)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from memo_data import listed

from costmodel.ops import FORMULAS
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.engines.protocol import OUTCOMES, SIZES
from refimpl.memo.index import GraphIndex

B, T, d, H, D, f, V = 1, 512, 256, 4, 64, 1024, 5000
RNG = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape, dtype=np.float32)


HIDDEN, HEADS, MAP = array(B, T, d), array(B, H, T, D), array(B, H, T, T)
CACHE = array(2, B, 3, 1040, D)  # keys and values of SmolLM2's three heads, with room for 16 more positions
K, W = CACHE[:, :, :, :1024]
Q = array(B, 9, 1, D)


def filtered(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """With thresholds that keep about a seventh of the pairs."""
    (q_codes, q_scale), (k_codes, k_scale) = NumpyEngine().quantize(q), NumpyEngine().quantize(k)
    return q, k, v, q_codes, k_codes, q_scale, k_scale, np.full(q.shape[1], 1.9), D**-0.5


def without_values(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    return *operands[:2], *operands[3:]


ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear": lambda: (HIDDEN, array(f, d), array(f)),
    "project": lambda: (HIDDEN, array(3 * d, d), array(3 * d), (d, d, d)),
    "conv1d": lambda: (array(B, 2 * T, 80), array(d, 3, 80), array(d), 2),
    "depthwise_conv": lambda: (HIDDEN, array(31, d), array(d)),
    "embedding": lambda: (array(V, d), RNG.integers(0, V, (B, T))),
    "layer_norm": lambda: (HIDDEN, array(d), array(d), 1e-5),
    "rms_norm": lambda: (HIDDEN, array(d), 1e-5),
    "batch_norm": lambda: (HIDDEN, array(d), np.abs(array(d)), array(d), array(d), 1e-5),
    "add": lambda: (HIDDEN, array(B, T, d)),
    "gelu": lambda: (array(B, T, f),),
    "gelu_tanh": lambda: (array(B, T, f),),
    "silu": lambda: (array(B, T, f),),
    "relu": lambda: (array(B, T, f),),
    "glu": lambda: (array(B, T, 2 * d),),
    "swiglu": lambda: (array(B, T, f), array(B, T, f)),
    "rotary": lambda: (HEADS, array(T, D // 2), array(T, D // 2), False),
    "concat": lambda: ((HEADS, array(B, H, T, D)), 1),
    "append": lambda: (CACHE[0].copy(), array(B, 3, 1, D), 1024),
    "block_linear": lambda: (array(B, T, 4 * d), array(4, d, d), array(4 * d)),
    "max_pool": lambda: (HIDDEN,),
    "nearest": lambda: (array(8, 128), array(2000, 128)),
    "search_graph": lambda: (array(8, 128), GraphIndex(array(2000, 128))),
    "fetch": lambda: (listed(array(8, H, 128, 128)), (3, 1, 5, 0), "copy"),
    "take_rows": lambda: (array(8, 128, d), (3, 1, 5, 0)),
    "scatter": lambda: (array(8, H, 128, 128), array(4, H, 128, 128), (3, 1, 5, 0)),
    "scores": lambda: (HEADS, array(B, H, T, D), 0.125),
    "add_relative": lambda: (MAP, array(B, H, T, 2 * T - 1)),
    "softmax": lambda: (MAP,),
    "weighted_sum": lambda: (MAP, HEADS),
    "attention": lambda: (HEADS, array(B, H, T, D), array(B, H, T, D)),
    "top": lambda: (array(B, 1, 49152), 3072),
    "refine": lambda: (
        array(B, 1, 49152),
        np.arange(B * 3072).reshape(B, 1, 3072) * 16,
        array(49152, 504),
        array(B, 1, 504),
    ),
    "quantize": lambda: (HEADS,),
    "filtered_attention": lambda: filtered(HEADS, array(B, H, T, D), array(B, H, T, D)),
    "filtered_map": lambda: without_values(filtered(HEADS, array(B, H, T, D), HEADS)),
    "relative_attention": lambda: (HEADS, HEADS, HEADS, HEADS, array(H, 2 * T - 1, D), 0.125),
    "local_attention": lambda: (HEADS, HEADS, HEADS, 64, 0.125),
    "local_relative_attention": lambda: (HEADS, HEADS, HEADS, HEADS, array(H, 2 * T - 1, D), 64, 0.125),
    "project_length": lambda: (HEADS, array(128, T)),
    "elu_plus_one": lambda: (HEADS,),
    "linear_attention": lambda: (np.abs(HEADS), np.abs(HEADS), HEADS, True),
}


# One position of SmolLM2, 1024 in the cache.
DECODING: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "rms_norm": ("rms_norm", lambda: (array(B, 1, 576), array(576), 1e-5)),
    "qkv": ("project", lambda: (array(B, 1, 576), array(960, 576), None, (576, 192, 192))),
    "gate and up": ("project", lambda: (array(B, 1, 576), array(3072, 576), None, (1536, 1536))),
    "down": ("linear", lambda: (array(B, 1, 1536), array(576, 1536))),
    "vocabulary": ("linear", lambda: (array(B, 1, 576), array(49152, 576))),
    "vocabulary, batch 8": ("linear", lambda: (array(8, 1, 576), array(49152, 576))),
    "rotary": ("rotary", lambda: (Q, array(1, D // 2), array(1, D // 2), False)),
    "scores": ("scores", lambda: (Q, K, 0.125, True)),
    "softmax": ("softmax", lambda: (array(B, 9, 1, 1024), True)),
    "weighted_sum": ("weighted_sum", lambda: (array(B, 9, 1, 1024), W, True)),
    "attention": ("attention", lambda: (Q, K, W, 0.125, True)),
    "swiglu": ("swiglu", lambda: (array(B, 1, 1536), array(B, 1, 1536))),
    "add": ("add", lambda: (array(B, 1, 576), array(B, 1, 576))),
}


@pytest.mark.parametrize("op", SIZES)
def test_op(benchmark: Any, engine: Any, op: str) -> None:
    _time(benchmark, engine, op, op, ARGUMENTS[op]())


@pytest.mark.parametrize("name", DECODING)
def test_decoding_op(benchmark: Any, engine: Any, name: str) -> None:
    op, arguments = DECODING[name]
    _time(benchmark, engine, f"decoding: {name}", op, arguments())


def _time(benchmark: Any, engine: Any, group: str, op: str, given: tuple[Any, ...]) -> None:
    placed = [_placed(engine, argument) for argument in given]
    function = getattr(engine, op)

    def once() -> None:
        function(*placed)
        engine.elapsed_s(start, engine.mark())  # waits for the device

    start = engine.mark()
    once()  # compiles
    benchmark.group = group
    benchmark.extra_info.update(_rates(op, given))
    benchmark(once)


def _placed(engine: Any, argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return engine.asarray(argument)
    if isinstance(argument, tuple) and isinstance(argument[0], np.ndarray):
        return tuple(engine.asarray(part) for part in argument)
    return argument


def _rates(op: str, given: tuple[Any, ...]) -> dict[str, int]:
    """FLOPs and bytes of the call, so that a stored time can be read as a rate."""
    outcomes = OUTCOMES[op](getattr(NumpyEngine(), op)(*given)) if op in OUTCOMES else {}
    sizes = SIZES[op](*given) | {name: int(array.sum()) for name, array in outcomes.items()}
    cost = FORMULAS[op](4, **sizes)
    return {"flops": int(cost.flops), "bytes_moved": int(cost.bytes_moved)}
