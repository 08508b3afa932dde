"""The ops of narrow attention; the mirror of ``refimpl.methods.narrow``.

With heads of width D' everything in an attention sublayer is D' / D of dense but the softmax and the maps, which are
those of H heads.
"""

from __future__ import annotations

from costmodel.methods.smaller import Smaller
from refimpl.parameters.narrow import NarrowParameters


class Narrow(Smaller):
    """``dense`` with H heads of width D'."""

    parameters: NarrowParameters
