"""The ops of local attention; the mirror of ``refimpl.methods.local``.

With a window of w, 4 d (T (2 w + 1) - w (w + 1)) matrix FLOPs instead of 4 d T^2, for T above w.
"""

from __future__ import annotations

from dataclasses import replace

from costmodel.methods.flash import Flash, fused_context
from costmodel.methods.steps import Setting
from costmodel.ops import Op
from refimpl.parameters.local import LocalParameters


class Local(Flash):
    """``flash`` on the pairs of a band."""

    parameters: LocalParameters

    def context(self, index: int) -> list[Op]:
        if self.parameters.window is None:
            return super().context(index)
        return local_context(self.setting, self.parameters.window)


def local_context(s: Setting, window: int) -> list[Op]:
    """Scores, softmax and weighted sum within the band, as one op."""
    *before, attention = fused_context(s)
    return [*before, replace(attention, name=f"local_{attention.name}", sizes={**attention.sizes, "window": window})]
