"""What every method of the catalogue keeps to, whatever it computes; what is true of one alone is in its own file."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from counting import AuditedEngine, as_kept
from strategies import fits

import costmodel
from refimpl import Runner, Workload, forward, load_model
from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, ShapeError
from refimpl.methods import CATALOG
from refimpl.model import Prepared
from refimpl.parameters import PARAMETERS
from refimpl.recorder import tally
from refimpl.weights.layout import Weights

SIZES: dict[str, Any] = {
    "layers": 3, "d_model": 24, "heads": 4, "d_ff": 12, "vocab": 19, "max_positions": 32, "conv_kernel": 1,
}  # fmt: skip
MODELS = {
    "encoder": ModelConfig("encoder", "post-norm", **SIZES, position="learned", embedding_norm=True, final_norm=False),
    "decoder": ModelConfig(
        "decoder", "pre-norm", **SIZES, kv_heads=2, position="rotary", causal=True, gated=True, norm="rms", bias=False,
        head=True,
    ),
    "conformer": ModelConfig("conformer", "conformer", **SIZES, position="relative", activation="silu"),
}  # fmt: skip
LENGTH = 8

# Settings at which a method does something on models as small as these; its defaults where none are given.
ON: dict[str, dict[str, Any]] = {
    "svd-softmax": {"window": 3, "candidates": 4},
    "attmemo": {"epochs": 0, "tau": 0.5},
    "latte": {"gamma": 0.1},
    "kvsharer": {"layers": 1},
    "headshare": {"ratio": 0.5},
    "local": {"window": 2},
    "linformer": {"length": 2},  # hidden positions share a mixture with visible ones
}
# What a method cannot serve, with a word of its one line; anything else that raises fails the test.
REFUSED = {
    ("svd-softmax", "encoder"): "language head",
    ("svd-softmax", "conformer"): "language head",
    ("folding", "conformer"): "relative positions",
    ("attmemo", "conformer"): "relative positions",
    ("latte", "conformer"): "relative positions",
    ("headshare", "decoder"): "key head",
    ("narrow", "decoder"): "rotary",
    ("linformer", "decoder"): "causal",
    ("linformer", "conformer"): "relative positions",
    ("linear", "conformer"): "relative positions",
}
SERVED = [
    pytest.param(method, config, id=f"{method}-{name}")
    for method in CATALOG
    for name, config in MODELS.items()
    if (method, name) not in REFUSED
]
EACH = pytest.mark.parametrize(("method", "config"), SERVED)


def ids_of(batch: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(batch + 10 * length).integers(0, SIZES["vocab"], (batch, length))


def on(method: str) -> dict[str, Any]:
    return ON.get(method, {})


def arrays_of(node: Any) -> list[np.ndarray]:
    """All arrays in a tree of weights."""
    if isinstance(node, list):
        return [array for child in node for array in arrays_of(child)]
    if isinstance(node, Weights):
        return [array for child in vars(node).values() for array in arrays_of(child)]
    return [node]


@EACH
@pytest.mark.parametrize(("batch", "length"), [(2, LENGTH), (1, 1), (3, 1)])
def test_shape_dtype_and_counts(method: str, config: ModelConfig, batch: int, length: int) -> None:
    """The model's shape; the dtype of its weights; inputs and weights left alone; ops counted by the closed form."""
    ids = ids_of(batch, length)
    if method == "attmemo" and length == 1:
        with pytest.raises(ConfigError, match="at least 2"):
            forward(load_model(config), ids, method, on(method))
        return
    for dtype in ("float32", "float64") if length > 1 else ("float32",):
        model = load_model(config, dtype=dtype)
        given = ids.copy(), [array.copy() for array in arrays_of(model.weights)]
        ready = Runner(model, "numpy").prepare(method, on(method), ids)
        engine = AuditedEngine()
        run = Runner(model, engine)(ids, ready)
        assert run.output.shape == (batch, length, config.vocab if config.head else config.d_model)
        assert run.output.dtype == dtype
        assert np.isfinite(run.output).all()
        np.testing.assert_array_equal(ids, given[0])
        for array, before in zip(arrays_of(model.weights), given[1], strict=True):
            np.testing.assert_array_equal(array, before)
        estimate = costmodel.estimate(method, config, Workload(length, batch, dtype=dtype), ready.parameters)
        assert tally(run.calls) == as_kept(estimate, run.calls).tally()
        assert engine.audited == len(run.calls)
        assert sum(array.nbytes for array in arrays_of(ready.weights)) == estimate.resident_bytes


@EACH
def test_passes_are_repeatable(method: str, config: ModelConfig) -> None:
    """The second pass of a runner equals the first, and so does a sequence's row in a batch of two alike."""
    ids = ids_of(1)
    runner = Runner(load_model(config), "numpy")
    ready = runner.prepare(method, on(method), ids)
    first = runner(ids, ready).output
    np.testing.assert_array_equal(runner(ids, ready).output, first)
    twice = runner(np.concatenate([ids, ids]), ready).output
    np.testing.assert_array_equal(twice[0], twice[1])


@EACH
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padding_has_no_influence(method: str, config: ModelConfig, causal: bool) -> None:
    """What a mask of keys hides changes nothing at other positions, bit for bit."""
    mask = (np.arange(LENGTH) < np.array([[5], [LENGTH]]))[:, None, None, :]  # (B, 1, 1, T)
    ids, changed = ids_of(), ids_of()
    changed[0, 5:] = (changed[0, 5:] + 7) % SIZES["vocab"]
    runner = Runner(load_model(config), "numpy")
    if method in ("attmemo", "latte"):  # maps have their own masks; scales are of a whole head, hidden keys included
        pytest.skip("tests/methods has what holds for it instead")
    if method == "linformer" and causal:
        with pytest.raises(ConfigError, match="causal"):
            runner(ids, method, on(method), causal=True, mask=mask)
        return
    ready = runner.prepare(method, on(method), ids)
    kept, other = (runner(x, ready, causal=causal, mask=mask).output for x in (ids, changed))
    np.testing.assert_array_equal(kept[0, :5], other[0, :5])
    np.testing.assert_array_equal(kept[1], other[1])
    assert not np.array_equal(kept[0, 5:], other[0, 5:])
    free = runner(ids, ready, causal=causal).output
    if not causal and method != "svd-softmax":
        assert not np.array_equal(kept[0, :5], free[0, :5]), "the mask does nothing"


@EACH
def test_a_causal_pass_does_not_see_the_future(method: str, config: ModelConfig) -> None:
    """Bit for bit; and a pass that is not causal does see it."""
    if method in ("attmemo", "latte"):
        pytest.skip("tests/methods has what holds for it instead")
    ids, changed = ids_of(), ids_of()
    changed[:, 5:] = (changed[:, 5:] + 3) % SIZES["vocab"]
    runner = Runner(load_model(config), "numpy")
    ready = runner.prepare(method, on(method), ids)

    def first(x: np.ndarray, causal: bool) -> np.ndarray:
        return runner(x, ready, causal=causal).output[:, :5]

    if method == "linformer":
        with pytest.raises(ConfigError, match="causal"):
            first(ids, True)
    else:
        np.testing.assert_array_equal(first(ids, True), first(changed, True))
    if not config.causal:
        assert not np.array_equal(first(ids, False), first(changed, False))


@pytest.mark.parametrize("method", [name for name, row in CATALOG.items() if not row.exact])
def test_the_catalogue_says_where_off_is_or_why_there_is_none(method: str) -> None:
    row = CATALOG[method]
    assert bool(row.off) != bool(row.not_off)
    assert not row.off or row.off in CATALOG
    assert not row.off or CATALOG[row.off].exact


@EACH
def test_off_is_exact_bit_for_bit_and_on_is_not(method: str, config: ModelConfig) -> None:
    row, model, ids = CATALOG[method], load_model(config), ids_of()
    if row.exact:
        return
    base = forward(model, ids, row.off or "dense").output
    knobs = {name: values[0] for name, values in PARAMETERS[method].sweep(config).items()}
    off = forward(model, ids, method, {**knobs, **row.off_with}).output if knobs else None
    if row.off:
        np.testing.assert_array_equal(off, base)
    elif off is not None:
        np.testing.assert_allclose(off, base, rtol=1e-4, atol=1e-4)
        assert not np.array_equal(off, base), "it is off bit for bit: say so in the catalogue"
    changed = forward(model, ids, method, on(method)).output
    own = method == "attmemo"  # its database is of these inputs, so that every map is the exact one
    assert own or np.abs(changed - base).max() > 1e-4


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_a_method_cannot_serve_is_refused_in_one_line(method: str, name: str) -> None:
    """By the program and by the closed form, in the same words."""
    config = MODELS[name]
    assert not fits(method, on(method), config)
    messages = []
    for call in (
        lambda: forward(load_model(config), ids_of(), method, on(method)),
        lambda: costmodel.estimate(method, config, Workload(LENGTH), on(method)),
    ):
        with pytest.raises(ConfigError, match=REFUSED[method, name]) as caught:
            call()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]


@pytest.mark.parametrize("method", CATALOG)
def test_decoding_equals_one_pass_or_is_refused(method: str) -> None:
    """Position by position over a cache, in float64; on the kind of decoder that the method has."""
    config = replace(MODELS["decoder"], position="none", kv_heads=4)
    if method in ("attmemo", "linear", "linformer"):
        runner = Runner(load_model(config), "numpy")
        cache = runner.new_cache(LENGTH, method if method == "linear" else "dense")
        cache.advance(1)
        with pytest.raises(ConfigError):
            runner(ids_of(1)[:, 1:], method, on(method), cache=cache)
        with pytest.raises(ConfigError):
            costmodel.estimate(method, config, Workload(1, phase="decode", kv_len=3), on(method))
        return
    model, ids = load_model(config, dtype="float64"), ids_of(1)
    params = {"kept": 1, "stage2": "float"} if method == "latte" else on(method)  # scales are of the keys seen so far
    runner = Runner(model, "numpy")
    ready = runner.prepare(method, params, ids)
    cache = runner.new_cache(LENGTH, ready)
    stepped = [runner(ids[:, i : i + 1], ready, cache=cache).output for i in range(LENGTH)]
    np.testing.assert_allclose(np.concatenate(stepped, axis=1), runner(ids, ready).output, rtol=1e-9, atol=1e-9)


@EACH
def test_numba_is_as_right_as_numpy_in_the_same_precision(method: str, config: ModelConfig) -> None:
    """Within twice the rounding of the NumPy engine in float32, against float64."""
    if method in ("attmemo", "svd-softmax", "latte"):  # a hit, a candidate or a kept key more changes a whole row
        pytest.skip("tests/methods has what holds for it instead")
    ids = ids_of(2, 21)
    mask = (np.arange(21) < np.array([[21], [17]]))[:, None, None, :]
    exact, rounded = (load_model(config, dtype=dtype) for dtype in ("float64", "float32"))
    truth = forward(exact, ids, method, on(method), mask=mask).output
    honest, fast = (
        forward(rounded, ids, method, on(method), engine, mask=mask).output for engine in ("numpy", "numba")
    )
    error, allowed = (np.abs(x - truth).max() for x in (fast, honest))
    floor = 8 * np.finfo(np.float32).eps * np.abs(truth).max()
    assert error <= 2 * allowed + floor, f"{method}: error {error:.2e}, honest {allowed:.2e}"


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("latte", {"kept": 0.3}),
        ("kvsharer", {"layers": 1}),
        ("svd-softmax", {"weighting": "activations"}),
        ("kvsharer+latte", {"kvsharer": {"layers": 1}, "latte": {"kept": 0.3}}),
    ],
)
def test_what_is_found_beforehand_is_found_in_passes_as_they_will_be(method: str, params: dict[str, Any]) -> None:
    """A pass that overrides the model's causality prepares as a model that is so; one runner keeps both apart."""
    model, ids = load_model(replace(MODELS["decoder"], position="none")), ids_of()
    overridden = Runner(model, "numpy")
    first = overridden.prepare(method, params, ids)

    def documents(ready: Prepared) -> list[dict[str, Any]]:
        """With what was measured on the way."""
        members = ready.parameters.members if "+" in method else [(method, ready.parameters)]
        return [given.to_document() for _, given in members]

    for causal in (False, True):
        own = Runner(replace(model, config=replace(model.config, causal=causal)), "numpy")
        ready = overridden.prepare(method, params, ids, causal=causal)
        assert documents(ready) == documents(own.prepare(method, params, ids))
        assert (ready is first) == causal
        by_name, by_hand = (overridden(ids, given, params, causal=causal).calls for given in (method, ready))
        assert tally(by_name) == tally(by_hand)
    assert documents(first) != documents(overridden.prepare(method, params, ids, causal=False))
    assert overridden.prepare(method, params) is first  # without inputs, as for a cache


@EACH
def test_a_mask_broadcasts_as_arrays_do_and_nothing_else_is_taken_for_one(method: str, config: ModelConfig) -> None:
    """Missing axes are the first ones. Numbers, as those that others add to scores, would mean the opposite."""
    runner, ids, visible = Runner(load_model(config), "numpy"), ids_of(), np.arange(LENGTH) < 5
    ready = runner.prepare(method, {**on(method), **({"padding": "include"} if method == "attmemo" else {})}, ids)
    shape = "(2, 4, 8, 8)"
    for wrong in (
        np.zeros((1, 1, 1, LENGTH)),
        np.ones((LENGTH, LENGTH), np.int8),
        np.ones((1, 1, LENGTH, LENGTH - 1), bool),
        np.ones((3, 1, 1, LENGTH), bool),
        np.ones((1, 1, 1, 1, LENGTH), bool),
    ):
        for causal in (False, True):
            if method == "attmemo" and causal != config.causal:
                continue
            with pytest.raises(ShapeError, match=re.escape(shape)) as caught:
                runner(ids, ready, causal=causal, mask=wrong)
            assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(
        runner(ids, ready, mask=visible).output, runner(ids, ready, mask=visible[None, None, None, :]).output
    )
