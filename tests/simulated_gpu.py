"""A GPU that is not there: NumPy computes, and a clock says what a machine of known constants would have taken.

`SimulatedCupy` stands for `cupy`, as far as `refimpl.engines.cuda.device` and `graphs` ask it; `SimulatedGpu` is the
engine's device with the equations as ops. On a replayed graph an op takes no overhead of its own.
"""

from __future__ import annotations

import types
from contextlib import contextmanager
from typing import Any

import numpy as np

from costmodel.ops import FORMULAS
from refimpl.engines.cuda.device import Device
from refimpl.engines.protocol import OUTCOMES, SIZES

OVERHEAD_S, LAUNCH_S = 4e-6, 1e-5  # of an op, which passes while the device works, and of a graph
MATMUL_FLOPS_PER_S, VECTOR_FLOPS_PER_S = 4e14, 3e13
NEAR_BYTES_PER_S, FAR_BYTES_PER_S = 6e12, 2e12
L2_BYTES = 1 << 18


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which it does not export."""


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


class SimulatedCupy(types.ModuleType):
    """`cupy` with a clock; what is not here is NumPy's. `log` says what was asked of the device."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.clock_s, self.log = 0.0, []
        self.stream: Any = None  # that ops go to; None is the default one
        self.free, self.total, self.limit, self.pool_free, self.used = 80 << 30, 80 << 30, 0, 0, 0
        cupy = self

        class Event:
            def record(self) -> None:
                self.at_s = cupy.clock_s

            def synchronize(self) -> None:
                cupy.log.append("wait")

        class Graph:
            def __init__(self, seconds: float) -> None:
                self.seconds = seconds

            def launch(self) -> None:
                cupy.log.append("launch")
                cupy.clock_s += LAUNCH_S + self.seconds

        class Stream:
            def __init__(self, non_blocking: bool) -> None:
                assert non_blocking
                self.captured_s: float | None = None

            def __enter__(self) -> None:
                self.outer, cupy.stream = cupy.stream, self

            def __exit__(self, *error: Any) -> None:
                cupy.stream = self.outer

            def synchronize(self) -> None:
                cupy.log.append("wait for stream")

            def begin_capture(self) -> None:
                cupy.log.append("begin")
                self.captured_s = 0.0

            def end_capture(self) -> Graph:
                cupy.log.append("end")
                seconds, self.captured_s = self.captured_s, None
                if cupy.invalid:
                    cupy.invalid = False
                    raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated: operation failed\nin a capture")
                return Graph(seconds)

        class MemoryPool:
            malloc = "malloc of a pool"

        @contextmanager
        def using_allocator(malloc: Any) -> Any:
            cupy.log.append(f"using {malloc}")
            yield

        self.invalid = False
        device = types.SimpleNamespace(
            id=0, synchronize=lambda: self.log.append("wait for all"), pci_bus_id="0000:01:00.0",
            attributes={"L2CacheSize": L2_BYTES},
        )  # fmt: skip
        self.cuda = types.SimpleNamespace(
            cublas=None, nvrtc=None, Event=Event, Stream=Stream, MemoryPool=MemoryPool, using_allocator=using_allocator,
            Device=lambda: device, get_elapsed_time=lambda start, stop: 1e3 * (stop.at_s - start.at_s),
            runtime=types.SimpleNamespace(
                getDeviceCount=lambda: 1, memGetInfo=lambda: (self.free, self.total),
                getDeviceProperties=lambda index: {"name": b"NVIDIA Simulated"},
            ),
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np, name)

    def get_default_memory_pool(self) -> Any:
        return types.SimpleNamespace(
            get_limit=lambda: self.limit, free_bytes=lambda: self.pool_free, used_bytes=lambda: self.used,
            total_bytes=lambda: self.pool_free + self.used,
        )  # fmt: skip

    def asnumpy(self, array: Any) -> Any:
        self.log.append("download")
        return np.array(array)

    def spend(self, seconds: float) -> None:
        """Let an op take its time, or become part of a graph."""
        if self.stream is not None and self.stream.captured_s is not None:
            self.stream.captured_s += seconds
        else:
            self.clock_s += max(seconds, OVERHEAD_S)


class SimulatedGpu(Device):
    """The engine's device, whose ops take the time that the machine would."""

    name = "cupy"

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in SIZES or not callable(found) or self.__dict__.get("within"):
            return found

        def timed(*arguments: Any, **named: Any) -> Any:
            self.__dict__["within"] = True  # ops within this one take no time of their own
            try:
                result = found(*arguments, **named)
            finally:
                self.__dict__["within"] = False
            outcomes = OUTCOMES[name](result) if name in OUTCOMES else {}
            sizes = {**SIZES[name](*arguments, **named), **{key: int(one.sum()) for key, one in outcomes.items()}}
            first = next(one for one in (*arguments, result) if hasattr(one, "dtype") and one.dtype.kind == "f")
            self.xp.spend(seconds(FORMULAS[name](first.dtype.itemsize, **sizes)))
            return result

        return timed

    def fused(self, run: Any) -> Any:
        """The equations have no kernels to put together."""
        self.xp.log.append("fused")
        return run


class SimulatedTf32Gpu(SimulatedGpu):
    """The same by another name: NumPy has no TF32."""

    name = "cupy-tf32"


def seconds(cost: Any) -> float:
    """Of one op on the device: ``max(compute, memory)``."""
    compute = cost.matmul_flops / MATMUL_FLOPS_PER_S + cost.vector_flops / VECTOR_FLOPS_PER_S
    rate = NEAR_BYTES_PER_S if cost.bytes_moved <= L2_BYTES / 2 else FAR_BYTES_PER_S
    return float(max(compute, cost.bytes_moved / rate))
