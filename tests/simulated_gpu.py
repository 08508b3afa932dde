"""A GPU that is not there: NumPy computes, and a clock says what a machine of known constants would have taken."""

from __future__ import annotations

from typing import Any

from costmodel.ops import FORMULAS
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.engines.protocol import OUTCOMES, SIZES

OVERHEAD_S = 4e-6
MATMUL_FLOPS_PER_S, VECTOR_FLOPS_PER_S = 4e14, 3e13
BYTES_PER_S = 2e12


class SimulatedGpu(NumpyEngine):
    """What the commands ask of the CuPy engine; tests set the attributes of the class."""

    name = "cupy"
    free, total, elsewhere = 60 << 30, 80 << 30, 0
    clock_s = 0.0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in SIZES or not callable(found):
            return found

        def timed(*arguments: Any, **named: Any) -> Any:
            before = SimulatedGpu.clock_s
            result = found(*arguments, **named)
            outcomes = (
                {key: int(array.sum()) for key, array in OUTCOMES[name](result).items()} if name in OUTCOMES else {}
            )
            sizes = {**SIZES[name](*arguments, **named), **outcomes}
            first = next(one for one in (*arguments, result) if hasattr(one, "dtype") and one.dtype.kind == "f")
            cost = FORMULAS[name](first.dtype.itemsize, **sizes)
            SimulatedGpu.clock_s = before + seconds(cost)  # ops within this one took no time of their own
            return result

        return timed

    def mark(self) -> float:
        return SimulatedGpu.clock_s

    def elapsed_s(self, start: float, stop: float) -> float:
        return stop - start

    def free_bytes(self) -> int:
        return self.free

    def memory_bytes(self) -> tuple[int, int]:
        return self.total, self.elsewhere

    def device_name(self) -> str:
        return "NVIDIA Simulated"

    def bus_id(self) -> str:
        return "0000:01:00.0"


def seconds(cost: Any) -> float:
    """Of one op: ``overhead + max(compute, memory)``."""
    compute = cost.matmul_flops / MATMUL_FLOPS_PER_S + cost.vector_flops / VECTOR_FLOPS_PER_S
    return float(OVERHEAD_S + max(compute, cost.bytes_moved / BYTES_PER_S))
