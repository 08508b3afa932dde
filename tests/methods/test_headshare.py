"""Head-wise sharing: matches, chains, the weights that come of them, their files, and PostShare's loss."""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import prefilled_and_decoded
from strategies import configs, decoders, fits, head_matches, headshare_parameters, inputs_for, workloads

import costmodel
from costmodel.methods.headshare import COMPARED, matching_flops
from refimpl import Model, Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, preset, presets
from refimpl.errors import ConfigError, WeightsError
from refimpl.methods.headshare import HeadShare
from refimpl.methods.subject import Subject
from refimpl.parameters.headshare import MATCHED, HeadShareParameters, Matches
from refimpl.preparation.headpool import compact, expand, load, save, share
from refimpl.preparation.headshare import cosines, find_matches, head_rows
from refimpl.preparation.postshare import TERMS, stacked_heads, weight_loss
from refimpl.weights.layout import Weights

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "headshare.md"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def _config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": 4, "d_model": 12, "heads": 3, "d_ff": 20, "vocab": 30, "recipe": "pre-norm"}
    return ModelConfig(name="tiny", **{**sizes, **changes})


def _slices(weights: Weights, config: ModelConfig, layer: int, head: int) -> dict[str, Any]:
    """What belongs to a head, cut out by index."""
    attention, d, D = weights.layers[layer].attention, config.d_attention, config.head_dim
    rows = np.concatenate([np.arange(part * d + head * D, part * d + (head + 1) * D) for part in range(3)])
    bias = attention.qkv.bias
    return {
        "qkv": attention.qkv.weight[rows],
        "bias": None if bias is None else bias[rows],
        "output": attention.output.weight[:, head * D : (head + 1) * D],
    }


def _equal(found: dict[str, Any], wanted: dict[str, Any], *names: str) -> bool:
    return all(found[name] is wanted[name] or np.array_equal(found[name], wanted[name]) for name in names)


# --- matches ------------------------------------------------------------------------------------------------------


def _brute_matches(weights: Weights, config: ModelConfig, match: str) -> list[tuple[int, int, int, int, float]]:
    """Steps 1 to 3 of the algorithm, head against head; the entries in rising order of their cosine, as sorted."""

    def feature(layer: int, head: int) -> Any:
        q, k, v = np.split(_slices(weights, config, layer, head)["qkv"].astype(np.float64), 3)  # (D, d) each
        if match == "total":
            scores = np.exp(q @ k.T / math.sqrt(config.d_model))
            return (scores / scores.sum(axis=1, keepdims=True) @ v).ravel()
        return np.concatenate([{"q": q, "k": k, "v": v}[name] for name in match]).ravel()

    entries = []
    for layer in range(config.layers - 1, 0, -1):
        for head in range(config.heads):
            own, best = feature(layer, head), (-math.inf, -1, -1)
            for source_layer in range(layer):
                for source_head in range(config.heads):
                    other = feature(source_layer, source_head)
                    cosine = float(own @ other / (np.linalg.norm(own) * np.linalg.norm(other)))
                    if cosine > best[0]:
                        best = (cosine, source_layer, source_head)
            entries.append((layer, head, *best[1:], best[0]))
    return sorted(entries, key=lambda entry: entry[4])


@pytest.mark.parametrize("match", MATCHED)
def test_matches_equal_those_of_plain_loops(match: str) -> None:
    config = _config(layers=5, heads=4, d_model=16)
    weights = load_model(config, dtype="float64", seed=3).weights
    found, brute = find_matches(weights, config, match), _brute_matches(weights, config, match)[::-1]
    assert [one[:4] for one in found] == [one[:4] for one in brute]
    np.testing.assert_allclose([one.cosine for one in found], [one[4] for one in brute], rtol=1e-12)


def test_heads_may_together_be_wider_than_the_model() -> None:
    """H D = 24 for d = 12; the divisor of `total` is the root of d."""
    config = _config(head_dim=8)
    weights = load_model(config, dtype="float64").weights
    for match in MATCHED:
        found, brute = find_matches(weights, config, match), _brute_matches(weights, config, match)[::-1]
        assert [one[:4] for one in found] == [one[:4] for one in brute]


@pytest.mark.parametrize("match", ["qk", "total"])
@pytest.mark.parametrize("block", [1, 100, 10**9])
def test_cosines_do_not_depend_on_the_block(block: int, match: str) -> None:
    config = _config()
    weights = load_model(config).weights
    np.testing.assert_allclose(
        cosines(weights, config, match, block=block), cosines(weights, config, match), rtol=1e-12, atol=1e-14
    )


def test_cosines_of_float32_weights_are_summed_in_float64() -> None:
    """Heads that differ in the ninth digit of their cosine are told apart; float32 has seven."""
    config = _config(layers=3, heads=1, d_model=64, head_dim=64)
    layers = load_model(config, dtype="float32").weights.layers
    first = head_rows(layers[0], config)
    head_rows(layers[1], config)[:] = first
    head_rows(layers[1], config)[0, 0, 0, 0] *= 1 + 2e-3
    head_rows(layers[2], config)[:] = first
    similar = cosines(Weights(layers=layers), config)
    assert similar.dtype == np.float64
    x = np.stack([head_rows(layer, config)[:2].astype(np.float64).ravel() for layer in layers])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert 0 < 1 - similar[0, 1] < 1e-7
    np.testing.assert_allclose(1 - similar[0, 1], np.sum((x[0] - x[1]) ** 2) / 2, rtol=1e-4)
    assert find_matches(Weights(layers=layers), config)[0][:4] == (2, 0, 0, 0)


def test_of_equals_the_first_source_counts_and_the_last_target_comes_first() -> None:
    """All heads alike, with exact sums: sources are (0, 0); the order is layers rising, heads falling."""
    config = _config(layers=3, heads=2, d_model=4)
    layers = load_model(config, dtype="float64").weights.layers
    for layer in layers:
        head_rows(layer, config)[:] = 1.0
    found = find_matches(Weights(layers=layers), config)
    assert [match[:4] for match in found] == [(1, 1, 0, 0), (1, 0, 0, 0), (2, 1, 0, 0), (2, 0, 0, 0)]
    assert {match.cosine for match in found} == {1.0}


def test_a_head_of_zeros_is_like_no_other() -> None:
    config = _config(layers=2)
    layers = load_model(config).weights.layers
    head_rows(layers[1], config)[:, 1] = 0.0
    similar = cosines(Weights(layers=layers), config)
    assert (similar[4] == 0.0).all()
    assert np.isfinite(similar).all()


@settings(max_examples=40, deadline=None)
@given(config=configs(), match=st.sampled_from(MATCHED), seed=st.integers(0, 3))
def test_matches_lie_in_earlier_layers_and_fall(config: ModelConfig, match: str, seed: int) -> None:
    """Invariants 3 and 6: every head but those of layer 0 once; sources strictly earlier; best first."""
    config = replace(config, kv_heads=config.heads)
    found = find_matches(load_model(config, seed=seed).weights, config, match)
    assert sorted((one.layer, one.head) for one in found) == [
        (layer, head) for layer in range(1, config.layers) for head in range(config.heads)
    ]
    assert all(0 <= one.source_layer < one.layer and 0 <= one.source_head < config.heads for one in found)
    assert all(a.cosine >= b.cosine for a, b in pairwise(found))
    assert all(abs(one.cosine) <= 1 + 1e-12 for one in found)


def test_the_search_reports_its_progress() -> None:
    config = _config()
    said: list[tuple[str, float]] = []
    find_matches(load_model(config).weights, config, "qk", lambda message, fraction: said.append((message, fraction)))
    assert said[0] == ("matching 12 heads", 0.0)
    assert all(0.0 <= fraction < 1.0 for _, fraction in said)


# --- which heads are replaced -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3, 6, 12, 32])
@pytest.mark.parametrize("heads", [1, 6, 7, 10, 32])
def test_number_of_selected_heads_is_the_floor_of_the_ratio_as_written(layers: int, heads: int) -> None:
    """Invariant 6: 29 % of 100 heads are 29, though 0.29 * 100 is 28.999999999999996; and k / (L H) gives k."""
    config = _config(layers=layers, heads=heads, d_model=2 * heads)
    for percent in range(101):
        assert HeadShareParameters(percent / 100).selected(config) == percent * layers * heads // 100
    for count in range(layers * heads + 1):
        assert HeadShareParameters(count / (layers * heads)).selected(config) == count


def test_selected_heads_are_those_with_the_largest_cosines() -> None:
    """Invariant 6, on weights: the least of the selected is at least the most of the rest."""
    config = _config(layers=6, heads=4, d_model=16)
    weights = load_model(config, dtype="float64").weights
    best = {entry[:2]: entry[4] for entry in _brute_matches(weights, config, "qk")}
    for ratio in RATIOS:
        complete = HeadShare.complete(HeadShareParameters(ratio), _subject(Model(config, weights, "", False)))
        count, sources = complete.selected(config), complete.sources(config)
        replaced = {divmod(head, 4) for head, source in enumerate(sources) if head != source}
        assert len(replaced) == count == math.floor(ratio * 24)
        assert min(best[head] for head in replaced) >= max(best[head] for head in best.keys() - replaced)


def _subject(model: Model) -> Subject:
    return Subject(model, Runner(model, "numpy").engine)


def _repository(pairs: list[list[int]], heads: int) -> dict[int, int]:
    """What ``DirectShare`` leaves in its table: head -> the head whose weights it ends with.

    Layer by layer it makes a copy of the source's own weights for each pair, and enters it for both heads of the pair.
    """
    copies: list[int] = []
    table: dict[int, int] = {}
    for layer, head, source_layer, source_head in sorted(pairs):
        table[layer * heads + head] = len(copies)
        table[source_layer * heads + source_head] = len(copies)
        copies.append(source_layer * heads + source_head)
    return {head: copies[place] for head, place in table.items()}


def test_a_source_that_was_replaced_is_restored_by_the_repository() -> None:
    """(1, 0) is first a target and then a source: its own weights come back, and one head of three is not replaced."""
    config = _config(layers=4, heads=2, d_model=4)
    pairs = [[3, 1, 2, 0], [2, 0, 1, 0], [1, 0, 0, 1]]
    transitive, repo = (HeadShareParameters(3 / 8, chains=chains, matches=pairs) for chains in ("transitive", "repo"))
    assert _repository(pairs, 2) == {1: 1, 2: 2, 4: 4, 7: 4}
    assert repo.sources(config) == (0, 1, 2, 3, 4, 5, 6, 4)
    assert repo.replaced(config) == 1  # 3 targets, of which 2 are sources
    assert transitive.sources(config) == (0, 1, 1, 3, 1, 5, 6, 1)
    assert transitive.replaced(config) == 3


@settings(max_examples=200, deadline=None)
@given(data=st.data(), layers=st.integers(2, 6), heads=st.integers(1, 5))
def test_chains(data: st.DataObject, layers: int, heads: int) -> None:
    """Invariants 3 to 5 on any matches, and the repository's table."""
    config, pairs = _config(layers=layers, heads=heads, d_model=2 * heads), data.draw(head_matches(layers, heads))
    count = data.draw(st.integers(1, (layers - 1) * heads))
    chosen = {layer * heads + head: a * heads + b for layer, head, a, b in pairs[:count]}

    def plan(chains: str) -> tuple[HeadShareParameters, tuple[int, ...]]:
        found = HeadShareParameters(count / (layers * heads), chains=chains, matches=pairs)
        found.check(config)
        return found, found.sources(config)

    parameters, sources = plan("transitive")
    assert all(sources[head] == head for head in range(layers * heads) if head not in chosen)
    assert all(sources[source] == source for source in sources)  # a fixed point
    assert all(sources[head] // heads < head // heads for head in chosen)
    assert len(set(sources)) == layers * heads - count == layers * heads - parameters.replaced(config)
    for head in chosen:
        end = head
        while end in chosen:
            end = chosen[end]
        assert sources[head] == end

    parameters, sources = plan("repo")
    replaced = {head for head, source in enumerate(sources) if head != source}
    assert replaced == chosen.keys() - set(chosen.values())
    assert len(replaced) == parameters.replaced(config) == layers * heads - len(set(sources))
    table = _repository(pairs[:count], heads)
    assert sources == tuple(table.get(head, head) for head in range(layers * heads))


# --- the weights and the pass -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_off_knob_equals_dense_bit_for_bit(data: st.DataObject) -> None:
    """Invariant 1: r = 0, on which the published code selects all heads; and less than one head."""
    config = data.draw(configs())
    workload = data.draw(workloads(config))
    off = {"ratio": 0, "chains": data.draw(st.sampled_from(["transitive", "repo"]))}
    if config.kv_heads == config.heads and config.layers > 1 and data.draw(st.booleans()):
        off["ratio"] = 0.99 / (config.layers * config.heads)
    model, inputs = load_model(config), inputs_for(config, workload)
    dense = forward(model, inputs, "dense", causal=workload.causal)
    shared = forward(model, inputs, "headshare", off, causal=workload.causal)
    np.testing.assert_array_equal(shared.output, dense.output)


@settings(max_examples=30, deadline=None)
@given(config=decoders().filter(lambda config: not config.streams))
def test_off_knob_equals_dense_bit_for_bit_with_a_cache(config: ModelConfig) -> None:
    """Invariant 1 for a prefill and the decoding after it."""
    exact = prefilled_and_decoded(config, "dense", {})
    for found, wanted in zip(prefilled_and_decoded(config, "headshare", {"ratio": 0}), exact, strict=True):
        np.testing.assert_array_equal(found, wanted)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_head_has_the_slices_of_its_source(data: st.DataObject) -> None:
    """Step 4, slice by slice: q, k, v with their biases, o where shared; all else is the layer's own."""
    config = replace(data.draw(configs()), layers=data.draw(st.integers(2, 4)))
    config = replace(config, kv_heads=config.heads)
    weights = load_model(config).weights
    given = HeadShareParameters(**data.draw(headshare_parameters(config)))
    complete = HeadShare.complete(given, _subject(Model(config, weights, "", False)))
    before = {name: array.copy() for name, array in _flat(weights).items()}
    shared = HeadShare.derive(weights, config, complete)
    for name, array in before.items():
        np.testing.assert_array_equal(_flat(weights)[name], array)  # the exact model is not changed
        if not re.search(r"attention\.(qkv|output\.weight)", name):
            assert _flat(shared)[name] is _flat(weights)[name], name
    for head, source in enumerate(complete.sources(config)):
        place, origin = divmod(head, config.heads), divmod(source, config.heads)
        found = _slices(shared, config, *place)
        assert _equal(found, _slices(weights, config, *origin), "qkv", "bias")
        assert _equal(found, _slices(weights, config, *(origin if complete.share_output else place)), "output")


def _flat(weights: Weights) -> dict[str, Any]:
    """Dotted name -> array."""
    found: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, list):
            for index, child in enumerate(node):
                walk(child, f"{name}{index}.")
        elif isinstance(node, Weights):
            for key, child in vars(node).items():
                walk(child, f"{name}{key}.")
        else:
            found[name.removesuffix(".")] = node

    walk(weights, "")
    return found


def _with_duplicates(config: ModelConfig, copies: list[list[int]], dtype: str = "float32") -> Model:
    """A model in which each (layer, head) is an exact copy of (source layer, source head)."""
    model = load_model(config, dtype=dtype)
    for layer, head, source_layer, source_head in copies:
        own = _views(model.weights, config, layer, head)
        for name, slices in _views(model.weights, config, source_layer, source_head).items():
            own[name][...] = slices
    return model


def _views(weights: Weights, config: ModelConfig, layer: int, head: int) -> dict[str, Any]:
    attention, D = weights.layers[layer].attention, config.head_dim
    return {
        "qkv": head_rows(weights.layers[layer], config)[:, head],
        "bias": attention.qkv.bias.reshape(3, config.heads, D)[:, head],
        "output": attention.output.weight[:, head * D : (head + 1) * D],
    }


@pytest.mark.parametrize("chains", ["transitive", "repo"])
@pytest.mark.parametrize("recipe", ["post-norm", "pre-norm", "conformer"])
def test_sharing_exact_duplicates_changes_nothing(recipe: str, chains: str) -> None:
    """Invariant 2: found by the search itself; a copy of a copy among them."""
    config = _config(recipe=recipe, position="relative" if recipe == "conformer" else "none", conv_kernel=3)
    copies = [[1, 2, 0, 1], [2, 0, 1, 2], [3, 1, 0, 0]]
    model, ids = _with_duplicates(config, copies), np.arange(9)[None, :]
    params = {"ratio": 3 / 12, "chains": chains}
    ready = Runner(model, "numpy").prepare("headshare", params)
    assert {pair[:2] for pair in ready.parameters.matches[:3]} == {(1, 2), (2, 0), (3, 1)}
    dense = forward(model, ids, "dense").output
    np.testing.assert_array_equal(forward(model, ids, "headshare", params).output, dense)
    assert not np.allclose(forward(model, ids, "headshare", {**params, "ratio": 4 / 12}).output, dense)


def test_the_pass_is_that_of_dense_on_shared_weights() -> None:
    """Bit for bit, against weights put together by index in this file; `share_output` matters."""
    config = _config(recipe="post-norm", position="learned", max_positions=16, causal=True)
    pairs, outputs = [[2, 1, 0, 2], [3, 0, 2, 1], [1, 1, 0, 0]], []
    ids = np.arange(11)[None, :]
    for share_output in (True, False):
        model = load_model(config)
        for layer, head, source_layer, source_head in ([1, 1, 0, 0], [2, 1, 0, 2], [3, 0, 0, 2]):
            own = _views(model.weights, config, layer, head)
            for name, slices in _views(model.weights, config, source_layer, source_head).items():
                if share_output or name != "output":
                    own[name][...] = slices
        wanted = forward(model, ids, "dense").output
        params = {"ratio": 0.25, "matches": pairs, "share_output": share_output}
        outputs.append(forward(load_model(config), ids, "headshare", params).output)
        np.testing.assert_array_equal(outputs[-1], wanted)
    assert not np.allclose(*outputs)


def test_layers_before_the_first_replaced_head_are_the_same_objects() -> None:
    config = _config()
    weights = load_model(config).weights
    parameters = HeadShareParameters(1 / 12, matches=[[2, 0, 1, 1]])
    shared = HeadShare.derive(weights, config, parameters)
    assert [a is b for a, b in zip(shared.layers, weights.layers, strict=True)] == [True, True, False, True]
    assert HeadShare.derive(weights, config, HeadShareParameters(0)) is weights


@settings(max_examples=30, deadline=None)
@given(config=decoders().filter(lambda config: not config.streams), data=st.data())
def test_pieces_with_a_cache_equal_one_pass(config: ModelConfig, data: st.DataObject) -> None:
    """A prefill, and pieces of any length after it, are one pass over all."""
    config = replace(config, kv_heads=config.heads)
    params = data.draw(headshare_parameters(config))
    runner, ids = Runner(load_model(config, dtype="float64"), "numpy"), inputs_for(config, Workload(9, 2))
    whole = runner(ids, "headshare", params).output
    cache = runner.new_cache(9, "headshare", params, batch=2)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 8)))), 9]
    pieces = [runner(ids[:, a:b], "headshare", params, cache=cache).output for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-9, atol=1e-9)


FAST = [
    (_config(d_model=64, heads=8, d_ff=128, position="rotary", causal=True), {"ratio": 0.5}),
    (_config(d_model=64, heads=8, d_ff=128, recipe="post-norm"), {"ratio": 0.3, "share_output": False}),
    (
        _config(d_model=64, heads=8, d_ff=128, recipe="conformer", position="relative", conv_kernel=3),
        {"ratio": 0.75, "chains": "repo"},
    ),
]


@pytest.mark.parametrize(("config", "params"), FAST)
def test_numba_obeys_the_2x_rule(config: ModelConfig, params: dict[str, Any]) -> None:
    """float32 against float64, with twice the error of the NumPy engine in float32; floor: four roundings."""
    inputs, exact = inputs_for(config, Workload(23, 2)), load_model(config, dtype="float64")
    found = Runner(exact, "numpy").prepare("headshare", params).parameters.matches
    params = {**params, "matches": found}  # so that all share alike
    truth = forward(exact, inputs, "headshare", params).output
    model = load_model(config, dtype="float32")
    honest, fast = (forward(model, inputs, "headshare", params, engine).output for engine in ("numpy", "numba"))
    floor = 4 * float(np.finfo(np.float32).eps) * np.abs(truth).max()
    assert fast.dtype == honest.dtype == np.float32
    assert np.abs(fast - truth).max() <= 2 * np.abs(honest - truth).max() + floor


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, *RATIOS])
def test_only_parameters_fall(ratio: float) -> None:
    """Invariant 7: 4 d D less for each shared head; FLOPs, traffic, cache and peak as dense, and so is the time."""
    from costmodel.hardware import MemoryLevel
    from costmodel.hardware import presets as machines
    from costmodel.predict import predict

    config = replace(preset("llama-2-7b"), bias=False)
    decoding = Workload(phase="decode", kv_len=99, batch=2, steps=3)
    for work in (Workload(300, 2), decoding, Workload(64, fills_cache=True)):
        dense = costmodel.estimate("dense", config, work)
        shared = costmodel.estimate("headshare", config, work, {"ratio": ratio})
        assert shared.tally() == dense.tally()
        assert shared.total == dense.total
        assert (shared.cache_bytes, shared.peak_bytes) == (dense.cache_bytes, dense.peak_bytes)
        count, index = math.floor(round(ratio * 1024, 9)), 4 * 1024 if ratio else 0
        assert dense.params_bytes - shared.params_bytes == count * 4 * 4096 * 128 * 4 - index
        assert shared.resident_bytes == dense.resident_bytes == dense.params_bytes
        # What is kept would fit into this cache, what is run does not.
        between = (shared.params_bytes + dense.params_bytes) / 2 + dense.cache_bytes
        levels = (MemoryLevel("cache", between, 1e13), MemoryLevel("memory", 1e13, 1e11))
        machine = replace(machines()["xeon-8480"], memory=levels)
        assert predict(shared, machine).total.seconds == predict(dense, machine).total.seconds


@pytest.mark.parametrize(("share_output", "bias", "slices"), [(True, False, 48), (False, False, 36), (True, True, 51)])
def test_what_belongs_to_a_shared_head(share_output: bool, bias: bool, slices: int) -> None:
    """d = 12, D = 4: rows of q, k and v, and columns of o; biases of q, k and v, not that of o."""
    config = _config(bias=bias)
    params = {"ratio": 0.5, "share_output": share_output}
    dense = costmodel.estimate("dense", config, Workload(4)).params_bytes
    shared = costmodel.estimate("headshare", config, Workload(4), params).params_bytes
    assert dense - shared == 6 * slices * 4 * 4 - 12 * 4


def test_chains_of_the_repository_need_matches_in_closed_form() -> None:
    config, params = _config(), {"ratio": 0.25, "chains": "repo"}
    with pytest.raises(ConfigError, match="chains='repo' depends on the matches: give a file"):
        costmodel.estimate("headshare", config, Workload(4), params)
    assert costmodel.estimate("headshare", config, Workload(4), {**params, "ratio": 0}).params_bytes
    pairs = [[2, 0, 1, 0], [1, 0, 0, 0], [3, 1, 2, 2]]
    dense, shared = (
        costmodel.estimate(method, config, Workload(4), given).params_bytes
        for method, given in (("dense", {}), ("headshare", {**params, "matches": pairs}))
    )
    assert dense - shared == 2 * (48 + 3) * 4 * 4 - 12 * 4  # (1, 0) is restored


def test_matching_flops_are_counted_in_loops() -> None:
    config = _config(layers=5, heads=4, d_model=16)
    weights = load_model(config).weights
    for match, compared in COMPARED.items():
        flops = 0
        for layer in range(1, 5):
            for _head in range(4):
                for source_layer in range(layer):
                    numbers = head_rows(weights.layers[source_layer], config)[0].size * compared  # of all its heads
                    flops += 2 * numbers
        assert matching_flops(config, match) == flops
    llama = preset("llama-2-7b")
    assert matching_flops(llama) == 31 * 32 // 2 * 32**2 * 2 * (2 * 128 * 4096)


# --- files --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_compact_weights_expand_bit_for_bit(data: st.DataObject) -> None:
    """Every kind of model; from the weights before and after sharing."""
    config = replace(data.draw(configs()), layers=data.draw(st.integers(2, 4)))
    config = replace(config, kv_heads=config.heads)
    model = load_model(config)
    params = HeadShareParameters(**data.draw(headshare_parameters(config)))
    complete = HeadShare.complete(params, _subject(model))
    sources, share_output = complete.sources(config), complete.share_output
    shared = _flat(share(model.weights, config, sources, share_output))
    for weights in (model.weights, share(model.weights, config, sources, share_output)):
        found = _flat(expand(compact(weights, config, sources, share_output), config))
        assert found.keys() == shared.keys()
        for name, array in shared.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def _saved(path: Path, config: ModelConfig, model: Model, params: dict[str, Any]) -> None:
    complete = Runner(model, "numpy").prepare("headshare", params).parameters
    save(path, model.weights, config, complete.sources(config), complete.share_output)


def test_file_falls_by_the_shared_slices(tmp_path: Path) -> None:
    """As stated: 4 d D numbers per shared head, and 3 D of biases, to the byte."""
    config = _config(layers=6, heads=4, d_model=64, head_dim=16, d_ff=8)
    model = load_model(config)
    sizes = {}
    for ratio in (0, *RATIOS):
        path = tmp_path / f"{ratio}.npz"
        _saved(path, config, model, {"ratio": ratio})
        sizes[ratio] = path.stat().st_size
        kept = costmodel.estimate("headshare", config, Workload(4), {"ratio": ratio}).params_bytes
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name != "version"}
        assert sum(array.nbytes for array in arrays.values()) == kept + (0 if ratio else 4 * 24)
        headers = sizes[ratio] - sum(array.nbytes for array in arrays.values())
        assert headers < 500 * (len(arrays) + 1)
    for ratio in RATIOS:
        count = math.floor(ratio * 24)
        assert sizes[0] - sizes[ratio] == count * (4 * 64 * 16 + 3 * 16) * 4


def test_loaded_weights_run_as_the_method_does(tmp_path: Path) -> None:
    """The file is an ordinary model for dense, and gives the same output bit for bit."""
    config = _config(recipe="post-norm", position="learned", max_positions=16)
    model, ids = load_model(config, dtype="float64"), np.arange(9)[None, :]
    for params in ({"ratio": 0.5}, {"ratio": 0.5, "chains": "repo"}, {"ratio": 0.25, "share_output": False}):
        _saved(tmp_path / "w.npz", config, model, params)
        loaded = Model(config, load(tmp_path / "w.npz", config), "a file", True)
        np.testing.assert_array_equal(
            forward(loaded, ids, "dense").output, forward(model, ids, "headshare", params).output
        )
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config()
    model, path = load_model(config), tmp_path / "w.npz"
    _saved(path, config, model, {"ratio": 0.25})
    before = path.read_bytes()

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(WeightsError, match="cannot be written: No space left on device"):
        _saved(path, config, model, {"ratio": 0.5})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    for place in (tmp_path / "nowhere" / "w.npz", path / "w.npz"):
        with pytest.raises(WeightsError, match="cannot be written"):
            _saved(place, config, model, {"ratio": 0.5})


def _spoilt(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        tensors = {name: file[name] for name in file.files}
    tensors |= {name.replace("__", "."): array for name, array in changes.items()}
    np.savez(path, **{name: array for name, array in tensors.items() if array is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": np.int32(2)}, "version 1"),
        ({"version": None}, "version 1"),
        ({"version": np.ones(2)}, "version 1"),
        ({"heads__index": None}, "lack 'heads.index'"),
        ({"heads__qkv": None}, "lack 'heads.qkv'"),
        ({"heads__index": np.full((4, 3), 9)}, "from 0 to 8"),
        ({"heads__index": np.full((4, 3), -1)}, "from 0 to 8"),
        ({"heads__index": np.zeros((4, 3))}, "whole numbers"),
        ({"heads__index": np.zeros((4, 4), int)}, r"\(4, 4\); the model needs \(4, 3\)"),
        ({"heads__qkv": np.float32(1)}, r"'heads.qkv' has shape \(\)"),
        ({"heads__qkv": np.zeros((0, 3, 4, 12), "f")}, "'heads.bias' has shape"),
        ({"heads__qkv": np.zeros((9, 3, 4, 12), int)}, "holds int64"),
        ({"heads__qkv": np.full((9, 3, 4, 12), np.nan)}, "NaN"),
        ({"heads__output": None}, r"lack 'layers.0.attention.output.weight'"),
        ({"heads__bias": None}, "lack 'layers.0.attention.qkv.bias'"),
        ({"stem__embedding": None}, "lack 'stem.embedding'"),
        ({"stem__embedding": np.zeros((2, 2), "f")}, "needs"),
        ({"stem__positions": np.float32(1)}, "stem.positions"),
        ({"extra": np.zeros(3, "f")}, "does not have"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config, path = _config(), tmp_path / "w.npz"
    _saved(path, config, load_model(config), {"ratio": 0.25})
    _spoilt(path, **changes)
    with pytest.raises(WeightsError, match=message) as caught:
        load(path, config)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    config, path = _config(), tmp_path / "w.npz"
    _saved(path, config, load_model(config), {"ratio": 0.25})
    whole = path.read_bytes()
    np.savez(tmp_path / "pickled.npz", version=np.int32(1), stem=np.array([{}], object))
    np.save(tmp_path / "single.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as file:
        file.writestr("version.npy", "no array")
    contents = {"short.npz": whole[:-200], "middle.npz": whole[: len(whole) // 2], "empty.npz": b"", "text": b"weights"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in ("pickled.npz", "single.npy", "text.npz", *contents, "."):
        with pytest.raises(WeightsError, match=r"not an \.npz file|cannot be read") as caught:
            load(tmp_path / name, config)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        load(tmp_path / "absent.npz", config)
    with pytest.raises(WeightsError, match="needs"):
        load(path, replace(config, layers=5))


# --- matches in files ---------------------------------------------------------------------------------------------


def _document(config: ModelConfig, **params: Any) -> dict[str, Any]:
    found = Runner(load_model(config), "numpy").prepare("headshare", params).parameters.to_document()
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("match", MATCHED)
def test_found_matches_are_read_back(tmp_path: Path, match: str) -> None:
    """The same output without a search, and the same document again."""
    config, path = _config(), tmp_path / "matches.json"
    document = _document(config, match=match)
    assert (document["effref"], document["version"]) == ("headshare matches", 1)
    assert (document["model"], document["layers"], document["heads"]) == ("tiny", 4, 3)
    assert len(document["matches"]) == len(document["cosines"]) == 9
    path.write_text(json.dumps(document), "utf-8")
    read = HeadShareParameters(0.5, match=match, matches=str(path))
    assert json.loads(json.dumps(read.to_document())) == document
    model, ids = load_model(config), np.arange(9)[None, :]
    for ratio in (0.1, 0.5):
        found = forward(model, ids, "headshare", {"ratio": ratio, "match": match}).output
        params = {"ratio": ratio, "match": match, "matches": str(path)}
        np.testing.assert_array_equal(forward(model, ids, "headshare", params).output, found)
    assert hash(read) == hash(HeadShareParameters(0.5, match=match, matches=document["matches"]))


def test_given_matches_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("refimpl.methods.headshare.find_matches", fail)
    model = load_model(_config())
    pairs = [[layer, head, 0, 0] for layer in (1, 2, 3) for head in range(3)]
    ready = Runner(model, "numpy").prepare("headshare", {"matches": pairs})
    assert ready.parameters.matches == tuple(map(tuple, pairs))
    Runner(model, "numpy").prepare("headshare", {"ratio": 0})
    with pytest.raises(AssertionError, match="searched"):
        Runner(model, "numpy").prepare("headshare")


def test_without_matches_there_is_no_document() -> None:
    with pytest.raises(ConfigError, match="no matches yet"):
        HeadShareParameters().to_document()
    assert HeadShareParameters(0).is_complete(_config())
    assert not HeadShareParameters().is_complete(_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effref": "kvsharer strategy"}, "holds no headshare matches"),
        ({"effref": None}, "holds no headshare matches"),
        ({"version": 2}, "version 2; 1 can be read"),
        ({"version": [1] * 1000}, "1 can be read"),
        ({"match": "kv"}, "match is 'kv'"),
        ({"match": ["qk"]}, "known: q, k, v"),
        ({"match": "v"}, "found with match='v'; match='qk' is given"),
        ({"layers": "4"}, "layers is '4'"),
        ({"heads": True}, "heads is True"),
        ({"layers": 9}, "for 9 layers of 3 heads; tiny has 4 of 3"),
        ({"matches": None}, "matches=None"),
        ({"matches": {}}, "it must be a file"),
        ({"matches": [[1, 0, 0]]}, r"holds \[1, 0, 0\]"),
        ({"matches": [[1, 0, 0, 0.0]]}, "0.0"),
        ({"matches": [[1, 0, 0, "x" * 10**6]]}, "it must be"),
        ({"matches": [[1, 0, 0, True]]}, "it must be"),
        ({"matches": [[1, 0, 1, 2]]}, "earlier layer"),
        ({"matches": [[0, 0, 0, 0]]}, "earlier layer"),
        ({"matches": [[1, 0, -1, 0]]}, "it must be"),
        ({"matches": [[1, 0, 0, 0], [1, 0, 0, 1]]}, "names a head twice"),
        ({"matches": [[4, 0, 0, 0]]}, "counted from 0"),
        ({"matches": [[1, 3, 0, 0]]}, "counted from 0"),
        ({"matches": [[1, 0, 0, 10**30]]}, "counted from 0"),
        ({"matches": []}, "ratio=0.3 needs 3 matches; 0 are given"),
    ],
)
def test_hostile_documents_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "matches.json"
    path.write_text(json.dumps({**_document(_config()), **changes}), "utf-8")
    for call in (
        lambda: costmodel.estimate("headshare", _config(), Workload(4), {"matches": str(path)}),
        lambda: forward(load_model(_config()), np.arange(4)[None, :], "headshare", {"matches": str(path)}),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 10**5, b"9" * 10**5, b"null", b"\x00"]
)
def test_files_that_are_no_documents_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "matches.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a JSON file|holds no headshare matches"):
        HeadShareParameters(matches=str(path))
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            HeadShareParameters(matches=absent)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": -0.1}, "from 0 to 1"),
        ({"ratio": float("nan")}, "from 0 to 1"),
        ({"ratio": "0.3"}, "from 0 to 1"),
        ({"ratio": True}, "from 0 to 1"),
        ({"ratio": 0.76}, r"at most 0\.75"),
        ({"ratio": 1}, r"at most 0\.75"),
        ({"match": "kv"}, "one of 'q'"),
        ({"chains": "long"}, "one of 'transitive'"),
        ({"share_output": "no"}, "one of True"),
        ({"matches": 3}, "matches=3"),
        ({"ration": 0.3}, "did you mean 'ratio'"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forward(load_model(_config()), np.arange(4)[None, :], "headshare", params)
    with pytest.raises(ConfigError, match=message):
        costmodel.estimate("headshare", _config(), Workload(4), params)


def test_most_heads_that_can_be_replaced_are_all_but_those_of_the_first_layer() -> None:
    for layers in range(2, 40):
        config = _config(layers=layers)
        parameters = HeadShareParameters((layers - 1) / layers)
        parameters.check(config)
        assert parameters.selected(config) == (layers - 1) * 3
    with pytest.raises(ConfigError, match="at most 0 of all"):
        HeadShareParameters().check(_config(layers=1))


def test_grouped_key_heads_are_refused() -> None:
    """In one line, by everything that would need a slice of Wk for each query head; r = 0 shares nothing."""
    config = _config(heads=4, kv_heads=2, d_model=16)
    model = load_model(config)
    for call in (
        lambda: forward(model, np.arange(4)[None, :], "headshare"),
        lambda: costmodel.estimate("headshare", config, Workload(4)),
        lambda: find_matches(model.weights, config),
        lambda: compact(model.weights, config, range(16)),
        lambda: stacked_heads(model.weights, config),
    ):
        with pytest.raises(ConfigError, match="a key head for every query head; tiny has 2 for 4") as caught:
            call()
        assert "\n" not in str(caught.value)
    HeadShareParameters(0).check(config)


def test_models_that_are_refused_are_those_with_grouped_key_heads() -> None:
    """So that tests which skip what does not fit skip nothing else."""
    refused = {name for name, config in presets().items() if not fits("headshare", {}, config)}
    assert refused == {name for name, config in presets().items() if config.kv_heads != config.heads}


# --- PostShare ----------------------------------------------------------------------------------------------------

SLICES = 2 * np.sin(np.arange(3 * 3 * 2 * 2 * 4)).reshape(3, 3, 2, 2, 4)  # (L, 3, H, D, d)
MATCHES = [(2, 1, 1, 0), (1, 0, 0, 1), (2, 0, 0, 1)]  # a chain, and a source of two

# Loss, sum of gradient x index, and sum of |gradient|: the repository's formulas in PyTorch 2.13 (float64, autograd).
REFERENCE = {
    "norm": (9.834267866077, -19.521827124896035, 14.130767020229468),
    "mse": (5.365781738169933, 0.9886954622286228, 8.338077556893202),
    "kl": (1.7635030123433395, 0.015662003125615387, 2.3529053739844605),
    "js": (0.5512858069319436, -0.06252820746851584, 0.799277230804565),
}


@pytest.mark.parametrize("kind", TERMS)
def test_loss_and_gradient_are_those_of_the_repositorys_formulas(kind: str) -> None:
    loss, gradient = weight_loss(SLICES, MATCHES, kind)
    weighted = float(np.sum(gradient.ravel() * np.arange(SLICES.size)))
    np.testing.assert_allclose((loss, weighted, np.abs(gradient).sum()), REFERENCE[kind], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", TERMS)
def test_gradient_equals_finite_differences(kind: str) -> None:
    """Central differences in float64, of every number of every head."""
    _, gradient = weight_loss(SLICES, MATCHES, kind)
    step = 1e-5
    for place in np.ndindex(SLICES.shape):
        up, down = SLICES.copy(), SLICES.copy()
        up[place] += step
        down[place] -= step
        numeric = (weight_loss(up, MATCHES, kind)[0] - weight_loss(down, MATCHES, kind)[0]) / (2 * step)
        assert gradient[place] == pytest.approx(numeric, abs=1e-8), place


@pytest.mark.parametrize("kind", TERMS)
def test_loss_is_zero_only_where_matched_slices_are_equal(kind: str) -> None:
    """Invariant 8; the gradient there is 0. The kinds other than norm do not look at v."""
    heads = SLICES.copy()
    for layer, head, source_layer, source_head in sorted(MATCHES):
        heads[layer, :, head] = heads[source_layer, :, source_head]
    loss, gradient = weight_loss(heads, MATCHES, kind)
    assert loss == 0.0
    assert not gradient.any()
    for part in range(3):
        for layer, head, *_ in MATCHES:
            changed = heads.copy()
            changed[layer, part, head, 1, 2] += 1e-3
            assert (weight_loss(changed, MATCHES, kind)[0] > 0.0) == (kind == "norm" or part < 2)


def test_loss_does_not_depend_on_other_weights() -> None:
    """Invariant 8: not on Wo, nor on heads outside the matches."""
    config = _config()
    weights = load_model(config).weights
    matches = [(2, 1, 0, 2), (3, 0, 2, 1)]
    before, gradient = weight_loss(stacked_heads(weights, config), matches)
    outside = np.ones((4, 3), bool)
    outside[[2, 3, 0], [1, 0, 2]] = False
    assert not gradient.swapaxes(1, 2)[outside].any()
    for layer in weights.layers:
        layer.attention.output.weight[:] = 0.0
        layer.attention.qkv.bias[:] = 9.0
    head_rows(weights.layers[1], config)[:] = 0.0
    assert weight_loss(stacked_heads(weights, config), matches)[0] == before


def test_the_loss_is_the_mean_of_norms() -> None:
    """Frobenius, not squared: twice the difference is twice the loss; a match counted twice changes nothing."""
    heads = np.zeros((2, 3, 1, 2, 2))
    heads[1, 0, 0] = [[3.0, 0.0], [0.0, 4.0]]
    heads[1, 2, 0] = 1.0
    assert weight_loss(heads, [(1, 0, 0, 0)])[0] == pytest.approx(5.0 + 2.0)
    assert weight_loss(2 * heads, [(1, 0, 0, 0)])[0] == pytest.approx(14.0)
    assert weight_loss(heads, [(1, 0, 0, 0)] * 2)[0] == pytest.approx(7.0)
    assert weight_loss(heads, [])[0] == 0.0
    with pytest.raises(ConfigError, match="one of 'norm', 'mse', 'kl', 'js'"):
        weight_loss(heads, [], "kl2")


def test_descending_the_loss_makes_sharing_harmless() -> None:
    """What PostShare is for, without its language model: once L_w is down, the selected heads can be shared."""
    config = _config(bias=False)
    model, ids = load_model(config, dtype="float64"), np.arange(9)[None, :]
    ready = Runner(model, "numpy").prepare("headshare", {"ratio": 0.25, "share_output": False})
    chosen = ready.parameters.matches[: ready.parameters.selected(config)]

    def error(heads: Any) -> float:
        for layer, slices in zip(model.weights.layers, heads, strict=True):
            head_rows(layer, config)[:] = slices
        dense = forward(model, ids, "dense").output
        params = {"ratio": 0.25, "share_output": False, "matches": ready.parameters.matches}
        return float(np.linalg.norm(forward(model, ids, "headshare", params).output - dense) / np.linalg.norm(dense))

    heads = stacked_heads(model.weights, config)
    before, loss = error(heads), weight_loss(heads, chosen, "mse")[0]
    for _ in range(400):
        heads = heads - 20.0 * weight_loss(heads, chosen, "mse")[1]
    # Values are not in this loss: give each head those of its source, as the norm would.
    sources = ready.parameters.sources(config)
    heads[:, 2] = heads.swapaxes(1, 2).reshape(12, 3, 4, 12)[list(sources), 2].reshape(4, 3, 4, 12)
    assert weight_loss(heads, chosen, "mse")[0] < 1e-12 * loss
    assert error(heads) < 1e-4 * before


# --- real weights -------------------------------------------------------------------------------------------------


def _pretrained(name: str) -> Model:
    from refimpl.weights import pretrained

    if pretrained.folder(name) is None:
        pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
    return load_model(name, weights="pretrained")


@pytest.fixture(scope="module", params=["minilm-l6", "whisper-tiny-en"])
def real(request: Any) -> Model:
    return _pretrained(request.param)


@pytest.mark.models
def test_real_weights_hold_the_invariants(real: Model) -> None:
    config = real.config
    found = find_matches(real.weights, config)
    assert [one[:4] for one in found] == [one[:4] for one in _brute_matches(real.weights, config, "qk")[::-1]]
    matches, total = Matches(one[:4] for one in found), config.layers * config.heads
    for ratio in RATIOS:
        parameters = HeadShareParameters(ratio, matches=matches)
        sources = parameters.sources(config)
        assert len(set(sources)) == total - math.floor(round(ratio * total, 9))
        assert all(sources[source] == source for source in sources)
        assert sources[: config.heads] == tuple(range(config.heads))


@pytest.mark.models
@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_real_outputs_change_with_the_ratio_and_not_without(real: Model, engine: str) -> None:
    from refimpl.inputs import random_inputs

    inputs, runner = random_inputs(real.config, 40), Runner(real, engine)
    dense = runner(inputs, "dense").output
    np.testing.assert_array_equal(runner(inputs, "headshare", {"ratio": 0}).output, dense)
    shared = runner(inputs, "headshare", {"ratio": 0.3}).output
    assert np.isfinite(shared).all()
    assert np.linalg.norm(shared - dense) > 0.01 * np.linalg.norm(dense)


@pytest.mark.models
def test_real_weights_survive_a_file(real: Model, tmp_path: Path) -> None:
    from refimpl.inputs import random_inputs

    path, params = tmp_path / "w.npz", {"ratio": 0.3}
    _saved(path, real.config, real, params)
    loaded, inputs = Model(real.config, load(path, real.config), "a file", True), random_inputs(real.config, 40)
    shared = Runner(real, "numba")(inputs, "headshare", params).output
    np.testing.assert_array_equal(Runner(loaded, "numba")(inputs, "dense").output, shared)


@pytest.mark.models
def test_table_of_the_page_is_what_real_weights_give(real: Model) -> None:
    """Cosines, counts and errors, row by row, as printed there."""
    from refimpl.inputs import load_input, sample

    config, runner = real.config, Runner(real, "numba")
    inputs = load_input(real, sample("paragraph" if config.stem == "tokens" else "speech")).array
    dense = runner(inputs, "dense").output

    def error(params: dict[str, Any]) -> float:
        output = runner(inputs, "headshare", {**params, "matches": matches}).output
        return float(np.linalg.norm(output - dense) / np.linalg.norm(dense))

    found = find_matches(real.weights, config)
    best, matches = np.array([one.cosine for one in found]), Matches(one[:4] for one in found)
    rows = []
    for ratio in RATIOS:
        repo, transitive = (
            HeadShareParameters(ratio, chains=chains, matches=matches) for chains in ("repo", "transitive")
        )
        count = repo.selected(config)
        chosen = {pair[:2]: pair[2:] for pair in matches[:count]}
        chained = sum(source in chosen for source in chosen.values())
        assert len(chosen) - len(set(chosen.values()) & chosen.keys()) == repo.replaced(config)
        rows.append(
            f"| {ratio:.2f} | {count} | {best[count - 1]:.4f} | {chained} | {repo.replaced(config)} | "
            f"{transitive.replaced(config)} | {error({'ratio': ratio, 'chains': 'repo'}):.2f} | "
            f"{error({'ratio': ratio}):.2f} |"
        )
    summary = f"max {best.max():.4f}, mean {best.mean():.4f}, min {best.min():.4f}"
    text = PAGE.read_text("utf-8")
    printed = re.search(rf"<!-- matches: {config.name} -->\n\n(.*)\n\n\|.*\n\|.*\n((?:\|.*\n)+)", text)
    assert printed, f"the page has no table for {config.name}"
    assert summary in printed[1], summary
    assert printed[2].splitlines() == rows, "\n".join(rows)
