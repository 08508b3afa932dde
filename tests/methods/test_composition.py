"""Methods combined: names, what cannot be combined, equality with the members alone, preparation, memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from passes import prefilled_and_decoded, small_llama
from strategies import compositions, configs, decoders, inputs_for, parameters_for, workloads

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import Workload, preset
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.errors import ConfigError
from refimpl.inputs import random_inputs
from refimpl.methods import CATALOG, method, parameters
from refimpl.methods.composite import Composite
from refimpl.parameters.composition import Composition, canonical, in_common, members
from refimpl.parameters.parts import PARTS, REPLACES
from refimpl.recorder import tally

SEARCHED = [HealthCheck.too_slow, HealthCheck.filter_too_much]
IDS = np.random.default_rng(0).integers(0, 40, (2, 12))

# Of each method parameters under which it is exact attention, to the bit; svd-softmax turns the head, and so rounds.
OFF: dict[str, dict[str, Any]] = {
    "reuse": {"group": 1},
    "folding": {"fold": 1},
    "attmemo": {"tau": 1.1},
    "latte": {"kept": 1, "stage2": "float"},
    "kvsharer": {"layers": 0},
    "headshare": {"ratio": 0},
    "efficientasr": {"group": 1, "score_residual": 0, "ffn_chunks": 1},
}
# Of each method parameters under which it is not.
ON: dict[str, dict[str, Any]] = {
    "flash": {},
    "reuse": {"group": 2},
    "folding": {"fold": 1, "fold_ffn": 2},
    "svd-softmax": {"window": 5, "candidates": 7},
    "attmemo": {"tau": 0, "epochs": 0},
    "latte": {"gamma": 0.9},
    "kvsharer": {"strategy": [[1, 0], [3, 2]]},
    "headshare": {"ratio": 0.5},
    "efficientasr": {"group": 1, "score_residual": 0, "ffn_chunks": 2},
}


def _model(**changes: Any) -> Any:
    return load_model(small_llama(4, kv_heads=6, **changes), seed=3)


def _pairs() -> list[tuple[str, str]]:
    """Two methods with parameters under which they can be combined."""
    config = small_llama(4, kv_heads=6)
    found = []
    for one in ON:
        for other in ON:
            given = {name: {**ON, "svd-softmax": {}}[name] for name in (one, other)}
            if one != other and not _refused(f"{one}+{other}", given, config):
                found.append((one, other))
    return found


def _refused(name: str, given: dict[str, Any], config: Any) -> bool:
    try:
        parameters(name, given, config)
    except ConfigError:
        return True
    return False


# --- names and conflicts --------------------------------------------------------------------------------------------


def test_names_have_one_order_and_dense_adds_nothing() -> None:
    assert canonical("latte+svd-softmax") == canonical("svd-softmax + latte") == "svd-softmax+latte"
    assert canonical("dense+reuse") == "reuse"
    assert canonical("dense") == "dense"
    assert members("efficientasr+svd-softmax+flash") == ("flash", "svd-softmax", "efficientasr")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reuse+", "holds an empty name"),
        ("+", "holds an empty name"),
        ("reuse+reuse", "names reuse twice"),
        ("reuse+late", "did you mean 'latte'"),
        ("", "unknown method ''"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        costmodel.estimate(name, preset("minilm-l6"), Workload(8))


def test_every_method_says_what_it_replaces_in_known_parts() -> None:
    assert {part for parts in REPLACES.values() for part in parts} == set(PARTS)
    assert set(REPLACES) <= set(CATALOG)


@pytest.mark.parametrize("one", CATALOG)
def test_methods_are_combined_exactly_where_no_part_is_replaced_by_both(one: str) -> None:
    """With all parts of each method in use; the message names both methods and the part."""
    config = replace(preset("smollm2-135m"), kv_heads=9)
    on = {**ON, "dense": {}, "folding": {"fold": 3}, "efficientasr": {}, "svd-softmax": {}, "attmemo": {"tau": 0.9}}
    for other in CATALOG:
        if one == other or "dense" in (one, other):
            continue
        common = in_common(one, other)
        given = Composition.of(f"{one}+{other}", {name: on.get(name, {}) for name in (one, other)})
        if not common:
            given.check_parts(config)
            continue
        with pytest.raises(ConfigError, match="cannot be combined: both replace") as caught:
            given.check(config)
        assert "\n" not in str(caught.value)
        assert f"'{common[0]}'" in str(caught.value)
        assert one in str(caught.value)
        assert other in str(caught.value)


def test_parts_at_off_are_not_replaced() -> None:
    model = _model()
    chunks = {"group": 1, "score_residual": 0, "ffn_chunks": 2}
    run = forward(model, IDS, "reuse+efficientasr", {"efficientasr": chunks})
    assert {"block_linear", "softmax"} <= {call.op for call in run.calls}
    with pytest.raises(ConfigError, match="both replace 'feed-forward'"):
        forward(model, IDS, "folding+efficientasr", {"folding": {"fold": 1, "fold_ffn": 2}, "efficientasr": chunks})


def test_parameters_of_a_combination_are_given_by_method() -> None:
    config = preset("smollm2-135m")
    for params, message in (
        ({"group": 4}, "by method"),
        ({"flash": {}}, "none of reuse, svd-softmax"),
        ({"reuse": {"groop": 4}}, "unknown parameter of reuse 'groop'"),
        ({"svd-softmax": {"window": 10**6}}, "window"),
    ):
        with pytest.raises(ConfigError, match=message):
            costmodel.estimate("reuse+svd-softmax", config, Workload(8), params)


def test_a_method_that_declares_nothing_replaces_the_whole_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(REPLACES, "headshare")
    assert in_common("headshare", "latte")
    assert not in_common("headshare", "svd-softmax")
    run = forward(_model(), IDS, "headshare+svd-softmax", {"headshare": {"ratio": 0.25}})
    assert np.isfinite(run.output).all()


def test_row_of_a_combination_is_that_of_its_members() -> None:
    row = method("svd-softmax+reuse")
    assert not row.exact
    assert row.model == CATALOG["svd-softmax"].model  # reuse's own has no head
    assert CATALOG["reuse"].equation in row.equation
    assert CATALOG["svd-softmax"].equation in row.equation


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "on"), [pair for pair in _pairs() if pair[0] in OFF])
def test_a_member_at_off_leaves_the_other_alone_bit_for_bit(off: str, on: str) -> None:
    """Where the member at off has the attention, that is as in ``dense``, not fused as that of svd-softmax alone."""
    materialised = {"fused": False} if on == "svd-softmax" and {"map", "context"} & set(REPLACES[off]) else {}
    model, own = _model(), {**ON[on], **materialised}
    alone = forward(model, IDS, on, own)
    both = forward(model, IDS, f"{off}+{on}", {off: OFF[off], on: own})
    np.testing.assert_array_equal(both.output, alone.output)
    assert tally(alone.calls) != tally(forward(model, IDS, "dense").calls) or on == "headshare"  # it is not at off


@pytest.mark.parametrize(("one", "other"), [pair for pair in _pairs() if pair[0] < pair[1]])
def test_every_member_has_its_effect(one: str, other: str) -> None:
    """The output differs from each member's alone; exact ones (flash) change the ops instead."""
    model = _model()
    both = forward(model, IDS, f"{one}+{other}", {one: ON[one], other: ON[other]})
    for name in (one, other):
        alone = forward(model, IDS, name, ON[name])
        rest = other if name == one else one
        if rest == "flash":
            assert tally(both.calls) != tally(alone.calls) or name == "svd-softmax"
        else:
            assert np.abs(both.output - alone.output).max() > 1e-7, f"{rest} changes nothing beside {name}"


@settings(max_examples=20, deadline=None, suppress_health_check=SEARCHED)
@given(data=st.data())
def test_order_of_names_does_not_matter(data: st.DataObject) -> None:
    config = data.draw(configs(head=data.draw(st.booleans()) or None))
    workload = data.draw(workloads(config))
    name, params = data.draw(compositions(config, causal=workload.is_causal(config)))
    turned = "+".join(reversed(name.split("+")))
    model, inputs = load_model(config), inputs_for(config, workload)
    one, other = (forward(model, inputs, each, params, causal=workload.causal) for each in (name, turned))
    np.testing.assert_array_equal(one.output, other.output)
    costs = [costmodel.estimate(each, config, workload, params) for each in (name, turned)]
    assert costs[0] == costs[1]
    assert costs[0].method == canonical(turned)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_dense_is_neutral(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload, params = data.draw(workloads(config)), data.draw(parameters_for("reuse", config))
    model, inputs = load_model(config), inputs_for(config, workload)
    one, other = (forward(model, inputs, each, params) for each in ("reuse", "dense+reuse"))
    np.testing.assert_array_equal(one.output, other.output)


def test_flash_beside_kvsharer_is_its_own_fused_knob() -> None:
    """A second path to the same program: outputs, ops, costs."""
    model, strategy = _model(), {"strategy": [[1, 0], [3, 2]]}
    fused, both = {**strategy, "fused": True}, {"kvsharer": strategy}
    one, other = forward(model, IDS, "kvsharer", fused), forward(model, IDS, "kvsharer+flash", both)
    np.testing.assert_array_equal(one.output, other.output)
    assert tally(one.calls) == tally(other.calls)
    work = Workload(12, 2)
    costs = [
        costmodel.estimate(name, model.config, work, given)
        for name, given in (("kvsharer", fused), ("kvsharer+flash", both))
    ]
    for figure in ("total", "params_bytes", "resident_bytes", "cache_bytes", "peak_bytes"):
        assert getattr(costs[0], figure) == getattr(costs[1], figure), figure


def test_fused_of_a_member_holds_where_no_member_replaces_attention() -> None:
    ops = {
        name: {call.op for call in forward(_model(), IDS, name, given).calls}
        for name, given in (
            ("kvsharer+svd-softmax", {"kvsharer": ON["kvsharer"]}),
            ("reuse+svd-softmax", {}),
            ("headshare+svd-softmax", {"headshare": ON["headshare"], "svd-softmax": {"fused": False}}),
        )
    }
    assert "attention" in ops["kvsharer+svd-softmax"]
    assert "softmax" in ops["reuse+svd-softmax"]
    assert "softmax" in ops["headshare+svd-softmax"]


@settings(max_examples=15, deadline=None, suppress_health_check=SEARCHED)
@given(data=st.data())
def test_decoding_gives_what_a_whole_pass_gives(data: st.DataObject) -> None:
    """Latte scales by what a pass has seen, so it is left out."""
    config = replace(data.draw(decoders()), max_positions=16)
    name, params = data.draw(compositions(config, cached=True).filter(lambda found: "latte" not in found[0]))
    model, ids = load_model(config), inputs_for(config, Workload(7, 2))
    prefill, steps = prefilled_and_decoded(config, name, params)
    whole = forward(model, ids, name, params, causal=True).output
    np.testing.assert_allclose(np.concatenate([prefill, steps], axis=1), whole, rtol=2e-3, atol=2e-4)


def test_reuse_beside_latte_hands_on_the_filtered_map() -> None:
    """The definition: a compute layer's map is zero where latte drops a key, and reuse layers take that map."""
    model, kept = _model(), []
    given = {"reuse": {"group": 2}, "latte": {"gamma": 0.9}}
    program = Composite(model.config, parameters("reuse+latte", given, model.config))
    filtering = program.members["latte"].attention_map

    def watched(*operands: Any) -> Any:
        kept.append(filtering(*operands))
        return kept[-1]

    program.members["latte"].attention_map = watched  # type: ignore[method-assign]
    runner = Runner(model, "numpy")
    ready = runner.prepare("reuse+latte", given, IDS)
    run = Runner(replace(model, weights=ready.weights), "numpy")(IDS, program)
    assert [call.op for call in run.calls].count("filtered_map") == len(kept) == 2  # of four layers
    for weights in kept:
        assert 0 < np.count_nonzero(weights) < 0.9 * np.count_nonzero(np.tri(12)) * 2 * 6
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    latte = forward(model, IDS, "latte", {"gamma": 0.9})
    first = {call.op: dict(call.sizes)["kept"] for call in latte.calls[:12] if call.op == "filtered_attention"}
    assert np.count_nonzero(kept[0]) == first["filtered_attention"]  # the first layer filters as without reuse


def test_all_three_of_the_manual_s_example_together() -> None:
    config = small_llama(4)
    model, name = load_model(config, seed=3), "reuse+svd-softmax+latte"
    given = {"reuse": {"group": 2}, "svd-softmax": {"window": 5, "candidates": 7}, "latte": {"kept": 0.4}}
    run = forward(model, IDS, name, given)
    assert {"filtered_map", "top", "refine"} <= {call.op for call in run.calls}
    assert not {"scores", "attention", "filtered_attention"} & {call.op for call in run.calls}
    off = {**given, "latte": OFF["latte"]}
    without = {member: given[member] for member in ("reuse", "svd-softmax")}
    np.testing.assert_array_equal(
        forward(model, IDS, name, off).output, forward(model, IDS, "reuse+svd-softmax", without).output
    )


@pytest.mark.parametrize(
    ("reuse", "message"), [({"share": "scores"}, "hands on scores before softmax"), ({"heads": 2}, "a part of their")]
)
def test_reuse_that_needs_more_than_the_filtered_map_is_refused(reuse: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forward(_model(), IDS, "reuse+latte", {"reuse": reuse, "latte": {"gamma": 0.5}})


# --- preparation and memory -------------------------------------------------------------------------------------------


def test_every_member_finds_what_it_finds_alone() -> None:
    """A strategy, thresholds and a basis, on the exact model; with its seconds told to the same listener."""
    runner, heard = Runner(_model(), "numpy"), []
    given = {"kvsharer": {"layers": 1, "threshold": -1}, "latte": {"kept": 0.4}, "svd-softmax": {"window": 5}}
    ready = runner.prepare("+".join(given), given, IDS, progress=lambda message, fraction: heard.append(message))
    for name, own in ready.parameters.members:
        assert own == runner.prepare(name, given[name], IDS).parameters, name
    assert {word for line in heard for word in ("kvsharer", "latte", "head") if word in line} == {
        "kvsharer", "latte", "head"
    }  # fmt: skip
    again = runner.prepare("+".join(reversed(given)), given, IDS)
    assert again is ready


def test_a_combination_without_inputs_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="latte calibrates its thresholds on inputs"):
        Runner(_model(), "numpy").prepare("svd-softmax+latte")


def test_arrays_of_a_pass_are_freed_without_the_collector() -> None:
    """Members know the whole by a weak reference: a cycle would keep maps and keys until a collection."""
    config = small_llama(4, kv_heads=6)
    given = parameters("kvsharer+flash", {"kvsharer": ON["kvsharer"]}, config)
    gc.collect()
    gc.disable()
    try:
        program = Composite(config, given)
        member = program.members["kvsharer"]
        assert member.whole is program
        del program
        assert member.whole is member
    finally:
        gc.enable()


ENGINE = NumbaEngine()
COMBINED = [
    ("kvsharer+flash", {"kvsharer": {"strategy": [[2, 0], [3, 1]]}}),
    ("kvsharer+latte", {"kvsharer": {"strategy": [[3, 1]]}, "latte": {"gamma": 0.1}}),
    ("reuse+svd-softmax", {"reuse": {"group": 2}}),
    ("reuse+efficientasr", {"reuse": {"group": 4}, "efficientasr": ON["efficientasr"]}),
    ("reuse+latte", {"reuse": {"group": 2}, "latte": {"gamma": 0.1}}),
]


@pytest.mark.parametrize(("name", "params"), COMBINED)
def test_peak_is_an_upper_bound_within_a_tenth(name: str, params: dict[str, Any]) -> None:
    """As of single methods in tests/costmodel/test_memory.py, on the allocator of the numba engine."""
    model = "smollm2-135m" if "svd-softmax" in name else "minilm-l6"
    config, seq, batch = replace(preset(model), layers=4, vocab=500), 220, 2
    runner, inputs = Runner(load_model(config, positions=seq), ENGINE), random_inputs(config, seq, batch)
    ready = runner.prepare(name, params, inputs)
    ENGINE.buffers.release()
    ENGINE.buffers.reset_high_water()
    runner(inputs, ready)
    cost = costmodel.estimate(name, config, Workload(seq, batch), params)
    tables = sum(table.nbytes for table in runner._tables)
    seen = ENGINE.buffers.high_water_bytes + tables + cost.resident_bytes
    assert seen <= cost.peak_bytes <= seen + 0.1 * ENGINE.buffers.high_water_bytes
