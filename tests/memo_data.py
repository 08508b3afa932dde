"""Hidden states and maps that belong together, for tests of memoised attention."""

from __future__ import annotations

import numpy as np


def clusters(
    count: int, seed: int = 0, length: int = 8, width: int = 6, heads: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Sequences of four kinds, alike within a kind: hidden states (N, T, d), maps (N, H, T, T), kinds (N,)."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, count)
    centres = rng.standard_normal((4, length, width))
    logits = 3 * rng.standard_normal((4, heads, length, length))
    hidden = centres[kinds] + 0.1 * rng.standard_normal((count, length, width))
    e = np.exp(logits[kinds] + 0.1 * rng.standard_normal((count, heads, length, length)))
    return hidden.astype(np.float32), (e / e.sum(-1, keepdims=True)).astype(np.float32), kinds
