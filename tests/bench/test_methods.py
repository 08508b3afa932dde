"""One benchmark per method: two layers of its example model at T = 512 (float32)."""

from __future__ import annotations

from typing import Any

import pytest

import costmodel
from refimpl import load_model
from refimpl.config import Workload, override, preset
from refimpl.inputs import random_inputs
from refimpl.methods import CATALOG
from refimpl.model import Runner

T = 512


@pytest.mark.parametrize("method", CATALOG)
def test_method(benchmark: Any, engine: Any, method: str) -> None:
    config = override(preset(CATALOG[method].model), layers=2)
    runner, inputs = Runner(load_model(config), engine), random_inputs(config, T)
    ready = runner.prepare(method, {}, inputs)
    runner(inputs, ready, record=False)  # compiles
    cost = costmodel.estimate(method, config, Workload(T), ready.parameters).total
    benchmark.group = "methods"
    benchmark.extra_info.update(flops=int(cost.flops), bytes_moved=int(cost.bytes_moved))
    benchmark(runner, inputs, ready, record=False)
