"""The figures of ``effref maps``: how diagonal and how alike attention maps are, and the grouping that suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import costmodel
from refimpl.config import ModelConfig, Workload
from refimpl.diagnostics import attention_maps, diagonality, map_similarity, suggest_groups
from refimpl.errors import UnsupportedError
from refimpl.inputs import Inputs, load_input, random_inputs
from refimpl.model import sequence_length
from refimpl.weights import Model, load_model, resolve_config

from . import gpu
from .context import available_bytes
from .progress import Progress

ROWS = 256  # query positions that are kept of every map, evenly spread over the input
RANDOM_LENGTH = 256


def diagnose(
    model: str, input_file: Path | None, seq: int | None, compute_layers: int | None, seed: int, progress: Progress
) -> dict[str, Any]:
    """Run exact attention on one input and describe its maps.

    Returns
    -------
    found : dict
        ``layers`` (per layer: CAD of each head, likeness to the layer before), ``similarity`` (L, L), ``groups``, and
        what it was run on. Query positions in padding are left out.
    """
    config = resolve_config(model)
    at_least = RANDOM_LENGTH if input_file is None else max(config.chunk, 1)
    _require_memory(config, seq or at_least, 1)
    progress.stage(f"loading {model}")
    loaded = load_model(model, seed=seed, positions=seq or 0)
    progress.note(f"{loaded.config.name}: {loaded.source}")
    given = _input(loaded, input_file, seq, seed)
    length = sequence_length(loaded.config, given.array)
    _require_memory(loaded.config, length, len(given.array))
    for note in given.notes:
        progress.note(note)
    rows = np.unique(np.linspace(0, given.valid_positions - 1, ROWS).astype(int))
    progress.stage(f"running {loaded.config.name} on {given.valid_positions} positions")
    maps = attention_maps(loaded, given.array, "numpy", rows=rows)
    progress.done()
    similarity = map_similarity(maps)
    wanted = compute_layers or -(-loaded.config.layers // 2)
    return {
        "model": loaded.config.name,
        "weights": loaded.source,
        "input": str(input_file) if input_file else f"seeded random, seed {seed}",
        "positions": given.valid_positions,
        "length": length,
        "query_rows": len(rows),
        "layers": [
            {
                "layer": index,
                "cad": diagonality(weights, rows).tolist(),
                "similarity_to_previous": float(similarity[index - 1, index]) if index else None,
            }
            for index, weights in enumerate(maps)
        ],
        "similarity": similarity.tolist(),
        "groups": [list(group) for group in suggest_groups(similarity, wanted)],
    }


def _require_memory(config: ModelConfig, length: int, batch: int) -> None:
    """Refuse what does not fit: exact attention with its weights, and the rows of the maps that are kept."""
    kept = 4 * batch * config.layers * config.heads * min(ROWS, length) * length
    needed = int(costmodel.estimate("dense", config, Workload(length, batch)).peak_bytes) + kept
    available = available_bytes("cpu")
    if needed > available:
        raise UnsupportedError(
            f"the maps of {config.name} at T={length} need {gpu.too_little(needed, available, 'cpu')}: lower --seq, or "
            "take a smaller model"
        )


def _input(model: Model, path: Path | None, seq: int | None, seed: int) -> Inputs:
    if path:
        return load_input(model, path, seq)
    length = seq or RANDOM_LENGTH
    return Inputs(random_inputs(model.config, length, 1, seed), model.config.stem, (), length)
