"""A small model, and passes that the tests of several methods make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from strategies import inputs_for

from refimpl import ModelConfig, Runner, Workload, load_model


def prefilled_and_decoded(config: ModelConfig, method: str, params: Mapping[str, Any]) -> list[np.ndarray]:
    """Outputs of four positions of two sequences at once, and of three steps behind them."""
    runner, ids = Runner(load_model(config), "numpy"), inputs_for(config, Workload(7, 2))
    cache = runner.new_cache(7, method, params, batch=2)
    prefill = runner(ids[:, :4], method, params, cache=cache).output
    return [prefill, runner.decode(ids[:, 4:], method, cache, params).output]


def small_llama(layers: int, **changes: Any) -> ModelConfig:
    """Grouped key heads, rotary positions, a gated feed-forward, a language head."""
    sizes: dict[str, Any] = {
        "recipe": "pre-norm", "layers": layers, "d_model": 24, "heads": 6, "kv_heads": 3, "d_ff": 20, "vocab": 40,
        "activation": "silu", "gated": True, "norm": "rms", "bias": False, "causal": True, "position": "rotary",
        "head": True,
    }  # fmt: skip
    return ModelConfig(name="tiny", **{**sizes, **changes})
