"""A closed-form model of what efficient-attention methods cost: FLOPs, bytes, memory, and seconds on given hardware.

Example::

    cost = costmodel.estimate("reuse", config, workload, params={"group": 2})
    cost.total, cost.by_component()
    costmodel.predict(cost, costmodel.load_hardware("h100-sxm")).total.seconds
"""

from costmodel.closed_form import Estimate, estimate
from costmodel.hardware import Hardware, load_hardware
from costmodel.ops import Cost, Op
from costmodel.predict import Prediction, predict

__all__ = ["Cost", "Estimate", "Hardware", "Op", "Prediction", "estimate", "load_hardware", "predict"]
