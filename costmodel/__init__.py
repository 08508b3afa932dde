"""A closed-form model of what efficient-attention methods cost: FLOPs, bytes, memory, and seconds on given hardware.

import costmodel
cost = costmodel.estimate("reuse", config, workload, params={"group": 2})
cost.by_component(), cost.total
"""

from costmodel.closed_form import Estimate, estimate
from costmodel.ops import Cost, Op

__all__ = ["Cost", "Estimate", "Op", "estimate"]
