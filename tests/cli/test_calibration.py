"""What a calibration is fitted on: every kind of op, and no size of a preset."""

from __future__ import annotations

from effref.calibration import CELLS

import costmodel
from costmodel.predict import kind_of
from refimpl.config import Workload, presets
from refimpl.methods import CATALOG

WIDTHS = {config.d_model for config in presets().values()}


def _kinds(method: str, config, seq: int, params=None) -> set[str]:
    cost = costmodel.estimate(method, config, Workload(seq), params)
    return {kind_of(op.name, op.sizes) for op in cost.ops}


def test_no_calibration_model_has_the_width_of_a_preset() -> None:
    assert not WIDTHS & {cell.config.d_model for cell in CELLS}
    assert not {config.d_ff for config in presets().values()} & {cell.config.d_ff for cell in CELLS}


def test_every_op_of_every_preset_and_method_is_calibrated() -> None:
    calibrated = {
        kind for cell in CELLS for name, params in cell.methods for kind in _kinds(name, cell.config, 32, params)
    }
    for config in presets().values():
        for method in CATALOG:
            assert _kinds(method, config, 32) <= calibrated, (config.name, method)
