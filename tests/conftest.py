"""Benchmarks and tests keep apart: ``pytest --benchmark-only`` runs tests/bench, any other call leaves it out."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "bench"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = bool(config.getoption("--benchmark-only", default=False))
    left_out = [item for item in items if item.path.is_relative_to(BENCHMARKS) != wanted]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
