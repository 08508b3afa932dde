"""What the CuPy engine asks of the device beside ops, with a `cupy` that answers as told."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_emulation import HostCupy
from simulated_gpu import L2_BYTES, SimulatedCupy, SimulatedGpu

import refimpl
from refimpl.config import override, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, EffrefError, MissingDependencyError, UnsupportedError
from refimpl.model import Runner
from refimpl.weights import load_model


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which it does not export."""


def cupy_with(
    free: int = 60, total: int = 80, pool_free: int = 5, used: int = 7, limit: int = 0, refuses: Exception | None = None
) -> Any:
    def get_limit() -> int:
        if refuses:
            raise refuses
        return limit

    pool = types.SimpleNamespace(
        get_limit=get_limit, free_bytes=lambda: pool_free, used_bytes=lambda: used, total_bytes=lambda: pool_free + used
    )
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 1, memGetInfo=lambda: (free, total))
    cuda = types.SimpleNamespace(
        runtime=runtime, cublas=None, nvrtc=None, Device=lambda: types.SimpleNamespace(id=0, pci_bus_id="0000:3B:00.0")
    )
    return types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool)


def engine_on(monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(**given))
    return refimpl.engine("cupy")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 65),  # what is free, and what the pool holds unused
        ({"limit": 40}, 33),  # the limit less what is in use
        ({"limit": 90}, 65),
        ({"limit": 5}, 0),
    ],
)
def test_free_bytes(monkeypatch, given, expected) -> None:
    assert engine_on(monkeypatch, **given).free_bytes() == expected


def test_what_others_hold(monkeypatch) -> None:
    assert engine_on(monkeypatch).memory_bytes() == (80, 80 - 60 - 12)


def test_place_on_the_bus(monkeypatch) -> None:
    assert engine_on(monkeypatch).bus_id() == "0000:3B:00.0"


@pytest.mark.parametrize(
    ("refuses", "kind", "said"),
    [
        (ValueError("could not convert string\nto float"), ConfigError, "CUPY_GPU_MEMORY_LIMIT must be bytes"),
        (CUDARuntimeError("cudaErrorDevicesUnavailable: busy"), MissingDependencyError, "cannot be used: cudaErrorDev"),
    ],
)
def test_a_device_that_cannot_be_used(monkeypatch, refuses, kind, said) -> None:
    with pytest.raises(EffrefError) as error:
        engine_on(monkeypatch, refuses=refuses)
    assert type(error.value) is kind
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch) -> Any:
    cupy = SimulatedCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return SimulatedGpu()


def test_a_pass_runs_once_before_it_is_recorded(device) -> None:
    x, seen = np.ones((2, 3), np.float32), []

    def work() -> Any:
        seen.append((device.xp.stream is not None, device.xp.log[-1]))
        return device.relu(x)

    device.xp.log.clear()
    replay = device.record(work)
    assert device.xp.log == ["wait for all", "using malloc of a pool", "wait for stream", "begin", "end"]
    assert seen == [(True, "using malloc of a pool"), (True, "begin")]
    assert device.xp.stream is None
    before = device.xp.clock_s
    output, seconds = replay()
    assert device.xp.log[-2:] == ["launch", "wait"]
    assert seconds == pytest.approx(device.xp.clock_s - before)
    np.testing.assert_array_equal(output, x)


def test_what_a_pass_uploads_is_uploaded_once(device) -> None:
    """In another order and less the second time, as where the first run keeps something for later ones."""
    mask, table, taken = np.eye(2, dtype=bool), np.arange(4.0), []

    def work() -> Any:
        hosts = [table, mask] if not taken else [mask.copy()]
        taken.extend(device.asarray(host) for host in hosts)
        return taken[0]

    device.record(work)
    assert taken[2] is taken[1]
    assert device.uploads is None


def refused(device: Any, work: Callable[[], Any]) -> str:
    with pytest.raises(UnsupportedError) as error:
        device.record(work)
    assert device.uploads is None  # ordinary passes go on
    assert device.xp.stream is None
    np.testing.assert_array_equal(device.to_numpy(device.asarray(np.arange(3))), np.arange(3))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pass_that_reads_a_result_is_refused(device) -> None:
    assert "the host reads a result within it; leave --graph away" in refused(
        device, lambda: device.to_numpy(device.relu(np.ones((2, 2))))
    )


def test_a_pass_that_uploads_other_things_each_time_is_refused(device) -> None:
    random = np.random.default_rng(0)
    assert "uploads something else" in refused(device, lambda: device.asarray(random.random(3)))
    assert device.xp.log[-1] in ("end", "download")


def test_a_capture_that_cuda_refuses(device) -> None:
    """As where CuPy waits for the device within an op."""

    def work() -> Any:
        device.xp.invalid = True
        return device.relu(np.ones((2, 2)))

    assert "cudaErrorStreamCaptureInvalidated: operation failed in a capture" in refused(device, work)


@pytest.mark.parametrize("error", [MemoryError("full"), ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_other_errors_of_a_recorded_pass_are_themselves(device, error) -> None:
    def work() -> Any:
        if "begin" in device.xp.log:
            raise error
        return device.relu(np.ones((2, 2)))

    with pytest.raises(type(error)):
        device.record(work)
    assert device.xp.log[-1] == "end"


def test_a_recorded_pass_gives_what_an_ordinary_one_gives(device) -> None:
    config = override(preset("smollm2-135m"), layers=2, d_model=24, heads=6, kv_heads=2, d_ff=20, vocab=50)
    runner = Runner(load_model(config), device)
    ready, ids = runner.prepare("dense"), np.arange(8).reshape(1, 8)
    cache = runner.new_cache(8, ready)
    runner(ids[:, :5], ready, cache=cache)
    recorded = runner.recorded(ids[:, 5:], ready, cache=cache)
    assert cache.length == 5
    replayed = recorded()
    assert cache.length == 5
    np.testing.assert_array_equal(replayed.output, runner(ids[:, 5:], ready, cache=cache).output)
    assert replayed.calls == []


def test_engines_of_the_cpu_record_no_graphs() -> None:
    runner = Runner(load_model(override(preset("bert-base"), layers=1, d_model=8, heads=2, d_ff=8, vocab=9)), "numpy")
    with pytest.raises(UnsupportedError, match="take 'cupy'"):
        runner.recorded(np.zeros((1, 2), np.int64), runner.prepare("dense"))


def test_the_cache_is_overwritten_by_a_buffer_twice_its_size(device) -> None:
    device.clear_cache()
    first = device._cold
    assert first.nbytes == 2 * L2_BYTES
    assert device.xp.log[-1] == "wait for all"
    device.clear_cache()
    assert device._cold is first


# --- TF32 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "computes"),
    [
        ("cupy", {"float16": 68, "float32": 68, "float64": 70}),  # CUBLAS_COMPUTE_32F and _64F of cublas_api.h
        ("cupy-tf32", {"float16": 68, "float32": 77, "float64": 70}),  # CUBLAS_COMPUTE_32F_FAST_TF32
    ],
)
def test_tf32_is_for_float32_of_the_engine_that_is_asked_for_it(monkeypatch, tmp_path, name, computes) -> None:
    cupy, seen = HostCupy(tmp_path), []
    cupy.cuda.cublas.CUBLAS_COMPUTE_32F_FAST_TF32 = 77
    monkeypatch.setattr(cupy.cuda.cublas, "gemmStridedBatchedEx", lambda *given: seen.append(given[-2]))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    engine: Any = refimpl.engine(name)
    for dtype, compute in computes.items():
        engine.linear(cupy.zeros((2, 3), dtype), cupy.zeros((4, 3), dtype))
        assert seen.pop() == compute


def test_tf32_needs_tensor_cores_that_have_it(monkeypatch, tmp_path) -> None:
    cupy = HostCupy(tmp_path)
    cupy.cuda.runtime.getDeviceProperties = lambda device: {"name": b"emulated", "major": 7, "minor": 5}
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(UnsupportedError, match=r"needs compute capability 8\.0; emulated has 7\.5"):
        refimpl.engine("cupy-tf32")
    assert refimpl.engine("cupy").name == "cupy"


# --- cuDNN ------------------------------------------------------------------------------------------------------------


def test_cudnn_computes_unmasked_attention_of_its_engine_alone(monkeypatch, tmp_path) -> None:
    calls = []

    class Stand:
        def __init__(self, xp) -> None:
            self.xp = xp

        def __call__(self, q, k, v, out, scale, causal) -> None:
            calls.append((scale, causal))
            out[...] = NumpyEngine().attention(q, k, v, scale, causal)

    monkeypatch.setattr("refimpl.engines.cuda.cudnn.CudnnAttention", Stand)
    monkeypatch.setitem(sys.modules, "cupy", HostCupy(tmp_path))
    engine: Any = refimpl.engine("cupy-cudnn")
    q, k, v = (engine.asarray(np.ones((1, heads, 3, 4), np.float16)) for heads in (4, 2, 2))
    out = engine.attention(q, k, v, causal=True)
    np.testing.assert_array_equal(out, np.ones((1, 4, 3, 4), np.float16))
    assert calls == [(0.5, True)]
    assert engine.merge_heads(out).data.ptr == out.data.ptr
    with pytest.raises(UnsupportedError, match="mask"):
        engine.attention(q, k, v, mask=np.ones((1, 1, 1, 3), bool))
    assert refimpl.engine("cupy").attention.__func__ is not engine.attention.__func__
