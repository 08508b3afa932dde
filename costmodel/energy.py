"""Energy of a pass from published figures per byte and per operation; no machine is measured.

    E = e_weights (weight and table bytes) + e_activations (activation, key, value and written bytes)
        + e_multiply_add (matrix FLOPs / 2) + e_vector (vector FLOPs)
    P = E / seconds of input that the pass stands for

Weights lie off the chip and are read once a step; what ops hand to each other, and the cache of keys and values, stay
on it. Parts of the product that no pass runs (`ModelConfig.companions`) read their weights at each of their calls. That
off-chip weights dominate the energy of streaming speech recognition is said in arXiv 2102.11531; the formula is ours.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from costmodel.closed_form import Estimate
from costmodel.ops import Cost, Quantity
from refimpl.components import COMPONENTS
from refimpl.errors import unknown

PJ = 1e-12
COMPANIONS = "companions"


@dataclass(frozen=True)
class EnergyModel:
    """What a byte and an operation take.

    Attributes
    ----------
    bytes_per_element : int
        Of weights and activations as they are deployed, whatever the dtype of the pass.
    weights_j_per_byte, activations_j_per_byte : float
    multiply_add_j, vector_j : float
        Per multiply-add of a product, and per vector FLOP.
    source : str
    """

    name: str
    title: str
    bytes_per_element: int
    weights_j_per_byte: float
    activations_j_per_byte: float
    multiply_add_j: float
    vector_j: float
    source: str


# name -> bytes per element, keys of the constants: memory of the weights, of the activations, operations of a
# multiply-add, a vector FLOP (in float where products are in int8)
_MODELS: dict[str, tuple[int, str, str, tuple[str, ...], str]] = {
    "int8-dram": (1, "dram_low_pj_per_byte", "sram_1mib_pj_per_byte", ("int8_mul_pj", "int8_add_pj"), "fp16_add_pj"),
    "int8-dram-high": (
        1, "dram_high_pj_per_byte", "sram_1mib_pj_per_byte", ("int8_mul_pj", "int8_add_pj"), "fp16_add_pj"
    ),
    "int8-sram": (1, "sram_1mib_pj_per_byte", "sram_32kib_pj_per_byte", ("int8_mul_pj", "int8_add_pj"), "fp16_add_pj"),
    "fp16-dram": (2, "dram_low_pj_per_byte", "sram_1mib_pj_per_byte", ("fp16_fma_pj",), "fp16_add_pj"),
    "fp32-dram": (4, "dram_low_pj_per_byte", "sram_1mib_pj_per_byte", ("fp32_fma_pj",), "fp32_add_pj"),
}  # fmt: skip


@cache
def energy_models() -> dict[str, EnergyModel]:
    """The models by name, from the constants in ``energy.toml`` (Horowitz, ISSCC 2014, 45 nm)."""
    table = tomllib.loads(Path(__file__).with_name("energy.toml").read_text("utf-8"))
    constants = table["horowitz-45nm"]
    return {name: _model(name, constants, *keys) for name, keys in _MODELS.items()}


def _model(
    name: str, constants: Mapping[str, Any], size: int, weights: str, activations: str, product: tuple[str, ...],
    vector: str,
) -> EnergyModel:  # fmt: skip
    return EnergyModel(
        name=name,
        title=f"{constants['title']}, {size} byte{'s' if size > 1 else ''} an element, weights in "
        f"{weights.partition('_pj')[0].replace('_', ' ')}, activations in "
        f"{activations.partition('_pj')[0].replace('_', ' ')}",
        bytes_per_element=size,
        weights_j_per_byte=constants[weights] * PJ,
        activations_j_per_byte=constants[activations] * PJ,
        multiply_add_j=sum(constants[key] for key in product) * PJ,
        vector_j=constants[vector] * PJ,
        source=constants["source"],
    )


def energy_model(name: str) -> EnergyModel:
    """The model called `name`; raises ConfigError with the nearest name otherwise."""
    if name not in energy_models():
        raise unknown("energy model", name, energy_models())
    return energy_models()[name]


@dataclass(frozen=True)
class Joules:
    """Energy by what it goes to."""

    weights: Quantity = 0.0
    activations: Quantity = 0.0
    arithmetic: Quantity = 0.0

    @property
    def total(self) -> Quantity:
        """All of it."""
        return self.weights + self.activations + self.arithmetic

    def __add__(self, other: Joules) -> Joules:
        return Joules(
            self.weights + other.weights, self.activations + other.activations, self.arithmetic + other.arithmetic
        )


@dataclass(frozen=True)
class Energy:
    """The energy of one pass.

    Attributes
    ----------
    by_component : dict of str to Joules
        In the order of ``refimpl.components``; last, where there are any, ``"companions"``.
    input_seconds : number
        How much of a recording the pass stands for; 0 where the model does not say.
    """

    model: EnergyModel
    by_component: Mapping[str, Joules]
    input_seconds: Quantity

    @property
    def total(self) -> Joules:
        """Of the whole pass, companions included."""
        return sum(self.by_component.values(), Joules())

    @property
    def power_w(self) -> Quantity | None:
        """Mean power while the input comes in; None where it has no duration."""
        return self.total.total / self.input_seconds if self.input_seconds else None


def energy(estimate: Estimate, model: EnergyModel) -> Energy:
    """The energy of a pass.

    Parameters
    ----------
    estimate : Estimate
        From `costmodel.estimate`.
    model : EnergyModel
        From `energy_model`.
    """
    costs = estimate.by_component()
    found = {name: _joules(costs[name], estimate.itemsize, model) for name in COMPONENTS if name in costs}
    config, work = estimate.config, estimate.workload
    positions = work.seq * work.steps
    if config.companions:
        chunks = positions / config.chunk
        calls = sum(companion.parameters * companion.calls_per_chunk for companion in config.companions)
        found[COMPANIONS] = Joules(
            weights=work.batch * chunks * calls * model.bytes_per_element * model.weights_j_per_byte,
            arithmetic=work.batch * chunks * calls * model.multiply_add_j,
        )
    return Energy(model, found, positions * config.position_seconds)


def _joules(cost: Cost, itemsize: int, model: EnergyModel) -> Joules:
    size = model.bytes_per_element / itemsize  # bytes as deployed for each byte as counted
    passed = cost.activation_bytes + cost.kv_bytes + cost.bytes_written
    return Joules(
        weights=(cost.weight_bytes + cost.table_bytes) * size * model.weights_j_per_byte,
        activations=passed * size * model.activations_j_per_byte,
        arithmetic=cost.matmul_flops / 2 * model.multiply_add_j + cost.vector_flops * model.vector_j,
    )
