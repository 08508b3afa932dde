"""The engines by name. Numba and CuPy are imported only when their engine is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from refimpl.engines.protocol import Engine
from refimpl.errors import unknown

# name -> (module, class, device)
ENGINES: dict[str, tuple[str, str, str]] = {
    "numpy": ("refimpl.engines.numpy_engine", "NumpyEngine", "cpu"),
    "numba": ("refimpl.engines.numba_engine", "NumbaEngine", "cpu"),
    "cupy": ("refimpl.engines.cupy_engine", "CupyEngine", "gpu"),
    "cupy-tf32": ("refimpl.engines.cupy_engine", "CupyTf32Engine", "gpu"),
    "cupy-cudnn": ("refimpl.engines.cupy_engine", "CupyCudnnEngine", "gpu"),
}


def engine(name: str = "numpy") -> Engine:
    """The engine called `name`: "numpy" (the equations), "numba" (fast CPU) or "cupy" (NVIDIA GPU).

    "cupy-tf32" is "cupy" with the factors of float32 products rounded to TF32, "cupy-cudnn" with cuDNN's fused
    attention.

    Raises
    ------
    ConfigError
        If there is no such engine.
    MissingDependencyError
        If its package or device is missing; the message says what to install.
    UnsupportedError
        If the device has no TF32.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    module, cls, _ = ENGINES[name]
    return cast(Engine, getattr(import_module(module), cls)())
