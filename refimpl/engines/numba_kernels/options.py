"""How kernels are compiled. A `STEP` works on a range of rows; a `KERNEL` shares the rows out among Numba's threads.

Rows are given as a flat array and a stride in elements, so that one compiled kernel serves contiguous arrays and column
slices alike. The parts into which a kernel cuts its rows depend on sizes alone, never on the number of threads.
"""

from __future__ import annotations

from typing import Any

# error_model "numpy": x / 0 is inf, which needs no branch. "contract" fuses a product with a sum and breaks nothing.
STEP: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
KERNEL: dict[str, Any] = {"parallel": True, "nogil": True, "cache": True, "error_model": "numpy"}
