"""Which layers look up, and how many sequences hit: found on inputs, before a pass counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from refimpl.errors import ConfigError
from refimpl.methods.attmemo import AttMemo
from refimpl.methods.subject import Subject
from refimpl.model import Runner, sequence_length
from refimpl.parameters.attmemo import AttMemoParameters

MARGIN = 0.05  # of the time of a layer's exact attention; less may be noise of the profile


def selected(parameters: AttMemoParameters, subject: Subject) -> AttMemoParameters:
    """With the layers where looking up pays by the profile of the database at this threshold.

    Raises
    ------
    ConfigError
        If a selection is wanted and the database was not profiled at this threshold.
    """
    if parameters.select == "all" or parameters.layers is not None:
        return parameters
    memo: Any = parameters.database
    profiled = {row["tau"]: row.get("layers", []) for row in memo.profile.get("thresholds", [])}
    rows = profiled.get(parameters.tau, [])
    if not rows and parameters.select == "auto":
        return replace(parameters, select="all")
    if not rows:
        raise ConfigError(
            f"select={parameters.select} needs a profile of the database at tau={parameters.tau:g}: run 'effref memo "
            f"profile --taus {parameters.tau:g}', or give select=all"
        )
    key = "predicted_benefit_s" if parameters.select == "model" else "benefit_s"
    return replace(parameters, layers=paying(rows, key))


def paying(rows: Sequence[Mapping[str, Any]], key: str = "benefit_s") -> tuple[int, ...]:
    """The layers of a profile that gain more than `MARGIN` of the time of exact attention, measured or predicted.

    Where nothing is found nothing is gained, whatever was measured.
    """
    return tuple(row["layer"] for row in rows if row["hit_rate"] > 0 and row[key] > MARGIN * row["dense_s"])


def counted(parameters: AttMemoParameters, subject: Subject) -> AttMemoParameters:
    """With the share of sequences that hit in each layer on the subject's inputs, for the cost model."""
    config, memo = subject.model.config, parameters.database
    fits = subject.inputs is not None and sequence_length(config, subject.inputs) == memo.about.length  # type: ignore[union-attr]
    if parameters.hit_rate is not None or parameters.is_off(config) or not fits:
        return parameters
    rates = hit_rates(parameters, subject)
    return replace(parameters, hit_rate=tuple(rates.get(layer, 0.0) for layer in range(config.layers)))


def hit_rates(parameters: AttMemoParameters, subject: Subject) -> dict[int, float]:
    """Of each layer that looks up, the share of the subject's sequences that hit, in a pass of the method itself."""
    config, inputs = subject.model.config, subject.inputs
    assert inputs is not None
    weights = AttMemo.derive(subject.model.weights, config, parameters)
    program = AttMemo(config, parameters)
    runner = Runner(replace(subject.model, weights=weights), subject.engine)
    runner(inputs, program, causal=parameters.database.about.causal, record=False)  # type: ignore[union-attr]
    return {layer: sum(row is not None for row in rows) / len(rows) for layer, rows in program.found.items()}
