"""What a calibration is fitted on: every kind of op, and no size of a preset."""

from __future__ import annotations

from dataclasses import replace

from effref.calibration import CELLS
from strategies import fits

import costmodel
from costmodel.predict import kind_of
from refimpl.config import Workload, presets
from refimpl.methods import CATALOG

WIDTHS = {config.d_model for config in presets().values()}


def _kinds(method: str, config, work: Workload, params=None) -> set[str]:
    return {kind_of(op.name, op.sizes) for op in costmodel.estimate(method, config, work, params).ops}


def test_no_calibration_model_has_the_width_of_a_preset() -> None:
    assert not WIDTHS & {cell.config.d_model for cell in CELLS}
    assert not {config.d_ff for config in presets().values()} & {cell.config.d_ff for cell in CELLS}


def test_every_op_of_every_preset_and_method_is_calibrated() -> None:
    calibrated = {
        kind
        for cell in CELLS
        for name, params in cell.methods
        for kind in _kinds(name, cell.config, cell.workload(), params)
    }
    for config in presets().values():
        for work in _workloads(config):
            for method in (name for name in CATALOG if fits(name, {}, config)):
                given = work
                if method in ("attmemo", "linear"):  # they take no cache
                    given = replace(work, fills_cache=False, phase="prefill", kv_len=0)
                assert _kinds(method, config, given) <= calibrated, (config.name, method)


def _workloads(config) -> list[Workload]:
    """Long and short prefills, and decoding where the model can."""
    prefills = [Workload(length, fills_cache=config.generates) for length in (4, 32)]
    return [*prefills, Workload(phase="decode", kv_len=32)] if config.generates else prefills
