"""Peak live memory: the elements that are alive at the fullest moments of a forward pass.

Counted from the programs. An op's operands and its result are alive together; a sublayer's input is alive until it
returns, and so is the input of its layer. Weights and tables are added by ``costmodel.estimate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from costmodel.ops import Quantity

if TYPE_CHECKING:
    from costmodel.methods.steps import Setting

# Hidden states that are alive beside what a sublayer makes: the layer's input, the residual, the normed input.
BESIDE_ATTENTION = {"post-norm": 1, "pre-norm": 2, "conformer": 3, "emformer": 2}
BESIDE_FEED_FORWARD = {"post-norm": 2, "pre-norm": 3, "conformer": 3, "emformer": 3}


def hidden(s: Setting) -> Quantity:
    """B T d."""
    return s.rows * s.config.d_model


def maps(s: Setting, heads: Quantity) -> Quantity:
    """The maps of so many heads."""
    return s.B * heads * s.T * s.S


def materialised(s: Setting) -> list[Quantity]:
    """Attention that holds its map: at the position scores and their sum, at the softmax, at the output projection."""
    heads = s.config.heads
    before = BESIDE_ATTENTION[s.config.recipe] * hidden(s) + _projections(s)
    moments = [before + 2 * maps(s, heads), before + maps(s, heads) + _context(s) + hidden(s)]
    if s.config.position == "relative":
        shifted = s.B * heads * s.T * (2 * s.T - 1)
        moments += [before + maps(s, heads) + shifted + _position_keys(s), before + 2 * maps(s, heads) + shifted]
    return moments


def fused(s: Setting) -> list[Quantity]:
    """Attention without a map: at the output projection."""
    keys = _position_keys(s) if s.config.position == "relative" else 0
    return [BESIDE_ATTENTION[s.config.recipe] * hidden(s) + _projections(s) + keys + _context(s) + hidden(s)]


def filtering(s: Setting) -> list[Quantity]:
    """Attention over filtered keys: the op, beside codes and values laid out for it; the output projection.

    Codes count four to an element of float32: those of queries once, of keys three times, as codes and in two layouts.
    """
    (output,) = fused(s)
    keys = s.B * s.S * s.config.d_kv
    return [output, output - hidden(s) + keys + (s.rows * s.config.d_attention + 3 * keys) // 4]


def filtering_map(s: Setting) -> list[Quantity]:
    """Attention that holds its filtered map: the op, beside codes laid out for it; the output projection."""
    (fused_output,) = fused(s)
    one, keys = maps(s, s.config.heads), s.B * s.S * s.config.d_kv
    before = fused_output - hidden(s) - _context(s)
    return [fused_output + one, before + one + (s.rows * s.config.d_attention + 3 * keys) // 4]


def reusing(s: Setting) -> Quantity:
    """Attention that takes a map, beside that map: values, context and output."""
    return BESIDE_ATTENTION[s.config.recipe] * hidden(s) + s.rows * s.config.d_kv + _context(s) + hidden(s)


def feed_forward(s: Setting) -> Quantity:
    """The hidden width before and after its activation (or gate, up and their product)."""
    c = s.config
    return BESIDE_FEED_FORWARD[c.recipe] * hidden(s) + s.rows * c.d_ff * (3 if c.gated else 2)


def convolution(s: Setting) -> Quantity:
    """The doubled width and its gated half."""
    return (3 + 2 + 1) * hidden(s) if s.config.recipe == "conformer" else 0


def head(s: Setting) -> Quantity:
    """The last hidden state and the logits; or the last linear map before and after its norm."""
    if s.config.d_out:
        return hidden(s) + 2 * s.outputs * s.config.d_out
    return hidden(s) + s.rows * s.config.vocab if s.config.head else 0


def stem(s: Setting) -> Quantity:
    """The widest step of the strided convolutions: its windows, product and activation."""
    c = s.config
    if c.stem == "stacked":
        return s.rows * c.stack * c.features + 2 * hidden(s)
    if c.stem != "frames":
        return 2 * hidden(s)
    rows = s.B * c.stem_length(s.T) // c.strides[0]
    return s.B * c.stem_length(s.T) * c.features + rows * (3 * c.features + 2 * c.d_model)


def _context(s: Setting) -> Quantity:
    return s.rows * s.config.d_attention


def _projections(s: Setting) -> Quantity:
    """Q, K, V, and the two biased (or the rotated) copies that positions add."""
    c = s.config
    extra = {"relative": 2 * c.d_attention, "rotary": c.d_attention + c.d_kv}.get(c.position, 0)
    return s.rows * (c.d_attention + 2 * c.d_kv + extra)


def _position_keys(s: Setting) -> Quantity:
    return (2 * s.T - 1) * s.config.d_attention


def largest(*candidates: Quantity) -> Any:
    """The maximum of ints, arrays or SymPy expressions."""
    if any(isinstance(c, np.ndarray) for c in candidates):
        return np.maximum.reduce(np.broadcast_arrays(*candidates))
    if all(isinstance(c, (int, np.integer)) for c in candidates):
        return max(candidates)
    import sympy

    return sympy.Max(*candidates)
