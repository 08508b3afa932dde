"""Local attention: a query sees keys at most w positions away (sliding window, arXiv 2004.05150, section 3.1).

    Y_i = sum over |j - i| <= w of softmax_j(q_i k_jᵀ / sqrt(D) + mask) v_j Woᵀ        causal: i - w <= j <= i

One fused op walks along the diagonal and computes nothing outside the band: T (2 w + 1) pairs, not T^2. The first and
last w positions see fewer keys. With a cache a new position sees the last w of it.
"""

from __future__ import annotations

from refimpl.components import ATTENTION
from refimpl.engines.protocol import Array
from refimpl.methods.flash import Flash
from refimpl.methods.steps import Layer, Queries, position_keys
from refimpl.parameters.local import LocalParameters
from refimpl.recorder import At


class Local(Flash):
    """``flash`` within a band."""

    parameters: LocalParameters

    def context(self, at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
        if self.parameters.window is None:
            return super().context(at, q, k, v, layer)
        return local_context(at, q, k, v, self.parameters.window, layer)


def local_context(at: At, q: Queries, k: Array, v: Array, window: int, layer: Layer) -> Array:
    """``softmax(scale q kᵀ + mask) v`` within the band: (B, H, T, D)."""
    ops = at(ATTENTION)
    if q.position is None:
        return ops.local_attention(q.content, k, v, window, layer.scale, layer.causal, layer.mask)
    p = position_keys(at, layer)[0, :, :, :]  # (H, 2T - 1, D)
    return ops.local_relative_attention(q.content, q.position, k, v, p, window, layer.scale, layer.causal, layer.mask)
