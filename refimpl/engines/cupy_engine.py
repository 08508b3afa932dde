"""The engine for NVIDIA GPUs: matrix products through cuBLAS, everything else by the kernels of ``engines/cuda``.

Ops are queued on the current stream and return at once; `to_numpy`, `elapsed_s` and `synchronize` wait.
"""

from __future__ import annotations

from refimpl.engines.cuda.attention import Attention
from refimpl.engines.cuda.elementwise import Elementwise
from refimpl.engines.cuda.linear import LinearMaps
from refimpl.engines.cuda.selection import Selection
from refimpl.engines.cuda.stored import StoredMaps
from refimpl.errors import UnsupportedError

TF32_CAPABILITY = 80  # compute capability 8.0, from which tensor cores have it


class CupyEngine(LinearMaps, Elementwise, Attention, Selection, StoredMaps):
    """The op vocabulary on the current CUDA device; an op that is in no family is the equation over CuPy arrays."""

    name = "cupy"


class CupyTf32Engine(CupyEngine):
    """The same with products of float32 on tensor cores, which round their factors to TF32: 10 bits behind the point.

    Raises
    ------
    UnsupportedError
        If the device has none: cuBLAS would compute in float32 and say nothing.
    """

    name = "cupy-tf32"
    tf32 = True

    def __init__(self) -> None:
        super().__init__()
        found = str(self.xp.cuda.Device().compute_capability)
        if int(found) < TF32_CAPABILITY:
            raise UnsupportedError(
                f"TF32 needs compute capability {TF32_CAPABILITY / 10}; {self.device_name()} has {int(found) / 10}: "
                "leave --tf32 away"
            )
