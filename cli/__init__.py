"""What the ``effref`` command does, as Python functions.

    import effref
    effref.estimate(seq=4096, method="reuse")["results"][0]["total"]["predicted_s"]

Nothing is imported before it is used, so that the command answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing import audit
    from .calibration import calibrate
    from .comparison import fidelity
    from .crossing import crossover
    from .estimation import estimate
    from .guidance import guideline
    from .measurement import measure
    from .preparation import prepare
    from .reporting.page import report
    from .sweeping import sweep
    from .threshold_training import train_thresholds

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "audit",
    "calibrate",
    "crossover",
    "estimate",
    "fidelity",
    "guideline",
    "measure",
    "prepare",
    "report",
    "sweep",
    "train_thresholds",
]

_HOME = {
    "audit": ".auditing",
    "calibrate": ".calibration",
    "crossover": ".crossing",
    "estimate": ".estimation",
    "fidelity": ".comparison",
    "guideline": ".guidance",
    "measure": ".measurement",
    "prepare": ".preparation",
    "report": ".reporting.page",
    "sweep": ".sweeping",
    "train_thresholds": ".threshold_training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effref' has no attribute '{name}'")
    return getattr(import_module(_HOME[name], __name__), name)
