"""Forward passes of efficient-attention methods: equations in NumPy, fast in Numba, on the GPU through CuPy.

Example::

    model = refimpl.load_model("conformer-m")
    run = refimpl.forward(model, inputs, method="reuse", params={"group": 2}, engine="numba")
    run.output, run.breakdown
"""

from refimpl.cache import Cache
from refimpl.config import ModelConfig, Workload
from refimpl.engines import engine
from refimpl.model import Run, Runner, forward
from refimpl.weights import Model, load_model

__all__ = ["Cache", "Model", "ModelConfig", "Run", "Runner", "Workload", "engine", "forward", "load_model"]
