"""Parameters of EfficientASR, our reading: the paper's abstract (arXiv 2404.19214) names none, so all are ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from refimpl.config import ModelConfig
from refimpl.errors import ConfigError
from refimpl.parameters.base import parameter, require_choice, require_int, require_number
from refimpl.parameters.parts import ATTENTION
from refimpl.parameters.reuse import ReuseParameters

LEAST_FACTOR, MOST_FACTOR = 2.0**-14, 2.0**15  # normal numbers in float16, the narrowest dtype


@dataclass(frozen=True)
class EfficientASRParameters:
    """Shared residual attention and a chunked feed-forward, each of use alone.

    `group` = 1, `score_residual` = 0, no `band` and `ffn_chunks` = 1 together are exact.
    """

    group: int = parameter(2, "layers that share one map, consecutive; 1 shares none")
    score_residual: float = parameter(
        1.0, "alpha: this multiple of the previous compute layer's scores is added to a compute layer's own; 0 is none"
    )
    band: int | None = parameter(None, "w: a query sees keys that are at most w positions away; default all")
    band_penalty: float | None = parameter(
        None, "beta, subtracted from scores outside the band; default infinite, which hides them"
    )
    ffn_chunks: int = parameter(2, "n: chunks of channels, each with a feed-forward of its own; 1 is dense")
    ffn_tied: bool = parameter(False, "all chunks have one feed-forward")
    fused: bool = parameter(False, "attention as one fused op, as in flash; for group=1 without residual and penalty")

    def __post_init__(self) -> None:
        require_int("group", self.group, 1)
        _require_factor("score_residual", self.score_residual)
        if self.band is not None:
            require_int("band", self.band, 0)
        if self.band_penalty is not None:
            if self.band_penalty == math.inf:
                raise ConfigError("band_penalty=inf; leave it out to hide what is outside the band")
            require_number("band_penalty", self.band_penalty, 0, MOST_FACTOR)
            if self.band is None:
                raise ConfigError(f"band_penalty={self.band_penalty!r}; there is no band: give band, too")
        require_int("ffn_chunks", self.ffn_chunks, 1)
        require_choice("ffn_tied", self.ffn_tied, (True, False))
        require_choice("fused", self.fused, (True, False))
        if self.fused and (self.group, self.score_residual, self.band_penalty) != (1, 0, None):
            raise ConfigError("fused=true has no map to hand on: it needs group=1, score_residual=0, no band_penalty")

    @classmethod
    def sweep(cls, config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        """Growing groups, up to all layers."""
        return ReuseParameters.sweep(config)

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the parameters do not fit the model."""
        for name in ("d_model", "d_ff"):
            width = getattr(config, name)
            if isinstance(width, int) and width % self.ffn_chunks:  # SymPy symbols are taken to divide
                raise ConfigError(f"ffn_chunks={self.ffn_chunks} does not divide {name}={width}: choose a divisor")

    def replaces(self, config: ModelConfig) -> tuple[str, ...]:
        """The parts of a pass that are not at off."""
        attends = self.group > 1 or self.score_residual > 0 or self.band is not None
        return (*(ATTENTION if attends else ()), *(["feed-forward"] if self.ffn_chunks > 1 else []))

    @property
    def sharing(self) -> ReuseParameters:
        """The map sharing alone: attention map reuse in full."""
        return ReuseParameters(group=self.group)

    @property
    def hides(self) -> bool:
        """A hard band: what lies outside is hidden, not penalised."""
        return self.band is not None and self.band_penalty is None

    def chunk(self, config: ModelConfig) -> ModelConfig:
        """The model whose feed-forward is that of one chunk: d / n and f / n wide; only its feed-forward is run."""
        d, f = config.d_model // self.ffn_chunks, config.d_ff // self.ffn_chunks
        return replace(config, d_model=d, d_ff=f, stack=min(config.stack, 1))  # a stem may not stack to this width


def _require_factor(name: str, value: Any) -> None:
    """0 or a normal number. A negative or vanishing multiple of a hidden score, which is -inf, would be inf or NaN."""
    if value is not False and value == 0:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST_FACTOR <= value <= MOST_FACTOR:
        raise ConfigError(f"{name}={value!r}; it must be 0 or a number from {LEAST_FACTOR:g} to {MOST_FACTOR:g}")
