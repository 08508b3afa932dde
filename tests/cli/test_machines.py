"""What is said when a measurement was disturbed."""

from __future__ import annotations

import subprocess
import sys
import time

from effref import machines
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
