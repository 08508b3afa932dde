"""The engine for NVIDIA GPUs: matrix products through cuBLAS, everything else by the kernels of ``engines/cuda``.

Ops are queued on the current stream and return at once; `to_numpy`, `elapsed_s` and `synchronize` wait.
"""

from __future__ import annotations

import math

from refimpl.engines.cuda import cudnn
from refimpl.engines.cuda.attention import Attention
from refimpl.engines.cuda.elementwise import Elementwise
from refimpl.engines.cuda.filtered import Filtered
from refimpl.engines.cuda.fusion import Fusion
from refimpl.engines.cuda.linear import LinearMaps
from refimpl.engines.cuda.selection import Selection
from refimpl.engines.cuda.stored import StoredMaps
from refimpl.engines.protocol import Array
from refimpl.errors import UnsupportedError

TF32_CAPABILITY = 80  # compute capability 8.0, from which tensor cores have it


class CupyEngine(Fusion, LinearMaps, Elementwise, Attention, Filtered, Selection, StoredMaps):
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
        found = self.capability()
        if found < TF32_CAPABILITY:
            raise UnsupportedError(
                f"TF32 needs compute capability {TF32_CAPABILITY / 10}; {self.device_name()} has {found / 10}: "
                "leave --tf32 away"
            )


class CupyCudnnEngine(CupyEngine):
    """The same with the fused `attention` of cuDNN: float16 without a mask; what cuDNN refuses is refused.

    Raises
    ------
    MissingDependencyError
        If cuDNN's Python frontend is not installed.
    """

    name = "cupy-cudnn"

    def __init__(self) -> None:
        super().__init__()
        self._cudnn = cudnn.CudnnAttention(self.xp)

    def attention(
        self, q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False,
        mask: Array | None = None,
    ) -> Array:  # fmt: skip
        if mask is not None:
            raise UnsupportedError("cuDNN's attention is offered without a mask: take the engine cupy")
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        out = self._heads_last((*q.shape[:3], v.shape[3]), v.dtype)
        self._cudnn(q, k, v, out, scale, causal)
        return out
