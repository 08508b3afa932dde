"""The device: what an engine asks of CuPy beside ops. Marks are events in the current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.engines.cuda.failures import one_line
from refimpl.engines.cuda.graphs import Replay, Uploads, cannot
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, MissingDependencyError


class Device(NumpyEngine):
    """The current CUDA device; the ops are the equations over CuPy arrays until a family of kernels replaces them."""

    def __init__(self) -> None:
        super().__init__(require_cupy())
        self.uploads: Uploads | None = None  # while a pass is recorded as a graph
        self._cold: Array | None = None

    def asarray(self, host: Array) -> Array:
        return super().asarray(host) if self.uploads is None else self.uploads.take(host, super().asarray)

    def to_numpy(self, array: Array) -> Array:
        if self.uploads is not None:
            raise cannot("the host reads a result within it")
        return self.xp.asnumpy(array)

    def mark(self) -> Any:
        event = self.xp.cuda.Event()
        event.record()
        return event

    def elapsed_s(self, start: Any, stop: Any) -> float:
        stop.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, stop)) / 1e3

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""
        self.xp.cuda.Device().synchronize()

    def cache_bytes(self) -> int:
        """The second-level cache."""
        return int(self.xp.cuda.Device().attributes["L2CacheSize"])

    def clear_cache(self) -> None:
        """Overwrite the second-level cache, with a buffer twice its size, and wait."""
        if self._cold is None:
            self._cold = self.xp.empty((2 * self.cache_bytes(),), np.uint8)
        self._cold[...] = 0
        self.synchronize()

    def record(self, work: Callable[[], Array]) -> Replay:
        """Record the ops of `work`, which returns its output, as a CUDA graph; see `Replay`."""
        return Replay(self, work)

    def free_bytes(self) -> int:
        """Device memory that can still be allocated, CuPy's pool included, within the pool's limit if it has one."""
        free, _ = self.xp.cuda.runtime.memGetInfo()
        pool = self.xp.get_default_memory_pool()
        room, limit = int(free + pool.free_bytes()), pool.get_limit()
        return min(room, max(int(limit - pool.used_bytes()), 0)) if limit else room

    def memory_bytes(self) -> tuple[int, int]:
        """Device memory in all, and what of it is neither free nor this process's: other programs and the driver."""
        free, total = self.xp.cuda.runtime.memGetInfo()
        return int(total), int(total - free - self.xp.get_default_memory_pool().total_bytes())

    def device_name(self) -> str:
        """The GPU's name, such as "NVIDIA H100 80GB HBM3"."""
        name = self._properties["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    @cached_property
    def _properties(self) -> dict[str, Any]:
        return dict(self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.Device().id))

    def capability(self) -> int:
        """The compute capability that kernels are chosen by: 90 for 9.0."""
        return int(10 * self._properties["major"] + self._properties["minor"])

    def block_shared_bytes(self) -> int:
        """The most shared memory that a block can ask for."""
        return int(self._properties["sharedMemPerBlockOptin"])

    def multiprocessors(self) -> int:
        """How many blocks can run at once, at least."""
        return int(self._properties["multiProcessorCount"])

    def bus_id(self) -> str:
        """Where the GPU is on the PCI bus, by which NVIDIA's management library knows it."""
        return str(self.xp.cuda.Device().pci_bus_id)

    def split_heads(self, x: Array, heads: int) -> Array:
        batch, length, width = x.shape
        return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    def merge_heads(self, x: Array) -> Array:
        batch, heads, length, width = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)


def require_cupy() -> Any:
    """CuPy, with a device and the libraries that the engine calls; else MissingDependencyError, one line."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "CuPy is not installed: pip install 'effref[gpu]' (CUDA 12) or cupy-cuda13x (CUDA 13), and an NVIDIA GPU "
            "with its driver is needed"
        ) from error
    except ImportError as error:
        raise MissingDependencyError(f"CuPy cannot be loaded: {one_line(error)}") from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError, a class that CuPy does not export
        raise MissingDependencyError(f"CuPy finds no NVIDIA GPU: {one_line(error)}") from error
    if devices == 0:
        raise MissingDependencyError("CuPy finds no NVIDIA GPU: the driver lists no device")
    try:
        cupy.cuda.cublas, cupy.cuda.nvrtc  # noqa: B018 - loaded at first use
    except ImportError as error:
        raise MissingDependencyError(
            f"CuPy cannot load cuBLAS or NVRTC; install the CUDA toolkit, or cupy-cuda12x[ctk]: {one_line(error)}"
        ) from error
    try:
        cupy.get_default_memory_pool().get_limit()  # starts CUDA on the device, and reads the variable
    except ValueError as error:
        raise ConfigError(
            f"CUPY_GPU_MEMORY_LIMIT must be bytes, or a part of all memory as 40%: {one_line(error)}"
        ) from error
    except Exception as error:
        raise MissingDependencyError(
            f"the GPU cannot be used: {one_line(error)}; 'nvidia-smi' shows whether it works and who else uses it"
        ) from error
    return cupy
