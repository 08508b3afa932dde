"""The ops of attention with fewer heads; the mirror of ``refimpl.methods.fewer_heads``.

With H' of H heads everything in an attention sublayer is H' / H of dense: weights, FLOPs, maps and cache.
"""

from __future__ import annotations

from costmodel.methods.smaller import Smaller
from refimpl.parameters.fewer_heads import FewerHeadsParameters


class FewerHeads(Smaller):
    """``dense`` with H' heads of the same width."""

    parameters: FewerHeadsParameters
