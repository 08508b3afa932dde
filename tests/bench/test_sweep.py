"""A hundred thousand points of a design space, estimated in one process and written as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effref import sweep

SPACE = {
    "model": {"name": ["conformer-m", "bert-base"]},
    "workload": {"seq": {"from": 8, "to": 20_000, "step": 8}, "batch": [1, 2]},
    "method": {"dense": {}, "flash": {}, "reuse": {"group": [1, 2, 4]}},
    "hardware": {"name": ["xeon-8480", "h100-sxm"]},
}


def test_estimates(benchmark: Any, tmp_path: Path) -> None:
    benchmark.group = "sweep"
    summary = benchmark.pedantic(sweep, (SPACE, tmp_path / "points.csv"), rounds=3)
    assert summary.written == summary.points == 100_000
    benchmark.extra_info["points"] = summary.points
