"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret, arXiv 2006.16236): a kernel of feature maps for softmax.

    Y_i = phi(q_i) (sum_j phi(k_j) v_jᵀ) / (phi(q_i) . sum_j phi(k_j)) Woᵀ        phi(x) = elu(x) + 1

The sums are over all keys (eq. 5), or over those up to i (eqs. 9 to 12, a running state). They do not depend on the
query, so that no T x T map is ever computed: T D^2 instead of T^2 D products a head. Queries are not scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refimpl.cache import Stored
from refimpl.components import ATTENTION
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.methods.dense import Dense
from refimpl.methods.steps import Layer, project_heads, project_output
from refimpl.parameters.linear import FEATURES, NO_DECODING, LinearParameters
from refimpl.recorder import At


class Linear(Dense):
    """``dense`` with the kernel phi(q) . phi(k) for exp(q . k / sqrt(D))."""

    parameters: LinearParameters

    def stored(self) -> Sequence[Stored]:
        """Nothing: its state has no positions."""
        return (Stored(0, 0, self.config.head_dim),) * self.config.layers

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        if layer.cache is not None and layer.cache.length:
            raise ConfigError(NO_DECODING)
        if layer.mask is not None and tuple(layer.mask.shape[1:3]) != (1, 1):
            raise UnsupportedError(
                f"linear attention sums keys before queries meet them; the mask is {tuple(layer.mask.shape)}: give one "
                f"of keys alone, (B or 1, 1, 1, {x.shape[1]})"
            )
        q, k, v = project_heads(at, x, replace(layer, cache=None))
        phi = getattr(at(ATTENTION), FEATURES[self.parameters.feature])
        context = at(ATTENTION).linear_attention(phi(q.content), phi(k), v, layer.causal, layer.mask)  # (B, H, T, D)
        return project_output(at, context, layer)
