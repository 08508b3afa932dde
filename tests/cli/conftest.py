"""A command line with a cache of its own, tiny models and a profile that was not measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from effref.main import main

from costmodel.hardware import Band, Hardware, MemoryLevel, OpModel, RecordedModel
from costmodel.ops import FORMULAS

TINY = ["--layers", "2", "--d-model", "32", "--heads", "2", "--d-ff", "64"]
RESIDUAL = {"median_abs": 0.1, "p90_abs": 0.2, "bias": 0.0, "n": 9}
RUN = [*TINY, "--engine", "numpy", "--seq", "8,16", "--repeats", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EFFREF_CACHE", str(folder))
    return folder


@pytest.fixture
def effref() -> Callable[..., Result]:
    """Run the command; arguments may be one text."""

    def run(*arguments: str) -> Result:
        words = arguments[0].split() if len(arguments) == 1 else list(arguments)
        return CliRunner().invoke(main, words)

    return run


KINDS = [*FORMULAS, *(f"{op}, {few}" for op in FORMULAS for few in ("few rows", "few queries", "causal"))]


def profile(**changes: Any) -> Hardware:
    op = OpModel(1e-6, 1e11, 1e10, {}, 1e10, 5e9, 1e6)
    given: dict[str, Any] = {
        "name": "local",
        "title": "this machine",
        "kind": "cpu",
        "level": "calibrated",
        "source": "effref calibrate",
        "capacity_bytes": 1e9,
        "matmul_flops_per_s": {"float32": 1e13},
        "vector_flops_per_s": {"float32": 1e12},
        "memory": (MemoryLevel("cache", 1e6, 1e11), MemoryLevel("memory", 1e9, 1e10)),
        "ops": dict.fromkeys(KINDS, op),
        "recorded": RecordedModel(1e-5, 1e-7, 0.5),
        "bands": {"total": Band(0.9, 1.2), "recorded": Band(0.8, 1.1)} | {name: Band(0.8, 1.5) for name in KINDS},
        "about": {
            "engine": "numpy", "threads": 1, "dtype": "float32", "passes": 3, "samples": 30, "global_efficiency": 2.0,
            "residuals": {name: dict(RESIDUAL) for name in (*KINDS, "total", "recorded")},
        },
    }  # fmt: skip
    return Hardware(**given | changes)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calibration that measures nothing; the list holds what it was asked for."""
    import effref.calibration

    asked: list[tuple[Any, ...]] = []

    def calibrate(engine: str, threads: int, dtype: str, progress: Any = None, **given: Any) -> Hardware:
        asked.append((engine, threads, dtype, given))
        progress("measuring", 0.5)
        return profile()

    monkeypatch.setattr(effref.calibration, "calibrate", calibrate)
    return asked


def error_of(result: Result, code: int = 2) -> str:
    """The one line on stderr of a request that was refused."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("effref: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return lines[0]
