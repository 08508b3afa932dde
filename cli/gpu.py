"""The GPU beside its engine: who else holds its memory, how it was clocked, and what its failures mean.

NVIDIA's management library is asked through nvidia-ml-py (the extra ``gpu``); what it does not tell stays unknown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from refimpl.engines.cuda.failures import of_cupy
from refimpl.errors import ConfigError

LIMIT = "CUPY_GPU_MEMORY_LIMIT"  # CuPy's own variable, read when its pool is made
SHORTAGES = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED")
MENTIONED = 0.02  # of the memory, from which someone else's part is worth a word
THROTTLED = 0.01  # of a measurement, from which lowered clocks are

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons (nvml.h), and whether the GPU could not go on as fast.
REASONS = {
    0x001: ("idle", False),
    0x002: ("applications clocks setting", False),
    0x004: ("software power cap", True),
    0x008: ("hardware slowdown", True),
    0x010: ("sync boost", False),
    0x020: ("software thermal slowdown", True),
    0x040: ("hardware thermal slowdown", True),
    0x080: ("hardware power brake", True),
    0x100: ("display clocks setting", False),
}


# --- failures and memory --------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, that of the GPU or of the machine."""
    if isinstance(error, MemoryError):  # CuPy's own is one, too
        return True
    return of_cupy(error) and any(word in str(error) for word in SHORTAGES)


def shortage(error: BaseException) -> str:
    """What ran out, and who else holds it."""
    return f"the memory of the GPU ran out{held_by_others('gpu')}" if of_cupy(error) else "memory ran out"


def too_little(needed_bytes: float, available_bytes: float, device: str) -> str:
    """How much is needed and how much there is, and who holds the rest."""
    needed, available = needed_bytes / 2**30, available_bytes / 2**30
    return f"{needed:.2f} GiB of memory and {available:.2f} GiB are available{held_by_others(device)}"


def limit_memory(given: str) -> None:
    """Let CuPy allocate no more than this: bytes, ``8GiB``, or a part of the GPU's memory as ``40%``.

    For this process, before the first allocation. CuPy refuses what goes beyond as if memory had run out.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    os.environ[LIMIT] = _as_cupy_reads_it(given.strip())


def _as_cupy_reads_it(given: str) -> str:
    with suppress(ValueError):
        if given.endswith("%"):
            if 0 < float(given[:-1]) <= 100:
                return given
        else:
            size = float(given.removesuffix("GiB")) * (2**30 if given.endswith("GiB") else 1)
            if 1 <= size < 2**63:
                return str(int(size))
    raise ConfigError(f"--gpu-memory {given}: give bytes, as 8589934592 or 8GiB, or a part of all, as 40%")


def held_by_others(device: str) -> str:
    """Whose memory the GPU's is beside this process's, to be put behind a message; empty where nobody's."""
    if device != "gpu":
        return ""
    from refimpl.engines import engine

    ops: Any = engine("cupy")
    total, elsewhere = ops.memory_bytes()
    with _nvml() as found:
        holders = _holders(*found) if found else []
    named = [f"process {pid}{name} holds {_gib(held)}" for pid, name, held in holders if held > MENTIONED * total]
    if named:
        return f" ({', '.join(named)})"
    if elsewhere > MENTIONED * total:
        return f" ({_gib(elsewhere)} of {_gib(total)} are held by other programs and the driver)"
    return ""


def _holders(nvml: Any, handle: Any) -> list[tuple[int, str, int]]:
    """Other processes, their names where they can be seen, and their bytes; the largest first.

    None where this process is not among those that use the GPU: the numbers are then the host's, not this container's.
    """
    import psutil

    asked = (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses)
    held = {one.pid: one.usedGpuMemory or 0 for question in asked for one in _asked(question, handle) or []}
    if held.pop(os.getpid(), None) is None:
        return []
    found = []
    for pid, size in sorted(held.items(), key=lambda item: -item[1]):
        name = ""
        with suppress(psutil.Error):
            name = f" ({psutil.Process(pid).name()})"
        found.append((pid, name, size))
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


# --- clocks, power and heat ------------------------------------------------------------------------------------------


@contextmanager
def watched(seen: dict[str, Any], note: Callable[[str], None], what: str) -> Iterator[None]:
    """Put the state of the GPU before and after into `seen`, and note clocks that were lowered meanwhile.

    ``seen["gpu_state"]`` stays away where NVIDIA's management library cannot be asked.
    """
    with _nvml() as found:
        if found is None:
            yield
            return
        before, counted, start = _state(*found), _counters(*found), time.perf_counter()
        yield
        spent, after = time.perf_counter() - start, _state(*found)
        seen["gpu_state"] = {
            **_fixed(*found), "before": before, "after": after, **_between(counted, _counters(*found), spent)
        }  # fmt: skip
    for reason in _lowered(seen["gpu_state"], spent):
        note(
            f"the GPU lowered its clocks while {what} ({reason}): the times are too long; let it cool, raise its power "
            "limit, or fix lower clocks with 'nvidia-smi --lock-gpu-clocks'"
        )


def _fixed(nvml: Any, handle: Any) -> dict[str, Any]:
    """What does not change while something runs."""
    version = _asked(nvml.nvmlSystemGetCudaDriverVersion_v2)
    persistence = _asked(nvml.nvmlDeviceGetPersistenceMode, handle)
    return {
        "name": _text(_asked(nvml.nvmlDeviceGetName, handle)),
        "driver_version": _text(_asked(nvml.nvmlSystemGetDriverVersion)),
        "cuda_version": None if version is None else f"{version // 1000}.{version % 1000 // 10}",  # the driver's
        "persistence_mode": None if persistence is None else bool(persistence),
        "max_sm_clock_hz": _times(1e6, _asked(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)),
        "power_limit_w": _times(1e-3, _asked(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
    }


def _state(nvml: Any, handle: Any) -> dict[str, Any]:
    """What does."""
    reasons = _asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return {
        "sm_clock_hz": _times(1e6, _asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)),
        "memory_clock_hz": _times(1e6, _asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM)),
        "power_w": _times(1e-3, _asked(nvml.nvmlDeviceGetPowerUsage, handle)),
        "temperature_c": _asked(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": None if reasons is None else [name for bit, (name, _) in REASONS.items() if reasons & bit],
    }


def _counters(nvml: Any, handle: Any) -> dict[str, float | None]:
    """Joules, and seconds under each limit, since the driver was loaded."""
    limits = {"power": nvml.NVML_PERF_POLICY_POWER, "thermal": nvml.NVML_PERF_POLICY_THERMAL}
    under = {name: _asked(nvml.nvmlDeviceGetViolationStatus, handle, policy) for name, policy in limits.items()}
    return {
        "energy": _times(1e-3, _asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)),
        **{name: _times(1e-9, getattr(found, "violationTime", None)) for name, found in under.items()},
    }


def _between(first: dict[str, float | None], last: dict[str, float | None], spent: float) -> dict[str, Any]:
    """What the counters say of the time between."""
    passed = {name: _difference(first[name], last[name]) for name in first}
    energy = passed.pop("energy")
    return {"mean_power_w": None if energy is None or spent <= 0 else energy / spent, "throttled_s": passed}


def _lowered(state: dict[str, Any], spent: float) -> list[str]:
    """Why clocks were lowered: by the counters where there are such, else by what is said before and after."""
    counted = {name: seconds for name, seconds in state["throttled_s"].items() if seconds is not None}
    if counted:
        long = {name: seconds for name, seconds in counted.items() if seconds > THROTTLED * spent}
        return [f"{name} limit, {seconds:.2g} of {spent:.2g} s" for name, seconds in long.items()]
    slowing = {name for name, slows in REASONS.values() if slows}
    said = [*(state["before"]["throttle_reasons"] or []), *(state["after"]["throttle_reasons"] or [])]
    return [name for name in dict.fromkeys(said) if name in slowing]


@contextmanager
def _nvml() -> Iterator[tuple[Any, Any] | None]:
    """NVIDIA's management library and its handle of CUDA's current device; None where either is missing."""
    with ExitStack() as ends:
        yield _opened(ends)


def _opened(ends: ExitStack) -> tuple[Any, Any] | None:
    try:
        import pynvml

        from refimpl.engines import engine

        ops: Any = engine("cupy")
        pynvml.nvmlInit()
    except Exception:  # no package, no GPU; NVMLError: no library, no driver, no permission
        return None
    ends.callback(_asked, pynvml.nvmlShutdown)
    handle = _asked(pynvml.nvmlDeviceGetHandleByPciBusId, ops.bus_id())
    return None if handle is None else (pynvml, handle)


def _asked(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None: not every GPU, driver and container gives every one."""
    try:
        return question(*arguments)
    except Exception:  # NVMLError, of which there is a class for each code
        return None


def _text(given: Any) -> str | None:
    return given.decode() if isinstance(given, bytes) else given


def _times(unit: float, value: Any) -> float | None:
    return None if value is None else value * unit


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
