"""The closed forms equal what runs: op formulas against a counting array, method formulas against recorded runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from counting import AuditedEngine, audit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import RECIPES, cached_workloads, configs, decoders, inputs_for, parameters_for, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.methods import CATALOG
from refimpl.recorder import tally


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", CATALOG)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_recorded_ops_equal_closed_form(method: str, recipe: str, data: st.DataObject) -> None:
    """Op by op, with all sizes, as integers; and every executed op's FLOPs and bytes are counted while it runs."""
    config, workload = data.draw(configs(recipe)), data.draw(workloads())
    params = data.draw(parameters_for(method, config))
    engine = AuditedEngine()
    model = load_model(config)
    run = forward(model, inputs_for(config, workload), method, params, engine, causal=workload.causal)
    estimate = costmodel.estimate(method, config, workload, params)
    assert tally(run.calls) == estimate.tally()
    assert engine.audited == len(run.calls) == sum(estimate.calls().values())
    assert np.isfinite(run.output).all()


@pytest.mark.parametrize("method", CATALOG)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_recorded_ops_with_a_cache_equal_closed_form(method: str, data: st.DataObject) -> None:
    """A prefill that fills a cache, and decoding after it: ops, cache bytes, and the counted cost of each op."""
    config, workload = data.draw(decoders()), data.draw(cached_workloads())
    params = data.draw(parameters_for(method, config))
    engine = AuditedEngine()
    runner = Runner(load_model(config), engine)
    cache = runner.new_cache(max(workload.kv_len + workload.seq * workload.steps, 1), method, params, workload.batch)
    ids = inputs_for(config, replace(workload, seq=workload.kv_len + workload.seq * workload.steps))
    if workload.kv_len:
        runner(ids[:, : workload.kv_len], method, params, cache=cache)
    new = ids[:, workload.kv_len :]
    if workload.phase == "decode":
        run = runner.decode(new, method, cache, params)
    else:
        run = runner(new, method, params, cache=cache)
    estimate = costmodel.estimate(method, config, workload, params)
    assert tally(run.calls) == estimate.tally()
    assert cache.bytes == estimate.cache_bytes
    assert cache.length == cache.capacity


@pytest.mark.parametrize("method", CATALOG)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parameter_bytes_equal_the_weights(method: str, data: st.DataObject) -> None:
    config, workload = data.draw(configs()), data.draw(workloads())
    params = data.draw(parameters_for(method, config))
    weights = Runner(load_model(config), "numpy").prepare(method, params).weights
    assert costmodel.estimate(method, config, workload, params).params_bytes == bytes_of(weights)


def bytes_of(node: Any) -> int:
    """Of all arrays in a tree of weights."""
    if isinstance(node, list):
        return sum(bytes_of(child) for child in node)
    return sum(bytes_of(child) for child in vars(node).values()) if hasattr(node, "__dict__") else int(node.nbytes)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), causal=st.booleans(), masked=st.booleans(), extra=st.integers(0, 4))
def test_attention_ops_count_masks_and_longer_keys(data: st.DataObject, causal: bool, masked: bool, extra: int) -> None:
    """Keys longer than queries, grouped heads and padding masks, which the model recipes do not combine."""
    rng = np.random.default_rng(0)
    b, kv, group, t, d = (data.draw(st.integers(1, 3)) for _ in range(5))
    q = rng.standard_normal((b, kv * group, t, d))
    k, v = (rng.standard_normal((b, kv, t + extra, d)) for _ in range(2))
    mask = rng.random((b, 1, 1, t + extra)) < 0.7 if masked and not causal else None
    audit("attention", q, k, v, 0.5, causal, mask)
    weights = audit("softmax", audit("scores", q, k, 0.5, causal, mask), causal)
    audit("weighted_sum", weights, v, causal)


def test_formulas_take_arrays_of_lengths() -> None:
    """One call over an array of lengths equals one call per length."""
    from refimpl.config import Workload, presets

    lengths = np.array([64, 300, 4096])
    for name, config in presets().items():
        for method in CATALOG:
            many = costmodel.estimate(method, config, Workload(lengths))
            for i, length in enumerate(lengths.tolist()):
                one = costmodel.estimate(method, config, Workload(length))
                for figure in ("matmul_flops", "vector_flops", "bytes_read", "bytes_written"):
                    assert np.broadcast_to(getattr(many.total, figure), 3)[i] == getattr(one.total, figure), (
                        name,
                        method,
                    )
                assert np.broadcast_to(many.peak_bytes, 3)[i] == one.peak_bytes
