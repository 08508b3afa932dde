"""Random small models, workloads and method parameters for hypothesis."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from refimpl.config import ModelConfig, Workload
from refimpl.errors import ConfigError
from refimpl.methods import CATALOG, parameters

WHOLE = ("post-norm", "pre-norm", "conformer")  # recipes that see all positions at once
RECIPES = (*WHOLE, "emformer")


@st.composite
def configs(draw: Any, recipe: str | None = None, head: bool | None = None) -> ModelConfig:
    """A model of one of the recipes, of every kind of stem, position, norm and feed-forward that goes with it.

    Without `recipe` one that does not stream; with `head` a language model.
    """
    recipe = recipe or draw(st.sampled_from(WHOLE))
    streams = recipe == "emformer"
    kv_heads, grouping = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    position = "none" if streams else draw(st.sampled_from(["learned", "sinusoidal", "relative", "rotary", "none"]))
    if position == "relative":
        grouping = 1
    heads, head_dim = kv_heads * grouping, 2 * draw(st.integers(1, 3))
    stem = "stacked" if streams else draw(st.sampled_from(["tokens", "frames", "stacked", "patches"]))
    stem = "tokens" if head else stem
    gated, head = draw(st.booleans()), stem == "tokens" and (head or draw(st.booleans()))
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
        causal=not streams and draw(st.booleans()),
        stem=stem,
        vocab=draw(st.integers(2, 11)),
        token_types=draw(st.sampled_from([0, 2])),
        features=draw(st.integers(1, 5)),
        strides=tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))) if stem == "frames" else (),
        stack=draw(st.sampled_from(divisors(heads * head_dim))) if stem == "stacked" else 0,
        chunk=draw(st.integers(1, 3)) if streams else 0,
        left_context=draw(st.integers(0, 5)) if streams else 0,
        right_context=draw(st.integers(0, 3)) if streams else 0,
        position=position,
        max_positions=16,
        rope_interleaved=draw(st.booleans()),
        conv_kernel=draw(st.integers(1, 5)),
        embedding_norm=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        head=head,
        d_out=0 if head else draw(st.sampled_from([0, 4])),
    )


@st.composite
def workloads(draw: Any, config: ModelConfig | None = None) -> Workload:
    """A short sequence, its batch and mask; for a streaming `config` one or a few chunks, and no mask."""
    batch = draw(st.integers(1, 2))
    if config and config.streams:
        return Workload(seq=draw(st.integers(config.chunk, 9)), batch=batch)
    return Workload(seq=draw(st.integers(2, 7)), batch=batch, causal=draw(st.sampled_from([None, True, False])))


@st.composite
def decoders(draw: Any, head: bool | None = None) -> ModelConfig:
    """A model that can keep keys and values of past positions; with `head` a language model."""
    config = draw(configs(draw(st.sampled_from(["post-norm", "pre-norm"])), head))
    position = "rotary" if config.position == "relative" else config.position
    return replace(config, stem="tokens", strides=(), stack=0, causal=True, position=position)


@st.composite
def cached_workloads(draw: Any) -> Workload:
    """A prefill that fills a cache, or some steps of decoding after it."""
    batch = draw(st.integers(1, 2))
    if draw(st.booleans()):
        return Workload(seq=draw(st.integers(1, 7)), batch=batch, fills_cache=True)
    return Workload(seq=1, batch=batch, phase="decode", kv_len=draw(st.integers(0, 9)), steps=draw(st.integers(1, 4)))


@st.composite
def stream_workloads(draw: Any, config: ModelConfig) -> Workload:
    """Some chunks of a streaming model, of which the last may be shorter; or steps of whole ones."""
    batch = draw(st.integers(1, 2))
    if draw(st.booleans()):
        return Workload(seq=draw(st.integers(config.chunk, 12)), batch=batch, fills_cache=True)
    kv_len, steps = draw(st.integers(0, config.left_context)), draw(st.integers(1, 4))
    seq = config.chunk * draw(st.integers(1, 2)) if steps > 1 or not kv_len else draw(st.integers(1, 7))
    return Workload(seq=seq, batch=batch, phase="decode", kv_len=kv_len, steps=steps)


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


@st.composite
def folding_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of folding that fit the model."""
    heads = draw(st.sampled_from(["keep-width", "keep-count"]))
    part = config.head_dim // 2 if config.position == "rotary" else config.head_dim
    sizes = (config.heads, config.kv_heads) if heads == "keep-width" else (part,)
    fitting = [1] if config.position == "relative" else divisors(config.d_model, *sizes)
    ffn_fitting = divisors(config.d_model, config.d_ff)
    given: dict[str, Any] = {
        "fold": draw(factors(fitting, config.layers)),
        "fold_ffn": draw(factors(ffn_fitting, config.layers)),
        "heads": heads,
        "mask": draw(st.sampled_from(["frame", "subtoken"])),
        "fused": draw(st.booleans()),
        "ffn_hidden": draw(st.sampled_from([None, 1, config.d_ff])),
    }
    if set(fitting) <= set(ffn_fitting):
        given["fold_ffn"] = draw(st.sampled_from([True, False, given["fold_ffn"]]))
    if draw(st.booleans()):
        given["layers"] = sorted(draw(st.sets(st.integers(0, config.layers - 1))))
    return given


def factors(fitting: list[int], layers: int) -> Any:
    """A factor for all layers, or one for each."""
    one = st.sampled_from(fitting)
    return one | st.lists(one, min_size=layers, max_size=layers)


def divisors(*sizes: int) -> list[int]:
    """The common divisors, 1 first."""
    common = math.gcd(*sizes)
    return [n for n in range(1, common + 1) if common % n == 0]


@st.composite
def latte_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of latte, with nothing left to calibrate; models with relative positions have none that fit."""
    theta = st.none() | st.floats(0, 4) | st.integers(0, 3)
    rows = st.lists(theta, min_size=config.heads, max_size=config.heads)
    given: dict[str, Any] = {
        "nibble": draw(st.sampled_from(["floor", "round"])),
        "stage2": draw(st.sampled_from(["int8", "float"])),
    }
    off: list[dict[str, Any]] = [{"kept": 1}, {"gamma": 0}]
    thresholds = st.lists(rows, min_size=config.layers, max_size=config.layers).map(lambda t: {"thresholds": t})
    gamma = st.floats(0, 1).map(lambda gamma: {"gamma": gamma})
    return given | draw(st.sampled_from(off) | thresholds | gamma)


@st.composite
def attmemo_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of attmemo on its own inputs; off where the model has relative positions or streams."""
    if config.position == "relative" or config.streams:
        return {"tau": draw(st.sampled_from([1.1, 2]))}
    given: dict[str, Any] = {
        "tau": draw(st.sampled_from([0, 0.5, 0.9, 0.99, 1.5])),
        "skip_layers": draw(st.integers(0, config.layers)),
        "transfer": draw(st.sampled_from(["copy", "map"] if sys.platform == "linux" else ["copy"])),
        "heads": draw(st.sampled_from(["all", "first"])),
        "epochs": draw(st.integers(0, 1)),
    }
    if draw(st.booleans()):
        given["layers"] = sorted(draw(st.sets(st.integers(0, config.layers - 1))))
    return given


@st.composite
def kvsharer_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any strategy of kvsharer that fits the model; chains among its pairs, and none at all."""
    shared = draw(st.permutations(sorted(draw(st.sets(st.integers(1, max(config.layers - 1, 1)))))))
    return {
        "strategy": [[layer, draw(st.integers(0, layer - 1))] for layer in shared if layer < config.layers],
        "drop_projections": draw(st.booleans()),
        "fused": draw(st.booleans()),
    }


@st.composite
def svd_softmax_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of svd-softmax that fit the model."""
    return {
        "window": draw(st.none() | st.integers(1, config.d_model)),
        "candidates": draw(st.none() | st.integers(1, config.vocab)),
        "full_view": draw(st.sampled_from(["incremental", "replace"])),
        "decomposition": draw(st.sampled_from(["auto", "svd", "gram"])),
        "fused": draw(st.booleans()),
    }


@st.composite
def efficientasr_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of efficientasr that fit the model."""
    given: dict[str, Any] = {
        "group": draw(st.integers(1, config.layers + 1)),
        "score_residual": draw(st.sampled_from([0, 0.5, 1.0, 3])),
        "band": draw(st.none() | st.integers(0, 8)),
        "ffn_chunks": draw(st.sampled_from(divisors(config.d_model, config.d_ff))),
        "ffn_tied": draw(st.booleans()),
    }
    if given["band"] is not None:
        given["band_penalty"] = draw(st.none() | st.sampled_from([0.0, 1.5, 100.0]))
    if not draw(st.integers(0, 3)):
        given |= {"group": 1, "score_residual": 0, "band_penalty": None, "fused": True}
    return given


@st.composite
def fewer_heads_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any number of heads in whole groups."""
    group = config.heads // config.kv_heads
    return {
        "heads": draw(st.none() | st.integers(1, config.kv_heads).map(lambda heads: heads * group)),
        "keep": draw(st.sampled_from(["norm", "first"])),
        "fused": draw(st.booleans()),
    }


@st.composite
def narrow_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any width; the full one where heads are rotated."""
    least = config.head_dim if config.position == "rotary" else 1
    return {"width": draw(st.integers(least, config.head_dim)), "fused": draw(st.booleans())}


@st.composite
def local_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any window, wider than the sequence among them."""
    return {"window": draw(st.none() | st.integers(0, 9))}


@st.composite
def linformer_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of linformer; off where the model has no use for it."""
    able = not (config.streams or config.causal or config.position == "relative")
    return {
        "length": draw(st.none() | st.integers(1, 8)) if able else None,
        "projection": draw(st.sampled_from(["average", "random"])),
        "seed": draw(st.integers(0, 2)),
        "fused": draw(st.booleans()),
    }


@st.composite
def linear_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Either feature map."""
    return {"feature": draw(st.sampled_from(["elu", "relu"]))}


@st.composite
def headshare_parameters(draw: Any, config: ModelConfig) -> dict[str, Any]:
    """Any parameters of headshare that fit the model: none but the off knob where nothing can be shared."""
    most = (config.layers - 1) / config.layers
    if config.kv_heads != config.heads or not most:
        return {"ratio": 0}
    given: dict[str, Any] = {
        "ratio": draw(st.sampled_from([0, 0.3, most]).filter(lambda ratio: ratio <= most) | st.floats(0, most)),
        "match": draw(st.sampled_from(["q", "k", "v", "qk", "qkv", "total"])),
        "share_output": draw(st.booleans()),
    }
    if draw(st.booleans()):
        given["matches"] = draw(head_matches(config.layers, config.heads))
        given["chains"] = draw(st.sampled_from(["transitive", "repo"]))
    return given


@st.composite
def head_matches(draw: Any, layers: int, heads: int) -> list[list[int]]:
    """A source in an earlier layer for every head of the layers 1 to L - 1, in any order."""
    targets = draw(st.permutations([(layer, head) for layer in range(1, layers) for head in range(heads)]))
    return [[layer, head, draw(st.integers(0, layer - 1)), draw(st.integers(0, heads - 1))] for layer, head in targets]


ON_HEADS = ("svd-softmax",)  # methods for models with a language head alone
AT_ONCE = ("linear",)  # methods that keep no keys for a cache, so that nothing streams either

# method -> what draws its parameters for a model; methods without parameters are not listed
PARAMETERS = {
    "reuse": reuse_parameters,
    "folding": folding_parameters,
    "svd-softmax": svd_softmax_parameters,
    "attmemo": attmemo_parameters,
    "latte": latte_parameters,
    "kvsharer": kvsharer_parameters,
    "headshare": headshare_parameters,
    "efficientasr": efficientasr_parameters,
    "fewer-heads": fewer_heads_parameters,
    "narrow": narrow_parameters,
    "local": local_parameters,
    "linformer": linformer_parameters,
    "linear": linear_parameters,
}


@st.composite
def compositions(
    draw: Any, config: ModelConfig, cached: bool = False, least: int = 2, causal: bool = False
) -> tuple[str, dict[str, Any]]:
    """Two or more methods that can be combined, joined by + in any order, and the parameters of each."""
    found: dict[str, Any] = {}
    unable = {"dense", *(AT_ONCE if cached else ()), *(("linformer",) if causal or cached else ())}
    for method in draw(st.permutations([name for name in CATALOG if name not in unable])):
        params = {"tau": 1.1} if method == "attmemo" and cached else draw(parameters_for(method, config))
        wider = {**found, method: params}
        if fits("+".join(wider), wider if len(wider) > 1 else params, config):
            found = wider
    assume(len(found) >= least)
    return "+".join(found), found


def parameters_for(method: str, config: ModelConfig) -> Any:
    """A strategy of parameters of `method` that fit the model."""
    return PARAMETERS[method](config) if method in PARAMETERS else st.just({})


def fits(method: str, params: dict[str, Any], config: ModelConfig) -> bool:
    """Whether the model has the sizes that the parameters need."""
    try:
        parameters(method, params, config)
    except ConfigError:
        return False
    return True


def inputs_for(config: ModelConfig, workload: Workload, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    """Random inputs of the model's kind."""
    rng = np.random.default_rng(seed)
    if config.stem == "tokens":
        return rng.integers(0, config.vocab, (workload.batch, workload.seq))
    rows = config.stem_length(workload.seq)
    return rng.standard_normal((workload.batch, rows, config.features)).astype(dtype)
