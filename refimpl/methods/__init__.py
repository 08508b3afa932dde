"""The methods. `CATALOG` is the one table that programs, cost model, command line and documentation read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refimpl.config import ModelConfig
from refimpl.errors import unknown
from refimpl.methods.dense import Dense
from refimpl.methods.flash import Flash
from refimpl.methods.reuse import Reuse
from refimpl.parameters import NoParameters, ReuseParameters, make


@dataclass(frozen=True)
class Method:
    """A row of the catalogue."""

    title: str
    paper: str
    exact: bool
    program: type[Dense]
    parameters: type[Any]
    model: str  # the example model, used where none is named
    equation: str
    reading: str  # what our reading adds where the source is silent


# In reading order: the exact baselines first.
CATALOG: dict[str, Method] = {
    "dense": Method(
        title="exact attention, map materialised",
        paper="Vaswani et al., arXiv 1706.03762",
        exact=True,
        program=Dense,
        parameters=NoParameters,
        model="conformer-m",
        equation="Y = softmax(Q K^T / sqrt(D) + mask) V Wo^T",
        reading="nothing",
    ),
    "flash": Method(
        title="exact attention, fused",
        paper="Dao et al., arXiv 2205.14135",
        exact=True,
        program=Flash,
        parameters=NoParameters,
        model="conformer-m",
        equation="Y = softmax(Q K^T / sqrt(D) + mask) V Wo^T, row blocks with a running maximum; no T x T map",
        reading="relative positions are added tile by tile inside the fused op",
    ),
    "reuse": Method(
        title="attention map reuse across layers",
        paper="Shim, Choi, Sung, arXiv 2301.12444",
        exact=False,
        program=Reuse,
        parameters=ReuseParameters,
        model="conformer-m",
        equation="compute layer: A = softmax(Q K^T / sqrt(D) + mask), Y = A V Wo^T; reuse layer: Y = A (X Wv^T) Wo^T",
        reading="group size and grouping (not known from the paper), the kept output projection, the sharing point",
    ),
}


def method(name: str) -> Method:
    """The catalogue row called `name`; raises ConfigError with the nearest name otherwise."""
    if name not in CATALOG:
        raise unknown("method", name, CATALOG)
    return CATALOG[name]


def parameters(name: str, given: Mapping[str, Any] | None, config: ModelConfig) -> Any:
    """The parameters of method `name`, checked against the model."""
    made = make(method(name).parameters, name, given)
    made.check(config)
    return made
