"""A method in words and symbols: its cost formulas are computed from the code of the cost model, with SymPy symbols."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from costmodel.methods import COSTS
from costmodel.methods.steps import Setting
from costmodel.ops import Cost, Op
from refimpl.components import COMPONENTS
from refimpl.config import ModelConfig
from refimpl.methods import CATALOG, Method, method, parameters
from refimpl.parameters import PARAMETERS
from refimpl.parameters.composition import canonical, combines, declared, members
from refimpl.weights import resolve_config

FIGURES = ("matmul_flops", "vector_flops", "bytes_read", "bytes_written")
SYMBOLS = {
    "T": "length",
    "B": "batch",
    "d": "model width",
    "H": "query heads",
    "Hkv": "key and value heads",
    "D": "head width",
    "b": "bytes per element",
}


@dataclass(frozen=True)
class Layer:
    """The attention sublayer of one kind of layer: per component and figure a SymPy expression.

    Attributes
    ----------
    kind : str
        "every layer", or "compute layer" and "reuse layer".
    count : int
        How many the model has.
    """

    kind: str
    count: int
    formulas: Mapping[str, Mapping[str, Any]]

    def per_element(self) -> dict[str, dict[str, Any]]:
        """The formulas with bytes divided by b."""
        import sympy

        b = sympy.Symbol("b", integer=True, positive=True)
        return {
            component: {
                name: sympy.factor(row[name] / b) if name.startswith("bytes") else row[name] for name in FIGURES
            }
            for component, row in self.formulas.items()
        }

    @staticmethod
    def total(formulas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The sum over the components."""
        import sympy

        return {name: sympy.expand(sum(row[name] for row in formulas.values())) for name in FIGURES}


@dataclass(frozen=True)
class Explanation:
    """Everything that ``effref explain`` prints."""

    name: str
    config: ModelConfig
    causal: bool
    chosen: Mapping[str, Any]
    layers: list[Layer]

    @property
    def row(self) -> Method:
        """The method's row of the catalogue."""
        return method(self.name)

    @property
    def off(self) -> str:
        """The setting that is exact, and which equality holds; or why there is none. Empty for exact methods."""
        row = self.row
        if not row.off:
            return row.not_off
        knobs = {name: values[0] for name, values in PARAMETERS[self.name].sweep(self.config).items()}
        settings = {name: json.dumps(value) for name, value in (knobs | dict(row.off_with)).items()}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        return f"{text} equals {row.off}, bit for bit on the numpy engine"

    @property
    def parameters(self) -> list[tuple[str, Any, str]]:
        """Name, default and meaning of each parameter; ``reuse.group`` where there are several methods."""
        prefix = "{}." if "+" in self.name else ""
        return [
            (prefix.format(name) + f.name, f.default, f.metadata["about"])
            for name in members(self.name)
            for f in fields(PARAMETERS[name])
        ]

    @property
    def combines_with(self) -> dict[str, str]:
        """The other methods that can be combined with it, as they are ("yes") or with some of their parts at off."""
        own, found = members(self.name), {}
        for other in (name for name in CATALOG if name not in (*own, "dense")):
            verdicts = {combines(one, other) for one in own}
            if "no" not in verdicts:
                found[other] = "in part" if "in part" in verdicts else "yes"
        return found

    @property
    def combines_with_text(self) -> str:
        """The same in words."""
        whole, part = (
            ", ".join(name for name, verdict in self.combines_with.items() if verdict == wanted)
            for wanted in ("yes", "in part")
        )
        return "; ".join([*([whole] if whole else []), *([f"with some parts at off {part}"] if part else [])]) or "none"

    @property
    def replaced_text(self) -> str:
        """The parts in words, with the method where there are several."""
        if "+" not in self.name:
            return ", ".join(declared(self.name)) or "nothing"
        return "; ".join(f"{name}: {', '.join(declared(name))}" for name in members(self.name))

    @property
    def symbols(self) -> dict[str, str]:
        """The letters that occur, and D where it is d / H."""
        used = {
            str(s)
            for layer in self.layers
            for row in layer.formulas.values()
            for e in row.values()
            for s in e.free_symbols
        }
        return {letter: meaning for letter, meaning in SYMBOLS.items() if letter in used}

    def as_dict(self) -> dict[str, Any]:
        """For JSON; formulas as text that SymPy and Python read."""
        return {
            "schema_version": 1,
            "method": self.name,
            "title": self.row.title,
            "exact": self.row.exact,
            "source": self.row.paper,
            "equation": self.row.equation,
            "reading": self.row.reading,
            "replaces": {name: list(declared(name)) for name in members(self.name)},
            "combines_with": self.combines_with,
            "off": self.off,
            "parameters": [
                {"name": name, "default": default, "about": about} for name, default, about in self.parameters
            ],
            "model": self.config.name,
            "causal": self.causal,
            "params": dict(self.chosen),
            "symbols": self.symbols,
            "layers": [
                {
                    "kind": layer.kind,
                    "count": layer.count,
                    "components": [
                        {"component": component, **{name: str(row[name]) for name in FIGURES}}
                        for component, row in layer.formulas.items()
                    ],
                    "total": {name: str(value) for name, value in layer.total(layer.formulas).items()},
                }
                for layer in self.layers
            ],
        }


def explain(
    name: str,
    model: str | Path | ModelConfig | None = None,
    params: Mapping[str, Any] | None = None,
    causal: bool | None = None,
) -> Explanation:
    """Cost formulas of the attention sublayer of a method, in symbols.

    Parameters
    ----------
    name : str
        A name of the catalogue, or several joined by ``+``.
    model : str, Path or ModelConfig, optional
        Decides positions, key heads, biases and mask; its sizes become symbols. Default: the method's example model.
    params : mapping, optional
        The method's parameters.
    causal : bool, optional
        Overrides the model's own mask.

    Raises
    ------
    ConfigError
        Unknown method, model or parameter.
    """
    name = canonical(name)
    config = resolve_config(method(name).model if model is None else model)
    chosen = parameters(name, params, config)
    masked = config.causal if causal is None else causal
    import sympy

    T, B = sympy.symbols("T B", integer=True, positive=True)
    if hasattr(chosen, "in_numbers"):
        chosen = chosen.in_numbers(config)
    program = COSTS[name](Setting(_in_symbols(config), B, T, int(masked)), chosen)
    layers = [Layer(kind, count, _formulas(ops, config)) for kind, (count, ops) in program.layers().items() if count]
    return Explanation(name, config, masked, dict(params or {}), layers)


def _in_symbols(config: ModelConfig) -> ModelConfig:
    """The model with symbols for its sizes."""
    import sympy

    d, H, Hkv = sympy.symbols("d H Hkv", integer=True, positive=True)
    D = sympy.Symbol("D", even=True, positive=True)
    kv_heads = H if config.kv_heads == config.heads else Hkv
    return replace(config, d_model=d, heads=H, kv_heads=kv_heads, head_dim=D)


def _formulas(ops: list[Op], config: ModelConfig) -> dict[str, dict[str, Any]]:
    import sympy

    b = sympy.Symbol("b", integer=True, positive=True)
    costs: dict[str, Cost] = {}
    for op in ops:
        costs[op.component] = costs.get(op.component, Cost()) + op.cost(b)
    return {
        component: {name: _tidy(getattr(costs[component], name), config) for name in FIGURES}
        for component in COMPONENTS
        if component in costs
    }


def _tidy(value: Any, config: ModelConfig) -> Any:
    """Factored; with d for H D where the heads together are as wide as the model. Its divisions leave no remainder."""
    import sympy

    value = sympy.sympify(value).replace(sympy.floor, lambda inside: inside)
    if config.d_attention == config.d_model:
        d, H = sympy.symbols("d H", integer=True, positive=True)
        value = value.subs(sympy.Symbol("D", even=True, positive=True), d / H)
    return sympy.factor(value)
