"""Forward passes of efficient-attention methods: equations in NumPy, fast in Numba, on the GPU through CuPy.

Example::

    model = refimpl.load_model("conformer-m")
    run = refimpl.forward(model, inputs, method="reuse", params={"group": 2}, engine="numba")
    run.output, run.breakdown

Nothing is imported before it is used: the cost model needs shapes and parameters, not the programs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refimpl.cache import Cache
    from refimpl.config import ModelConfig, Workload
    from refimpl.engines import engine
    from refimpl.model import Run, Runner, forward
    from refimpl.weights import Model, load_model

__all__ = ["Cache", "Model", "ModelConfig", "Run", "Runner", "Workload", "engine", "forward", "load_model"]

_HOME = {
    "Cache": "cache",
    "Model": "weights",
    "ModelConfig": "config",
    "Run": "model",
    "Runner": "model",
    "Workload": "config",
    "engine": "engines",
    "forward": "model",
    "load_model": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refimpl' has no attribute '{name}'")
    return getattr(import_module(f"refimpl.{_HOME[name]}"), name)
