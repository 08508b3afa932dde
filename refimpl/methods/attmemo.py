"""AttMemo: attention maps looked up instead of computed (Feng et al., arXiv 2301.09262).

A database keeps, per layer, the maps of earlier sequences beside features of the hidden states that led to them:

    e = f(X),  (D, i) = nearest stored feature,  hit iff 1 - D >= tau
    hit:   P = stored map i                       no queries, no keys, no scores, no softmax
    miss:  P = softmax(Q Kᵀ / sqrt(D) + mask)
    both:  Y = P (X Wvᵀ) Woᵀ

It is decided per sequence and layer, all heads together; the values are always computed.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

from refimpl.components import MEMO, QKV, WEIGHTED_SUM
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, Queries, place_keys, place_queries, project_output
from refimpl.methods.subject import Subject
from refimpl.parameters.attmemo import AttMemoParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights, rows_of

Rows = tuple[int | None, ...]  # of each sequence the record that it takes, or None


class AttMemo(Dense):
    """`found` tells, per layer that looked up, which record each sequence took."""

    parameters: AttMemoParameters

    def __init__(self, config: ModelConfig, parameters: AttMemoParameters) -> None:
        super().__init__(config, parameters)
        if not parameters.is_complete(config):
            raise ConfigError("attmemo has no database yet: let Runner.prepare build one on inputs, or give database")
        self.looked_up = parameters.looked_up(config)
        self.memo: Any = parameters.database
        self.found: dict[int, Rows] = {}

    @classmethod
    def complete(cls, parameters: AttMemoParameters, subject: Subject) -> AttMemoParameters:
        """With the database opened, or built from the subject's inputs; layers selected; hits counted on the inputs."""
        config = subject.model.config
        if parameters.is_off(config):
            return parameters
        from refimpl.memo.selection import counted, selected

        opened = cls._opened(parameters, subject)
        if opened.database is None:
            return parameters
        return counted(selected(opened, subject), subject)

    @classmethod
    def _opened(cls, parameters: AttMemoParameters, subject: Subject) -> AttMemoParameters:
        from refimpl.memo.building import Plan, build, weights_checksum
        from refimpl.memo.memo import Memo
        from refimpl.memo.training import Settings

        config = subject.model.config
        if isinstance(parameters.database, Memo):
            return parameters
        if parameters.database is not None:
            memo = Memo(parameters.database)
            memo.check(config, weights_checksum(subject))
            return replace(parameters, database=memo)
        if subject.inputs is None:
            return parameters
        if config.positions(int(subject.inputs.shape[1])) < 2:
            raise ConfigError("attmemo pools positions in pairs: give sequences of at least 2, or tau=1.1")
        subject.progress(
            f"attmemo: building a database of the {len(subject.inputs)} sequences that it will run on", 0.0
        )
        plan = Plan(Settings(parameters.epochs, seed=parameters.seed), parameters.heads)
        with tempfile.TemporaryDirectory(prefix="effref-memo-") as folder:  # open files outlive their names
            build(folder, subject, plan, durable=False)
            return replace(parameters, database=Memo(folder))

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: AttMemoParameters) -> Weights:
        """With the embedding and the features of each layer that looks up."""
        if not parameters.is_complete(config) or parameters.is_off(config):
            return weights
        memo: Any = parameters.database
        layers = list(weights.layers)
        for index in parameters.looked_up(config):
            layers[index] = layers[index].but(memo=memo.tables(index))
        return weights.but(layers=layers)

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        if layer.index not in self.looked_up:
            return super().attention(at, x, layer)
        self._check(x, layer)
        rows = self.found[layer.index] = self.look_up(at, x, layer)
        if not any(row is not None for row in rows):
            return super().attention(at, x, layer)
        v = self._values(at, x, layer)  # (B, Hkv, T, D)
        missed = tuple(b for b, row in enumerate(rows) if row is None)
        weights = at(MEMO).fetch(self.memo.records(layer.index), rows, self.parameters.transfer)  # (B, H, T, T)
        if missed:
            weights = at(MEMO).scatter(weights, self._computed(at, x, layer, missed), missed)
        context = at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)  # (B, H, T, D)
        return project_output(at, context, layer)

    def look_up(self, at: At, x: Array, layer: Layer) -> Rows:
        """The record that each sequence takes, or None where the nearest is too far."""
        from refimpl.memo.index import is_hit

        ops, table = at(MEMO), layer.weights.memo
        states = ops.max_pool(x)  # (B, T / 2, d / 2)
        states = ops.reshape(states, (x.shape[0], states.shape[1] * states.shape[2]))
        features = ops.linear(states, table.weight, table.bias)  # (B, 128)
        if self.parameters.index == "hnsw":
            distances, nearest = ops.search_graph(features, self.memo.graph(layer.index))
        else:
            distances, nearest = ops.nearest(features, table.points)
        hits = is_hit(ops.to_numpy(distances), self.parameters.tau)
        return tuple(int(row) if hit else None for row, hit in zip(ops.to_numpy(nearest), hits, strict=True))

    def _values(self, at: At, x: Array, layer: Layer) -> Array:
        """``V = x Wvᵀ`` of all sequences."""
        config = self.config
        first = config.d_attention + config.d_kv
        w = rows_of(layer.weights.attention.qkv, [slice(first, first + config.d_kv)])
        return at(QKV).split_heads(at(QKV).linear(x, w.weight, w.bias), config.kv_heads)

    def _computed(self, at: At, x: Array, layer: Layer, missed: tuple[int, ...]) -> Array:
        """The maps of these sequences, as `dense` computes them: (n, H, T, T)."""
        config = self.config
        w = rows_of(layer.weights.attention.qkv, [slice(0, config.d_attention + config.d_kv)])
        few = at(MEMO).take_rows(x, missed)  # (n, T, d)
        q, k = at(QKV).project(few, w.weight, w.bias, (config.d_attention, config.d_kv))
        some = replace(layer, mask=_rows_of_mask(layer.mask, missed))
        placed: Queries = place_queries(at, q, some)
        return self.attention_map(at, placed, place_keys(at, k, some), some)

    def _check(self, x: Array, layer: Layer) -> None:
        about = self.memo.about
        if layer.cache is not None:
            raise ConfigError("attmemo keeps no keys for a cache: run without one, or give tau=1.1")
        if x.shape[1] != about.length:
            given = f"the database holds maps of {about.length} positions; the input has {x.shape[1]}"
            raise ConfigError(f"{given}: build one for it, or give --seq {about.length}")
        if layer.causal != about.causal:
            kinds = {True: "causal", False: "not causal"}
            raise ConfigError(f"the maps of the database are {kinds[about.causal]}; this pass is {kinds[layer.causal]}")
        if layer.mask is not None and self.parameters.padding == "masked":
            raise ConfigError("a stored map has its own mask: run without one, or give padding=include")


def _rows_of_mask(mask: Array | None, rows: tuple[int, ...]) -> Array | None:
    """The part of a broadcastable mask that concerns these sequences."""
    return mask if mask is None or mask.shape[0] == 1 else mask[list(rows), ...]
