"""The engine for NVIDIA GPUs: matrix products through cuBLAS, everything else by the kernels of ``engines/cuda``.

Ops are queued on the current stream and return at once; `to_numpy`, `elapsed_s` and `synchronize` wait.
"""

from __future__ import annotations

from refimpl.engines.cuda.attention import Attention
from refimpl.engines.cuda.elementwise import Elementwise
from refimpl.engines.cuda.fusion import Fusion
from refimpl.engines.cuda.linear import LinearMaps
from refimpl.engines.cuda.selection import Selection
from refimpl.engines.cuda.stored import StoredMaps


class CupyEngine(Fusion, LinearMaps, Elementwise, Attention, Selection, StoredMaps):
    """The op vocabulary on the current CUDA device; an op that is in no family is the equation over CuPy arrays."""

    name = "cupy"
