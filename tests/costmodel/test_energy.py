"""Energy from published figures: the formula by hand, and what it says of folding."""

from __future__ import annotations

import dataclasses

import pytest

from costmodel import estimate
from costmodel.energy import COMPANIONS, Joules, energy, energy_model, energy_models
from refimpl.config import Companion, Workload, preset
from refimpl.errors import ConfigError

EMFORMER = preset("emformer-rnnt-base")
CHUNK = Workload(EMFORMER.chunk, phase="decode", kv_len=EMFORMER.left_context)
INT8 = energy_model("int8-dram")


def test_constants_are_those_of_the_source() -> None:
    """Horowitz, ISSCC 2014: DRAM 1.3 nJ per 64 bits, int8 multiply 0.2 and add 0.03 pJ, 1 MiB of cache 100 pJ."""
    assert INT8.weights_j_per_byte == pytest.approx(1.3e-9 / 8)
    assert INT8.multiply_add_j == pytest.approx(0.23e-12)
    assert INT8.activations_j_per_byte == pytest.approx(100e-12 / 8)
    assert energy_model("fp32-dram").multiply_add_j == pytest.approx(4.6e-12)
    assert [model.bytes_per_element for model in energy_models().values()] == [1, 1, 1, 2, 4]


def test_one_component_by_hand() -> None:
    """The feed-forward of 20 layers, 5 rows: weights once, two linear maps, a GELU of 5 FLOPs an element."""
    found = energy(estimate("dense", EMFORMER, CHUNK), INT8).by_component["feed-forward"]
    d, f, rows, layers = 512, 2048, 5, 20
    assert found.weights == pytest.approx(layers * (2 * d * f + f + d) * 162.5e-12)
    moved = 2 * rows * d + 4 * rows * f  # elements: in, hidden out and in, activated out and in, out
    assert found.activations == pytest.approx(layers * moved * 12.5e-12)
    vector = rows * f + 5 * rows * f + rows * d  # bias, GELU, bias
    assert found.arithmetic == pytest.approx(layers * (2 * rows * d * f * 0.23e-12 + vector * 0.4e-12))


def test_companions_and_power_at_the_rate_of_chunks() -> None:
    whole = energy(estimate("dense", EMFORMER, CHUNK), INT8)
    read = sum(part.parameters * part.calls_per_chunk for part in EMFORMER.companions)  # int8: a byte each
    assert whole.by_component[COMPANIONS].weights == pytest.approx(read * 162.5e-12)
    assert whole.input_seconds == pytest.approx(0.16)
    assert whole.power_w == pytest.approx(whole.total.total / 0.16)
    assert sum(whole.by_component.values(), Joules()).total == pytest.approx(whole.total.total)


def test_energy_does_not_depend_on_the_dtype_of_the_pass() -> None:
    """The deployed precision is the energy model's: float16 and float64 passes give one figure."""
    two = [
        energy(estimate("dense", EMFORMER, dataclasses.replace(CHUNK, dtype=dtype)), INT8).total.total
        for dtype in ("float16", "float64")
    ]
    assert two[0] == pytest.approx(two[1], rel=1e-12)


def test_steps_and_chunks_add_up() -> None:
    one, three = (
        energy(estimate("dense", EMFORMER, dataclasses.replace(CHUNK, kv_len=30, steps=n)), INT8) for n in (1, 3)
    )
    assert three.total.total == pytest.approx(3 * one.total.total)
    assert three.power_w == pytest.approx(one.power_w)


def test_a_text_model_has_energy_but_no_power() -> None:
    found = energy(estimate("dense", preset("smollm2-135m"), Workload(phase="decode", kv_len=64)), INT8)
    assert found.power_w is None
    assert COMPANIONS not in found.by_component
    assert found.total.weights > 0.9 * found.total.total  # decoding at batch 1 reads weights


def test_more_calls_of_a_companion_cost_their_share() -> None:
    often = dataclasses.replace(EMFORMER, companions=(Companion("joiner", 1000, 8.0),))
    seldom = dataclasses.replace(EMFORMER, companions=(Companion("joiner", 1000, 2.0),))
    parts = [
        energy(estimate("dense", config, CHUNK), INT8).by_component[COMPANIONS].total for config in (often, seldom)
    ]
    assert parts[0] == pytest.approx(4 * parts[1])


def test_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int8-dram'"):
        energy_model("int8-dramm")
