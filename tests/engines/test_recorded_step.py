"""A recorded decoding step of the Numba engine: the bits of an ordinary step at every position, or a refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import small_llama
from strategies import decoders

from refimpl import ModelConfig, Runner, load_model
from refimpl.config import override, preset
from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numba_kernels import instructions, layout
from refimpl.engines.numba_kernels.instructions import INSTRUCTION, LINE
from refimpl.engines.recorded_step import StepRecorder
from refimpl.errors import ConfigError, InputError, ShapeError, UnsupportedError
from refimpl.language import generate
from refimpl.methods import CATALOG

LLAMA = small_llama(4)
GPT2 = replace(override(preset("gpt2"), layers=3, d_model=24, heads=4, d_ff=40, vocab=50), max_positions=400)
NO_INSTRUCTIONS = {
    "latte",
    "svd-softmax",
    "folding",
    "local",
    "efficientasr",
}  # ops, or parts of the cache, that no instruction has


@pytest.fixture
def all_threads() -> Iterator[NumbaEngine]:
    """The engine, which has its number of threads again afterwards."""
    engine = NumbaEngine()
    threads = engine.threads
    yield engine
    engine.set_threads(threads)


class Decoding:
    """A text in a cache, to go on from by ordinary and by recorded steps."""

    def __init__(
        self, config: ModelConfig, method: str = "dense", params: dict[str, Any] | None = None, past: int = 5,
        room: int = 12, batch: int = 1, dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.runner = Runner(load_model(config, dtype=dtype), "numba")
        self.ids = np.random.default_rng(0).integers(config.vocab, size=(batch, room))
        self.ready = self.runner.prepare(method, params, self.ids)
        self.cache = self.runner.new_cache(room, self.ready, batch=batch)
        if past:
            self.runner(self.ids[:, :past], self.ready, cache=self.cache, record=False)

    def recorded(self) -> Callable[[np.ndarray], Any]:
        return self.runner.recorded_step(self.ready, self.cache)

    def next_ids(self) -> np.ndarray:
        return self.ids[:, self.cache.length : self.cache.length + 1]

    def assert_same(self, step: Callable[[np.ndarray], Any], steps: int) -> None:
        """Each of some steps, ordinary and then recorded: the same numbers and the same keys and values."""
        for _ in range(steps):
            ids, at = self.next_ids(), self.cache.length
            wanted = self.runner(ids, self.ready, cache=self.cache, record=False).output.copy()
            held = [x[:, :, at].copy() for x in self.stores()]
            for x in self.stores():
                x[:, :, at] = np.nan
            self.cache.truncate(at)
            found = step(ids).output
            np.testing.assert_array_equal(found, wanted, err_msg=f"at position {at}")
            for x, before in zip(self.stores(), held, strict=True):
                np.testing.assert_array_equal(x[:, :, at], before)
            assert self.cache.length == at + 1

    def stores(self) -> list[np.ndarray]:
        """The arrays of the cache."""
        return [x for x in (*self.cache._keys, *self.cache._values) if x is not None]


@pytest.mark.parametrize("method", CATALOG)
def test_a_recorded_step_is_an_ordinary_one_bit_for_bit_or_is_refused(method: str) -> None:
    params = {"kvsharer": {"strategy": [[2, 0]]}, "latte": {"kept": 0.5}, "folding": {"fold": 3, "fold_ffn": 1}}.get(
        method, {}
    )
    config = replace(LLAMA, position="none") if method == "narrow" else LLAMA
    if method in ("attmemo", "linear", "linformer"):
        with pytest.raises(ConfigError):  # no method for decoding
            Decoding(config, method).recorded()
        return
    if method == "headshare":
        config = replace(config, kv_heads=config.heads)
    decoding = Decoding(config, method, params, batch=2)
    if method in NO_INSTRUCTIONS:
        with pytest.raises(UnsupportedError, match="cannot be recorded on the CPU"):
            decoding.recorded()
    else:
        decoding.assert_same(decoding.recorded(), 6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["dense", "flash"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_one_recording_serves_all_lengths(config: ModelConfig, method: str, dtype: str) -> None:
    """Over the lengths at which the keys of a head are cut into more ranges, from the first position on."""
    decoding = Decoding(config, method, past=0, room=300, dtype=dtype)
    step = decoding.recorded()
    decoding.assert_same(step, 3)
    for past in (126, 254):
        decoding.runner(decoding.ids[:, decoding.cache.length : past], decoding.ready, cache=decoding.cache)
        decoding.assert_same(step, 4)
    decoding.cache.truncate(2)
    decoding.assert_same(step, 1)


@settings(max_examples=25, deadline=None)
@given(config=decoders(), past=st.integers(0, 5), batch=st.integers(1, 8), method=st.sampled_from(["dense", "flash"]))
def test_any_decoder(config: ModelConfig, past: int, batch: int, method: str) -> None:
    """Widths off the vector grid, grouped heads, biases, norms before or after."""
    decoding = Decoding(config, method, past=past, room=9, batch=batch)
    decoding.assert_same(decoding.recorded(), 3)


def test_results_do_not_depend_on_threads(all_threads: NumbaEngine) -> None:
    """A model whose matrices are cut into parts, for one thread and for all."""
    config = small_llama(2, d_model=288, heads=6, kv_heads=3, d_ff=600, vocab=900)
    decoding = Decoding(config, "flash", past=130, room=140)
    step, outputs = decoding.recorded(), []
    for threads in (1, all_threads.threads):
        all_threads.set_threads(threads)
        decoding.cache.truncate(130)
        outputs.append(step(decoding.next_ids()).output.copy())
    np.testing.assert_array_equal(*outputs)
    decoding.cache.truncate(130)
    decoding.assert_same(step, 3)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_thread_that_never_comes_holds_nobody_up(all_threads: NumbaEngine, threads: int) -> None:
    """Ranges of parts for more threads than there are: one does all the work, each part once."""
    all_threads.set_threads(1)
    out, x = np.zeros((1, 4096), np.float32), np.ones((1, 4096), np.float32)
    weight = np.eye(4096, dtype=np.float32)
    table = np.zeros(3, INSTRUCTION)
    for row, (source, target) in zip(table, ((x, out), (out, x), (x, out)), strict=True):
        for name, value in {
            "function": instructions.linear(np.float32), "parts": 37, "rows": 1, "width": 4096, "depth": 4096,
            "x": source.ctypes.data, "y": weight.ctypes.data, "out": target.ctypes.data,
        }.items():  # fmt: skip
            row[name] = value
    taken, done = (np.zeros(3 * n * LINE, np.int64) for n in (threads, 1))
    walk = threading.Thread(
        target=instructions.kernel_walk, args=(table, 0, taken, done, threads), daemon=True
    )  # else a deadlock would hang the tests
    walk.start()
    walk.join(60)
    assert not walk.is_alive()
    assert done.reshape(3, LINE)[:, 0].tolist() == [37, 37, 37]
    np.testing.assert_array_equal(out, 1)


def test_a_continuation_is_made_of_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the NumPy engine; the first pass reads the prompt, all others are recorded."""
    passes = []
    ordinary = Runner.__call__
    monkeypatch.setattr(
        Runner, "__call__", lambda self, ids, *a, **k: passes.append(ids) or ordinary(self, ids, *a, **k)
    )
    ids, model = np.arange(6).reshape(2, 3), load_model(LLAMA, dtype="float64")
    runner = Runner(model, "numba")
    found = generate(runner, ids, 9)
    assert len(passes) == 1
    np.testing.assert_array_equal(found[:, :1], generate(runner, ids, 1))
    np.testing.assert_array_equal(found, generate(Runner(model, "numpy"), ids, 9))


def test_a_recorded_pass_stays_at_its_place() -> None:
    """What `measure --graph` repeats: the cache is as before after each."""
    decoding = Decoding(LLAMA, "flash")
    wanted = decoding.runner(decoding.next_ids(), decoding.ready, cache=decoding.cache).output
    decoding.cache.truncate(5)
    again = decoding.runner.recorded(decoding.next_ids(), decoding.ready, cache=decoding.cache)
    for _ in range(3):
        np.testing.assert_array_equal(again().output, wanted)
        assert decoding.cache.length == 5


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_step_refuses_what_an_ordinary_one_refuses() -> None:
    decoding = Decoding(LLAMA, past=5, room=6)
    step = decoding.recorded()
    for ids, error, said in (
        (np.array([[40]]), InputError, "0 to 39"),
        (np.array([[1, 2]]), ShapeError, "one position"),
        (np.array([[1], [2]]), ShapeError, "for 1 sequences; 2 are given"),
        (np.array([[0.5]]), InputError, "whole numbers"),
    ):
        with pytest.raises(error, match=said):
            step(ids)
    step(np.array([[1]]))
    with pytest.raises(InputError, match="holds 6 of 6 positions"):
        step(np.array([[1]]))
    assert decoding.cache.length == 6


def test_positions_behind_the_table_are_refused() -> None:
    decoding = Decoding(replace(GPT2, max_positions=6), past=5, room=8)
    step = decoding.recorded()
    step(np.array([[1]]))
    with pytest.raises(InputError, match="7 positions; the position table of gpt2 has 6"):
        step(np.array([[1]]))


def test_what_cannot_be_recorded_says_why() -> None:
    with pytest.raises(UnsupportedError, match="9 sequences, and up to 8"):
        Decoding(LLAMA, batch=9).recorded()
    with pytest.raises(UnsupportedError, match="18 heads share 2 heads of keys"):
        Decoding(small_llama(1, d_model=36, heads=18, kv_heads=2)).recorded()
    model = load_model(LLAMA)
    runner = Runner(model, "numpy")
    with pytest.raises(UnsupportedError, match="'numpy' records no steps: take 'numba'"):
        runner.recorded_step(runner.prepare("dense"), runner.new_cache(4))
    decoding = Decoding(LLAMA)
    with pytest.raises(ShapeError, match="another model or method"):
        decoding.runner.recorded_step(decoding.runner.prepare("kvsharer", {"strategy": [[2, 0]]}), decoding.cache)


def test_arrays_that_change_unseen_are_refused() -> None:
    """What an instruction cannot follow from step to step must not be taken for a constant."""
    recorder = StepRecorder(3, [table := np.zeros((9, 4), np.float32)])
    store, x = np.zeros((1, 2, 9, 4), np.float32), np.zeros((1, 2, 1, 4), np.float32)
    held = recorder.append(store, x, 3)
    row, weight = np.zeros((1, 1, 4), np.float32), np.zeros((4, 4), np.float32)
    for call in (
        lambda: recorder.attention(x, held[:, :, 1:], held[:, :, 1:]),  # the last keys alone
        lambda: recorder.attention(x, held[:, :, :2], held[:, :, :2]),
        lambda: recorder.attention(x, x, x),  # new keys alone
        lambda: recorder.attention(x, held, held, mask=np.ones((1, 1, 1, 4), bool)),
        lambda: recorder.scores(x, held, 1.0, mask=np.ones((1, 1, 1, 4), bool)),
        lambda: recorder.append(store, x, 2),
        lambda: recorder.append(store[:, :, ::2], x, 3),
        lambda: recorder.relu(held),
        lambda: recorder.add(row, table[2:3]),  # another position
        lambda: recorder.add(row, np.zeros((2, 4), np.float32)),
        lambda: recorder.rotary(x, table[2:3, :2], table[3:4, :2], False),
        lambda: recorder.linear(row, weight.T),
        lambda: recorder.linear(row.astype(np.float64), weight),
        lambda: recorder.merge_heads(np.zeros((1, 2, 4, 4), np.float32)),
        lambda: recorder.weighted_sum(np.zeros((1, 2, 1, 4), np.float32), held),
        lambda: recorder.filtered_attention(x, held, held),
    ):
        with pytest.raises(UnsupportedError, match="cannot be recorded on the CPU") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_maps_of_very_long_texts_are_refused() -> None:
    """There the engine's softmax shares out a row, and its sums have another order."""
    decoding = Decoding(small_llama(1, d_model=6, heads=1, kv_heads=1, d_ff=4), room=layout.LONG_ROW)
    with pytest.raises(UnsupportedError, match="has room for 65536 positions"):
        decoding.recorded()
