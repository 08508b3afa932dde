"""The ops of methods combined; the mirror of ``refimpl.methods.composite``.

Every part costs what it costs under the member that replaces it, and what it costs in ``dense`` where none does.
"""

from __future__ import annotations

from costmodel.methods import COSTS
from costmodel.methods.dense import Dense
from costmodel.methods.flash import Flash
from costmodel.methods.steps import Setting
from costmodel.ops import Op, Quantity
from refimpl.parameters.composition import Composition


class Composite(Dense):
    """The members' closed forms under one roof."""

    parameters: Composition

    def __init__(self, setting: Setting, parameters: Composition) -> None:
        super().__init__(setting, parameters)
        self.members = {name: COSTS[name](setting, given) for name, given in parameters.members}
        self.owners = parameters.owners(setting.config)
        self.exact = (Flash if parameters.fused else Dense)(setting, None)
        for program in (*self.members.values(), self.exact):
            program.whole = self

    # --- ops --------------------------------------------------------------------------------------------------------

    def layers(self) -> dict[str, tuple[Quantity, list[Op]]]:
        """As a member says that decides about keys and context, and so about the whole sublayer; else put together."""
        owner = self.owners.get("context")
        return self.members[owner].layers() if owner and owner == self.owners.get("keys") else self.layers_by_kind()

    def attention(self) -> list[Op]:
        return self._of("context").attention()

    def kind(self, index: int) -> str:
        kinds = [program.kind(index) for program in self.members.values()]
        return ", ".join(kind for kind in kinds if kind != Dense.KIND) or Dense.KIND

    def sublayer(self, index: int) -> list[Op]:
        return self._of("context").sublayer(index)

    def project(self, index: int) -> list[Op]:
        return self._of("keys").project(index)

    def context(self, index: int) -> list[Op]:
        return self._of("map").context(index)

    def attention_map(self, index: int) -> list[Op]:
        return self._of("map").attention_map(index)

    def feed_forward(self) -> list[Op]:
        return self._of("feed-forward").feed_forward()

    def head(self) -> list[Op]:
        return self._of("head").head()

    # --- weights and cache ------------------------------------------------------------------------------------------

    def attention_parameters(self) -> Quantity:
        return self._of("weights").attention_parameters()

    def copied_parameters(self) -> Quantity:
        return self._of("weights").copied_parameters()

    def index_bytes(self) -> Quantity:
        return self._of("weights").index_bytes()

    def feed_forward_parameters(self) -> Quantity:
        return self._of("feed-forward").feed_forward_parameters()

    def head_parameters(self) -> Quantity:
        return self._of("head").head_parameters()

    def stored(self) -> Quantity:
        return self._of("keys").stored()

    # --- memory -----------------------------------------------------------------------------------------------------

    def attention_live(self) -> list[Quantity]:
        return self._of("keys", "context").attention_live()

    def context_live(self) -> list[Quantity]:
        return self._of("map").context_live()

    def map_live(self) -> list[Quantity]:
        return self._of("map").map_live()

    def feed_forward_live(self) -> list[Quantity]:
        return self._of("feed-forward").feed_forward_live()

    def head_live(self) -> Quantity:
        return self._of("head").head_live()

    def mask_bytes(self) -> Quantity:
        return sum(program.mask_bytes() for program in self.members.values())

    def held(self) -> Quantity:
        return sum(program.held() for program in self.members.values())

    def _of(self, *parts: str) -> Dense:
        """The closed form of the first of these parts that a member replaces."""
        owner = next((self.owners[part] for part in parts if part in self.owners), None)
        return self.exact if owner is None else self.members[owner]
