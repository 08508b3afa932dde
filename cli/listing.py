"""What there is, as rows of raw values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

Rows = list[dict[str, Any]]


def methods() -> Rows:
    """The catalogue, in reading order."""
    from refimpl.engines import ENGINES
    from refimpl.methods import CATALOG
    from refimpl.parameters import PARAMETERS
    from refimpl.parameters.composition import declared

    return [
        {
            "method": name,
            "exact": row.exact,
            "title": row.title,
            "paper": row.paper,
            "example_model": row.model,
            "parameters": {field.name: field.default for field in fields(PARAMETERS[name])},
            "engines": list(ENGINES),
            "replaces": list(declared(name)),
        }
        for name, row in CATALOG.items()
    ]


def models() -> Rows:
    """The model shapes."""
    from refimpl.config import presets

    return [
        {
            "model": name,
            "layers": config.layers,
            "d_model": config.d_model,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "d_ff": config.d_ff,
            "reads": config.reads,
            "positions": config.position,
            "max_positions": config.max_positions or None,
            "causal": config.causal,
            "source": config.source,
        }
        for name, config in presets().items()
    ]


def hardware() -> Rows:
    """The spec-sheet presets, and the profiles that were calibrated here."""
    from costmodel.hardware import presets

    from . import profiles

    return [
        {
            "hardware": one.name,
            "kind": one.kind,
            "level": one.level,
            "cores": one.cores or None,
            "matmul_flops_per_s": one.matmul_flops_per_s.get("float32"),
            "bandwidth_bytes_per_s": one.memory[-1].bandwidth_bytes_per_s,
            "capacity_bytes": one.capacity_bytes or None,
            "title": one.title,
        }
        for one in [*presets().values(), *profiles.kept()]
    ]


def components() -> Rows:
    """The parts of a forward pass."""
    from refimpl.components import COMPONENTS

    return [{"component": name, "about": about} for name, about in COMPONENTS.items()]


def pretrained() -> Rows:
    """The models that can be fetched."""
    from refimpl.weights.pretrained import available, folder

    return [
        {
            "model": name,
            "alias": entry.alias,
            "download_bytes": entry.bytes,
            "cached": folder(name) is not None,
            "licence": entry.licence,
            "upstream": entry.upstream,
        }
        for name, entry in available().items()
    ]


KINDS: dict[str, Callable[[], Rows]] = {
    "methods": methods,
    "models": models,
    "hardware": hardware,
    "components": components,
}
