"""What the cost model says about each claim, under the conditions of its settings; nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import costmodel
from costmodel.closed_form import Estimate
from costmodel.energy import energy, energy_model
from refimpl.components import ATTENTION, HEAD, OUTPUT, POSITIONS, QKV, SCORES, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig, Workload, override, preset
from refimpl.parameters.folding import SETTINGS

from .claims import Reading

Settings = Mapping[str, Any]
SELF_ATTENTION = (QKV, POSITIONS, SCORES, SOFTMAX, WEIGHTED_SUM, ATTENTION, OUTPUT)


# --- shapes ---------------------------------------------------------------------------------------------------------


def one_head(s: Settings) -> ModelConfig:
    """A language head of the claim's size, on one small layer that is not looked at."""
    base = preset("smollm2-135m")
    shape = override(base, layers=1, d_model=s["width"], heads=4, kv_heads=4, d_ff=s["width"], vocab=s["words"])
    return _named(shape, f"a head of {s['words']:,} x {s['width']}")


def llama(s: Settings) -> ModelConfig:
    """Llama-2 in the claim's size."""
    sizes = {name: s[name] for name in ("layers", "d_model", "heads", "d_ff")}
    return _named(override(preset("llama-2-7b"), kv_heads=s["heads"], **sizes), "Llama-2-13B")


def encoder(s: Settings) -> ModelConfig:
    """A speech encoder in the claim's size: our choice where a paper names none."""
    sizes = {name: s[name] for name in ("layers", "d_model", "heads", "d_ff")}
    return _named(
        override(preset(s["model"]), **sizes), f"encoder of {s['layers']} layers, d {s['d_model']}, f {s['d_ff']}"
    )


def _named(config: ModelConfig, name: str) -> ModelConfig:
    return replace(config, name=name)


# --- attention map reuse --------------------------------------------------------------------------------------------


def reuse_speedup(s: Settings) -> list[Reading]:
    """Matrix FLOPs of dense over those of reuse: a bound where time goes by them."""
    config, found = preset(s["model"]), []
    for of, parts in (("matrix FLOPs of the model", None), ("matrix FLOPs of self-attention", SELF_ATTENTION)):
        for group in s["groups"]:
            for length in s["lengths"]:
                own = costmodel.estimate("reuse", config, Workload(length), {"group": group})
                dense = costmodel.estimate("dense", config, Workload(length))
                where = f"{config.name}, G={group}, T={length}"
                condition = where if parts is None else f"self-attention alone, {where}"
                found.append(
                    Reading(_flops(dense, parts) / _flops(own, parts), f"{of}, dense / reuse", condition, "ratio")
                )
    return found


def reuse_training_time(s: Settings) -> list[Reading]:
    """The share of the forward pass that is spared: also that of a backward pass of two products for each of it."""
    return [
        Reading(1 - 1 / one.value, "matrix FLOPs that are spared", one.condition)
        for one in reuse_speedup(s)
        if "self-attention" not in one.of
    ]


def _flops(estimate: Estimate, parts: Iterable[str] | None) -> float:
    costs = estimate.by_component()
    return float(sum(costs[name].matmul_flops for name in costs if parts is None or name in parts))


# --- folding --------------------------------------------------------------------------------------------------------


def folding_size(s: Settings) -> list[Reading]:
    """Weights of the whole product that folding spares."""
    config = preset(s["model"])
    dense = costmodel.estimate("dense", config, Workload(config.chunk))
    whole = dense.params_bytes + dense.companion_bytes
    return [
        Reading(
            (dense.params_bytes - _folded(config, name, Workload(config.chunk)).params_bytes) / whole,
            "weights of encoder, predictor and joiner that are spared",
            _folding_words(config, name),
        )
        for name in SETTINGS
    ]


def folding_power(s: Settings) -> list[Reading]:
    """Energy of a chunk, predictor and joiner included, that folding spares."""
    config, model = preset(s["model"]), energy_model(s["energy"])
    work = Workload(config.chunk, phase="decode", kv_len=config.left_context)
    dense = energy(costmodel.estimate("dense", config, work), model).total.total
    return [
        Reading(
            float(1 - energy(_folded(config, name, work), model).total.total / dense),
            f"energy of a chunk that is spared, by the model {model.name}",
            _folding_words(config, name),
        )
        for name in SETTINGS
    ]


def _folded(config: ModelConfig, setting: str, work: Workload) -> Estimate:
    return costmodel.estimate("folding", config, work, {"setting": setting})


def _folding_words(config: ModelConfig, setting: str) -> str:
    return f"{config.name}, our setting {setting}"


# --- SVD-softmax ----------------------------------------------------------------------------------------------------


def svd_softmax_multiplications(s: Settings) -> list[Reading]:
    """(d^2 + V W + N d) / (V d), or with N (d - W) where the full view adds to the preview."""
    return [
        Reading(
            _head_part(s, view, "matmul_flops"), "multiplications of the head", f"{_svd_words(s)}, full view {view}"
        )
        for view in ("replace", "incremental")
    ]


def svd_softmax_speedup(s: Settings) -> list[Reading]:
    """Weight bytes of the exact head over those of SVD-softmax, at one position: a bound where time goes by them."""
    return [
        Reading(
            1 / _head_part(s, view, "weight_bytes"),
            "weight bytes read for one position, exact / SVD-softmax",
            f"{_svd_words(s)}, full view {view}",
            "ratio",
        )
        for view in ("incremental", "replace")
    ]


def _head_part(s: Settings, view: str, quantity: str) -> float:
    params = {"window": s["window"], "candidates": s["candidates"], "full_view": view}
    own, exact = (
        costmodel.estimate(method, one_head(s), Workload(1), given).by_component()[HEAD]
        for method, given in (("svd-softmax", params), ("dense", None))
    )
    return float(getattr(own, quantity) / getattr(exact, quantity))


def _svd_words(s: Settings) -> str:
    return f"D={s['width']}, W={s['window']}, N={s['candidates']:,}"


# --- AttMemo --------------------------------------------------------------------------------------------------------


def attmemo_latency(s: Settings) -> list[Reading]:
    """Matrix FLOPs that are spared, the embedding counted: a bound where time goes by them."""
    config, found = preset(s["model"]), []
    for rate in s["hit_rates"]:
        for length in s["lengths"]:
            work = Workload(length, s["batch"])
            own = costmodel.estimate("attmemo", config, work, {"hit_rate": rate})
            dense = costmodel.estimate("dense", config, work)
            condition = f"{config.name}, T={length}, {100 * rate:.0f} % of the maps found"
            found.append(
                Reading(1 - _flops(own, None) / _flops(dense, None), "matrix FLOPs that are spared", condition)
            )
    return found


# --- LATTE ----------------------------------------------------------------------------------------------------------


def latte_filtered(s: Settings) -> list[Reading]:
    """What filtering so much spares of scores and weighted sum: with 4-bit multipliers, and in FLOPs without."""
    config, kept = preset(s["model"]), s["kept"]
    own = costmodel.estimate("latte", config, Workload(s["length"]), {"kept": kept})
    sizes = next(op.sizes for op in own.ops if op.name == "filtered_attention")
    dense = costmodel.estimate("dense", config, Workload(s["length"]))
    work = _flops(own, (ATTENTION,)) / _flops(dense, (SCORES, WEIGHTED_SUM))
    pairs = sizes["maps"] * _pairs(s["length"], config.causal)
    units = (pairs + 7 * sizes["kept"]) / (8 * pairs)  # of 4-bit products: 1 + 3 rho for scores, 4 rho for the sum
    condition = f"{100 * (1 - kept):.2f} % filtered"
    return [
        Reading(1 - units, "4-bit products of scores and weighted sum that are spared", condition, comparable=False),
        Reading(1 - work, "matrix FLOPs of scores and weighted sum that are spared", condition, comparable=False),
    ]


def _pairs(length: int, causal: bool) -> int:
    return length * (length + 1) // 2 if causal else length * length


# --- KVSharer -------------------------------------------------------------------------------------------------------


def kvsharer_computation(s: Settings) -> list[Reading]:
    """Keys and values that are neither projected nor kept."""
    config, found = llama(s), []
    for count in s["shared"]:
        own, dense = _decoding(config, s["kv_len"], count)
        share = 1 - own.cache_bytes / dense.cache_bytes
        found.append(Reading(share, "keys and values that are spared", _sharing_words(config, count)))
    return found


def kvsharer_speedup(s: Settings) -> list[Reading]:
    """Bytes of a decoding step, exact over shared: a bound where time goes by them."""
    config, found = llama(s), []
    for count in s["shared"]:
        own, dense = _decoding(config, s["kv_len"], count)
        ratio = float(dense.total.bytes_moved / own.total.bytes_moved)
        words = f"{_sharing_words(config, count)}, S={s['kv_len']}, batch 1"
        found.append(Reading(ratio, "bytes of a decoding step, dense / kvsharer", words, "ratio"))
    return found


def _decoding(config: ModelConfig, kv_len: int, count: int) -> tuple[Estimate, Estimate]:
    work = Workload(1, phase="decode", kv_len=kv_len, dtype="float16")
    return costmodel.estimate("kvsharer", config, work, {"layers": count}), costmodel.estimate("dense", config, work)


def _sharing_words(config: ModelConfig, count: int) -> str:
    return f"{config.name}, {count} of {config.layers} layers share"


# --- DirectShare and EfficientASR -----------------------------------------------------------------------------------


def headshare_ratio(s: Settings) -> list[Reading]:
    """Attention weights that are not kept, and their part of all weights."""
    config = preset(s["closed_form"])
    own = costmodel.estimate("headshare", config, Workload(1), {"ratio": s["ratio"]})
    dense = costmodel.estimate("dense", config, Workload(1))
    index = 4 * config.layers * config.heads  # bytes: where each head's weights are, kept beside them
    spared = dense.params_bytes + index - own.params_bytes
    attention = own.itemsize * config.layers * 2 * config.d_model * (config.d_attention + config.d_kv)
    return [
        Reading(
            spared / attention, "attention weights that are spared", f"{config.name}, chains followed to their end"
        ),
        Reading(spared / dense.params_bytes, "of all weights", config.name, comparable=False),
    ]


def efficientasr_parameters(s: Settings) -> list[Reading]:
    """Weights of an encoder that shared maps and chunked feed-forwards spare."""
    config = encoder(s)
    dense = costmodel.estimate("dense", config, Workload(64)).params_bytes
    return [
        Reading(
            1
            - costmodel.estimate("efficientasr", config, Workload(64), efficientasr_params(*choice)).params_bytes
            / dense,
            "weights of the encoder that are spared",
            efficientasr_words(config, *choice),
        )
        for choice in s["choices"]
    ]


def efficientasr_params(group: int, chunks: int) -> dict[str, Any]:
    """Parameters of the method for a group of layers and chunks of channels, without a sum of scores."""
    return {"group": group, "ffn_chunks": chunks, "score_residual": 0}


def efficientasr_words(config: ModelConfig, group: int, chunks: int) -> str:
    """The setting in words."""
    return f"{config.name}, G={group}, n={chunks}"


# claim -> what the cost model says
CLOSED_FORMS: dict[str, Callable[[Settings], list[Reading]]] = {
    "reuse-speedup": reuse_speedup,
    "reuse-training-time": reuse_training_time,
    "folding-size": folding_size,
    "folding-power": folding_power,
    "svd-softmax-multiplications": svd_softmax_multiplications,
    "svd-softmax-speedup": svd_softmax_speedup,
    "attmemo-latency-mean": attmemo_latency,
    "attmemo-latency-max": attmemo_latency,
    "latte-vision": latte_filtered,
    "latte-language": latte_filtered,
    "kvsharer-computation": kvsharer_computation,
    "kvsharer-speedup": kvsharer_speedup,
    "headshare-ratio": headshare_ratio,
    "efficientasr-parameters": efficientasr_parameters,
}
