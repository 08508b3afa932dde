"""Forward passes of efficient-attention methods: equations in NumPy, fast in Numba, on the GPU through CuPy.

Example::

    model = refimpl.load_model("conformer-m")
    run = refimpl.forward(model, inputs, method="reuse", params={"group": 2}, engine="numba")
    run.output, run.breakdown
"""

from refimpl.config import ModelConfig, Workload
from refimpl.engines import engine
from refimpl.model import Run, forward
from refimpl.weights import Model, load_model

__all__ = ["Model", "ModelConfig", "Run", "Workload", "engine", "forward", "load_model"]
