"""Attention with fewer heads: of H heads of width D the H' remain whose outputs weigh most.

    Y = sum over the kept heads h of softmax(Q_h K_hᵀ / sqrt(D) + mask) V_h Wo_hᵀ

A key head leaves together with the query heads that share it. Nothing is rescaled or trained: our reading, for weights
of a model that was trained with all heads.
"""

from __future__ import annotations

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.smaller import Smaller
from refimpl.parameters.fewer_heads import FewerHeadsParameters
from refimpl.weights.layout import Weights


class FewerHeads(Smaller):
    """Exact attention of the heads that remain."""

    parameters: FewerHeadsParameters

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: FewerHeadsParameters) -> Weights:
        """Of every matrix of attention the slices of the heads that remain, in their order."""
        if parameters.is_off(config):
            return weights
        count = parameters.shape(config).kv_heads
        layers = []
        for layer in weights.layers:
            norms = output_norms(layer.attention, config)
            order = np.argsort(-norms, kind="stable") if parameters.keep == "norm" else np.arange(config.kv_heads)
            layers.append(layer.but(attention=_of_key_heads(layer.attention, config, np.sort(order[:count]))))
        return weights.but(layers=layers)


def output_norms(w: Weights, config: ModelConfig) -> Array:
    """``sum over the query heads h of key head g of |Wo_h Wv_g|^2``, squared Frobenius norms: (Hkv,), float64."""
    group, d = config.heads // config.kv_heads, config.d_model
    values = w.qkv.weight[config.d_attention + config.d_kv :].astype(np.float64)
    values = values.reshape(config.kv_heads, config.head_dim, d)  # (Hkv, D, d)
    outputs = w.output.weight.astype(np.float64).reshape(d, config.kv_heads, group, config.head_dim)
    of_values = values @ values.swapaxes(1, 2)  # (Hkv, D, D)
    of_outputs = np.einsum("dghi,dghj->gij", outputs, outputs)  # (Hkv, D, D)
    norms: Array = np.einsum("gij,gij->g", of_values, of_outputs)  # trace(Wvᵀ Woᵀ Wo Wv)
    return norms


def _of_key_heads(w: Weights, config: ModelConfig, kept: Array) -> Weights:
    """The weights of these key heads and of the query heads that share them."""
    group = config.heads // config.kv_heads
    of_keys = _columns(kept, config.head_dim)
    of_queries = _columns((kept[:, None] * group + np.arange(group)).reshape(-1), config.head_dim)
    first_key, first_value = config.d_attention, config.d_attention + config.d_kv
    rows = np.concatenate([of_queries, first_key + of_keys, first_value + of_keys])
    changed = {
        "qkv": Weights(**{name: array[rows] for name, array in vars(w.qkv).items()}),
        "output": w.output.but(weight=np.ascontiguousarray(w.output.weight[:, of_queries])),
    }
    if config.position == "relative":
        changed["position"] = w.position.but(weight=w.position.weight[of_queries])
        changed |= {name: getattr(w, name)[of_queries] for name in ("content_bias", "position_bias")}
    return w.but(**changed)


def _columns(heads: Array, width: int) -> Array:
    """Where the numbers of these heads stand, head after head."""
    where: Array = (heads[:, None] * width + np.arange(width)).reshape(-1)
    return where
