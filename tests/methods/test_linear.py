"""Linear attention as a method; its op is in tests/engines/test_compressed_attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import costmodel
from refimpl import Runner, Workload, forward, load_model
from refimpl.config import ModelConfig, override, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.methods.linear import Linear
from refimpl.methods.steps import Layer
from refimpl.parameters.linear import LinearParameters
from refimpl.recorder import Recorder, tally

TINY = ModelConfig("tiny", "pre-norm", 1, 24, 4, 8, kv_heads=2, vocab=30)
FEATURES = {"elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), "relu": lambda x: np.maximum(x, 0)}
Array = np.ndarray


def sublayer(model: Any, x: Array, causal: bool, mask: Array | None, feature: str) -> Array:
    """The attention sublayer alone: (B, T, d)."""
    program = Linear(model.config, LinearParameters(feature=feature))
    layer = Layer(0, model.config, model.weights.layers[0], causal, mask, ())
    return np.asarray(program.attention(Recorder(NumpyEngine()).at, x, layer))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", ["elu", "relu"])
def test_a_layer_is_the_equation_of_the_page(feature: str, causal: bool) -> None:
    """Sums over keys, query by query and head by head, with grouped key heads and padding."""
    model = load_model(TINY, dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, 7, 24))
    seen = np.arange(7) < np.array([[7], [4]])
    found = sublayer(model, x, causal, seen[:, None, None, :], feature)
    w, phi = model.weights.layers[0].attention, FEATURES[feature]
    for b in range(2):
        q, k, v = np.split(x[b] @ w.qkv.weight.T + w.qkv.bias, [24, 36], axis=1)
        rows = np.zeros((7, 24))
        for i in range(7):
            for h in range(4):
                query, shared = phi(q[i, 6 * h : 6 * h + 6]), slice(6 * (h // 2), 6 * (h // 2) + 6)
                keys = [j for j in range(i + 1 if causal else 7) if seen[b, j]]
                state = sum(np.outer(phi(k[j, shared]), v[j, shared]) for j in keys)
                total = sum(phi(k[j, shared]) for j in keys)
                rows[i, 6 * h : 6 * h + 6] = query @ state / (query @ total or 1)
        np.testing.assert_allclose(found[b], rows @ w.output.weight.T + w.output.bias, rtol=1e-9, atol=1e-9)


def test_the_last_causal_row_is_that_of_all_keys() -> None:
    model, x = load_model(TINY, dtype="float64"), np.random.default_rng(0).standard_normal((1, 9, 24))
    full, causal = (sublayer(model, x, flag, None, "elu") for flag in (False, True))
    np.testing.assert_allclose(causal[:, -1], full[:, -1], rtol=1e-11)
    assert np.abs(causal[:, 0] - full[:, 0]).max() > 1e-3


def test_order_does_not_matter_without_a_causal_mask() -> None:
    model, x = load_model(TINY, dtype="float64"), np.random.default_rng(0).standard_normal((1, 9, 24))
    turned = sublayer(model, x[:, ::-1], False, None, "elu")[:, ::-1]
    np.testing.assert_allclose(turned, sublayer(model, x, False, None, "elu"), rtol=1e-10)


@pytest.mark.parametrize("name", ["minilm-l6", "gpt2", "smollm2-135m", "whisper-tiny-en", "dinov2-s"])
def test_engines_agree_on_every_kind_of_model(name: str) -> None:
    """Learned, rotary and sinusoidal positions, causal and not, grouped or not."""
    config = override(preset(name), layers=2, d_model=48, heads=6, d_ff=32, vocab=50)
    inputs = np.random.default_rng(0).standard_normal((1, config.stem_length(140), max(config.features, 1)))
    if config.stem == "tokens":
        inputs = np.random.default_rng(0).integers(0, config.vocab, (1, 140))
    truth = forward(load_model(config, dtype="float64"), inputs, "linear").output
    model = load_model(config)
    honest, fast = (forward(model, inputs, "linear", engine=engine).output for engine in ("numpy", "numba"))
    error, allowed = (np.abs(x - truth).max() for x in (fast, honest))
    assert error <= 2 * allowed + 8 * np.finfo(np.float32).eps * np.abs(truth).max()


def test_cost_grows_with_the_length_not_its_square() -> None:
    config = preset("minilm-l6")
    costs = [costmodel.estimate("linear", config, Workload(T)) for T in (1024, 2048, 3072)]
    flops, peaks = [cost.total.flops for cost in costs], [cost.peak_bytes for cost in costs]
    assert flops[2] - flops[1] == flops[1] - flops[0]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0]


def test_caches_streams_and_relative_positions_are_refused_in_one_line() -> None:
    config = preset("smollm2-135m")
    small = override(config, layers=1, d_model=12, heads=2, kv_heads=1, d_ff=8, vocab=20)
    runner, ids = Runner(load_model(small), "numpy"), np.zeros((1, 3), int)
    words, cache = "keeps a state of D x D a head", runner.new_cache(6, "linear")
    run = runner(ids, "linear", cache=cache)  # a prefill keeps nothing
    np.testing.assert_array_equal(run.output, runner(ids, "linear").output)
    estimate = costmodel.estimate("linear", small, Workload(3, fills_cache=True))
    assert tally(run.calls) == estimate.tally()
    assert cache.bytes == estimate.cache_bytes == 0
    with pytest.raises(ConfigError, match=words):
        runner(ids, "linear", cache=cache)
    with pytest.raises(ConfigError, match=words):
        costmodel.estimate("linear", config, Workload(1, phase="decode", kv_len=9))
    for name, message in (("conformer-m", "relative positions"), ("emformer-rnnt-base", "left context")):
        with pytest.raises(ConfigError, match=message) as caught:
            costmodel.estimate("linear", preset(name), Workload(9))
        assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="give one of keys alone"):
        forward(load_model(TINY), ids, "linear", mask=np.ones((1, 1, 3, 3), bool))
    with pytest.raises(ConfigError, match="feature='softmax'"):
        costmodel.estimate("linear", config, Workload(9), {"feature": "softmax"})
