"""The ops of SVD-softmax; the mirror of ``refimpl.methods.svd_softmax``.

Multiplications of the head per position: D^2 + V W + N (D - W), or N D to replace, instead of V D. Candidates are read
once for each position: from about V / N positions at a time on, the exact head moves fewer bytes.
"""

from __future__ import annotations

from costmodel import memory
from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.flash import Flash
from costmodel.methods.steps import Setting
from costmodel.ops import INDEX_BYTES, Op, Quantity
from refimpl.components import HEAD
from refimpl.parameters.svd_softmax import SVDSoftmaxParameters


class SVDSoftmax(Dense):
    """Exact attention, and a head of rotation, preview, selection and full view."""

    parameters: SVDSoftmaxParameters

    def __init__(self, setting: Setting, parameters: SVDSoftmaxParameters) -> None:
        super().__init__(setting, parameters)
        self.exact = (Flash if parameters.fused else Dense)(setting, None)

    def compute_layer(self) -> list[Op]:
        return self.exact.compute_layer()

    def attention_live(self) -> list[Quantity]:
        return self.exact.attention_live()

    def head(self) -> list[Op]:
        s, c, window = self.setting, self.setting.config, self._window
        ops = [steps.linear(s, HEAD, c.d_model, c.d_model, 0), steps.linear(s, HEAD, window, c.vocab, 0)]
        if not self._remaining:
            return ops
        n = self.parameters.full_views(c)
        replaces = int(self.parameters.full_view == "replace")
        return [
            *ops,
            Op(HEAD, "top", {"rows": s.rows, "width": c.vocab, "n": n}),
            Op(HEAD, "refine", {"rows": s.rows, "n": n, "d_in": self._remaining, "replace": replaces}),
        ]

    def head_parameters(self) -> Quantity:
        c = self.setting.config
        return c.d_model * c.d_model + c.vocab * (self._window + self._remaining)

    def head_live(self) -> Quantity:
        """Beside logits and hidden states: those turned, and indices of candidates (of float32: two elements each)."""
        s, n = self.setting, self.parameters.full_views(self.setting.config) if self._remaining else 0
        return memory.head(s) + memory.hidden(s) + s.rows * n * (INDEX_BYTES // 4)

    @property
    def _window(self) -> int:
        return self.parameters.preview_width(self.setting.config)

    @property
    def _remaining(self) -> int:
        return self.parameters.remaining(self.setting.config)
