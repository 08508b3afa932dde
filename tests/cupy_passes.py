"""Small models of every recipe, for whole passes on the CuPy engine."""

from __future__ import annotations

import numpy as np

from refimpl.config import ModelConfig
from refimpl.weights.layout import Weights

SIZES = {"layers": 4, "d_model": 24, "heads": 4, "d_ff": 40}
CONFIGS = {
    "post-norm": ModelConfig(
        name="bert", recipe="post-norm", **SIZES, vocab=17, token_types=2, position="learned", max_positions=12,
        embedding_norm=True, final_norm=False,
    ),
    "pre-norm": ModelConfig(
        name="whisper", recipe="pre-norm", **SIZES, stem="frames", features=5, strides=(1, 2), position="sinusoidal",
        max_positions=12,
    ),
    "llama": ModelConfig(
        name="llama", recipe="pre-norm", **SIZES, kv_heads=2, gated=True, norm="rms", bias=False, causal=True, vocab=17,
        position="rotary", head=True,
    ),
    "vit": ModelConfig(
        name="vit", recipe="pre-norm", **SIZES, activation="gelu_tanh", stem="patches", features=6, position="learned",
        max_positions=12,
    ),
    "conformer": ModelConfig(
        name="conformer", recipe="conformer", **SIZES, activation="silu", stem="frames", features=5, strides=(2,),
        position="relative", conv_kernel=5,
    ),
}  # fmt: skip


def inputs_for(config):
    rng = np.random.default_rng(7)
    if config.stem == "tokens":
        return rng.integers(0, config.vocab, (2, 9))
    return rng.standard_normal((2, config.stem_length(9), config.features), dtype=np.float32)


def weights_as(dtype, node):
    if isinstance(node, list):
        return [weights_as(dtype, child) for child in node]
    if isinstance(node, Weights):
        return Weights(**{name: weights_as(dtype, child) for name, child in vars(node).items()})
    return node.astype(dtype)
