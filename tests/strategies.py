"""Random small models, workloads and method parameters for hypothesis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.config import ModelConfig, Workload

RECIPES = ("post-norm", "pre-norm", "conformer")


@st.composite
def configs(draw: Any, recipe: str | None = None) -> ModelConfig:
    """A model of one of the recipes, of every kind of stem, position, norm and feed-forward that goes with it."""
    recipe = recipe or draw(st.sampled_from(RECIPES))
    kv_heads, grouping = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    position = draw(st.sampled_from(["learned", "sinusoidal", "relative", "rotary", "none"]))
    if position == "relative":
        grouping = 1
    heads, head_dim = kv_heads * grouping, 2 * draw(st.integers(1, 3))
    stem = draw(st.sampled_from(["tokens", "frames", "patches"]))
    gated = draw(st.booleans())
    return ModelConfig(
        name="random",
        recipe=recipe,
        layers=draw(st.integers(1, 5)),
        d_model=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=draw(st.integers(1, 9)),
        activation="silu" if gated else draw(st.sampled_from(["gelu", "gelu_tanh", "silu", "relu"])),
        gated=gated,
        norm=draw(st.sampled_from(["layer", "rms"])),
        bias=draw(st.booleans()),
        causal=draw(st.booleans()),
        stem=stem,
        vocab=draw(st.integers(2, 11)),
        token_types=draw(st.sampled_from([0, 2])),
        features=draw(st.integers(1, 5)),
        strides=tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))) if stem == "frames" else (),
        position=position,
        max_positions=16,
        rope_interleaved=draw(st.booleans()),
        conv_kernel=draw(st.integers(1, 5)),
        embedding_norm=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        head=draw(st.booleans()) if stem == "tokens" else False,
    )


@st.composite
def workloads(draw: Any) -> Workload:
    """A short sequence, its batch and mask."""
    return Workload(
        seq=draw(st.integers(2, 7)), batch=draw(st.integers(1, 2)), causal=draw(st.sampled_from([None, True, False]))
    )


@st.composite
def decoders(draw: Any) -> ModelConfig:
    """A model that can keep keys and values of past positions."""
    config = draw(configs(draw(st.sampled_from(["post-norm", "pre-norm"]))))
    position = "rotary" if config.position == "relative" else config.position
    return replace(config, stem="tokens", strides=(), causal=True, position=position)


@st.composite
def cached_workloads(draw: Any) -> Workload:
    """A prefill that fills a cache, or some steps of decoding after it."""
    batch = draw(st.integers(1, 2))
    if draw(st.booleans()):
        return Workload(seq=draw(st.integers(1, 7)), batch=batch, fills_cache=True)
    return Workload(seq=1, batch=batch, phase="decode", kv_len=draw(st.integers(0, 9)), steps=draw(st.integers(1, 4)))


@st.composite
def reuse_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of reuse that fit the model."""
    given: dict[str, Any] = {
        "group": draw(st.integers(1, config.layers + 1)),
        "share": draw(st.sampled_from(["probabilities", "scores"])),
        "head_order": draw(st.sampled_from(["rotate", "keep"])),
        "output_projection": draw(st.booleans()),
    }
    if draw(st.booleans()):
        owner = draw(st.lists(st.integers(0, 2), min_size=config.layers, max_size=config.layers))
        groups = [[layer for layer in range(config.layers) if owner[layer] == group] for group in range(3)]
        given["groups"] = [group for group in groups if group]
    if config.kv_heads == config.heads and draw(st.booleans()):
        given["heads"] = draw(st.integers(0, config.heads))
    return given


# method -> what draws its parameters for a model; methods without parameters are not listed
PARAMETERS = {"reuse": reuse_parameters}


def parameters_for(method: str, config: ModelConfig) -> Any:
    """A strategy of parameters of `method` that fit the model."""
    return PARAMETERS[method](config) if method in PARAMETERS else st.just({})


def inputs_for(config: ModelConfig, workload: Workload, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    """Random inputs of the model's kind."""
    rng = np.random.default_rng(seed)
    if config.stem == "tokens":
        return rng.integers(0, config.vocab, (workload.batch, workload.seq))
    rows = config.stem_length(workload.seq)
    return rng.standard_normal((workload.batch, rows, config.features)).astype(dtype)
