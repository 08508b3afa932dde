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
    from .estimation import estimate
    from .guideline import guideline
    from .measurement import measure
    from .preparation import prepare
    from .threshold_training import train_thresholds

__version__ = "0.1.0"
__all__ = [
    "__version__", "audit", "calibrate", "estimate", "fidelity", "guideline", "measure", "prepare", "train_thresholds",
]  # fmt: skip

_HOME = {
    "audit": ".auditing",
    "calibrate": ".calibration",
    "estimate": ".estimation",
    "fidelity": ".comparison",
    "guideline": ".guideline",
    "measure": ".measurement",
    "prepare": ".preparation",
    "train_thresholds": ".threshold_training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effref' has no attribute '{name}'")
    return getattr(import_module(_HOME[name], __name__), name)
