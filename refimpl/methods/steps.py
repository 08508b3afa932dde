"""The steps that attention methods are put together from; each is a few ops under their components' names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refimpl.cache import Cache
from refimpl.components import FEED_FORWARD, OUTPUT, POSITIONS, QKV, SCORES
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.recorder import At
from refimpl.weights.layout import Weights


@dataclass(frozen=True)
class Layer:
    """What an attention sublayer knows beside its input."""

    index: int
    config: ModelConfig
    weights: Weights
    causal: bool
    mask: Array | None  # bool, broadcasts to (B, H, T, T)
    tables: tuple[Array, ...]  # relative: one table (2T - 1, d); rotary: cos and sin (T, D / 2); else none
    cache: Cache | None = None  # keys and values of earlier positions

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1.0 / math.sqrt(self.config.head_dim)


@dataclass(frozen=True)
class Queries:
    """Queries as the logits need them: with relative positions the content bias u and position bias v are added."""

    content: Array  # (B, H, T, D)
    position: Array | None = None  # (B, H, T, D)


def project_heads(at: At, x: Array, layer: Layer) -> tuple[Queries, Array, Array]:
    """``Q, K, V = x Wqᵀ, x Wkᵀ, x Wvᵀ`` as heads; with a cache, K and V of all positions so far."""
    config, qkv = layer.config, layer.weights.attention.qkv
    widths = (config.d_attention, config.d_kv, config.d_kv)
    q, k, v = at(QKV).project(x, qkv.weight, qkv.bias, widths)  # (B, T, H D), (B, T, Hkv D) twice
    v = at(QKV).split_heads(v, config.kv_heads)
    return place_queries(at, q, layer), seen_keys(at, place_keys(at, k, layer), layer), seen_values(at, v, layer)


def seen_keys(at: At, k: Array, layer: Layer) -> Array:
    """The keys that queries meet: new ones (B, Hkv, T, D), behind those of the cache where there is one."""
    return k if layer.cache is None else layer.cache.keys(at, layer.index, k)  # (B, Hkv, S, D)


def seen_values(at: At, v: Array, layer: Layer) -> Array:
    """The values that belong to `seen_keys`."""
    return v if layer.cache is None else layer.cache.values(at, layer.index, v)  # (B, Hkv, S, D)


def place_queries(at: At, q: Array, layer: Layer, heads: slice = slice(None)) -> Queries:
    """Queries (B, T, H D), of these heads of the layer, with their positions, as heads."""
    count = q.shape[2] // layer.config.head_dim
    split = at(QKV).split_heads
    if layer.config.position == "relative":
        w = layer.weights.attention
        columns = _columns(layer.config, heads)
        content = at(POSITIONS).add(q, w.content_bias[columns])  # (B, T, H D)
        position = at(POSITIONS).add(q, w.position_bias[columns])
        return Queries(split(content, count), split(position, count))
    return Queries(_rotate(at, split(q, count), layer))


def place_keys(at: At, k: Array, layer: Layer) -> Array:
    """Keys (B, T, Hkv D) as heads, rotated where the model rotates."""
    return _rotate(at, at(QKV).split_heads(k, k.shape[2] // layer.config.head_dim), layer)


def _rotate(at: At, x: Array, layer: Layer) -> Array:
    if layer.config.position != "rotary":
        return x
    cos, sin = layer.tables  # (T, D / 2)
    return at(POSITIONS).rotary(x, cos, sin, layer.config.rope_interleaved)


def position_keys(at: At, layer: Layer, heads: slice = slice(None)) -> Array:
    """``P = R Wpᵀ`` of these heads: (1, H, 2T - 1, D), the same for the whole batch."""
    weight = layer.weights.attention.position.weight[_columns(layer.config, heads), :]
    (table,) = layer.tables  # (2T - 1, d)
    p = at(POSITIONS).linear(table, weight)  # (2T - 1, H D)
    return at(POSITIONS).split_heads(p[None, :, :], p.shape[1] // layer.config.head_dim)


def _columns(config: ModelConfig, heads: slice) -> slice:
    """The columns that these heads take in a (..., H D) array."""
    start, stop, _ = heads.indices(config.heads)
    return slice(start * config.head_dim, stop * config.head_dim)


def logits(at: At, q: Queries, k: Array, layer: Layer, heads: slice = slice(None)) -> Array:
    """``scale q kᵀ``, plus the relative-position term where the model has one: (B, H, T, T)."""
    content = at(SCORES).scores(q.content, k, layer.scale, layer.causal, layer.mask)
    if q.position is None:
        return content
    position = at(POSITIONS).scores(q.position, position_keys(at, layer, heads), layer.scale)  # (B, H, T, 2T - 1)
    return at(POSITIONS).add_relative(content, position)


def project_output(at: At, context: Array, layer: Layer) -> Array:
    """``concat(heads) Woᵀ``: (B, H, T, D) -> (B, T, d)."""
    output = layer.weights.attention.output
    return at(OUTPUT).linear(at(OUTPUT).merge_heads(context), output.weight, output.bias)


def feed_forward(at: At, x: Array, weights: Weights, config: ModelConfig) -> Array:
    """``activation(x W1ᵀ) W2ᵀ``, or with a gate ``(silu(x Wgᵀ) * (x Wuᵀ)) W2ᵀ``."""
    ops, up, down = at(FEED_FORWARD), weights.up, weights.down
    if config.gated:
        hidden = ops.swiglu(*ops.project(x, up.weight, up.bias, (config.d_ff, config.d_ff)))  # (B, T, f)
    else:
        hidden = getattr(ops, config.activation)(ops.linear(x, up.weight, up.bias))
    return ops.linear(hidden, down.weight, down.bias)
