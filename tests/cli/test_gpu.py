"""Commands on a GPU that is simulated: its memory, and its clocks and power as NVIDIA's library tells them."""

from __future__ import annotations

import csv
import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from effref import calibration, context, gpu, machines, profiles
from effref.auditing.measurements import MEASUREMENTS
from effref.calibration import METHODS, Cell, _model
from effref.context import _gpus, available_bytes, gpu_name
from simulated_gpu import FAR_BYTES_PER_S, L2_BYTES, LAUNCH_S, NEAR_BYTES_PER_S, OVERHEAD_S, SimulatedCupy, SimulatedGpu

from refimpl.config import override, preset
from refimpl.engines import ENGINES
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import UnsupportedError

from .conftest import TINY, error_of, profile

RUN = [*TINY, "--device", "gpu", "--repeats", "2"]


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> SimulatedCupy:
    found = SimulatedCupy()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setitem(ENGINES, "cupy", ("simulated_gpu", "SimulatedGpu", "gpu"))
    monkeypatch.setitem(ENGINES, "cupy-tf32", ("simulated_gpu", "SimulatedTf32Gpu", "gpu"))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed, unless a test puts one there
    monkeypatch.setenv("CUPY_GPU_MEMORY_LIMIT", "")  # restored afterwards
    return found


@pytest.fixture
def on_gpu(effref, monkeypatch) -> Callable[..., Any]:
    """Run a command on the simulated GPU under a profile that was not measured."""
    monkeypatch.setattr(calibration, "calibrate", lambda *given, **named: profile(kind="gpu"))
    return effref


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_memory_of_the_gpu_is_asked_for(cupy) -> None:
    cupy.free = 12345
    assert available_bytes("gpu") == 12345


@pytest.mark.parametrize("command", ["measure", "fidelity"])
def test_what_does_not_fit_is_refused_before_it_is_allocated(on_gpu, cupy, command) -> None:
    cupy.free, cupy.pool_free = 1 << 30, 3 << 30
    cupy.limit = 1000
    said = error_of(on_gpu(command, *RUN, "--seq", "64"))
    assert (
        "0.00 GiB are available (76.00 GiB of 80.00 GiB are held by other programs and the driver): lower --seq" in said
    )


def test_crossover_looks_up_to_what_fits(on_gpu, cupy) -> None:
    cupy.free = 1000
    assert "or all memory" in error_of(on_gpu("crossover", *RUN[:-2], "--measure", "--range", "8:64"))


def test_processes_that_hold_the_memory_are_named(on_gpu, cupy, nvml) -> None:
    cupy.free = 1000
    nvml.compute = [process(os.getpid(), 5 << 30), process(2**22 + 1, 3 << 30), process(os.getppid(), 70 << 30)]
    nvml.graphics = [process(2**22 + 2, None), process(2**22 + 3, 1 << 20)]  # not told; too little for a word
    said = error_of(on_gpu("measure", *RUN, "--seq", "64"))
    import psutil

    parent = f"process {os.getppid()} ({psutil.Process(os.getppid()).name()}) holds 70.00 GiB"
    assert f"available ({parent}, process {2**22 + 1} holds 3.00 GiB): lower" in said


def test_processes_of_a_host_are_not_named_in_a_container(on_gpu, cupy, nvml) -> None:
    """This process, by the number that it has outside, would be one of the others; so would a name be of another."""
    cupy.free = 1000
    nvml.compute = [process(os.getppid(), 70 << 30)]
    said = error_of(on_gpu("measure", *RUN, "--seq", "64"))
    assert "(80.00 GiB of 80.00 GiB are held by other programs and the driver): lower" in said


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class CUBLASError(RuntimeError):
    """As CuPy's."""


OutOfMemoryError.__module__ = "cupy.cuda.memory"
CUBLASError.__module__ = "cupy_backends.cuda.libs.cublas"
SHORTAGES = [
    OutOfMemoryError("Out of memory allocating 4,294,967,296 bytes"),
    CUBLASError("CUBLAS_STATUS_ALLOC_FAILED"),
]


def failing_at(monkeypatch: pytest.MonkeyPatch, length: int, error: Exception) -> None:
    """Let softmax fail on maps of this length, as if memory ran out there."""
    original = SimulatedGpu.softmax

    def softmax(self: Any, scores: Any, *rest: Any, **named: Any) -> Any:
        if scores.shape[2] >= length:
            raise error
        return original(self, scores, *rest, **named)

    monkeypatch.setattr(SimulatedGpu, "softmax", softmax)


@pytest.mark.parametrize("error", SHORTAGES)
def test_what_was_measured_is_kept_when_memory_runs_out(on_gpu, monkeypatch, error) -> None:
    failing_at(monkeypatch, 32, error)
    result = on_gpu("measure", *RUN, "--seq", "8,32", "--method", "dense", "--format", "json")
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("effref: error: "))
    assert "the memory of the GPU ran out before all was measured" in line
    document = json.loads(result.stdout)
    assert document["out_of_memory"] == "the memory of the GPU ran out"
    assert [(one["method"], one["seq"]) for one in document["results"]] == [("dense", 8)]


@pytest.mark.parametrize("error", SHORTAGES)
def test_memory_that_runs_out_before_the_first_result(on_gpu, monkeypatch, error) -> None:
    failing_at(monkeypatch, 1, error)
    assert "the memory of the GPU ran out: lower --seq" in error_of(on_gpu("measure", *RUN, "--seq", "8"))


def test_a_sweep_leaves_out_what_memory_ran_out_for(on_gpu, monkeypatch, tmp_path) -> None:
    failing_at(monkeypatch, 32, SHORTAGES[0])
    grid, rows = tmp_path / "grid.toml", tmp_path / "rows.csv"
    sizes = "layers = [1]\nd_model = [16]\nheads = [2]\nd_ff = [16]"
    grid.write_text(f"[model]\nname = 'bert-base'\n{sizes}\n[workload]\nseq = [8, 32]\n[method.dense]\n")
    result = on_gpu("sweep", str(grid), "--device", "gpu", "--mode", "measure", "--output", str(rows))
    assert result.exit_code == 0, result.stderr
    assert len(rows.read_text().splitlines()) == 2  # the names of the columns, and the length that fits
    assert "the memory of the GPU ran out" in result.stderr


def test_the_memory_of_the_machine_may_run_out_too(effref, monkeypatch) -> None:
    original = NumpyEngine.softmax

    def softmax(self: Any, scores: Any, *rest: Any, **named: Any) -> Any:
        if scores.shape[2] >= 32:
            raise MemoryError
        return original(self, scores, *rest, **named)

    monkeypatch.setattr(NumpyEngine, "softmax", softmax)
    words = ["--engine", "numpy", "--hardware", "xeon-8480", "--seq", "8,32", "--method", "dense", "--repeats", "1"]
    result = effref("measure", *TINY, *words)
    assert result.exit_code == 2
    assert "effref: error: memory ran out before all was measured: lower --seq" in result.stderr
    assert "T=8" in result.stdout


def test_other_errors_are_no_shortage(on_gpu, monkeypatch) -> None:
    failing_at(monkeypatch, 32, CUBLASError("CUBLAS_STATUS_EXECUTION_FAILED"))
    said = error_of(on_gpu("measure", *RUN, "--seq", "8,32", "--method", "dense", "--format", "json"))
    assert "the GPU failed (CUBLAS_STATUS_EXECUTION_FAILED)" in said


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ("8GiB", str(8 << 30)),
        ("1.5GiB", str(3 << 29)),
        ("8589934592", "8589934592"),
        ("40%", "40%"),
        (" 7.5% ", "7.5%"),
    ],
)
def test_the_limit_is_the_one_of_cupy_s_pool(on_gpu, given, limit) -> None:
    result = on_gpu("measure", *RUN, "--seq", "8", "--method", "dense", "--gpu-memory", given, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == limit
    assert json.loads(result.stdout)["context"]["gpu_memory_limit"] == limit


@pytest.mark.parametrize("given", ["", "x", "-1", "0", "0%", "101%", "nan", "inf", "8GB", "%", "GiB", "1e40"])
def test_a_limit_that_is_none_is_refused(on_gpu, given) -> None:
    assert "give bytes, as 8589934592 or 8GiB" in error_of(on_gpu("measure", *RUN, "--gpu-memory", given))


def test_a_limit_needs_a_gpu_and_this_machine(on_gpu, tmp_path) -> None:
    assert "add --device gpu" in error_of(on_gpu("measure", *TINY, "--gpu-memory", "1GiB"))
    sweep = ["sweep", "grid.toml", "--device", "gpu", "--gpu-memory", "1GiB", "--cluster", "tcp://localhost:1"]
    assert "where the workers are started" in error_of(on_gpu(*sweep))


# --- timing ---------------------------------------------------------------------------------------------------------


def timed(on_gpu: Callable[..., Any], *words: str) -> dict[str, Any]:
    result = on_gpu("measure", *RUN, "--format", "json", *words)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_times_are_those_of_the_device(on_gpu) -> None:
    """Events around each op and each pass, by the clock of the simulated machine."""
    (one,) = timed(on_gpu, "--seq", "16", "--method", "dense")["results"]
    components = sum(row["measured_s"]["median"] for row in one["components"])
    assert one["total"]["measured_s"]["median"] == pytest.approx(components, rel=1e-9)
    assert components == pytest.approx(one["total"]["calls"] * OVERHEAD_S)  # ops as small as these are launches


def test_an_ordinary_pass_waits_at_its_end_only(on_gpu, cupy, monkeypatch) -> None:
    from refimpl.model import Runner

    waits = []
    original = Runner._pass

    def noted(self: Any, *arguments: Any) -> Any:
        cupy.log.clear()
        ops: list[int] = []
        spend = cupy.spend
        monkeypatch.setattr(cupy, "spend", lambda seconds: (ops.append(len(cupy.log)), spend(seconds)))
        run = original(self, *arguments)
        waits.append(sum(ops))
        return run

    monkeypatch.setattr(Runner, "_pass", noted)
    timed(on_gpu, "--seq", "16", "--method", "dense")
    assert len(waits) > 4
    assert set(waits) == {0}  # nothing was waited for, nor read, before the last op was queued


@pytest.mark.parametrize("model", ["conformer-m", "minilm-l6", "smollm2-135m"])
def test_graphs_are_timed_without_the_launches(on_gpu, cupy, model) -> None:
    words = ["--model", model, "--seq", "16,24", "--method", "dense,flash", "--vocab", "50"]
    plain, graph = timed(on_gpu, *words), timed(on_gpu, *words, "--graph")
    assert (plain["config"]["graph"], graph["config"]["graph"]) == (False, True)
    assert "launch" in cupy.log
    for before, after in zip(plain["results"], graph["results"], strict=True):
        assert before["total"]["measured_s"]["median"] == pytest.approx(before["total"]["calls"] * OVERHEAD_S)
        assert LAUNCH_S < after["total"]["measured_s"]["median"] < 1.1 * LAUNCH_S  # so small are these ops
        rows = zip(before["components"], after["components"], strict=True)
        assert all(a["measured_s"]["median"] == pytest.approx(b["measured_s"]["median"]) for a, b in rows)
        assert after["fidelity"]["rel_l2"] < 1e-5
    assert any("replayed as CUDA graphs" in note for note in graph["notes"])


def test_pairs_of_ops_are_fused_where_that_is_asked_for(on_gpu, cupy) -> None:
    words = ["--model", "minilm-l6", "--seq", "16", "--method", "dense", "--vocab", "50", "--graph"]
    plain = timed(on_gpu, *words)
    assert "fused" not in cupy.log
    fused = timed(on_gpu, *words, "--fuse")
    assert cupy.log.count("fused") == 2  # dense and flash
    assert [one["config"]["fuse"] for one in (plain, fused)] == [False, True]
    assert any("no two ops are one kernel" in note for note in fused["notes"])


def test_a_decoding_step_is_replayed_behind_the_same_positions(on_gpu, cupy) -> None:
    words = "--phase decode --kv-len 4,9 --model smollm2-135m --kv-heads 2 --vocab 50 --method dense,reuse --graph"
    found = timed(on_gpu, *words.split())
    passes = 3 * 2 * (1 + 2)  # of dense, flash and reuse at two lengths: a warm-up and two repeats
    assert cupy.log.count("launch") == passes
    assert {one["kv_len"] for one in found["results"]} == {4, 9}
    assert all(one["fidelity"]["rel_l2"] < 1e-5 for one in found["results"] if one["method"] == "dense")


@pytest.mark.parametrize("method", ["reuse", "efficientasr", "latte", "headshare", "local", "linear", "linformer"])
def test_methods_are_replayed(on_gpu, cupy, method) -> None:
    found = timed(on_gpu, "--model", "minilm-l6", "--seq", "16", "--method", method, "--graph")
    (one,) = found["results"]
    plain = timed(on_gpu, "--model", "minilm-l6", "--seq", "16", "--method", method)["results"][0]
    assert one["fidelity"]["rel_l2"] == pytest.approx(plain["fidelity"]["rel_l2"])


def test_what_reads_a_result_on_its_way_is_refused(on_gpu) -> None:
    said = error_of(on_gpu("measure", *RUN, "--model", "minilm-l6", "--seq", "16", "--method", "attmemo", "--graph"))
    assert "attmemo: the pass cannot be recorded as a CUDA graph: the host reads a result within it" in said


def test_a_cold_cache_is_overwritten_before_each_pass(on_gpu, cupy, monkeypatch) -> None:
    cleared = []
    original = SimulatedGpu.clear_cache

    def noted(self: Any) -> None:
        original(self)
        assert self._cold.nbytes == 2 * L2_BYTES
        cleared.append(cupy.clock_s)

    monkeypatch.setattr(SimulatedGpu, "clear_cache", noted)
    found = timed(on_gpu, "--seq", "16", "--method", "dense,flash", "--l2", "cold")
    assert found["config"]["l2"] == "cold"
    assert len(cleared) == 2 + 2 * 2 * 2  # the warm-up of both, two repeats of two passes of both
    assert timed(on_gpu, "--seq", "16", "--method", "dense")["config"]["l2"] == "warm"
    assert len(cleared) == 10


def test_a_sweep_times_the_passes_that_were_asked_for(on_gpu, cupy, tmp_path, monkeypatch) -> None:
    cleared = []
    original = SimulatedGpu.clear_cache
    monkeypatch.setattr(SimulatedGpu, "clear_cache", lambda self: cleared.append(1) or original(self))
    grid, path = tmp_path / "grid.toml", tmp_path / "rows.csv"
    sizes = "layers = 1\nd_model = 16\nheads = 2\nd_ff = 16\nvocab = 50"
    grid.write_text(f"[model]\nname = 'minilm-l6'\n{sizes}\n[workload]\nseq = 16\n[method.dense]\n[method.attmemo]\n")
    words = ["sweep", str(grid), "--device", "gpu", "--mode", "measure", "--warmup", "0", "--repeats", "1"]
    result = on_gpu(*words, "--graph", "--fuse", "--l2", "cold", "--output", str(path))
    assert result.exit_code == 0, result.stderr
    assert "1: attmemo: the pass cannot be recorded as a CUDA graph: the host reads a result within it" in result.stderr
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["method"], row["l2"], row["graph"], row["fuse"]) == ("dense", "cold", "true", "true")
    assert LAUNCH_S < float(row["measured_median_s"]) < 1.1 * LAUNCH_S  # without those of its ops
    assert cupy.log.count("launch") == 2  # dense and flash
    assert "fused" in cupy.log
    assert len(cleared) == 3  # before these, and before the ordinary pass of dense


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--l2 cold --engine numpy", "--l2 cold is for GPUs: add --device gpu"),
        ("--graph --engine numba", "--graph is for GPUs and, on the CPU, for decoding with the engine 'numba'"),
        ("--fuse --device gpu", "--fuse is for the passes of --graph"),
        ("--l2 col --device gpu", "did you mean 'cold'"),
        ("--graph --device gpu --phase decode --model smollm2-135m --steps 2", "--graph replays one pass"),
        ("--graph --device gpu --model emformer-rnnt-base --seq 8", "does not stream"),
    ],
)
def test_timing_that_there_is_not(effref, words, said) -> None:
    assert said in error_of(effref("measure", *words.split()))


def test_graphs_need_memory_of_their_own(on_gpu, cupy) -> None:
    words = ["measure", *RUN, "--seq", "64", "--method", "dense", "--format", "json"]
    peak = json.loads(on_gpu(*words).stdout)["results"][0]["peak_bytes"]
    cupy.free = peak + 1000
    assert on_gpu(*words).exit_code == 0
    assert "dense needs" in error_of(on_gpu(*words, "--graph"))


# --- calibration ----------------------------------------------------------------------------------------------------

SMALL = (
    Cell(_model("post-norm", 40, 2, 80), 24, methods=METHODS),
    Cell(_model("patches", 48, 3, 96), 40, methods=METHODS),
    Cell(_model("post-norm", 56, 2, 112), 17, batch=2, methods=METHODS),
    Cell(_model("patches", 72, 3, 144), 33, methods=METHODS),
)


def test_calibration_finds_the_constants_of_the_device(effref, monkeypatch, cache) -> None:
    """Launches from the passes; bandwidths, which launches hide there, from graphs of one op."""
    monkeypatch.setattr(calibration, "CELLS", SMALL)
    monkeypatch.setattr(calibration, "LARGE_CELLS", ())
    monkeypatch.setattr(calibration, "ADDS", (2, 6))
    words = ["--device", "gpu", "--dtype", "float16"]
    result = effref("calibrate", *words, "--seconds", "0.1", "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["kind"], found["about"]["machine"]) == ("gpu", "NVIDIA Simulated")
    assert found["about"]["threads"] is None
    l2, memory = found["memory"]
    assert (l2["level"], memory["level"]) == ("L2", "memory")
    assert l2["bandwidth_bytes_per_s"] == pytest.approx(NEAR_BYTES_PER_S, rel=0.1)
    assert memory["bandwidth_bytes_per_s"] == pytest.approx(FAR_BYTES_PER_S, rel=0.05)
    for op in found["ops"].values():
        assert op["overlaps"]
        assert op["overhead_s"] == pytest.approx(OVERHEAD_S, rel=0.02)
    assert found["recorded"]["call_s"] < 0.05 * OVERHEAD_S  # in a graph the host launches none
    assert found["about"]["residuals"]["recorded"]["n"] == sum(len(cell.methods) for cell in SMALL)
    (place,) = (cache / "profiles").iterdir()
    assert place.name.endswith("-cupy-float16.json")
    again = effref(
        "measure", *RUN, *words, "--model", "bert-base", "--seq", "9,21", "--method", "dense", "--format", "json"
    )
    assert "calibrat" not in again.stderr  # the profile is there
    assert json.loads(again.stdout)["accuracy"]["totals"]["median_abs"] < 0.02
    graph = effref(
        "measure", *RUN, *words, "--model", "bert-base", "--seq", "9,21", "--method", "dense", "--format", "json",
        "--graph",
    )  # fmt: skip
    for before, after in zip(*(json.loads(run.stdout)["results"] for run in (again, graph)), strict=True):
        assert after["total"]["predicted_s"] < 0.5 * before["total"]["predicted_s"]
    assert "cupy, " in effref("calibrate", *words, "--seconds", "0.1").stdout


def test_bandwidths_that_the_clock_or_graphs_do_not_tell_are_left_to_the_passes(cupy, monkeypatch) -> None:
    assert set(calibration.bandwidths(SimulatedGpu(), "float32")) == {"near_bytes_per_s", "far_bytes_per_s"}
    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda, "get_elapsed_time", lambda start, stop: 0.5)
        assert calibration.bandwidths(SimulatedGpu(), "float32") == {}
    cupy.invalid = True  # CUDA refuses the first capture
    assert calibration.bandwidths(SimulatedGpu(), "float32") == {}


def test_calibration_takes_what_fits(cupy) -> None:
    few = calibration.fitting("float32", 4 << 30)
    assert few[: len(calibration.CELLS)] == calibration.CELLS
    assert len(few) < len(calibration.CELLS + calibration.LARGE_CELLS)
    assert calibration.fitting("float32", 40 << 30) == calibration.CELLS + calibration.LARGE_CELLS
    cupy.free = 1 << 30
    with pytest.raises(UnsupportedError, match=r"needs at least .* and 1\.00 GiB are available \(79\.00 GiB of 80\.00"):
        calibration.calibrate("cupy", seconds=0.1)
    assert "begin" not in cupy.log  # refused before the bandwidths, whose arrays are large


@pytest.mark.parametrize(
    ("error", "said"),
    [
        *((error, "the memory of the GPU ran out while calibrating: end other programs") for error in SHORTAGES),
        (CUBLASError("CUBLAS_STATUS_EXECUTION_FAILED"), "the GPU failed (CUBLAS_STATUS_EXECUTION_FAILED)"),
    ],
)
def test_failures_while_calibrating(effref, monkeypatch, cache, error, said) -> None:
    monkeypatch.setattr(calibration, "CELLS", SMALL)
    monkeypatch.setattr(calibration, "LARGE_CELLS", ())
    monkeypatch.setattr(calibration, "bandwidths", lambda gpu, dtype: {})
    failing_at(monkeypatch, 33, error)
    for command in (["calibrate", "--device", "gpu"], ["measure", *RUN, "--seq", "8"]):
        assert said in error_of(effref(*command))
    assert not (cache / "profiles").exists()


def test_the_profile_of_another_gpu_is_not_taken(effref, monkeypatch) -> None:
    made = []

    def calibrate(*given: Any, **named: Any) -> Any:
        own = profile(kind="gpu")
        made.append(replace(own, about={**own.about, "machine": "NVIDIA Simulated" if made else "NVIDIA L4"}))
        return made[-1]

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    words = ["measure", *RUN, "--seq", "8", "--method", "dense", "--format", "json"]
    for count, noted in ((1, False), (2, True), (2, False)):
        result = effref(*words)
        assert result.exit_code == 0, result.stderr
        assert len(made) == count
        assert ("of NVIDIA L4, not of NVIDIA Simulated: calibrating anew" in result.stderr) == noted


# --- TF32 ------------------------------------------------------------------------------------------------------------


def test_tf32_is_an_engine_of_its_own(on_gpu) -> None:
    """Recorded with the result, under a profile of its own, and never used unasked."""
    asked = timed(on_gpu, "--seq", "8", "--method", "dense", "--tf32")
    assert (asked["config"]["engine"], asked["config"]["tf32"]) == ("cupy-tf32", True)
    assert {one["engine"] for one in asked["results"]} == {"cupy-tf32"}
    plain = timed(on_gpu, "--seq", "8", "--method", "dense")
    assert (plain["config"]["engine"], plain["config"]["tf32"]) == ("cupy", False)
    places = {profiles.path(engine, 1, "float32").name for engine in ("cupy", "cupy-tf32")}
    assert {place.name for place in (profiles.path("cupy", 1, "float32").parent).iterdir()} == places
    assert len(places) == 2


@pytest.mark.parametrize("name", ["h100-sxm", "h200-sxm", "a100-sxm-80gb"])
def test_presets_are_priced_at_tf32_where_it_is_asked_for(effref, name) -> None:
    """Twice the time of float16's rate, by the units of a tensor core."""
    words = ["estimate", "--seq", "4096", "--method", "dense", "--hardware", name, "--format", "json"]
    plain, tf32 = (json.loads(effref(*words, *more).stdout) for more in ((), ("--tf32", "--device", "gpu")))
    peaks = tf32["hardware"]["matmul_flops_per_s"]
    assert peaks["float32"] == pytest.approx(peaks["float16"] / 2, rel=2e-3)
    assert plain["hardware"]["matmul_flops_per_s"]["float32"] < peaks["float32"]
    assert tf32["results"][0]["total"]["predicted_s"] < plain["results"][0]["total"]["predicted_s"]
    assert tf32["hardware"]["name"].endswith("in TF32")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("measure --tf32", "--tf32 is for products of the engine 'cupy': add --device gpu"),
        ("measure --tf32 --engine numba", "of the engine 'cupy'"),
        ("measure --tf32 --engine cupy-cudnn", "of the engine 'cupy'"),
        ("measure --tf32 --device gpu --dtype float16", "the dtype is float16"),
        ("calibrate --engine cupy-tf32 --dtype float64", "the dtype is float64"),
        ("estimate --tf32 --device gpu --hardware l4", "no peak for TF32; these have: h100-sxm"),
    ],
)
def test_tf32_that_there_is_not(effref, words, said) -> None:
    assert said in error_of(effref(*words.split()))


# --- clocks and power ------------------------------------------------------------------------------------------------


def process(pid: int, held: int | None) -> Any:
    return types.SimpleNamespace(pid=pid, usedGpuMemory=held)


class NVMLError(Exception):
    """As of nvidia-ml-py."""


class Nvml(types.ModuleType):
    """`pynvml` with counters that go on by a second of power at each look."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1
    compute: Any = ()
    graphics: Any = ()
    reasons, violation_s, energy_j, sessions = 0, 0.0, 0.0, 0
    lacks: tuple[str, ...] = ()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("nvml") and name in super().__getattribute__("lacks"):

            def refuses(*arguments: Any) -> Any:
                raise NVMLError("Not Supported")

            return refuses
        return found

    def nvmlInit(self) -> None:
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        assert bus_id == "0000:01:00.0"
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.10"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA Simulated"

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:
        return 1

    def nvmlDeviceGetMaxClockInfo(self, handle: str, clock: int) -> int:
        return 1980

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1755, 2: 2619}[clock]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 412_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 54

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.energy_j += 100.0
        return round(self.energy_j * 1e3)

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> Any:
        if policy == 0:
            self.violation_s += 2.0 if self.reasons else 0.0
        return types.SimpleNamespace(violationTime=round((self.violation_s if policy == 0 else 0.0) * 1e9))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        return list(self.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> Any:
        return list(self.graphics)


@pytest.fixture
def nvml(monkeypatch) -> Nvml:
    found = Nvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


def measured(on_gpu: Callable[..., Any], *more: str) -> dict[str, Any]:
    result = on_gpu("measure", *RUN, "--seq", "8", "--method", "dense", "--format", "json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_state_of_the_gpu_is_in_the_context(on_gpu, nvml) -> None:
    state = measured(on_gpu)["context"]["gpu_state"]
    assert {name: state[name] for name in ("name", "driver_version", "cuda_version", "persistence_mode")} == {
        "name": "NVIDIA Simulated", "driver_version": "570.86.10", "cuda_version": "12.8", "persistence_mode": True,
    }  # fmt: skip
    assert state["max_sm_clock_hz"] == 1.98e9
    assert state["power_limit_w"] == 700.0
    for when in ("before", "after"):
        assert state[when] == {
            "sm_clock_hz": 1.755e9, "memory_clock_hz": 2.619e9, "power_w": 412.5, "temperature_c": 54,
            "throttle_reasons": [],
        }  # fmt: skip
    assert state["mean_power_w"] > 0
    assert state["throttled_s"] == {"power": 0.0, "thermal": 0.0}
    assert nvml.sessions == 0  # each one was closed


def test_the_gpu_has_the_name_that_its_library_tells(on_gpu, nvml, monkeypatch) -> None:
    for listed in (None, "the first on the bus, which need not be CUDA's"):
        monkeypatch.setattr(context, "gpu_name", lambda listed=listed: listed)
        assert measured(on_gpu)["context"]["gpu"] == "NVIDIA Simulated"


def test_an_audit_says_which_gpu_it_is_from(on_gpu, nvml, monkeypatch) -> None:
    config = override(preset("bert-base"), layers=2, d_model=16, heads=2, d_ff=16, vocab=20)

    def timed_once(settings: Any, lab: Any) -> list[Any]:
        lab.timed(config, "reuse", {"group": 2}, 8)
        return []

    monkeypatch.setitem(MEASUREMENTS, "reuse-speedup", timed_once)
    words = ["audit", "--method", "reuse", "--device", "gpu", "--hardware", "l4", "--max-seconds", "1"]
    result = on_gpu(*words, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["context"]["gpu"] == "NVIDIA Simulated"
    nvml.lacks = ("nvmlInit",)
    assert json.loads(on_gpu(*words, "--format", "json").stdout)["context"]["gpu"] == gpu_name()


def test_rows_of_a_sweep_say_which_gpu_measured_them(on_gpu, nvml, tmp_path) -> None:
    grid, rows = tmp_path / "grid.toml", tmp_path / "rows.csv"
    sizes = "layers = [1]\nd_model = [16]\nheads = [2]\nd_ff = [16]"
    grid.write_text(f"[model]\nname = 'bert-base'\n{sizes}\n[workload]\nseq = [8]\n[method.dense]\n")
    result = on_gpu("sweep", str(grid), "--device", "gpu", "--mode", "measure", "--output", str(rows))
    assert result.exit_code == 0, result.stderr
    with rows.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["device"], row["gpu"]) == ("gpu", "NVIDIA Simulated")


@pytest.mark.parametrize(
    "command", [["crossover", "--measure", "--range", "8:16", "--max-seconds", "1"], ["fidelity", "--seq", "16"]]
)
def test_other_commands_that_time_have_it_too(on_gpu, nvml, command) -> None:
    result = on_gpu(command[0], *TINY, *command[1:], "--device", "gpu", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["context"]["gpu_state"]["before"]["power_w"] == 412.5


def test_a_profile_keeps_it(effref, nvml, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "calibrate", lambda *given, **named: profile(kind="gpu"))
    result = effref("calibrate", "--device", "gpu", "--format", "json")
    assert json.loads(result.stdout)["about"]["gpu_state"]["driver_version"] == "570.86.10"


def test_lowered_clocks_are_noted_with_the_time_they_were_lowered(on_gpu, nvml) -> None:
    nvml.reasons = 0x4
    document = measured(on_gpu)
    assert document["context"]["gpu_state"]["throttled_s"]["power"] == pytest.approx(2.0)
    (note,) = (note for note in document["notes"] if "lowered its clocks while measuring" in note)
    assert "power limit, 2 of" in note


@pytest.mark.parametrize(("reasons", "noted"), [(0x44, True), (0x20, True), (0x3, False), (0x110, False)])
def test_without_counters_the_reasons_count(on_gpu, nvml, reasons, noted) -> None:
    nvml.reasons, nvml.lacks = reasons, ("nvmlDeviceGetViolationStatus",)
    document = measured(on_gpu)
    assert any("lowered its clocks" in note for note in document["notes"]) == noted
    assert document["context"]["gpu_state"]["throttled_s"] == {"power": None, "thermal": None}


def test_what_a_gpu_does_not_tell_is_null(on_gpu, nvml) -> None:
    nvml.lacks = tuple(name for name in vars(Nvml) if name.startswith("nvmlDeviceGet") and "Handle" not in name)
    state = measured(on_gpu)["context"]["gpu_state"]
    assert state["before"] == dict.fromkeys(state["before"])
    assert state["mean_power_w"] is None
    assert state["driver_version"] == "570.86.10"


@pytest.mark.parametrize("lacks", [("nvmlInit",), ("nvmlDeviceGetHandleByPciBusId",)])
def test_without_the_library_there_is_no_state(on_gpu, nvml, lacks) -> None:
    nvml.lacks = lacks
    assert "gpu_state" not in measured(on_gpu)["context"]


def test_without_the_package_there_is_no_state(on_gpu) -> None:
    assert "gpu_state" not in measured(on_gpu)["context"]


def test_a_cpu_is_not_asked_for_it(on_gpu, nvml) -> None:
    result = on_gpu("measure", *TINY, "--engine", "numpy", "--seq", "8", "--hardware", "xeon-8480", "--format", "json")
    assert "gpu_state" not in json.loads(result.stdout)["context"]


def test_names_of_nvml_are_those_of_the_package() -> None:
    """The stub has what the real module has; this needs nvidia-ml-py, but no GPU."""
    sys.modules.pop("pynvml", None)
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in vars(Nvml):
        if name.lower().startswith("nvml"):
            assert hasattr(real, name), name
    slowing = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    bits = {getattr(real, f"nvmlClocksThrottleReason{name}") for name in slowing}
    assert bits == {bit for bit, (_, slows) in gpu.REASONS.items() if slows}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H200", "h200-sxm"), ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA L4", "l4"), ("NVIDIA L40S", "rtx-4090"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), (None, "h100-sxm"),
    ],
)  # fmt: skip
def test_the_preset_is_that_of_the_nearest_chip(monkeypatch, name, preset) -> None:
    monkeypatch.setattr(machines, "gpu_name", lambda: name)
    assert machines.nearest_preset("cupy", 1).name == preset


# --- which GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "NVIDIA L4"), ("1", "NVIDIA H100 80GB HBM3"), ("1,0", "NVIDIA H100 80GB HBM3"), ("2", None), ("", None),
     ("GPU-22", "NVIDIA H100 80GB HBM3"), ("GPU-33", None)],
)  # fmt: skip
def test_the_gpu_is_the_visible_one(monkeypatch, tmp_path, visible, name) -> None:
    for place, model, uuid in (("0000:01:00.0", "NVIDIA L4", 11), ("0000:02:00.0", "NVIDIA H100 80GB HBM3", 22)):
        (tmp_path / place).mkdir()
        text = f"Model: \t\t {model}\nIRQ:   \t\t 16\nGPU UUID: \t GPU-{uuid}-aa\nVideo BIOS: \t 96\n"
        (tmp_path / place / "information").write_text(text)
    monkeypatch.setattr(context, "_GPU_LIST", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu_name.cache_clear()
    assert gpu_name() == name
    gpu_name.cache_clear()
    assert len(_gpus()) == 2
