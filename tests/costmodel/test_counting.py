"""The closed forms equal what runs: op formulas against a counting array, method formulas against recorded runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from counting import AuditedEngine, as_kept, audit
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import (
    AT_ONCE,
    ON_HEADS,
    RECIPES,
    WHOLE,
    cached_workloads,
    compositions,
    configs,
    decoders,
    fits,
    inputs_for,
    parameters_for,
    stream_workloads,
    workloads,
)  # fmt: skip

import costmodel
from costmodel.closed_form import Estimate
from refimpl import Runner, load_model
from refimpl.methods import CATALOG
from refimpl.model import Prepared
from refimpl.preparation.headpool import compact
from refimpl.recorder import Call, tally


@pytest.mark.parametrize(
    ("method", "recipe"), [(m, recipe) for m in CATALOG for recipe in (WHOLE if m in ON_HEADS + AT_ONCE else RECIPES)]
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_recorded_ops_equal_closed_form(method: str, recipe: str, data: st.DataObject) -> None:
    """Op by op, with all sizes, as integers; and every executed op's FLOPs and bytes are counted while it runs."""
    config = data.draw(configs(recipe, method in ON_HEADS))
    workload = data.draw(workloads(config))
    params = data.draw(parameters_for(method, config))
    assume(fits(method, params, config))
    assume(not params.get("length") or not workload.is_causal(config))  # linformer has no causal passes
    engine, model, inputs = AuditedEngine(), load_model(config), inputs_for(config, workload)
    ready = Runner(model, "numpy").prepare(method, params, inputs, causal=workload.causal)
    run = Runner(model, engine)(inputs, ready, causal=workload.causal)
    estimate = costmodel.estimate(method, config, workload, params)
    if config.streams:  # one closed form stands for chunks that keep different numbers of pairs
        assert without_kept(tally(run.calls)) == without_kept(estimate.tally())
    else:
        assert tally(run.calls) == as_kept(estimate, run.calls).tally()
    assert engine.audited == len(run.calls) == sum(estimate.calls().values())
    assert np.isfinite(run.output).all()


@pytest.mark.parametrize("method", [method for method in CATALOG if method not in AT_ONCE])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_recorded_ops_with_a_cache_equal_closed_form(method: str, data: st.DataObject) -> None:
    """A prefill that fills a cache, and decoding after it: ops, cache bytes, and the counted cost of each op."""
    config, workload = data.draw(decoders(method in ON_HEADS)), data.draw(cached_workloads())
    params = {"tau": 1.1} if method == "attmemo" else data.draw(parameters_for(method, config))  # it takes no cache
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
    assert tally(run.calls) == tally_of_steps(estimate, run.calls)
    assert cache.bytes == estimate.cache_bytes
    assert cache.length == cache.capacity


@pytest.mark.parametrize("method", [method for method in CATALOG if method not in ON_HEADS + AT_ONCE])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_recorded_ops_of_a_stream_equal_closed_form(method: str, data: st.DataObject) -> None:
    """Chunks from the beginning and behind a left context: ops, cache bytes, and the counted cost of each op."""
    config = data.draw(configs("emformer"))
    workload, params = data.draw(stream_workloads(config)), data.draw(parameters_for(method, config))
    new, kv_len = workload.seq * workload.steps, workload.kv_len
    filled = -(-kv_len // config.chunk) * config.chunk  # whole chunks, of which `kv_len` positions are kept
    engine = AuditedEngine()
    runner = Runner(load_model(config), engine)
    cache = runner.new_cache(max(filled, kv_len + new), method, params, workload.batch)
    if filled:
        runner(inputs_for(config, replace(workload, seq=filled)), method, params, cache=cache)
        cache.truncate(kv_len)
    frames = inputs_for(config, replace(workload, seq=new), seed=1)
    before = engine.audited
    run = runner.decode(frames, method, cache, params)
    estimate = costmodel.estimate(method, config, workload, params)
    assert without_kept(tally(run.calls)) == without_kept(estimate.tally())
    assert engine.audited - before == len(run.calls)
    assert cache.length == kv_len + new
    assert estimate.cache_bytes == cache.bytes // (cache.capacity + config.right_context) * cache.past


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_recorded_ops_of_combined_methods_equal_closed_form(recipe: str, data: st.DataObject) -> None:
    """Any methods that can be combined: op by op, the counted cost of each op, the bytes of their weights."""
    config = data.draw(configs(recipe, data.draw(st.booleans()) or None if recipe != "emformer" else None))
    workload = data.draw(workloads(config))
    method, params = data.draw(compositions(config, causal=workload.is_causal(config)))
    engine, model, inputs = AuditedEngine(), load_model(config), inputs_for(config, workload)
    ready = Runner(model, "numpy").prepare(method, params, inputs, causal=workload.causal)
    run = Runner(model, engine)(inputs, ready, causal=workload.causal)
    estimate = costmodel.estimate(method, config, workload, params)
    if config.streams:
        assert without_kept(tally(run.calls)) == without_kept(estimate.tally())
    else:
        assert tally(run.calls) == as_kept(estimate, run.calls).tally()
    assert engine.audited == len(run.calls) == sum(estimate.calls().values())
    assert estimate.resident_bytes == bytes_of(ready.weights)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_recorded_ops_of_combined_methods_with_a_cache_equal_closed_form(data: st.DataObject) -> None:
    """The same with keys and values in a cache, in a prefill and behind it, and the bytes of the cache."""
    config, workload = data.draw(decoders(data.draw(st.booleans()) or None)), data.draw(cached_workloads())
    method, params = data.draw(compositions(config, cached=True))
    length = workload.kv_len + workload.seq * workload.steps
    runner, ids = Runner(load_model(config), AuditedEngine()), inputs_for(config, replace(workload, seq=length))
    cache = runner.new_cache(length, method, params, workload.batch)
    if workload.kv_len:
        runner(ids[:, : workload.kv_len], method, params, cache=cache)
    new = ids[:, workload.kv_len :]
    decodes = workload.phase == "decode"
    run = runner.decode(new, method, cache, params) if decodes else runner(new, method, params, cache=cache)
    estimate = costmodel.estimate(method, config, workload, params)
    assert tally(run.calls) == tally_of_steps(estimate, run.calls)
    assert cache.bytes == estimate.cache_bytes


def tally_of_steps(estimate: Estimate, calls: list[Call]) -> Counter[Any]:
    """The tally of an estimate whose steps are estimated one by one."""
    work, found = estimate.workload, Counter()
    count = len(calls) // work.steps  # of one step
    for step in range(work.steps):
        one = replace(work, kv_len=work.kv_len + step * work.seq, steps=1) if work.steps > 1 else work
        alone = costmodel.estimate(estimate.method, estimate.config, one, estimate.parameters)
        found += as_kept(alone, calls[step * count : (step + 1) * count]).tally()
    return found


def without_kept(counts: Counter[Any]) -> Counter[Any]:
    """A tally in which calls that differ by their kept pairs alone are the same."""
    found: Counter[Any] = Counter()
    for (component, op, sizes), count in counts.items():
        found[component, op, tuple(size for size in sizes if size[0] != "kept")] += count
    return found


@pytest.mark.parametrize("method", CATALOG)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parameter_bytes_equal_the_weights(method: str, data: st.DataObject) -> None:
    config = data.draw(
        configs(data.draw(st.sampled_from(WHOLE if method in ON_HEADS + AT_ONCE else RECIPES)), method in ON_HEADS)
    )
    workload = data.draw(workloads(config))
    params = data.draw(parameters_for(method, config))
    assume(fits(method, params, config))
    assume(not params.get("length") or not workload.is_causal(config))
    ready = Runner(load_model(config), "numpy").prepare(method, params, inputs_for(config, workload))
    cost = costmodel.estimate(method, config, workload, params)
    assert cost.resident_bytes == bytes_of(ready.weights)
    assert cost.params_bytes == kept_bytes(ready)


def kept_bytes(ready: Prepared) -> int:
    """Of the weights as they are kept: with shared heads once, and an index of them."""
    if ready.method != "headshare" or not ready.parameters.replaced(ready.config):
        return bytes_of(ready.weights)
    sources, share_output = ready.parameters.sources(ready.config), ready.parameters.share_output
    return sum(tensor.nbytes for tensor in compact(ready.weights, ready.config, sources, share_output).values())


def bytes_of(node: Any) -> int:
    """Of all arrays in a tree of weights."""
    if isinstance(node, list):
        return sum(bytes_of(child) for child in node)
    return sum(bytes_of(child) for child in vars(node).values()) if hasattr(node, "__dict__") else int(node.nbytes)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), causal=st.booleans(), masked=st.booleans(), extra=st.integers(0, 4))
def test_attention_ops_count_masks_and_longer_keys(data: st.DataObject, causal: bool, masked: bool, extra: int) -> None:
    """Keys longer than queries, grouped heads, and masks of every shape, which the model recipes do not combine."""
    rng = np.random.default_rng(0)
    b, kv, group, t, d = (data.draw(st.integers(1, 3)) for _ in range(5))
    q = rng.standard_normal((b, kv * group, t, d))
    k, v = (rng.standard_normal((b, kv, t + extra, d)) for _ in range(2))
    shape = [data.draw(st.sampled_from([1, n])) for n in (b, kv * group, t, t + extra)]
    mask = rng.random(shape) < 0.7 if masked else None
    audit("attention", q, k, v, 0.5, causal, mask)
    weights = audit("softmax", audit("scores", q, k, 0.5, causal, mask), causal)
    audit("weighted_sum", weights, v, causal)
    thresholds = np.array(data.draw(st.lists(st.sampled_from([0, 0.5, 2, np.inf]), min_size=kv * group, max_size=9)))
    (q_codes, q_scale), (k_codes, k_scale) = audit("quantize", q), audit("quantize", k)
    operands = q, k, v, q_codes, k_codes, q_scale, k_scale, thresholds[: kv * group]
    nibble, stage2 = data.draw(st.sampled_from(["floor", "round"])), data.draw(st.sampled_from(["int8", "float"]))
    audit("filtered_attention", *operands, 0.5, causal, mask, nibble, stage2)
    window = data.draw(st.integers(0, 6))
    audit("local_attention", q, k, v, window, 0.5, causal, mask)
    of_keys = None if mask is None else rng.random((data.draw(st.sampled_from([1, b])), 1, 1, t + extra)) < 0.7
    audit("linear_attention", audit("elu_plus_one", q), audit("elu_plus_one", k), v, causal, of_keys)
    audit("project_length", k, rng.standard_normal((data.draw(st.integers(1, 4)), t + extra)), of_keys)
    if group == 1 and not extra:
        p = rng.standard_normal((kv, 2 * t - 1, d))
        audit("local_relative_attention", q, q, k, v, p, window, 0.5, causal, mask)
        audit("relative_attention", q, q, k, v, rng.standard_normal((kv, 2 * t - 1, d)), 0.5, causal, mask)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 5), st.booleans())
def test_block_linear_counts_its_blocks_alone(sizes: tuple[int, ...], biased: bool) -> None:
    rng = np.random.default_rng(0)
    batch, length, blocks, d_in, d_out = sizes
    bias = rng.standard_normal(blocks * d_out) if biased else None
    audit("block_linear", rng.standard_normal((batch, length, blocks * d_in)), rng.random((blocks, d_out, d_in)), bias)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 2), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.data())
def test_selection_and_full_view_count_the_candidates_of_each_row(
    rows: tuple[int, int], width: int, depth: int, replace: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    z, weight, g = (rng.standard_normal(shape) for shape in ((*rows, width), (width, depth), (*rows, depth + 1)))
    ids = audit("top", z, data.draw(st.integers(1, width)))
    audit("refine", z, ids, weight, g[..., 1:], replace)


def test_formulas_take_arrays_of_lengths() -> None:
    """One call over an array of lengths equals one call per length."""
    from refimpl.config import Workload, presets

    lengths = np.array([64, 300, 4096])
    for name, config in presets().items():
        for method in (name for name in CATALOG if fits(name, {}, config)):
            many = costmodel.estimate(method, config, Workload(lengths))
            for i, length in enumerate(lengths.tolist()):
                one = costmodel.estimate(method, config, Workload(length))
                for figure in ("matmul_flops", "vector_flops", "bytes_read", "bytes_written"):
                    assert np.broadcast_to(getattr(many.total, figure), 3)[i] == getattr(one.total, figure), (
                        name,
                        method,
                    )
                assert np.broadcast_to(many.peak_bytes, 3)[i] == one.peak_bytes
