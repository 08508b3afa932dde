"""The two exact baselines: the materialised map and the fused op are one function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from passes import small_llama
from strategies import WHOLE, configs, inputs_for, workloads

from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, preset
from refimpl.errors import ConfigError, InputError, ShapeError


@settings(max_examples=60, deadline=None)
@given(config=configs(), workload=workloads())
def test_flash_equals_dense_in_float64(config: ModelConfig, workload: Any) -> None:
    model, inputs = load_model(config, dtype="float64"), inputs_for(config, workload)
    dense = forward(model, inputs, "dense", causal=workload.causal).output
    flash = forward(model, inputs, "flash", causal=workload.causal).output
    np.testing.assert_allclose(flash, dense, rtol=1e-9, atol=1e-9)


def _tiny(recipe: str, **changes: Any) -> ModelConfig:
    position = {"post-norm": "learned", "pre-norm": "rotary", "conformer": "relative"}[recipe]
    sizes: dict[str, Any] = {
        "layers": 3, "d_model": 16, "heads": 4, "d_ff": 24, "vocab": 30, "position": position, "max_positions": 64,
        "conv_kernel": 3,
    }  # fmt: skip
    return ModelConfig(name="tiny", recipe=recipe, **{**sizes, **changes})  # type: ignore[arg-type]


def test_relative_positions_are_relative() -> None:
    """The Conformer's map depends on offsets: equal frames give rows that are shifts of each other."""
    from refimpl.diagnostics import attention_maps

    config = _tiny("conformer", layers=1, stem="frames", features=2, strides=(1,))
    inputs = np.ones((1, 40, 2))
    (weights,) = attention_maps(load_model(config, dtype="float64"), inputs)
    inner = np.log(weights[0, 0, 10:20])  # far enough from the edges that the convolutions see equal frames
    shifted = np.log(weights[0, 0, 11:21])
    np.testing.assert_allclose(np.diff(inner[:, 10:29], axis=1), np.diff(shifted[:, 11:30], axis=1), atol=1e-9)


@pytest.mark.parametrize("recipe", WHOLE)
def test_output_keeps_dtype_and_inputs(recipe: str) -> None:
    config = _tiny(recipe, stem="frames", features=3, strides=(2,))
    for dtype in ("float32", "float64"):
        inputs = np.random.default_rng(0).standard_normal((2, 20, 3))
        before = inputs.copy()
        output = forward(load_model(config, dtype=dtype), inputs).output
        assert output.dtype == dtype
        assert output.shape == (2, 10, 16)
        np.testing.assert_array_equal(inputs, before)


def test_inputs_that_do_not_fit_are_refused() -> None:
    tokens = load_model(_tiny("post-norm"))
    frames = load_model(_tiny("conformer", stem="frames", features=3, strides=(2,)))
    with pytest.raises(InputError, match="0 to 29"):
        forward(tokens, np.array([[30]]))
    with pytest.raises(InputError, match="whole numbers"):
        forward(tokens, np.array([[1.5]]))
    with pytest.raises(ShapeError, match="shape"):
        forward(tokens, np.array([1, 2]))
    with pytest.raises(InputError, match="64"):
        forward(tokens, np.zeros((1, 65), int))
    with pytest.raises(ShapeError, match="features"):
        forward(frames, np.zeros((1, 8, 4)))
    with pytest.raises(InputError, match="NaN"):
        forward(frames, np.full((1, 8, 3), np.nan))
    with pytest.raises(ConfigError, match="did you mean 'flash'"):
        forward(tokens, np.array([[1]]), "flahs")
    with pytest.raises(ConfigError, match="no parameters"):
        forward(tokens, np.array([[1]]), "dense", {"group": 2})


def test_default_model_runs() -> None:
    config = preset("conformer-m")
    inputs = np.random.default_rng(0).standard_normal((1, config.stem_length(8), config.features))
    run = forward(load_model("conformer-m"), inputs, "flash")
    assert run.output.shape == (1, 8, 256)
    assert 0.05 < np.abs(run.output).mean() < 20
    assert sum(run.breakdown.values()) <= run.seconds


def test_logits_of_relative_positions_equal_their_definition() -> None:
    """Transformer-XL: (q + u) k + (q + v) Wp R(i - j), R the sinusoid of the signed offset, written out per pair."""
    from refimpl.engines.numpy_engine import NumpyEngine
    from refimpl.methods.steps import Layer, logits, project_heads
    from refimpl.model import position_tables

    config = _tiny("conformer", layers=1, heads=2, d_model=8)
    w = load_model(config, dtype="float64").weights.layers[0].attention
    x, engine = np.random.default_rng(0).standard_normal((1, 5, 8)), NumpyEngine()
    layer = Layer(
        0,
        config,
        load_model(config, dtype="float64").weights.layers[0],
        False,
        None,
        position_tables(config, 5, "float64"),
    )
    q, k, _ = project_heads(lambda component: engine, x, layer)
    found = logits(lambda component: engine, q, k, layer)
    rates = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    for h, i, j in np.ndindex(2, 5, 5):
        rows = slice(4 * h, 4 * h + 4)
        query = w.qkv.weight[:8][rows] @ x[0, i] + w.qkv.bias[:8][rows]
        key = w.qkv.weight[8:16][rows] @ x[0, j] + w.qkv.bias[8:16][rows]
        offset = np.stack([np.sin((i - j) * rates), np.cos((i - j) * rates)], axis=-1).ravel()
        position = w.position.weight[rows] @ offset
        expected = (query + w.content_bias[rows]) @ key + (query + w.position_bias[rows]) @ position
        assert found[0, h, i, j] == pytest.approx(expected / 2.0)  # 1 / sqrt(D) with D = 4


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_a_cache_of_another_precision_is_refused(engine: str) -> None:
    config = small_llama(layers=2)
    of_32, of_64 = (Runner(load_model(config, dtype=dtype), engine) for dtype in ("float32", "float64"))
    for own, other in ((of_32, of_64), (of_64, of_32)):
        cache = own.new_cache(4)
        with pytest.raises(ShapeError, match="float") as caught:
            other(np.zeros((1, 4), np.int64), cache=cache)
        assert "\n" not in str(caught.value)
        assert cache.length == 0
        own(np.zeros((1, 4), np.int64), cache=cache)
