"""The streaming Emformer: against torchaudio, against one masked pass, and what must not change a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import AT_ONCE, ON_HEADS, configs

import costmodel
from refimpl import Runner, forward, load_model
from refimpl.config import ModelConfig, Workload, preset
from refimpl.diagnostics import attention_maps
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.errors import ConfigError, InputError, ShapeError, UnsupportedError
from refimpl.inputs import load_input, random_inputs
from refimpl.methods import CATALOG
from refimpl.weights import Model
from refimpl.weights.layout import assemble

REFERENCE = np.load(Path(__file__).parent / "data" / "emformer_reference.npz")
NUMBA = NumbaEngine()


def _config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "layers": 3, "d_model": 12, "heads": 2, "d_ff": 16, "features": 5, "stack": 2, "chunk": 3, "left_context": 5,
        "right_context": 2, "d_out": 7, "final_norm": False,
    }  # fmt: skip
    return ModelConfig(name="tiny", recipe="emformer", stem="stacked", **{**sizes, **changes})


# --- against torchaudio ---------------------------------------------------------------------------------------------

# The sizes that tests/data/README.md names.
SHAPES: dict[str, ModelConfig] = {
    "small": _config(heads=3),
    "base": _config(
        layers=2, d_model=16, heads=2, d_ff=20, features=3, stack=4, chunk=4, left_context=30, right_context=1, d_out=9
    ),
    "none": _config(
        layers=2, d_model=8, heads=2, d_ff=12, features=4, stack=1, chunk=2, left_context=0, right_context=0, d_out=5,
        activation="silu",
    ),
}  # fmt: skip
NAMES = {  # theirs -> ours, within a layer
    "layer_norm_input": "attention_norm",
    "attention.out_proj": "attention.output",
    "pos_ff.0": "feed_forward_norm",
    "pos_ff.1": "feed_forward.up",
    "pos_ff.4": "feed_forward.down",
    "layer_norm_output": "final_norm",
}


def _torchaudio_model(name: str) -> Model:
    """Their random weights under our names."""
    given = {key.removeprefix(f"{name}."): REFERENCE[key] for key in REFERENCE.files if key.startswith(f"{name}.")}
    ours = {"stem.frames.weight": given["input_linear.weight"]}
    for leaf in ("weight", "bias"):
        ours[f"output.{leaf}"] = given[f"output_linear.{leaf}"]
        ours[f"output_norm.{leaf}"] = given[f"layer_norm.{leaf}"]
        for index in range(SHAPES[name].layers):
            theirs = f"transformer.emformer_layers.{index}"
            for part, own in NAMES.items():
                ours[f"layers.{index}.{own}.{leaf}"] = given[f"{theirs}.{part}.{leaf}"]
            query = given[f"{theirs}.attention.emb_to_query.{leaf}"]
            key_value = given[f"{theirs}.attention.emb_to_key_value.{leaf}"]
            ours[f"layers.{index}.attention.qkv.{leaf}"] = np.concatenate([query, key_value])
    return Model(SHAPES[name], assemble(SHAPES[name], ours), "torchaudio", False)


@pytest.mark.parametrize("method", ["dense", "flash"])
@pytest.mark.parametrize("name", SHAPES)
def test_all_chunks_equal_torchaudios_masked_pass(name: str, method: str) -> None:
    """Its `forward`: one pass under the training mask, the last chunk shorter."""
    run = forward(_torchaudio_model(name), REFERENCE[f"{name}.inputs"], method)
    np.testing.assert_allclose(run.output, REFERENCE[f"{name}.forward"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SHAPES)
def test_a_stream_equals_torchaudios(name: str) -> None:
    """Its `infer`, one chunk a call; the outputs are of size 3, so this is 200 roundings of float64."""
    model, inputs, truth = _torchaudio_model(name), REFERENCE[f"{name}.inputs"], REFERENCE[f"{name}.infer"]
    runner, config = Runner(model, "numpy"), model.config
    cache = runner.new_cache(truth.shape[1], "dense", batch=2)
    for first in range(0, truth.shape[1], config.chunk):
        stop = first + config.chunk
        run = runner(inputs[:, first * config.stack : config.stem_length(stop)], cache=cache)
        np.testing.assert_allclose(run.output, truth[:, first:stop], rtol=0, atol=1e-13)


def test_parameters_equal_torchaudios() -> None:
    """``emformer_rnnt_base(4097)``: transcriber 63,605,760, with predictor and joiner 76,738,049."""
    config = preset("emformer-rnnt-base")
    encoder = costmodel.estimate("dense", config, Workload(4)).params_bytes // 4
    assert encoder == 63_605_760
    assert encoder + sum(one.parameters for one in config.companions) == 76_738_049


# --- against one pass with a mask, written out ----------------------------------------------------------------------


def _masked_pass(model: Model, frames: np.ndarray) -> np.ndarray:
    """All copies of right contexts in front of the whole utterance, in one pass; each row sees what its chunk sees."""
    c, w = model.config, model.weights
    x = (frames @ w.stem.frames.weight.T).reshape(len(frames), -1, c.d_model)  # (B, T + right, d)
    length = x.shape[1] - c.right_context
    starts = range(0, length, c.chunk)
    copies = [x[:, min(first + c.chunk, length) :][:, : c.right_context] for first in starts]
    x = np.concatenate([*copies, x[:, :length]], axis=1)  # (B, chunks * right + T, d)
    chunk_of = np.concatenate([np.repeat(np.arange(len(starts)), c.right_context), np.arange(length) // c.chunk])
    position = np.concatenate([np.full(len(starts) * c.right_context, -1), np.arange(length)])  # -1: a copy
    first_seen = chunk_of * c.chunk - c.left_context
    same = chunk_of[:, None] == chunk_of[None, :]
    before = (position[None, :] >= np.maximum(first_seen, 0)[:, None]) & (chunk_of[None, :] < chunk_of[:, None])
    visible = same | before
    for layer in w.layers:
        x = _layer(x, layer, c, visible)
    x = x[:, len(starts) * c.right_context :]
    return _normed(x @ w.output.weight.T + w.output.bias, w.output_norm) if c.d_out else x


def _layer(x: np.ndarray, w: Any, c: ModelConfig, visible: np.ndarray) -> np.ndarray:
    q, k, v = np.split(_normed(x, w.attention_norm) @ w.attention.qkv.weight.T + w.attention.qkv.bias, 3, axis=-1)
    heads = []
    for h in range(c.heads):
        columns = slice(h * c.head_dim, (h + 1) * c.head_dim)
        logits = q[..., columns] @ k[..., columns].swapaxes(1, 2) / np.sqrt(c.head_dim)  # (B, rows, rows)
        powers = np.where(visible, np.exp(logits), 0)
        heads.append(powers / powers.sum(axis=-1, keepdims=True) @ v[..., columns])
    x = x + np.concatenate(heads, axis=-1) @ w.attention.output.weight.T + w.attention.output.bias
    hidden = np.maximum(_normed(x, w.feed_forward_norm) @ w.feed_forward.up.weight.T + w.feed_forward.up.bias, 0)
    return _normed(x + hidden @ w.feed_forward.down.weight.T + w.feed_forward.down.bias, w.final_norm)


def _normed(x: np.ndarray, w: Any) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * w.weight + w.bias


@st.composite
def streams(draw: Any) -> tuple[ModelConfig, int]:
    """A geometry and a length, from one chunk to several times what a cache of its own holds."""
    config = _config(
        chunk=draw(st.integers(1, 4)), left_context=draw(st.integers(0, 7)), right_context=draw(st.integers(0, 5)),
        stack=draw(st.sampled_from([1, 2, 3])), d_out=draw(st.sampled_from([0, 7])), layers=draw(st.integers(1, 3)),
        activation="relu",
    )  # fmt: skip
    return config, draw(st.integers(config.chunk, 40))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=40, deadline=None)
@given(stream=streams(), batch=st.integers(1, 2), engine=st.sampled_from(["numpy", NUMBA]))
def test_chunks_equal_one_masked_pass(dtype: str, stream: tuple[ModelConfig, int], batch: int, engine: Any) -> None:
    """To the rounding of sums in another order: twice what the masked pass itself loses in that precision."""
    config, length = stream
    inputs = random_inputs(config, length, batch, dtype=dtype)
    truth = _masked_pass(load_model(config, dtype="float64"), inputs.astype("float64"))
    found = forward(load_model(config, dtype=dtype), inputs, "flash" if batch > 1 else "dense", engine=engine).output
    honest = abs(_masked_pass(load_model(config, dtype=dtype), inputs) - truth).max()
    assert found.dtype == dtype
    assert abs(found - truth).max() <= 2 * honest + 64 * np.finfo(dtype).eps * abs(truth).max()


# --- what a stream must not change ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["numpy", NUMBA], ids=["numpy", "numba"])
@pytest.mark.parametrize("method", [method for method in CATALOG if method not in ON_HEADS + AT_ONCE])
def test_later_frames_change_nothing_before_them_bit_for_bit(method: str, engine: Any) -> None:
    """A chunk sees its right context and not one frame more."""
    config = _config(left_context=6)
    runner, inputs = Runner(load_model(config), engine), random_inputs(config, 20)
    # attmemo and linformer take no stream unless they are off; a key that latte filters away would change nothing
    params = {"attmemo": {"tau": 1.1}, "latte": {"kept": 1}, "linformer": {"length": None}}.get(method)
    before = runner(inputs, method, params).output
    for chunk in range(6):
        changed, seen = inputs.copy(), (3 * chunk + 3 + config.right_context) * config.stack
        changed[:, seen:] += 1.0
        after = runner(changed, method, params).output
        np.testing.assert_array_equal(after[:, : 3 * chunk + 3], before[:, : 3 * chunk + 3])
        assert (after[:, 3 * chunk + 3 :] != before[:, 3 * chunk + 3 :]).any(axis=-1).all()
        changed[:, seen - 1] += 1.0
        own = slice(3 * chunk, 3 * chunk + 3)
        assert (runner(changed, method, params).output[:, own] != before[:, own]).any()


@settings(max_examples=30, deadline=None)
@given(stream=streams(), data=st.data())
def test_a_stream_may_be_fed_any_number_of_chunks_at_a_time(stream: tuple[ModelConfig, int], data: Any) -> None:
    config, length = stream
    runner, inputs = Runner(load_model(config), "numpy"), random_inputs(config, length)
    whole = runner(inputs).output
    cache, parts = runner.new_cache(length), []
    while cache.length < length:
        first = cache.length
        stop = min(first + config.chunk * data.draw(st.integers(1, 4)), length)
        parts.append(runner(inputs[:, first * config.stack : config.stem_length(stop)], cache=cache).output)
        assert cache.length == stop
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert cache.past == min(length, config.left_context)


@settings(max_examples=30, deadline=None)
@given(stream=streams())
def test_the_next_chunk_reads_the_left_context_and_nothing_else(stream: tuple[ModelConfig, int]) -> None:
    """NaN everywhere in the cache but in the left context: rows of the right context leave no trace."""
    config, length = stream
    runner = Runner(load_model(config), "numpy")
    inputs = random_inputs(config, length + config.chunk)
    cache = runner.new_cache(length + config.chunk)
    runner(inputs[:, : config.stem_length(length)], cache=cache)
    following = inputs[:, length * config.stack :]
    expected = runner(following, cache=cache).output
    cache.truncate(length)
    for store in (*cache._keys, *cache._values):
        store[:, :, : length - cache.past] = np.nan
        store[:, :, length:] = np.nan
    np.testing.assert_array_equal(runner(following, cache=cache).output, expected)
    calls = [call for call in runner(inputs).calls if call.op == "scores"]
    assert {dict(call.sizes)["k_len"] for call in calls} <= set(range(1, sum_of_contexts(config) + 1))


def sum_of_contexts(config: ModelConfig) -> int:
    return config.left_context + config.chunk + config.right_context


def test_a_stream_need_not_end_with_its_cache() -> None:
    """Compacting a full cache changes no bit; without it the cache says that it is full."""
    config = _config()
    runner, inputs = Runner(load_model(config), "numpy"), random_inputs(config, 99)
    long, short = runner.new_cache(99), runner.new_cache(config.own_cache)
    for first in range(0, 99, 3):
        frames = inputs[:, first * config.stack : config.stem_length(first + 3)]
        if short.length + 3 > short.capacity:
            with pytest.raises(InputError, match=r"holds 1[24] of 14 positions, 3 more do not fit"):
                runner(frames, cache=short)
            short.compact()
            assert short.length == config.left_context
        np.testing.assert_array_equal(runner(frames, cache=short).output, runner(frames, cache=long).output)
    assert long.length == 99


def test_compacting_waits_until_it_moves_less_than_it_frees() -> None:
    config = _config()
    runner = Runner(load_model(config), "numpy")
    cache = runner.new_cache(30)
    runner(random_inputs(config, 9), cache=cache)
    cache.compact()
    assert cache.length == 9  # fewer than twice the left context
    runner(random_inputs(config, 1), cache=cache)
    cache.compact()
    assert cache.length == config.left_context


# --- work and memory ------------------------------------------------------------------------------------------------


def test_every_chunk_behind_a_full_left_context_costs_the_same() -> None:
    config = preset("emformer-rnnt-base")
    one = costmodel.estimate("dense", config, Workload(4, phase="decode", kv_len=30))
    many = costmodel.estimate("dense", config, Workload(4, phase="decode", kv_len=30, steps=50))
    assert many.total == one.total.times(50)
    assert one.cache_bytes == many.cache_bytes == 2 * 30 * 512 * 20 * 4


@settings(max_examples=40, deadline=None)
@given(stream=streams(), given_cache=st.booleans())
def test_formulas_take_arrays_of_lengths(stream: tuple[ModelConfig, int], given_cache: bool) -> None:
    """One call over an array of lengths equals one call per length, although the chunks differ in number and kind."""
    config, _ = stream
    lengths = config.chunk + np.arange(0, 60, 7)
    many = costmodel.estimate("reuse", config, Workload(lengths, fills_cache=given_cache))
    for i, length in enumerate(lengths.tolist()):
        one = costmodel.estimate("reuse", config, Workload(length, fills_cache=given_cache))
        for figure in ("matmul_flops", "vector_flops", "bytes_read", "kv_bytes", "bytes_written"):
            assert getattr(many.total, figure)[i] == getattr(one.total, figure), (figure, length)
        assert (many.peak_bytes[i], many.cache_bytes[i]) == (one.peak_bytes, one.cache_bytes)


def test_a_long_pass_holds_no_more_than_a_short_one() -> None:
    config = preset("emformer-rnnt-base")
    short, long = (costmodel.estimate("dense", config, Workload(seq)) for seq in (100, 100_000))
    assert long.peak_bytes - short.peak_bytes == (100_000 - 100) * 1024 * 4  # the output
    given = costmodel.estimate("dense", config, Workload(100_000, fills_cache=True))
    assert given.peak_bytes - long.peak_bytes == (100_000 - config.own_cache) * 2 * 512 * 20 * 4


@pytest.mark.parametrize("method", ["dense", "flash", "reuse"])
def test_peak_is_an_upper_bound_within_a_tenth(method: str) -> None:
    config = replace(preset("emformer-rnnt-base"), layers=2)
    for seq, batch in ((20, 8), (9, 16)):  # smaller arrays are not seen
        NUMBA.buffers.release()
        NUMBA.buffers.reset_high_water()
        runner = Runner(load_model(config), NUMBA)
        cache = runner.new_cache(config.own_cache, method, batch=batch)  # as large as that of the pass
        runner(random_inputs(config, seq, batch), method)
        cost = costmodel.estimate(method, config, Workload(seq, batch))
        seen = NUMBA.buffers.high_water_bytes + cache.bytes + cost.resident_bytes
        assert seen <= cost.peak_bytes <= seen + 0.1 * NUMBA.buffers.high_water_bytes, (seq, batch)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_stream_cannot_take_is_refused() -> None:
    config = _config()
    runner, inputs = Runner(load_model(config), "numpy"), random_inputs(config, 9)
    with pytest.raises(ConfigError, match=r"2 positions do not fill the first chunk: tiny takes 3 at a time.* 10 rows"):
        runner(random_inputs(config, 2))
    with pytest.raises(ShapeError, match=r"inputs have 21 rows; tiny reads 2 a position: give 2 \(T \+ 2\)"):
        runner(inputs[:, :21])
    with pytest.raises(ShapeError, match="inputs have 4 rows"):
        runner(inputs[:, :4])
    with pytest.raises(ConfigError, match="causal mask"):
        runner(inputs, causal=True)
    with pytest.raises(ConfigError, match="mask"):
        runner(inputs, mask=np.ones((1, 1, 1, 9), bool))
    with pytest.raises(ConfigError, match="runs in chunks of 3"):
        attention_maps(load_model(config), inputs)
    with pytest.raises(ShapeError, match="cache of 0 positions"):
        runner.new_cache(0)


def test_a_cache_that_is_too_short_is_refused_before_it_changes() -> None:
    config = _config()
    runner = Runner(load_model(config), "numpy")
    cache = runner.new_cache(10)
    with pytest.raises(InputError, match="holds 0 of 10 positions, 11 more do not fit"):
        runner(random_inputs(config, 11), cache=cache)
    assert cache.length == 0


def test_the_last_chunk_of_a_stream_may_be_shorter() -> None:
    config = _config()
    runner, inputs = Runner(load_model(config), "numpy"), random_inputs(config, 4)
    cache = runner.new_cache(4)
    runner(inputs[:, : config.stem_length(3)], cache=cache)
    assert runner(inputs[:, 6:], cache=cache).output.shape == (1, 1, 7)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ({"seq": 2}, "2 positions do not fill the first chunk"),
        ({"seq": np.array([9, 2])}, "do not fill the first chunk"),
        ({"seq": 2, "phase": "decode"}, "do not fill the first chunk"),
        ({"seq": 3, "phase": "decode", "kv_len": 6}, "kv_len is 6; tiny sees no more than 5 earlier positions"),
        ({"seq": 4, "phase": "decode", "kv_len": 5, "steps": 2}, "seq is 4; only the last .* give a multiple of 3"),
        ({"seq": 9, "causal": True}, "causal must be false"),
    ],
)
def test_impossible_work_is_refused(work: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        costmodel.estimate("dense", _config(), Workload(**work))


def test_symbols_are_refused() -> None:
    sympy = pytest.importorskip("sympy")
    with pytest.raises(UnsupportedError, match="chunks"):
        costmodel.estimate("dense", _config(), Workload(sympy.Symbol("T")))


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_are_cut_to_whole_positions(tmp_path: Path) -> None:
    model = load_model(_config())
    np.save(tmp_path / "frames.npy", np.zeros((25, 5), np.float32))
    given = load_input(model, tmp_path / "frames.npy")
    assert (given.array.shape, given.kind, given.valid_positions) == ((1, 24, 5), "frames", 10)
    assert given.notes == (f"{tmp_path / 'frames.npy'} has 25 rows; the first 24 are used",)
    assert load_input(model, tmp_path / "frames.npy", 4).array.shape == (1, 12, 5)
    with pytest.raises(ConfigError, match="2 positions do not fill"):
        load_input(model, tmp_path / "frames.npy", 2)


def test_a_recording_is_padded_by_the_right_context() -> None:
    from refimpl.inputs import sample

    config = replace(preset("emformer-rnnt-base"), layers=1)
    model = load_model(config)
    given = load_input(model, sample("speech"))
    positions = config.positions(given.array.shape[1])
    assert given.array.shape == (1, (positions + 1) * 4, 80)
    assert forward(model, given.array[:, : config.stem_length(8)], "flash").output.shape == (1, 8, 1024)


@given(configs("emformer"))
def test_rows_and_positions_are_each_others_inverse(config: ModelConfig) -> None:
    assert config.positions(config.stem_length(9)) == 9
