"""The machine and the software that a result is from."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from .files import write_text
from .gpu import LIMIT

PACKAGES = ("effref", "numpy", "scipy", "numba", "cupy", "cupy-cuda12x", "cupy-cuda13x")
_CPU_LIST = Path("/sys/devices/system/cpu")
_GPU_LIST = Path("/proc/driver/nvidia/gpus")


def context(threads: int) -> dict[str, Any]:
    """The ``context`` of a result."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "cpu": cpu_name(),
        "gpu": gpu_name(),
        **({"gpu_memory_limit": limit} if (limit := os.environ.get(LIMIT)) else {}),
        "threads": threads,
        "blas": _blas(),
        "versions": _versions(),
        "commit": _commit(),
    }


def completed(document: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A result with its whole ``context``; what a measurement put there stays."""
    found = {**context(threads), **document.get("context", {})}
    found["gpu"] = found.get("gpu_state", {}).get("name") or found["gpu"]  # which knows what CUDA's first device is
    return {**document, "context": found}


def cache_root() -> Path:
    """Where profiles and the like are kept: ``$EFFREF_CACHE``, or the user's cache folder."""
    root = os.environ.get("EFFREF_CACHE")
    if root:
        return Path(os.path.expanduser(root))  # unlike the method of Path, it never raises
    import platformdirs

    return Path(platformdirs.user_cache_dir("effref"))


@cache
def cpu_name() -> str:
    """What the CPU calls itself."""
    with suppress(OSError):  # Linux on x86 says it at once
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return _asked_cpu_name()


def _asked_cpu_name() -> str:
    """py-cpuinfo takes a second, so its answer is kept."""
    kept = cache_root() / f"cpu-{slug(platform.node())}.txt"
    with suppress(OSError, UnicodeDecodeError):
        if name := kept.read_text("utf-8").strip():
            return name
    import cpuinfo

    name = str(cpuinfo.get_cpu_info().get("brand_raw") or platform.machine())
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, name)
    return name


@cache
def gpu_name() -> str | None:
    """What the NVIDIA GPU in use calls itself; None without one. No CUDA is started.

    The first in ``CUDA_VISIBLE_DEVICES``, by number in the order of the PCI bus or by UUID, else the first of all.
    """
    names, wanted = _gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if wanted.isdecimal():
        return names[int(wanted)][0] if int(wanted) < len(names) else None
    return next((name for name, uuid in names if wanted and uuid.startswith(wanted)), None)


def _gpus() -> list[tuple[str, str]]:
    """Name and UUID of each GPU that the driver lists."""
    found = []
    with suppress(OSError):
        for folder in sorted(_GPU_LIST.iterdir()):
            text = (folder / "information").read_text("utf-8")
            about = dict(re.findall(r"^(Model|GPU UUID):\s*(.+?)\s*$", text, re.MULTILINE))
            if "Model" in about:
                found.append((about["Model"], about.get("GPU UUID", "")))
    return found


@cache
def cores() -> int:
    """Physical cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    with suppress(OSError):  # hardware threads of one core name the same siblings
        return len({(_CPU_LIST / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in allowed})
    return len(allowed)


def available_bytes(device: str) -> int:
    """Memory that can be had now.

    Raises
    ------
    MissingDependencyError
        If it is that of a GPU, and there is none or no CuPy.
    """
    if device == "gpu":
        from refimpl.engines import engine

        return int(engine("cupy").free_bytes())  # type: ignore[attr-defined]  # of that engine alone
    import psutil

    return int(psutil.virtual_memory().available)


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") or "unknown"


def _blas() -> str | None:
    import numpy  # noqa: F401  # its BLAS is what is looked for
    import threadpoolctl

    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            return f"{library['internal_api']} {library['version']}"
    return None


def _versions() -> dict[str, str]:
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _commit() -> str | None:
    """The commit of this checkout; None where effref is installed."""
    root = Path(__file__).resolve().parents[1]
    if not ((root / ".git").exists() and (root / "pyproject.toml").is_file()):
        return None
    import subprocess

    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        )
        return done.stdout.strip()
    return None
