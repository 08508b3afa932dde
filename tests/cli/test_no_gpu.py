"""Every command on a machine without an NVIDIA GPU: without CuPy, with CuPy and no device; predictions work."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from effref.main import COMMANDS

from .conftest import TINY, error_of

GRID = """
[model]
name = "conformer-m"
layers = [2]
[workload]
seq = [8]
[method.dense]
"""
LANGUAGE = [
    "--model", "smollm2-135m", "--layers", "2", "--d-model", "24", "--heads", "6", "--kv-heads", "3", "--d-ff", "20",
    "--vocab", "50", "--input", "{text}",
]  # fmt: skip
RUNS = {
    "measure": ["measure", *TINY, "--seq", "8"],
    "measure on a preset": ["measure", *TINY, "--seq", "8", "--hardware", "h100-sxm"],
    "calibrate": ["calibrate"],
    "crossover": ["crossover", *TINY, "--measure", "--range", "8:16"],
    "fidelity": ["fidelity", *TINY],
    "fidelity without times": ["fidelity", *TINY, "--no-measure"],
    "audit": ["audit"],
    "prepare": ["prepare", "--method", "kvsharer", *LANGUAGE],
    "guideline": ["guideline", *LANGUAGE],
    "sweep": ["sweep", "{grid}", "--mode", "measure", "--output", "{rows}"],
}
PREDICTS = {
    "estimate": ["estimate", *TINY, "--seq", "8"],
    "estimate in float16": ["estimate", *TINY, "--seq", "8", "--dtype", "float16"],
    "crossover": ["crossover", *TINY, "--range", "8:16"],
    "audit": ["audit", "--no-measure", "--method", "reuse"],
    "sweep": ["sweep", "{grid}"],
}


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which it does not export."""


def without_cupy(patch: pytest.MonkeyPatch) -> str:
    patch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    return "CuPy is not installed: pip install 'effref[gpu]'"


def broken_cupy(patch: pytest.MonkeyPatch) -> str:
    """A library that CuPy needs cannot be loaded."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise ImportError("libcudart.so.12: cannot open shared object file:\nNo such file or directory")

    patch.delitem(sys.modules, "cupy", raising=False)
    patch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    return "CuPy cannot be loaded: libcudart.so.12"


def without_driver(patch: pytest.MonkeyPatch) -> str:
    def count():
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for the runtime")

    patch.setitem(sys.modules, "cupy", stub(count))
    return "CuPy finds no NVIDIA GPU: cudaErrorInsufficientDriver"


def without_device(patch: pytest.MonkeyPatch) -> str:
    patch.setitem(sys.modules, "cupy", stub(lambda: 0))
    return "CuPy finds no NVIDIA GPU: the driver lists no device"


def stub(device_count) -> types.ModuleType:
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=device_count))  # type: ignore[attr-defined]
    return cupy


@pytest.fixture(params=[without_cupy, broken_cupy, without_driver, without_device])
def said(request, monkeypatch) -> str:
    """What a command must say."""
    return request.param(monkeypatch)


@pytest.fixture
def words(tmp_path: Path):
    files = {"text": tmp_path / "text.txt", "grid": tmp_path / "grid.toml", "rows": tmp_path / "rows.csv"}
    files["text"].write_text("seven words are in this short text. " * 40)
    files["grid"].write_text(GRID)

    def filled(arguments: list[str]) -> list[str]:
        return [word.format(**files) for word in arguments]

    return filled


@pytest.mark.parametrize("chosen", ["--device gpu", "--engine cupy"])
@pytest.mark.parametrize("name", RUNS)
def test_what_runs_on_a_gpu_says_that_there_is_none(effref, words, said, tmp_path, name, chosen) -> None:
    result = effref(*words(RUNS[name]), *chosen.split())
    assert said in error_of(result)
    assert result.stderr.count("\n") == 1  # nothing was announced before
    assert not (tmp_path / "rows.csv").exists()  # nothing was begun


@pytest.mark.parametrize("name", PREDICTS)
def test_predictions_need_no_gpu(effref, words, said, name) -> None:
    result = effref(*words(PREDICTS[name]), "--device", "gpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout


def test_all_commands_that_take_a_device_are_tried(effref) -> None:
    able = {name for name in COMMANDS if "--device" in effref(name, "--help").stdout}
    assert able == {arguments[0] for arguments in (*RUNS.values(), *PREDICTS.values())}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CUDARuntimeError("cudaErrorDevicesUnavailable: busy"), "the GPU failed (cudaErrorDevicesUnavailable: busy)"),
        (MemoryError("out of memory"), "memory ran out"),
    ],
)
def test_an_error_of_the_device_is_one_line(effref, monkeypatch, error, said) -> None:
    import effref as package
    from effref import measurement

    assert package
    monkeypatch.setattr(CUDARuntimeError, "__module__", "cupy_backends.cuda.api.runtime")

    def fails(*args):
        raise error

    monkeypatch.setattr(measurement, "measured", fails)
    assert said in error_of(effref("measure", *TINY, "--seq", "8"))
