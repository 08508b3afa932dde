"""One benchmark per method: two layers of Conformer-M at T = 512 (float32)."""

from __future__ import annotations

from typing import Any

import pytest

import costmodel
from refimpl import load_model
from refimpl.config import Workload, override, preset
from refimpl.inputs import random_inputs
from refimpl.methods import CATALOG
from refimpl.model import Runner

CONFIG = override(preset("conformer-m"), layers=2)
MODEL = load_model(CONFIG)
T = 512


@pytest.mark.parametrize("method", CATALOG)
def test_method(benchmark: Any, engine: Any, method: str) -> None:
    runner, inputs = Runner(MODEL, engine), random_inputs(CONFIG, T)
    runner(inputs, method, record=False)  # compiles
    cost = costmodel.estimate(method, CONFIG, Workload(T)).total
    benchmark.group = "methods"
    benchmark.extra_info.update(flops=int(cost.flops), bytes_moved=int(cost.bytes_moved))
    benchmark(runner, inputs, method, record=False)
