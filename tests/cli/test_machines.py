"""What is said when a measurement was disturbed, and what the machine is called."""

from __future__ import annotations

import subprocess
import sys
import time
import types

import pytest
from effref import context, machines
from effref.progress import Progress


def test_other_programs_are_noticed(monkeypatch) -> None:
    monkeypatch.setattr(machines, "BUSY_SHARE", 0.01)
    progress = Progress()
    with (
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy,
        machines.disturbances_noted("resting", progress),
    ):
        time.sleep(1.0)
        busy.kill()
    assert len(progress.notes) == 1
    assert "while resting" in progress.notes[0]


def test_own_work_is_no_disturbance(monkeypatch) -> None:
    monkeypatch.setattr(machines, "BUSY_SHARE", 0.9)
    progress = Progress()
    with machines.disturbances_noted("working", progress):
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    assert progress.notes == []


@pytest.mark.parametrize("left", [None, b"", b"\xff\xfe"], ids=["nothing", "an empty file", "no text"])
def test_the_name_of_the_cpu_is_asked_for_where_none_is_kept(cache, monkeypatch, left) -> None:
    cpuinfo = types.SimpleNamespace(get_cpu_info=lambda: {"brand_raw": "A Chip"})
    monkeypatch.setitem(sys.modules, "cpuinfo", cpuinfo)
    if left is not None:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f"cpu-{context.slug(context.platform.node())}.txt").write_bytes(left)
    assert context._asked_cpu_name() == "A Chip"
    cpuinfo.get_cpu_info = lambda: {"brand_raw": "another"}
    assert context._asked_cpu_name() == "A Chip"  # kept
    assert len(list(cache.iterdir())) == 1  # and nothing beside it
