"""The ops of Linformer; the mirror of ``refimpl.methods.linformer``.

Per layer 4 T k d matrix FLOPs of map and values instead of 4 T^2 d, and 4 T k d to project keys and values along time.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.methods import steps
from costmodel.methods.dense import Dense
from costmodel.methods.flash import Flash, fused_context
from costmodel.methods.steps import Setting
from costmodel.ops import Op, Quantity, smaller
from refimpl.components import QKV
from refimpl.parameters.linformer import LinformerParameters


@dataclass(frozen=True)
class Projected(Setting):
    """Queries that meet k keys, or all where there are fewer."""

    length: Quantity = 0

    @property
    def S(self) -> Quantity:
        return smaller(self.length, self.T)


class Linformer(Dense):
    """``dense`` (or ``flash``) with min(k, T) keys and values, which are projected first where k < T."""

    parameters: LinformerParameters

    def __init__(self, setting: Setting, parameters: LinformerParameters) -> None:
        super().__init__(setting, parameters)
        parameters.check_pass(setting.config, bool(setting.causal))
        if parameters.length is not None:
            self.setting = Projected(**vars(setting), length=parameters.length)

    def compute_layer(self) -> list[Op]:
        s, c = self.setting, self.setting.config
        sizes = {"maps": s.B * c.kv_heads, "q_len": s.S, "k_len": s.T, "head_dim": c.head_dim, "mask": 0}
        projections = [Op(QKV, "project_length", sizes, calls=2 * self._some)]
        return [
            *steps.project_heads(s),
            *(projections if self.parameters.length is not None else []),
            *self._context(),
            steps.project_output(s),
        ]

    def _context(self) -> list[Op]:
        s, c = self.setting, self.setting.config
        if self.parameters.fused:
            return fused_context(s)
        return [
            *steps.logits(s, c.heads, c.kv_heads),
            steps.softmax(s, c.heads),
            steps.weighted_sum(s, c.heads, c.kv_heads),
        ]

    @property
    def _some(self) -> Quantity:
        """1 where the projection is shorter than the sequence, else 0; a symbol is taken to be longer."""
        length, T = self.parameters.length, self.setting.T
        if length is None:
            return 0
        return 1 if hasattr(T, "free_symbols") else (length < T) * 1

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        """As in the exact method, beside E and projected keys and values."""
        s = self.setting
        moments = (Flash if self.parameters.fused else Dense)(s, None).attention_live()
        projected = 2 * s.B * s.S * s.config.d_kv * self._some
        return [self.held() + moment + projected for moment in moments]

    def head_live(self) -> Quantity:
        return self.held() + super().head_live()

    def held(self) -> Quantity:
        """E."""
        return self.setting.S * self.setting.T * self._some
