"""Passes that the tests of several methods make."""

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
