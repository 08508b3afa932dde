"""Trains head-wise thresholds on files and judges them on what was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.config import ModelConfig, override
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError
from refimpl.preparation.checksum import checksum
from refimpl.training import checkpoint as checkpoints
from refimpl.training.comparison import UNTRAINED, Quality, evaluate
from refimpl.training.passes import TrainableModel, check_recipe
from refimpl.training.samples import Samples, read_samples
from refimpl.training.thresholds import Recipe, State, begin, kept_of_heads, train
from refimpl.weights import Model, load_model, resolve_config

from . import files, machines
from .context import cores
from .progress import Progress

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Asked:
    """A training that is asked for.

    Attributes
    ----------
    model : str, Path or ModelConfig
    overrides : mapping
        Sizes of the model that are changed.
    input_files : sequence of Path
    seq : int
        Positions of a window.
    recipe : Recipe
    steps : int
    threads : int or None
    checkpoint : Path or None
        Written after every step, and gone on from where it exists.
    compare : bool
        Whether untrained thresholds are judged too.
    """

    model: str | Path | ModelConfig
    overrides: Mapping[str, int | None]
    input_files: Sequence[Path]
    seq: int
    recipe: Recipe = field(default_factory=Recipe)
    steps: int = 100
    threads: int | None = None
    checkpoint: Path | None = None
    compare: bool = False


def train_thresholds(
    input_files: str | Path | Sequence[str | Path],
    model: str | Path | ModelConfig = "smollm2-135m",
    seq: int = 256,
    steps: int = 100,
    *,
    recipe: Recipe | None = None,
    overrides: Mapping[str, int | None] | None = None,
    threads: int | None = None,
    checkpoint: str | Path | None = None,
    compare: bool = False,
) -> dict[str, Any]:
    """Train the thresholds of latte.

    Parameters
    ----------
    input_files : str, Path or sequence of them
        Texts, recordings or arrays; the last quarter of the windows of each is held out.
    model, overrides, threads
        As for `effref.measure`.
    seq : int
        Positions of a window.
    steps : int
        In all, those of a checkpoint included.
    recipe : refimpl.training.thresholds.Recipe, optional
        How they are trained.
    checkpoint : str or Path, optional
        Written after every step; where it exists, the training goes on from it.
    compare : bool
        Whether untrained thresholds that keep as much are judged too.

    Returns
    -------
    document : dict
        What ``effref train-thresholds --output FILE`` writes, and latte reads.

    Raises
    ------
    ConfigError, InputError
        A model of another recipe, values that are not allowed, files that do not fit; a damaged checkpoint, or one of
        another training.
    """
    given = [input_files] if isinstance(input_files, (str, Path)) else input_files
    asked = Asked(
        model, overrides or {}, [Path(file) for file in given], seq, recipe or Recipe(), steps, threads,
        Path(checkpoint) if checkpoint else None, compare,
    )  # fmt: skip
    return found(asked, Progress())


def found(asked: Asked, progress: Progress) -> dict[str, Any]:
    """The document of a training."""
    config = resolve_config(asked.model)
    changed = override(config, **dict(asked.overrides))
    check_recipe(changed)
    with machines.limited("numpy", asked.threads or cores()):
        progress.stage(f"loading {changed.name}")
        model = load_model(changed if changed is not config else asked.model, seed=asked.recipe.seed)
        progress.note(f"{model.config.name}: {model.source}")
        training, held_out = read_samples(model, tuple(asked.input_files), asked.seq)
        progress.note(f"{len(training)} windows to train on, {len(held_out)} held out")
        trainable = TrainableModel(model, asked.recipe.rule)
        state = _trained(asked, model, trainable, training, progress)
        progress.stage("judging on held-out windows")
        judged = _judged(asked, trainable, training, held_out, state.thresholds, progress)
        kept = kept_of_heads(trainable, training, state.thresholds)
    return _document(asked, model, (training, held_out), state, kept, judged)


def _trained(asked: Asked, model: Model, trainable: TrainableModel, samples: Samples, progress: Progress) -> State:
    """The last state; from a checkpoint on where there is one."""
    place, key = asked.checkpoint, checkpoints.key_of(model, samples, asked.recipe)
    if place is not None and place.exists():
        state = checkpoints.read(place, key)
        if state.step > asked.steps:
            raise ConfigError(
                f"{place} is at step {state.step}; steps={asked.steps} is before that: ask for more steps"
            )
        progress.line(f"going on from {place} at step {state.step} of {asked.steps}")
    else:
        progress.stage("finding thresholds to start from")
        state = begin(trainable, samples, asked.recipe)
    progress.stage("training")
    try:
        for state in train(trainable, samples, asked.recipe, state, asked.steps, progress.advance):  # noqa: B020
            if place is not None:
                with files.whole(place) as scratch, scratch.open("wb") as file:
                    checkpoints.write(file, state, key)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {place}" if place and place.exists() else "nothing was kept"
        advice = "" if place else ", since no --checkpoint was given"
        progress.line(f"stopped after step {state.step} of {asked.steps}; {kept}{advice}")
        raise
    return state


def _judged(
    asked: Asked, model: TrainableModel, training: Samples, held_out: Samples, thresholds: Array, progress: Progress
) -> dict[str, Quality]:
    """What everything kept, the trained thresholds, and untrained ones that keep as much, do to held-out windows."""
    judged = {"all": evaluate(model, held_out, np.full_like(thresholds, np.inf))}
    judged["trained"] = evaluate(model, held_out, thresholds)
    if asked.compare:
        for name, find in UNTRAINED.items():
            progress.stage(f"finding {name} thresholds that keep as much")
            judged[name] = evaluate(model, held_out, find(model, training, held_out, judged["trained"].kept))
    return judged


def _document(
    asked: Asked, model: Model, samples: tuple[Samples, Samples], state: State, kept: Array, judged: dict[str, Quality]
) -> dict[str, Any]:
    config, recipe = model.config, asdict(asked.recipe)
    rule = recipe.pop("rule")
    return {
        "schema_version": SCHEMA_VERSION,
        "method": "latte",
        "model": config.name,
        "weights_sha256": checksum(model.weights, np.empty(0)),
        "layers": config.layers,
        "heads": config.heads,
        "nibble": rule["nibble"],
        "stage2": rule["stage2"],
        "source": "trained",
        "target_kept": recipe["target_kept"],
        "kept": kept.tolist(),
        "thresholds": state.thresholds.tolist(),
        "training": {
            **{name: value for name, value in recipe.items() if name != "target_kept"},
            "estimate": rule["estimate"],
            "temperature": rule["temperature"],
            "steps": state.step,
            "seq": asked.seq,
            "windows": len(samples[0]),
            "held_out_windows": len(samples[1]),
            "losses": list(state.losses),
            "kept": list(state.kept),
        },
        "held_out": {name: quality.to_document() for name, quality in judged.items()},
    }
