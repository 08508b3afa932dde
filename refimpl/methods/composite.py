"""Methods combined: every step is run by the member that replaces its part, and is exact where none does.

    reuse+svd-softmax     attention of ``reuse``, head of ``svd-softmax``, feed-forward of ``dense``

Members find their way to each other's steps through ``Dense.whole``. Which parts they replace, and so which methods
can be combined, is said in ``refimpl.parameters.parts``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from refimpl.cache import Stored
from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.methods.dense import Dense
from refimpl.methods.flash import Flash
from refimpl.methods.programs import PROGRAMS
from refimpl.methods.steps import Layer, Queries
from refimpl.methods.subject import Subject
from refimpl.parameters.composition import Composition
from refimpl.recorder import At
from refimpl.weights.layout import Weights


class Composite(Dense):
    """The members' programs under one roof."""

    parameters: Composition

    def __init__(self, config: ModelConfig, parameters: Composition) -> None:
        super().__init__(config, parameters)
        self.members = {name: PROGRAMS[name](config, given) for name, given in parameters.members}
        self.owners = parameters.owners(config)
        self.exact = (Flash if parameters.fused else Dense)(config, None)
        for program in (*self.members.values(), self.exact):
            program.composite = weakref.ref(self)

    @classmethod
    def complete(cls, parameters: Composition, subject: Subject) -> Composition:
        """Each member with what it finds on the exact model, as it does alone."""
        return Composition(tuple((name, PROGRAMS[name].complete(given, subject)) for name, given in parameters.members))

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: Composition) -> Weights:
        """One member after the other: each changes other weights."""
        for name, given in parameters.members:
            weights = PROGRAMS[name].derive(weights, config, given)
        return weights

    def stored(self) -> Sequence[Stored]:
        return self._of("keys").stored()

    def attention(self, at: At, x: Array, layer: Layer) -> Array:
        return self._of("context").attention(at, x, layer)

    def project(self, at: At, x: Array, layer: Layer) -> tuple[Queries, Array, Array]:
        return self._of("keys").project(at, x, layer)

    def context(self, at: At, q: Queries, k: Array, v: Array, layer: Layer) -> Array:
        return self._of("map").context(at, q, k, v, layer)

    def attention_map(self, at: At, q: Queries, k: Array, layer: Layer) -> Array:
        return self._of("map").attention_map(at, q, k, layer)

    def feed_forward(self, at: At, x: Array, weights: Weights, layer: Layer) -> Array:
        return self._of("feed-forward").feed_forward(at, x, weights, layer)

    def head(self, at: At, x: Array, weights: Weights) -> Array:
        return self._of("head").head(at, x, weights)

    def _of(self, part: str) -> Dense:
        """The program that runs this part."""
        return self.members[self.owners[part]] if part in self.owners else self.exact
