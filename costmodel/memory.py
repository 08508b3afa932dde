"""Peak live memory: the elements that are alive at the fullest moments of a forward pass.

Counted from the programs: a sublayer holds its input x and the normed input h until it returns; an op's operands and
its result are alive together. Weights and tables are added by ``costmodel.estimate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodel.ops import Quantity

if TYPE_CHECKING:
    from costmodel.methods.steps import Setting


@dataclass(frozen=True)
class Live:
    """Candidates for the peak of one attention sublayer, in elements."""

    moments: tuple[Quantity, ...]

    @classmethod
    def of_materialised(cls, s: Setting) -> Live:
        """softmax holds two maps; relative positions hold three and the (T, 2T - 1) scores."""
        maps = s.B * s.config.heads * s.T * s.T
        base = 2 * hidden(s) + projections(s)
        moments = [base + 2 * maps, base + maps + s.rows * s.config.d_attention + hidden(s)]
        if s.config.position == "relative":
            shifted = s.B * s.config.heads * s.T * (2 * s.T - 1)
            moments.append(base + position_keys(s) + 2 * maps + shifted)
        return cls(tuple(moments))

    @classmethod
    def of_fused(cls, s: Setting) -> Live:
        """Projections, context and output; no map."""
        context = s.rows * s.config.d_attention
        keys = position_keys(s) if s.config.position == "relative" else 0
        return cls((2 * hidden(s) + projections(s) + keys + context + hidden(s),))


def hidden(s: Setting) -> Quantity:
    """B T d."""
    return s.rows * s.config.d_model


def projections(s: Setting) -> Quantity:
    """Q, K, V, and the two biased (or the rotated) copies that positions add."""
    c = s.config
    extra = {"relative": 2 * c.d_attention, "rotary": c.d_attention + c.d_kv}.get(c.position, 0)
    return s.rows * (c.d_attention + 2 * c.d_kv + extra)


def position_keys(s: Setting) -> Quantity:
    """The projected table of relative positions."""
    return (2 * s.T - 1) * s.config.d_attention


def feed_forward(s: Setting) -> Quantity:
    """x, h, and the hidden width before and after its activation (or gate, up and their product)."""
    c = s.config
    return 2 * hidden(s) + s.rows * c.d_ff * (3 if c.gated else 2)


def convolution(s: Setting) -> Quantity:
    """x, h, the doubled width and its gated half."""
    return (2 + 2 + 1) * hidden(s) if s.config.recipe == "conformer" else 0


def head(s: Setting) -> Quantity:
    """The last hidden state and the logits."""
    return hidden(s) + s.rows * s.config.vocab if s.config.head else 0


def stem(s: Setting) -> Quantity:
    """The widest step of the strided convolutions: its windows, product and activation."""
    c = s.config
    if c.stem != "frames":
        return 2 * hidden(s)
    rows = s.B * c.stem_length(s.T) // c.strides[0]
    return s.B * c.stem_length(s.T) * c.features + rows * (3 * c.features + 2 * c.d_model)


def largest(*candidates: Quantity) -> Any:
    """The maximum of ints, arrays or SymPy expressions."""
    if any(isinstance(c, np.ndarray) for c in candidates):
        return np.maximum.reduce(np.broadcast_arrays(*candidates))
    if all(isinstance(c, (int, np.integer)) for c in candidates):
        return max(candidates)
    import sympy

    return sympy.Max(*candidates)
