"""Records of maps as a batch, mapped and copied, alone and with the weighted sum that reads it (page cache warm)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.memo.database import Database, Writer
from refimpl.memo.mapping import gather

B, H, D, RECORDS = 8, 12, 32, 24
RNG = np.random.default_rng(0)


@pytest.fixture(params=[64, 128, 256])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with Writer(tmp_path / "db", {}, durable=False) as writer:
        writer.append("maps-0", RNG.random((RECORDS, H, request.param, request.param), np.float32), aligned=True)
        writer.commit()
    with Database(tmp_path / "db") as opened:
        yield opened


@pytest.mark.parametrize("read", [False, True], ids=["gather", "gather-and-read"])
@pytest.mark.parametrize("transfer", ["map", "copy"])
def test_gather(benchmark: Any, database: Database, transfer: str, read: bool) -> None:
    records = database.records("maps-0")
    length = records.layout.shape[1]
    values = RNG.random((B, H, length, D), np.float32)
    rows = RNG.integers(0, RECORDS, B).tolist()
    benchmark.group = f"maps of {length} positions"
    benchmark.extra_info.update(bytes=B * records.layout.record_bytes)

    def run() -> None:
        maps = gather(records, rows, transfer)
        if read:
            maps @ values

    benchmark(run)
