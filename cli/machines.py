"""Which hardware a prediction is for: a preset, a profile, or this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from costmodel.hardware import Hardware, MemoryLevel, load_hardware, presets
from refimpl.engines import ENGINES
from refimpl.engines import engine as get_engine
from refimpl.engines.protocol import Engine
from refimpl.errors import ConfigError, UnsupportedError

from . import gpu, profiles
from .context import cpu_name, gpu_name
from .files import OutputError
from .progress import Progress
from .request import TF32, check_dtype

LOCAL = "local"
BUSY_SHARE = 0.1  # of all cores, taken by others, from which a measurement is said to be disturbed
_PRIVATE = ("L1D", "L2")  # cache levels that every core has for itself
# A word of the machine's own name -> its preset; the first that occurs counts, the last is for all others.
_CPUS = {
    "epyc": "epyc-9654",
    "ryzen": "ryzen-7840u",
    "amd": "epyc-9654",
    "snapdragon": "snapdragon-8-gen-3",
    "": "xeon-8480",
}
_GPUS = {
    "h200": "h200-sxm",
    "h100": "h100-sxm",
    "a100": "a100-sxm-80gb",
    "l40": "rtx-4090",  # the same chip, AD102
    "l4": "l4",
    "4090": "rtx-4090",
    "": "h100-sxm",
}


def choose(given: str | Hardware | None, engine: str, threads: int, dtype: str, progress: Progress) -> Hardware:
    """The hardware called `given`; by default this machine's profile, else its nearest preset, which is noted.

    Raises
    ------
    ConfigError
        If there is no such hardware, it is of another kind than the engine's device, or ``local`` was never calibrated.
    """
    named = find(given)
    if named:
        device = ENGINES[engine][2]
        if named.kind != device:
            raise ConfigError(f"hardware '{named.name}' is a {named.kind}, not a {device}: give --device {named.kind}")
        return in_tf32(named) if engine == TF32 and named.level == "spec" else named
    profile = profiles.load(engine, threads, dtype)
    if profile:
        return profile
    if given == LOCAL:
        raise ConfigError(
            f"no profile of this machine for engine {_under(engine, threads)}, {dtype}: run 'effref calibrate' with "
            "these values, or name a preset from 'effref list hardware'"
        )
    hardware = nearest_preset(engine, threads)
    if engine == TF32:
        hardware = in_tf32(hardware)
    progress.note(
        f"not calibrated for {_under(engine, threads)}, {dtype}: times are lower bounds from the spec sheet of "
        f"{hardware.name}; 'effref calibrate' makes them forecasts"
    )
    return hardware


def find(given: str | Hardware | None) -> Hardware | None:
    """The hardware that is given by name or file; None for this machine."""
    if given is None or given == LOCAL:
        return None
    return given if isinstance(given, Hardware) else load_hardware(given)


def local(engine: str, threads: int, dtype: str, progress: Progress) -> Hardware:
    """This machine's profile, calibrated now where there is none, or one of another GPU, which is noted.

    The file is named after the GPU where the driver lists it, so that it can be another one's in a container, or where
    GPUs differ and CUDA counts them in another order.
    """
    found = profiles.load(engine, threads, dtype)
    if found and ENGINES[engine][2] == "gpu":
        ops: Any = get_engine(engine)
        kept, here = found.about.get("machine"), ops.device_name()
        if kept not in (None, here):
            progress.note(f"the profile that is kept here is of {kept}, not of {here}: calibrating anew")
            found = None
    return found or calibrate(engine, threads, dtype, None, progress)


def calibrate(engine: str, threads: int, dtype: str, seconds: float | None, progress: Progress) -> Hardware:
    """Calibrate this machine, keep the profile, and say so."""
    from . import calibration

    check_dtype(engine, dtype)
    require(engine)
    given = {} if seconds is None else {"seconds": seconds}
    progress.stage(f"calibrating {_under(engine, threads)}, {dtype}: once, for a while")
    start = time.perf_counter()
    try:
        with limited(engine, threads), disturbances_noted("calibrating", progress, ENGINES[engine][2]) as seen:
            hardware = calibration.calibrate(engine, threads, dtype, progress=progress.advance, **given)
    except Exception as error:
        if not gpu.out_of_memory(error):
            raise
        raise UnsupportedError(
            f"{gpu.shortage(error)} while calibrating: end other programs that hold it, or name a preset from "
            "'effref list hardware' with --hardware"
        ) from error
    hardware = replace(hardware, about={**hardware.about, **seen})
    spent = time.perf_counter() - start
    try:
        progress.line(f"calibrated in {spent:.0f} s; profile kept in {profiles.save(hardware, engine, threads, dtype)}")
    except OutputError as error:
        progress.note(f"calibrated in {spent:.0f} s, for this run only: {error}")
    return hardware


@contextmanager
def disturbances_noted(what: str, progress: Progress, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Note what made times too long meanwhile: other programs that kept cores busy, a GPU that lowered its clocks.

    Yields
    ------
    seen : dict
        Afterwards what belongs into the ``context`` of the result: ``gpu_state``, on a GPU that tells it.
    """
    seen: dict[str, Any] = {}
    watching = gpu.watched(seen, progress.note, what) if device == "gpu" else nullcontext()
    with busy_cores_noted(what, progress), watching:
        yield seen


@contextmanager
def busy_cores_noted(what: str, progress: Progress) -> Iterator[None]:
    """Note when other programs (or other guests of the host) kept cores busy meanwhile."""
    import psutil

    def used_s() -> tuple[float, float, float]:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = every.idle + getattr(every, "iowait", 0.0)
        guests = getattr(every, "guest", 0.0) + getattr(every, "guest_nice", 0.0)  # counted in user and nice, too
        return sum(every) - idle - guests, own.user + own.system, time.perf_counter()

    busy, own, start = used_s()
    yield
    busy, own, wall = (after - before for after, before in zip(used_s(), (busy, own, start), strict=True))
    others = max(busy - own, 0.0) / max(wall, 1e-9)  # cores
    if others > BUSY_SHARE * (psutil.cpu_count() or 1):
        progress.note(
            f"other programs kept {others:.1f} of {psutil.cpu_count()} cores busy while {what}: the times are too long "
            "and unsteady; close them and run again"
        )


def require(engine: str) -> None:
    """Raise MissingDependencyError where the engine is one for GPUs and there is no GPU; nothing is compiled."""
    if ENGINES[engine][2] == "gpu":
        get_engine(engine)


def _under(engine: str, threads: int) -> str:
    """What a profile is for: threads are those of the CPU."""
    return engine if ENGINES[engine][2] == "gpu" else f"{engine}, {threads} threads"


def started(engine: str, threads: int, progress: Progress) -> Engine:
    """The engine, compiled and told its threads."""
    ops = get_engine(engine)
    if hasattr(ops, "warm_up"):
        ops.warm_up(progress.line)
    if hasattr(ops, "set_threads"):
        ops.set_threads(threads)
    return ops


@contextmanager
def limited(engine: str, threads: int) -> Iterator[None]:
    """Hold BLAS to so many threads; engines with threads of their own are told by ``set_threads``."""
    if engine != "numpy":
        yield
        return
    import threadpoolctl

    with threadpoolctl.threadpool_limits(threads):
        yield


def nearest_preset(engine: str, threads: int) -> Hardware:
    """The preset that resembles this machine, a CPU scaled to the cores in use."""
    if ENGINES[engine][2] == "gpu":
        return presets()[_match(gpu_name() or "", _GPUS)]
    return scaled(presets()[_match(cpu_name(), _CPUS)], threads)


def in_tf32(hardware: Hardware) -> Hardware:
    """A preset whose float32 products are those of TF32.

    Raises
    ------
    UnsupportedError
        If its peak is not known.
    """
    if "tf32" not in hardware.matmul_flops_per_s:
        known = ", ".join(name for name, one in presets().items() if "tf32" in one.matmul_flops_per_s)
        raise UnsupportedError(
            f"hardware '{hardware.name}' has no peak for TF32; these have: {known}; or run 'effref calibrate --tf32'"
        )
    peaks = {**hardware.matmul_flops_per_s, "float32": hardware.matmul_flops_per_s["tf32"]}
    return replace(hardware, name=f"{hardware.name} in TF32", matmul_flops_per_s=peaks)


def _match(name: str, table: dict[str, str]) -> str:
    return next(preset for word, preset in table.items() if word in name.lower())


def scaled(hardware: Hardware, cores: int) -> Hardware:
    """A CPU of which only `cores` work: their share of peaks, cache bandwidth and private caches; all of the DRAM."""
    share = cores / hardware.cores
    if share >= 1:
        return hardware
    *caches, last = hardware.memory
    return replace(
        hardware,
        name=f"{hardware.name} scaled to {cores} of {hardware.cores} cores",
        matmul_flops_per_s={dtype: peak * share for dtype, peak in hardware.matmul_flops_per_s.items()},
        vector_flops_per_s={dtype: peak * share for dtype, peak in hardware.vector_flops_per_s.items()},
        memory=(*(_share_of_cache(level, share) for level in caches), last),
        cores=cores,
    )


def _share_of_cache(level: MemoryLevel, share: float) -> MemoryLevel:
    size = level.size_bytes * share if level.level in _PRIVATE else level.size_bytes
    return MemoryLevel(level.level, size, level.bandwidth_bytes_per_s * share)
