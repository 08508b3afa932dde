"""EfficientASR, our reading (Wang, Liang, Zhang, Cheng, Xiao, arXiv 2404.19214). The equations are ours: they fit the
paper's abstract, which has none, and what they give is no reproduction of it.

Shared residual attention, in groups of layers: c is the first layer of a group, p the first of the group before.

    compute layer:  R_c = Q_c K_cᵀ / sqrt(D) + alpha R_p,   A_c = softmax(R_c + mask + band),   Y_c = [A_c V_c] Woᵀ
    reuse layer:    Y_r = [A_c (X_r Wvᵀ)] Woᵀ

The band hides keys more than w positions away, or takes beta off their scores. Chunked feed-forward, on n equal parts
of the channels; it is a feed-forward whose W1 and W2 are block-diagonal:

    Y = [act(x_1 W1_1ᵀ + b1_1) W2_1ᵀ + b2_1, ..., act(x_n W1_nᵀ + b1_n) W2_nᵀ + b2_n]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.components import FEED_FORWARD, SCORES, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.flash import fused_context
from refimpl.methods.folding import fold, unfold
from refimpl.methods.reuse import Reuse
from refimpl.methods.steps import Layer, Queries, feed_forward, logits, project_heads
from refimpl.parameters.efficientasr import EfficientASRParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights, rows_of


class EfficientASR(Reuse):
    """``reuse`` whose compute layers add up their scores and may have a band, with feed-forwards in chunks."""

    def __init__(self, config: ModelConfig, parameters: EfficientASRParameters) -> None:
        super().__init__(config, parameters.sharing)
        self.reading = parameters
        self.residual: Array | None = None  # R of the compute layer before: (B, H, T, S)
        self.band: Array | None = None  # one for all compute layers: a mask (.., T, S), or penalties (T, S)

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: Any) -> Weights:
        """Reuse layers as in ``reuse``; W1 and W2 as the nearest block-diagonal matrices, biases whole. Tied: the means
        over the chunks. Our reading, for weights that were not trained in chunks."""
        found = Reuse.derive(weights, config, parameters.sharing)
        if parameters.ffn_chunks == 1:
            return found
        return found.but(layers=[layer.but(**_in_chunks(layer, config, parameters)) for layer in found.layers])

    # --- shared residual attention ----------------------------------------------------------------------------------

    def _compute(self, at: At, x: Array, layer: Layer) -> Array:
        q, k, v = project_heads(at, x, layer)
        if self.reading.band is not None and self.reading.band_penalty is None:
            layer = replace(layer, mask=self._mask(at, layer, self.reading.band, x.shape[1], k.shape[2]))
        if self.reading.fused:
            return fused_context(at, q, k, v, layer)  # (B, H, T, D)
        scores = self._scores(at, q, k, layer)  # (B, H, T, S)
        weights = at(SOFTMAX).softmax(scores, layer.causal)
        del scores
        self.shared[layer.index] = weights
        return at(WEIGHTED_SUM).weighted_sum(weights, v, layer.causal)  # (B, H, T, D)

    def _scores(self, at: At, q: Queries, k: Array, layer: Layer) -> Array:
        """``R + mask + band``. What is hidden is hidden in all compute layers, so that it may stay -inf in R."""
        alpha, w, beta = self.reading.score_residual, self.reading.band, self.reading.band_penalty
        scores = logits(at, q, k, layer)  # (B, H, T, S)
        if self.residual is not None:
            scores = at(SCORES).add(scores, self.residual, alpha)
        last = layer.index == self.leaders[-1]
        self.residual = scores if alpha and not last else None
        if w is None or beta is None:
            return scores
        return at(SCORES).add(scores, self._penalties(at, scores, w, beta))

    def _mask(self, at: At, layer: Layer, w: int, length: int, keys: int) -> Array:
        """The band and the given mask as one: True where a query may look."""
        if self.band is None:
            near = at(SCORES).asarray(within(w, length, keys)[None, None, :, :])  # (1, 1, T, S)
            self.band = near if layer.mask is None else near & layer.mask
        return self.band

    def _penalties(self, at: At, scores: Array, w: int, beta: float) -> Array:
        """0 within the band, -beta outside: (T, S)."""
        if self.band is None:
            dtype = str(scores.dtype).rpartition(".")[2]  # "float32", whatever namespace it is in
            self.band = at(SCORES).asarray(np.where(within(w, *scores.shape[2:]), 0.0, -beta).astype(dtype))
        return self.band

    # --- chunked feed-forward ---------------------------------------------------------------------------------------

    def feed_forward(self, at: At, x: Array, weights: Weights, layer: Layer) -> Array:
        chunks = self.reading.ffn_chunks
        if chunks == 1:
            return super().feed_forward(at, x, weights, layer)
        if not self.reading.ffn_tied:
            return _chunked_feed_forward(at, x, weights, layer.config)
        ops, chunk = at(FEED_FORWARD), self.reading.chunk(layer.config)
        return unfold(ops, feed_forward(at, fold(ops, x, chunks), weights, chunk), chunks)  # on (B, T n, d / n)


def _chunked_feed_forward(at: At, x: Array, weights: Weights, config: ModelConfig) -> Array:
    """`steps.feed_forward` with block-diagonal maps, gate and up apart: (B, T, d) -> (B, T, d)."""
    ops, up, down = at(FEED_FORWARD), weights.up, weights.down
    hidden = ops.block_linear(x, up.weight, up.bias)  # (B, T, f)
    if config.gated:
        hidden = ops.swiglu(ops.block_linear(x, weights.gate.weight, weights.gate.bias), hidden)
    else:
        hidden = getattr(ops, config.activation)(hidden)
    return ops.block_linear(hidden, down.weight, down.bias)


def within(w: int, length: int, keys: int) -> Array:
    """Whether query i, the i-th of the last `length` of `keys` positions, is at most `w` away from key j: (T, S)."""
    past, w = keys - length, min(w, keys)
    return np.tri(length, keys, past + w, dtype=bool) & ~np.tri(length, keys, past - w - 1, dtype=bool)


# --- weights ------------------------------------------------------------------------------------------------------


def _in_chunks(layer: Weights, config: ModelConfig, parameters: EfficientASRParameters) -> dict[str, Weights]:
    """The feed-forward sublayers of a layer, by name."""
    names = [name for name in ("first_feed_forward", "feed_forward") if hasattr(layer, name)]
    made = _tied if parameters.ffn_tied else _untied
    return {name: made(getattr(layer, name), config, parameters.ffn_chunks) for name in names}


def _untied(w: Weights, config: ModelConfig, chunks: int) -> Weights:
    """Of each map (n p, n q) the blocks on its diagonal, (n, p, q); gate and up as two maps."""
    maps = {"up": w.up, "down": w.down}
    if config.gated:
        maps["gate"], maps["up"] = _gate_and_up(w, config)
    return Weights(**{name: one.but(weight=_diagonal(one.weight, chunks)) for name, one in maps.items()})


def _tied(w: Weights, config: ModelConfig, chunks: int) -> Weights:
    """Of each map (n p, n q) the mean of these blocks, (p, q), and of its bias that of the chunks; gate above up."""

    def mean(one: Weights) -> dict[str, Array]:
        blocks = {"weight": _diagonal(one.weight, chunks)}
        if one.bias is not None:
            blocks["bias"] = np.reshape(one.bias, (chunks, -1))
        return {name: np.mean(values, axis=0) for name, values in blocks.items()}

    parts = [mean(one) for one in (_gate_and_up(w, config) if config.gated else (w.up,))]
    up = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Weights(up=Weights(**up), down=Weights(**mean(w.down)))


def _gate_and_up(w: Weights, config: ModelConfig) -> tuple[Weights, Weights]:
    f = config.d_ff
    return rows_of(w.up, [slice(0, f)]), rows_of(w.up, [slice(f, 2 * f)])


def _diagonal(weight: Array, chunks: int) -> Array:
    """The blocks on the diagonal of a matrix (n p, n q): (n, p, q)."""
    p, q = (size // chunks for size in weight.shape)
    return np.stack([weight[c * p : (c + 1) * p, c * q : (c + 1) * q] for c in range(chunks)])
