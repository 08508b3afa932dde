"""Passes with pairs of ops as one kernel: what is fused, the results of ordinary passes, and what raises."""

from __future__ import annotations

import numpy as np
import pytest
from cupy_cases import DTYPES, REFERENCE, assert_close, honest_errors, in_dtype, largest, normal
from cupy_passes import CONFIGS, inputs_for, weights_as

import refimpl
from refimpl.engines.cuda import tiles
from refimpl.engines.cuda.fusion import Plan, Unfinished
from refimpl.errors import UnsupportedError
from refimpl.model import Runner


@pytest.fixture
def launched(engine, monkeypatch):
    """The kernels that the engine launches, in order, without their template arguments."""
    names = []

    def note(source, kernel, x, shape, *arguments, run=engine._launch):
        names.append(kernel.partition("<")[0])
        run(source, kernel, x, shape, *arguments)

    monkeypatch.setattr(engine, "_launch", note)
    return names


# --- pairs ----------------------------------------------------------------------------------------------------------


def norm_of_sum(engine, norm, scale, arrays):
    x, y, *columns = arrays
    total = engine.add(x, y, scale=scale)
    return total, getattr(engine, norm)(total, *columns, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_an_add_and_its_norm_give_the_same_bits(engine, launched, norm, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "ROW_THREADS", 32)  # rows beyond 128 packs are read again
    for width, period in ((24, (2, 5)), (31, (2, 5)), (64, (5,)), (1_056, (2, 5)), (8, ())):
        x, y = normal(dtype, 2, 5, width, size=3.0), normal(dtype, *period, width, seed=1)
        columns = [normal(dtype, width, seed=2 + i) for i in range(2 if norm == "layer_norm" else 1)]
        arrays = [engine.asarray(a) for a in (x, y, *columns)]
        run = engine.fused(lambda arrays=arrays, norm=norm: norm_of_sum(engine, norm, 0.5, arrays))
        launched.clear()
        fused = run()
        assert launched == [f"add_{norm}"]
        for ours, apart in zip(fused, norm_of_sum(engine, norm, 0.5, arrays), strict=True):
            np.testing.assert_array_equal(engine.to_numpy(ours), engine.to_numpy(apart))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_add_of_misaligned_views_gives_the_same_bits(engine, which):
    """The norm alone would read packs of the sum, the fused kernel could not of its operands: another order of sums."""
    shapes = (8, 1024), (8, 1024), (1024,), (1024,)
    hosts = [normal("float32", *shape, size=3.0, seed=seed) for seed, shape in enumerate(shapes)]
    arrays = [engine.asarray(host) for host in hosts]
    wide = engine.asarray(np.zeros((*hosts[which].shape[:-1], 1028), np.float32))
    arrays[which] = wide[..., 3:1027]
    arrays[which][...] = engine.asarray(hosts[which])
    run = engine.fused(lambda: norm_of_sum(engine, "layer_norm", 1.0, arrays))
    for ours, apart in zip(run(), norm_of_sum(engine, "layer_norm", 1.0, arrays), strict=True):
        np.testing.assert_array_equal(engine.to_numpy(ours), engine.to_numpy(apart))


def activated(engine, op, x, weight, bias):
    if op == "swiglu":
        half = weight.shape[0] // 2
        return engine.swiglu(*engine.project(x, weight, bias, (half, half)))
    return getattr(engine, op)(engine.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["gelu", "gelu_tanh", "silu", "relu", "glu", "swiglu"])
def test_a_bias_and_its_activation_are_accurate(engine, launched, op, dtype):
    for rows, d_out in (((2, 3), 48), ((7,), 26), ((0, 3), 16)):
        host = normal(dtype, *rows, 16), normal(dtype, d_out, 16), normal(dtype, d_out, size=4.0)
        arrays = [engine.asarray(a) for a in host]
        run = engine.fused(lambda arrays=arrays: activated(engine, op, *arrays))
        launched.clear()
        fused = engine.to_numpy(run())
        assert launched == ["bias_gate" if op in ("glu", "swiglu") else "bias_activation"]
        (error,) = honest_errors(dtype, lambda *a: activated(REFERENCE, op, *a), *host)
        truth = in_dtype(np.float64, lambda *a: activated(REFERENCE, op, *a), *host)
        assert_close(fused, truth, error, op)


def test_the_bias_of_a_convolution_waits_for_its_activation(engine, launched):
    host = normal("float32", 2, 9, 6), normal("float32", 8, 3, 6), normal("float32", 8)
    arrays = [engine.asarray(a) for a in host]
    run = engine.fused(lambda: engine.gelu(engine.conv1d(*arrays, 2)))
    launched.clear()
    fused = engine.to_numpy(run())
    assert launched == ["windows", "bias_activation"]
    (error,) = honest_errors("float32", lambda *a: REFERENCE.gelu(REFERENCE.conv1d(*a, 2)), *host)
    truth = in_dtype(np.float64, lambda *a: REFERENCE.gelu(REFERENCE.conv1d(*a, 2)), *host)
    assert_close(fused, truth, error, "gelu of conv1d")


# --- what is left alone ---------------------------------------------------------------------------------------------


@pytest.fixture
def given(engine):
    """x (3, 8), weight (8, 8), bias (8,)."""
    return [engine.asarray(a) for a in (normal("float32", 3, 8), normal("float32", 8, 8), normal("float32", 8))]


def read_again(engine, h, _):
    return engine.add(engine.gelu(h), h)


def view_read_again(engine, h, _):
    return engine.add(engine.gelu(h), h[1:2])


def read_by_a_reshape(engine, h, _):
    return engine.add(engine.gelu(h), engine.reshape(h, (3, 8)))


def read_before(engine, h, x):
    engine.relu(x)
    return engine.gelu(h)


def read_second(engine, h, x):
    return engine.swiglu(x, h)


@pytest.mark.parametrize("rest", [read_again, view_read_again, read_by_a_reshape, read_before, read_second])
def test_a_product_that_something_else_reads_is_complete(engine, given, rest):
    def run():
        return rest(engine, engine.linear(*given), given[0])

    assert engine.plan(run).put_off == frozenset()
    np.testing.assert_array_equal(engine.to_numpy(engine.fused(run)()), engine.to_numpy(run()))


def test_a_product_without_bias_and_unequal_parts_are_complete(engine, given):
    x, weight, bias = given
    assert not engine.plan(lambda: engine.gelu(engine.linear(x, weight))).put_off
    assert not engine.plan(lambda: engine.swiglu(*reversed(engine.project(x, weight, bias, (4, 4))))).put_off
    assert engine.plan(lambda: engine.swiglu(*engine.project(x, weight, bias, (4, 4)))).put_off == {0}


def test_a_later_product_in_the_same_place_is_another(engine, given):
    """The first product is freed; the second may get its memory, and is read twice."""
    x, weight, bias = given

    def run():
        y = engine.gelu(engine.linear(x, weight, bias))
        h = engine.linear(y, weight, bias)
        return engine.add(h, engine.relu(h))

    assert engine.plan(run) == Plan(("linear", "gelu", "linear", "relu", "add"), frozenset({0}))


def test_a_batch_of_nothing_is_fused(engine, given):
    _, weight, bias = given
    empty = engine.asarray(np.zeros((0, 8), np.float32))

    def run():
        h = engine.gelu(engine.linear(empty, weight, bias))
        return engine.layer_norm(engine.add(h, h), bias, bias, 1e-5)

    assert engine.plan(run).put_off == {0, 2}
    assert engine.fused(run)().shape == (0, 8)


# --- passes that are not what was traced ----------------------------------------------------------------------------


def test_another_pass_is_refused(engine, given):
    x, weight, bias = given
    change = []

    def run():
        h = None if "bias" in change else engine.linear(x, weight, bias=bias)
        if "op" in change:
            return engine.silu(h)
        if "bias" in change:
            return engine.gelu(engine.linear(x, weight))
        if "operand" in change:
            return engine.gelu(x)
        if "reader" in change:
            return h + 1
        if "shape" in change:
            return h.shape, engine.gelu(h)
        y = engine.gelu(h)
        if "end" not in change:
            y = engine.relu(y)
        return engine.relu(y) if "more" in change else y

    fused = engine.fused(run)
    expected = engine.to_numpy(fused())
    for kind, message in (
        ("op", "call 1 is silu, planned gelu"),
        ("bias", "has no bias"),
        ("operand", "reads something else than what call 0 gives"),
        ("end", "ends after 2 calls, planned 3"),
        ("more", "call 3 is relu, planned nothing"),
    ):
        change[:] = [kind]
        with pytest.raises(UnsupportedError, match=message):
            fused()
        assert not {"linear", "gelu", "to_numpy"} & vars(engine).keys()
    change[:] = ["reader"]
    with pytest.raises((UnsupportedError, TypeError)):
        fused()
    change.clear()
    np.testing.assert_array_equal(engine.to_numpy(fused()), expected)


def test_an_unfinished_product_gives_its_shape_alone():
    product = Unfinished((2, 3), np.dtype("float32"))
    assert (product.shape, product.ndim, product.size, product.dtype) == ((2, 3), 2, 6, np.float32)
    for read in (lambda: product[0], lambda: product.T, lambda: np.asarray(product), lambda: list(product)):
        with pytest.raises(UnsupportedError, match="put off"):
            read()


# --- whole passes ---------------------------------------------------------------------------------------------------

# config -> pairs in a pass of 4 layers: of the stem, of each layer
PAIRS = {"post-norm": (1, 3), "pre-norm": (3, 3), "llama": (0, 2), "vit": (1, 3), "conformer": (1, 7)}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", PAIRS)
def test_fused_passes_are_accurate_and_call_the_same_ops(engine, launched, name, dtype):
    config = CONFIGS[name]
    model = refimpl.load_model(config, dtype=dtype)
    inputs = inputs_for(config)
    inputs = inputs if config.stem == "tokens" else inputs.astype(dtype)
    runner = Runner(model, engine)
    ready = runner.prepare("flash", {}, inputs)
    apart = runner(inputs, ready)
    assert any(op in launched for op in ("add", "gate", "activation"))
    run = engine.fused(lambda: runner(inputs, ready))
    launched.clear()
    fused = run()
    stem, of_layer = PAIRS[name]
    pairs = [op for op in launched if op.startswith(("add_", "bias_")) and op != "add_relative"]
    assert len(pairs) == stem + 4 * of_layer
    assert [(c.component, c.op, c.sizes) for c in fused.calls] == [(c.component, c.op, c.sizes) for c in apart.calls]
    if name == "llama":  # no biases: adds and norms alone are fused
        np.testing.assert_array_equal(fused.output, apart.output)
    truth = refimpl.forward(model_as(np.float64, model), inputs, "flash").output
    error = largest(refimpl.forward(model, inputs, "flash").output.astype(np.float64) - truth)
    assert_close(fused.output, truth, error, name)


def test_a_recorded_pass_is_fused_where_that_is_asked_for(emulated, monkeypatch):
    """The emulation has no graphs: a recorded pass stands for its replay."""
    recorded = []
    monkeypatch.setattr(emulated, "record", lambda work: recorded.append(work) or (lambda: (work(), 0.0)))
    launched = []
    run = emulated._launch
    monkeypatch.setattr(
        emulated, "_launch", lambda source, kernel, *rest: (launched.append(kernel), run(source, kernel, *rest))
    )
    model = refimpl.load_model(CONFIGS["llama"], dtype="float32")
    runner, inputs = Runner(model, emulated), inputs_for(CONFIGS["llama"])
    ready = runner.prepare("dense", {}, inputs)
    outputs = []
    for fused in (False, True):
        replay = runner.recorded(inputs, ready, fused=fused)
        launched.clear()
        outputs.append(replay().output)
        assert any(kernel.startswith("add_rms_norm") for kernel in launched) == fused
    assert len(recorded) == 2
    np.testing.assert_array_equal(*outputs)


def model_as(dtype, model):
    return type(model)(**{**vars(model), "weights": weights_as(dtype, model.weights)})
