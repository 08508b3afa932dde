"""The search for layers that share keys and values: Algorithm 1 of KVSharer (Yang et al., arXiv 2410.18517).

1. One pass over the calibration samples; of every layer the keys, after rotation, and the values, averaged over the
   samples. Of two layers i and j: ``D_ij = (dist(K_i, K_j) + dist(V_i, V_j)) / 2``.
2. All pairs (i, j), i > j, the largest distance first. Layers that share already are passed over.
3. A pair is tried: layer i takes the keys and values of layer j, or of the layer that j takes them from. It is accepted
   where ``cos(h_L(modified), h_L(exact)) > threshold``, h_L the hidden states that leave the last layer. Until C are.

Where the paper and its published code (commit 39e5c19) differ, a parameter decides; see docs/methods/kvsharer.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.components import QKV
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, InputError
from refimpl.methods.kvsharer import KVSharer
from refimpl.methods.steps import Layer, Queries
from refimpl.methods.subject import Subject
from refimpl.model import Prepared, Runner, check_inputs, sequence_length
from refimpl.parameters.kvsharer import KVSharerParameters, Pair, Strategy
from refimpl.preparation.checksum import checksum
from refimpl.recorder import At

KEPT = 4  # searches that are remembered
SETTINGS = ("order", "seed", "distance", "similarity", "threshold")


@dataclass(frozen=True)
class Tried:
    """A pair that was tried: the later layer, its source, and what decided.

    Attributes
    ----------
    distance : float
        Of the layers' keys and values.
    similarity : float
        Of the last hidden states with and without this pair, beside the pairs accepted before.
    """

    layer: int
    source: int
    distance: float
    similarity: float
    accepted: bool


@dataclass
class Search:
    """How far the search on some samples is; acceptance is greedy, so it can go on where it stopped.

    Attributes
    ----------
    distances : array, shape (L, L)
    reference : array, shape (N, T, d)
        The last hidden states of the exact model.
    pairs : list of (int, int)
        All pairs in the order of trying; those from `position` on are left.
    tried : list of Tried
    """

    distances: Array
    reference: Array
    pairs: list[Pair]
    position: int = 0
    tried: list[Tried] = field(default_factory=list)

    @property
    def accepted(self) -> list[Pair]:
        """In the order of acceptance: the first C are what a search for C layers finds."""
        return [(one.layer, one.source) for one in self.tried if one.accepted]

    def next_pair(self) -> Pair | None:
        """The next pair whose later layer has its own keys and values; None where none is left."""
        shared = {layer for layer, _ in self.accepted}
        while self.position < len(self.pairs):
            pair = self.pairs[self.position]
            self.position += 1
            if pair[0] not in shared:
                return pair
        return None

    def tried_for(self, count: int) -> list[Tried]:
        """The pairs tried until `count` were accepted."""
        last = [index for index, one in enumerate(self.tried) if one.accepted][count - 1]
        return self.tried[: last + 1]


_SEARCHES: dict[str, Search] = {}  # by checksum, so that a search for more layers goes on


def search_strategy(parameters: KVSharerParameters, subject: Subject) -> Strategy:
    """Search which C layers share.

    Parameters
    ----------
    parameters : KVSharerParameters
    subject : Subject
        With inputs: their rows are the calibration samples; rows of more than `sample_tokens` tokens are cut.

    Returns
    -------
    strategy : Strategy
        C pairs, in the order of acceptance; its record holds the settings and every pair that was tried.

    Raises
    ------
    ConfigError
        If there are no inputs, or fewer than C pairs are accepted.
    """
    config, count = subject.model.config, parameters.count(subject.model.config)
    samples, left_out = calibration_samples(parameters, config, subject.inputs)
    bench = _Bench(parameters, subject, samples)
    search = _search_of(bench)
    _accept(search, count, bench)
    tried = search.tried_for(count)
    record = {
        "model": config.name,
        "layers": config.layers,
        **{name: getattr(parameters, name) for name in SETTINGS},
        "samples": len(samples),
        "sample_length": sequence_length(config, samples),
        "left_out": left_out,
        "tried": [asdict(one) for one in tried],
    }
    return Strategy([(one.layer, one.source) for one in tried if one.accepted], record)


def calibration_samples(parameters: KVSharerParameters, config: ModelConfig, inputs: Array | None) -> tuple[Array, int]:
    """At most `samples` rows of one length, and how many positions of the inputs are left out.

    Rows of tokens are cut into pieces of `sample_tokens`, those of a streaming model into chunks; what remains of a row
    is left out. Other frames and images are not cut: a row is a sample.
    """
    if inputs is None:
        raise ConfigError(
            f"kvsharer searches on inputs which {parameters.count(config)} layers share, and there are none: prepare "
            "it with inputs, or give strategy"
        )
    check_inputs(config, inputs)
    if len(inputs) == 0:
        raise InputError(f"inputs have shape {inputs.shape}; kvsharer needs at least one row to search on")
    length = sequence_length(config, inputs)
    samples = np.concatenate(_pieces(parameters, config, inputs, length), axis=1)  # (B, pieces, rows, ...)
    samples = samples.reshape(-1, *samples.shape[2:])[: parameters.samples]
    return samples, len(inputs) * length - len(samples) * sequence_length(config, samples)


def _pieces(parameters: KVSharerParameters, config: ModelConfig, inputs: Array, length: int) -> list[Array]:
    """The inputs cut along time into equal pieces (B, 1, rows, ...)."""
    if not (config.stem == "tokens" or config.streams):
        return [inputs[:, None]]
    size = min(config.chunk or parameters.sample_tokens, length)
    starts = range(0, length - size + 1, size)
    return [inputs[:, None, config.reduction * first : config.stem_length(first + size)] for first in starts]


class _Bench:
    """The model up to its last hidden states, and the samples that it runs on."""

    def __init__(self, parameters: KVSharerParameters, subject: Subject, samples: Array) -> None:
        self.parameters = replace(parameters, layers=None, strategy=None, drop_projections=True)
        self.subject, self.samples = subject, samples
        self.config = replace(subject.model.config, head=False, d_out=0)
        self.runner = Runner(replace(subject.model, config=self.config), subject.engine)
        self.began_s = time.perf_counter()

    def hidden_states(self, pairs: Sequence[Pair]) -> Array:
        """The last hidden states (N, T, d) where these layers share."""
        parameters = replace(self.parameters, strategy=Strategy(pairs))
        weights = KVSharer.derive(self.runner.weights, self.config, parameters)
        return self._run(Prepared("kvsharer", parameters, weights, self.config))

    def captured(self) -> tuple[Array, _Capture]:
        """The last hidden states of the exact model, and the keys and values of its layers."""
        capture = _Capture(self.config, replace(self.parameters, strategy=Strategy([])))
        return self._run(capture), capture

    def _run(self, method: Prepared | KVSharer) -> Array:
        return self.runner(self.samples, method, causal=self.subject.is_causal, record=False).output

    def report(self, message: str, fraction: float) -> None:
        self.subject.progress(f"kvsharer: {message}, {time.perf_counter() - self.began_s:.0f} s", fraction)


class _Capture(KVSharer):
    """Exact attention that keeps every layer's keys and values, averaged over the samples."""

    def __init__(self, config: ModelConfig, parameters: KVSharerParameters) -> None:
        super().__init__(config, parameters)
        self.keys: list[Array] = []  # (Hkv, T, D) each, float64
        self.values: list[Array] = []

    def project_own(self, at: At, x: Array, layer: Layer) -> tuple[Queries, Array, Array]:
        q, k, v = super().project_own(at, x, layer)
        for kept, new in ((self.keys, k), (self.values, v)):
            kept.append(at(QKV).to_numpy(new).mean(axis=0, dtype=np.float64))
        return q, k, v


def _search_of(bench: _Bench) -> Search:
    """The search on this model and these samples: a remembered one, or a new one with its pairs ranked."""
    model, engine = bench.subject.model, bench.subject.engine
    key = checksum(model.weights, bench.samples, bench.config, bench.parameters, bench.subject.is_causal, engine.name)
    if key not in _SEARCHES:
        samples = bench.samples
        length = sequence_length(bench.config, samples)
        bench.report(f"calibrating on {len(samples)} samples of {length} positions", 0.0)
        reference, capture = bench.captured()
        distances = layer_distances(capture.keys, capture.values, bench.parameters.distance)
        pairs = ranked_pairs(distances, bench.parameters.order, bench.parameters.seed)
        while len(_SEARCHES) >= KEPT:
            del _SEARCHES[next(iter(_SEARCHES))]
        _SEARCHES[key] = Search(distances, reference, pairs)
    return _SEARCHES[key]


def layer_distances(keys: Sequence[Array], values: Sequence[Array], distance: str) -> Array:
    """``D_ij = (dist(K_i, K_j) + dist(V_i, V_j)) / 2`` of averaged keys and values, (Hkv, T, D) for each layer.

    Returns
    -------
    distances : array, shape (L, L)
        Symmetric, with a zero diagonal.
    """
    of = {"flattened": _flattened, "per_position": _per_position}[distance]
    return np.stack([(of(keys, k) + of(values, v)) / 2 for k, v in zip(keys, values, strict=True)])


def _flattened(all_layers: Sequence[Array], one: Array) -> Array:
    """|x - y| over all elements (the paper): (L,)."""
    return np.array([np.linalg.norm(other - one) for other in all_layers])


def _per_position(all_layers: Sequence[Array], one: Array) -> Array:
    """|x - y| over the width of a head, then the mean over heads and positions (the published code): (L,)."""
    return np.array([np.linalg.norm(other - one, axis=-1).mean() for other in all_layers])


def ranked_pairs(distances: Array, order: str, seed: int) -> list[Pair]:
    """All pairs (i, j), i > j, in the order in which they are tried; of equal distances the earlier layers first."""
    pairs = [(layer, source) for layer in range(len(distances)) for source in range(layer)]
    if order == "random":
        return [pairs[index] for index in np.random.default_rng(seed).permutation(len(pairs))]
    return sorted(pairs, key=lambda pair: distances[pair], reverse=order == "dissimilar")


def _accept(search: Search, count: int, bench: _Bench) -> None:
    """Try pairs until `count` are accepted."""
    threshold = bench.parameters.threshold
    while len(search.accepted) < count:
        pair = search.next_pair()
        if pair is None:
            raise ConfigError(
                f"layers={count}, but only {len(search.accepted)} of {len(search.tried)} pairs that were tried keep a "
                f"similarity above threshold={threshold:g}: lower layers or threshold"
            )
        done = f"{len(search.accepted)} of {count} layers share, trying pair {len(search.tried) + 1}"
        bench.report(f"{done} ({pair[0]} takes {pair[1]})", len(search.accepted) / count)
        modified = bench.hidden_states([*search.accepted, pair])
        similarity = hidden_similarity(modified, search.reference, bench.parameters.similarity)
        search.tried.append(Tried(*pair, float(search.distances[pair]), similarity, similarity > threshold))
    bench.report(f"{count} of {count} layers share, {len(search.tried)} pairs tried", 1.0)


def hidden_similarity(modified: Array, exact: Array, similarity: str) -> float:
    """The cosine of hidden states (N, T, d): sample by sample and then the mean, or that of their means."""
    modified, exact = modified.astype(np.float64), exact.astype(np.float64)
    if similarity == "of_mean":
        modified, exact = modified.mean(axis=0, keepdims=True), exact.mean(axis=0, keepdims=True)
    return float(np.mean([_cosine(x, y) for x, y in zip(modified, exact, strict=True)]))


def _cosine(x: Array, y: Array) -> Any:
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return np.vdot(x, y) / scale if scale else 0.0
