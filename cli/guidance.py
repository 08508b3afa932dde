"""How wide a preview and how many candidates SVD-softmax needs on a head and a text, for a wished agreement.

The hidden states of the exact model on the text pass through the turned head once per window W. Sorted by preview, the
words give the outcome for every number of candidates N: the first N count with their exact logits, the others with
those of the preview.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.hardware import Hardware
from costmodel.predict import predict
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError
from refimpl.methods.subject import Subject
from refimpl.model import Runner
from refimpl.preparation.svd_softmax import hidden_states
from refimpl.weights import load_model
from refimpl.weights.layout import Weights

from . import context, machines, results
from .material import Wanted, gather
from .preparation import prepared
from .progress import Progress
from .request import Request, resolve

METHOD = "svd-softmax"
POSITIONS = 256  # of the text that are looked at
SIXTEENTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # of D: windows that are compared
HALVINGS = 20  # N from V down, each 1 / sqrt(2) of the one before
ROWS = 32  # positions worked on at a time


@dataclass(frozen=True)
class Choice:
    """A window with the least candidates that reach the wished agreement, and what it costs at one position.

    Attributes
    ----------
    window, candidates : int
        W and N.
    agreement : float
        Mean over positions of |top_k exact & top_k mixed| / k.
    kl_nats : float
        Mean of KL(exact || mixed).
    multiplications, weight_bytes : float
        Of the head, as parts of those of the exact head.
    predicted_s, exact_s : float
        Predicted seconds of this head and of the exact one.
    """

    window: int
    candidates: int
    agreement: float
    kl_nats: float
    multiplications: float
    weight_bytes: float
    predicted_s: float
    exact_s: float


def guideline(
    model: str | Path | ModelConfig | None = None,
    agreement: float = 0.99,
    top: int = 1,
    params: Mapping[str, Any] | None = None,
    *,
    input_file: str | Path | None = None,
    calibration_file: str | Path | None = None,
    positions: int = POSITIONS,
    hardware: str | Hardware | None = None,
    overrides: Mapping[str, int | None] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The cheapest window and number of candidates of SVD-softmax for a wished agreement on a head and a text.

    Parameters
    ----------
    model, overrides, dtype, device, engine, threads, hardware
        As for `effref.fidelity`; a model with a language head.
    agreement : float
        The wish: part of the `top` likeliest words that is found, mean over positions; above 0, at most 1.
    top : int
        k.
    params : mapping, optional
        Other parameters of the method, as ``{"weighting": "activations"}``.
    input_file, calibration_file : str or Path, optional
        The text, and what the method may look at before; default those of `effref.fidelity`.
    positions : int
        How many positions of the text are looked at, evenly spaced.
    seed : int
        Of random weights.

    Returns
    -------
    result : dict
        ``rows``, one per window with the least candidates that do, and ``chosen``, the row with the fewest
        multiplications.

    Raises
    ------
    ConfigError, InputError
        Unknown names, values that are not allowed, files that do not suit the model.
    """
    own, other = (None if path is None else Path(path) for path in (input_file, calibration_file))
    plan = planned(
        model, agreement, top, params or {}, own, other, positions, seed,
        overrides=overrides, dtype=dtype, device=device, engine=engine, threads=threads,
    )  # fmt: skip
    return {**found(plan, hardware, Progress()), "context": context.context(plan.request.threads)}


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked without loading anything."""

    request: Request
    wanted: Wanted
    agreement: float
    top: int
    positions: int

    @property
    def params(self) -> Mapping[str, Any]:
        """Of the method, as given."""
        return self.request.params.get(METHOD, {})


def planned(
    model: str | Path | ModelConfig | None, agreement: float, top: int, params: Mapping[str, Any],
    input_file: Path | None, calibration_file: Path | None, positions: int, seed: int, **given: Any,
) -> Plan:  # fmt: skip
    """Check everything that can be checked before weights are loaded; see `guideline`."""
    for name in ("window", "candidates"):
        if name in params:
            raise ConfigError(f"{METHOD}.{name} is what a guideline finds: leave it away")
    request = resolve(model, 1, METHOD, {METHOD: params}, **given)
    if not 0 < agreement <= 1:
        raise ConfigError(f"agreement={agreement:g}; it must be above 0 and at most 1")
    if not 1 <= top <= request.config.vocab:
        raise ConfigError(f"top={top}; the head of {request.config.name} has {request.config.vocab} words")
    if positions < 1:
        raise ConfigError(f"positions={positions}; at least one is needed")
    wanted = Wanted(input_file, calibration_file, None, None, seed)
    wanted.check(request.config)
    return Plan(request, wanted, agreement, top, positions)


def found(plan: Plan, hardware: str | Hardware | None, progress: Progress) -> dict[str, Any]:
    """The result without its context."""
    request = plan.request
    machines.require(request.engine)
    machine = machines.choose(hardware, request.engine, request.threads, request.dtype, progress)
    ops = machines.started(request.engine, request.threads, progress)
    with machines.limited(request.engine, request.threads):
        progress.stage(f"loading {request.config.name}")
        model = load_model(request.model, seed=plan.wanted.seed, dtype=request.dtype)
        meaning = "" if model.pretrained else ": figures of the mechanism, not of quality"
        progress.note(f"{request.config.name}: {model.source}{meaning}")
        material = gather(model, plan.wanted)
        progress.note(f"input: {material.source}")
        runner = Runner(model, ops)
        whole = {**plan.params, "window": request.config.d_model}  # the preview is then the whole head, turned
        ready, _ = prepared(runner, METHOD, whole, material.calibration, progress)
        states = hidden_states(Subject(model, ops, material.sequences))
        picked = np.linspace(0, len(states) - 1, min(plan.positions, len(states))).astype(int)
        head = Weights(**{name: ops.to_numpy(array) for name, array in vars(ready.weights.head).items()})
        rows = list(_choices(plan, machine, states[picked], head, progress))
    progress.done()
    chosen = min(rows, key=lambda row: (row.multiplications, row.weight_bytes))
    document = results.document(request, machine, [], progress.notes)
    del document["results"]
    document["config"] |= {
        "agreement": plan.agreement, "top": plan.top, "positions": len(picked), "input": material.source,
        "weights": model.source, "pretrained": model.pretrained,
    }  # fmt: skip
    return {**document, "rows": [asdict(row) for row in rows], "chosen": asdict(chosen)}


def _choices(plan: Plan, hardware: Hardware, states: Array, head: Weights, progress: Progress) -> Iterator[Choice]:
    """For each window the least candidates that reach the wish; all words do."""
    config = plan.request.config
    counts = candidate_counts(config.vocab)
    windows = sorted({max(1, config.d_model * n // 16) for n in SIXTEENTHS})
    progress.stage(f"comparing {len(windows)} windows at {len(states)} positions")
    agreement, divergence = outcomes(states, head, windows, counts, plan.top, progress.advance)
    for window, reached, nats in zip(windows, agreement, divergence, strict=True):
        first = int(np.argmax(reached >= plan.agreement - 1e-12))
        cost = _costs(plan, hardware, window, counts[first])
        yield Choice(window, counts[first], float(reached[first]), float(nats[first]), *cost)


def candidate_counts(vocab: int) -> list[int]:
    """V, and down from it by halves of an octave."""
    return sorted({max(1, round(vocab / 2 ** (step / 2))) for step in range(HALVINGS + 1)})


def outcomes(
    states: Array, head: Weights, windows: Sequence[int], counts: Sequence[int], top: int,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """What each window gives for each number of candidates, as means over hidden states.

    Parameters
    ----------
    states : array, shape (positions, D)
    head : Weights
        `rotation` (D, D) and the whole turned head as `preview` (V, D).
    windows, counts : sequence of int
        W, and rising N.
    top : int
        k.
    progress : callable, optional
        Called with a message and the fraction done.

    Returns
    -------
    agreement, kl_nats : arrays, shape (len(windows), len(counts))
    """
    agreement, divergence = np.zeros((2, len(windows), len(counts)))
    for first in range(0, len(states), ROWS):
        g = states[first : first + ROWS].astype(head.preview.dtype) @ head.rotation.T  # (rows, D)
        exact = g @ head.preview.T  # (rows, V)
        for i, window in enumerate(windows):
            preview = exact if window == g.shape[1] else g[:, :window] @ head.preview[:, :window].T
            for row, rough in zip(exact, preview, strict=True):
                order = np.argsort(-rough)
                one = _outcome(row[order].astype(np.float64), rough[order].astype(np.float64), counts, top)
                agreement[i] += one[0]
                divergence[i] += one[1]
            if progress:
                progress(f"position {first + len(g)}, window {window}", first / len(states))
    return agreement / len(states), divergence / len(states)


def _outcome(exact: Array, rough: Array, counts: Sequence[int], top: int) -> tuple[Array, Array]:
    """Of one hidden state: exact logits and previews (V,), the largest preview first."""
    peak = max(exact.max(), rough.max())
    of_exact, of_rough = np.exp(exact - peak), np.exp(rough - peak)
    mass = of_exact.sum()
    seen = np.cumsum(of_exact)  # up to and with each word
    unseen = np.append(np.cumsum(of_rough[::-1])[::-1], 0.0)  # from each word on
    shift = np.append(np.cumsum((of_exact / mass * (exact - rough))[::-1])[::-1], 0.0)
    wished = _largest(exact, np.arange(len(exact)), top)
    agreement, divergence = np.empty(len(counts)), np.empty(len(counts))
    best, before = np.empty(0, int), 0  # of the candidates so far
    for i, n in enumerate(counts):
        best = _largest(exact, np.concatenate([best, np.arange(before, n)]), top)
        before = n
        others = np.arange(n, min(n + top, len(exact)))  # the largest previews of all other words
        mixed = np.concatenate([exact[best], rough[others]])
        kept = np.concatenate([best, others])[np.argsort(-mixed, kind="stable")[:top]]
        agreement[i] = len(np.intersect1d(kept, wished)) / top
        divergence[i] = max(0.0, shift[n] - np.log(mass) + np.log(seen[n - 1] + unseen[n]))
    return agreement, divergence


def _largest(values: Array, places: Array, count: int) -> Array:
    """Those of `places` with the largest values."""
    if len(places) <= count:
        return places
    kept: Array = places[np.argpartition(values[places], len(places) - count)[len(places) - count :]]
    return kept


def _costs(plan: Plan, hardware: Hardware, window: int, candidates: int) -> tuple[float, float, float, float]:
    """Multiplications and weight bytes as parts of those of the exact head; seconds of this head and of that one."""
    params = {**plan.params, "window": window, "candidates": candidates}
    own, exact = (
        predict(plan.request.estimate(name, 1, given), hardware) for name, given in ((METHOD, params), ("flash", {}))
    )
    a, b = (one.estimate.by_component()["head"] for one in (own, exact))
    seconds = (float(one.by_component()["head"].seconds) for one in (own, exact))
    return a.matmul_flops / b.matmul_flops, a.weight_bytes / b.weight_bytes, *seconds
