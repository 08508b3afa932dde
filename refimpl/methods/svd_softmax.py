"""SVD-softmax: a language head that looks at most words in part (Shim et al., NIPS 2017, pages 5463-5473).

The head's matrix A (V, D) is turned once, offline, into the basis of its singular vectors, R = A Q. Then per position:

    g = Qᵀ h                                          (D)
    z_i = R[i, :W] . g[:W]              every word     (V)     the preview
    z_i = z_i + R[i, W:] . g[W:]        the N words with the largest preview

Logits of the N candidates are exact, all others are those of the preview; one softmax over all of them follows.
Language heads here are tied and have no bias. Attention is exact.
"""

from __future__ import annotations

from dataclasses import replace

from refimpl.components import HEAD
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array, Engine
from refimpl.methods.dense import Dense
from refimpl.methods.flash import Flash
from refimpl.methods.steps import Layer
from refimpl.methods.subject import Subject
from refimpl.parameters.svd_softmax import SVDSoftmaxParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights


class SVDSoftmax(Dense):
    """Exact attention, and a head of preview, selection and full view."""

    parameters: SVDSoftmaxParameters

    def __init__(self, config: ModelConfig, parameters: SVDSoftmaxParameters) -> None:
        super().__init__(config, parameters)
        self.exact = (Flash if parameters.fused else Dense)(config, None)

    @classmethod
    def complete(cls, parameters: SVDSoftmaxParameters, subject: Subject) -> SVDSoftmaxParameters:
        """With the basis, from a decomposition of the head unless it is given."""
        if parameters.is_complete(subject.model.config):
            return parameters
        from refimpl.preparation.svd_softmax import find_basis

        return replace(parameters, basis=find_basis(parameters, subject))

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: SVDSoftmaxParameters) -> Weights:
        """With a head of its own beside the table of tokens: Qᵀ, R[:, :W], and R[:, W:] or R."""
        from refimpl.preparation.svd_softmax import turned_head

        return weights.but(head=turned_head(weights.stem.embedding, config, parameters))

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        return self.exact.attention(at, x, layer)

    def head(self, at: At, x: Array, weights: Weights) -> Array:
        """Mixed logits: (B, T, d) -> (B, T, V)."""
        candidates = self.parameters.full_views(self.config)
        return mixed_logits(at(HEAD), x, weights.head, candidates, self.parameters.full_view == "replace")


def mixed_logits(ops: Engine, h: Array, head: Weights, candidates: int, replaces: bool = False) -> Array:
    """Logits (..., V) of hidden states h (..., D): exact for so many words of each row, a preview for the others."""
    g = ops.linear(h, head.rotation)  # (..., D)
    window = head.preview.shape[1]
    z = ops.linear(g[..., :window], head.preview)  # (..., V)
    if not head.full_view.shape[1]:
        return z
    ids = ops.top(z, candidates)  # (..., N)
    return ops.refine(z, ids, head.full_view, g if replaces else g[..., window:], replaces)
