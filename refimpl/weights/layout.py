"""What a model's weights are called and what shape they have: one declaration for readers, random weights and costs.

Every linear map is stored (d_out, d_in), so ``y = x Wᵀ + b``. A convolution is stored (d_out, kernel, d_in), so that
it is a linear map of its window. Query, key and value maps are one matrix with the rows of Q, K and V in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.errors import WeightsError

Shape = tuple[int, ...]
CONV_KERNEL = 3  # of the strided convolutions in front of the first layer


def shapes(config: ModelConfig, positions: int = 0) -> dict[str, Shape]:
    """Every weight of the model: dotted name -> shape.

    Parameters
    ----------
    config : ModelConfig
    positions : int
        Rows wanted of a position table; default the model's own `max_positions`.
    """
    table = dict(_stem(config, positions or config.max_positions))
    for index in range(config.layers):
        table.update({f"layers.{index}.{name}": shape for name, shape in layer_shapes(config).items()})
    if config.final_norm:
        table.update(_norm("final_norm", config.d_model, config.norm == "layer"))
    if config.d_out:
        table.update(_linear("output", config.d_out, config.d_model, True))
        table.update(_norm("output_norm", config.d_out, config.norm == "layer"))
    return table


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The weights of one layer."""
    d, f = config.d_model, config.d_ff
    shifted = config.norm == "layer"  # an RMS norm has no bias
    table = dict(_norm("attention_norm", d, shifted))
    table.update(_linear("attention.qkv", config.d_attention + 2 * config.d_kv, d, config.bias))
    table.update(_linear("attention.output", d, config.d_attention, config.bias))
    if config.position == "relative":
        table.update(_linear("attention.position", config.d_attention, d, False))
        table["attention.content_bias"] = (config.d_attention,)  # u, head after head
        table["attention.position_bias"] = (config.d_attention,)  # v
    for sublayer in _feed_forwards(config):
        table.update(_norm(f"{sublayer}_norm", d, shifted))
        table.update(_linear(f"{sublayer}.up", (2 if config.gated else 1) * f, d, config.bias))
        table.update(_linear(f"{sublayer}.down", d, f, config.bias))
    if config.recipe == "conformer":
        table.update(_norm("convolution_norm", d, shifted))
        table.update(_linear("convolution.expand", 2 * d, d, config.bias))
        table["convolution.depthwise.weight"] = (config.conv_kernel, d)
        table["convolution.depthwise.bias"] = (d,)
        for name in ("mean", "variance", "weight", "bias"):
            table[f"convolution.batch_norm.{name}"] = (d,)
        table.update(_linear("convolution.contract", d, d, config.bias))
    if config.recipe in ("conformer", "emformer"):
        table.update(_norm("final_norm", d, shifted))
    return table


def _feed_forwards(config: ModelConfig) -> tuple[str, ...]:
    return ("first_feed_forward", "feed_forward") if config.recipe == "conformer" else ("feed_forward",)


def _stem(config: ModelConfig, positions: int) -> Iterator[tuple[str, Shape]]:
    d = config.d_model
    if config.stem == "tokens":
        yield "stem.embedding", (config.vocab, d)
        if config.token_types:
            yield "stem.token_types", (config.token_types, d)
    elif config.stem == "frames":
        widths = (config.features,) + (d,) * len(config.strides)
        for index, d_in in enumerate(widths[:-1]):
            yield f"stem.convolutions.{index}.weight", (d, CONV_KERNEL, d_in)
            yield f"stem.convolutions.{index}.bias", (d,)
    elif config.stem == "stacked":
        yield from _linear("stem.frames", d // config.stack, config.features, False)
    else:
        yield from _linear("stem.patches", d, config.features, True)
        yield "stem.class_token", (1, d)
    if config.position in ("learned", "sinusoidal"):
        yield "stem.positions", (positions, d)
    if config.embedding_norm:
        yield from _norm("stem.norm", d, config.norm == "layer")


def _linear(name: str, d_out: int, d_in: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (d_out, d_in)
    if bias:
        yield f"{name}.bias", (d_out,)


def _norm(name: str, width: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


class Weights(SimpleNamespace):
    """Weights by attribute: ``weights.layers[0].attention.qkv.weight``; an absent ``bias`` reads as None."""

    bias: Any = None

    def but(self, **changes: Any) -> Weights:
        """These weights with some attributes replaced; the others are the same objects."""
        return Weights(**{**vars(self), **changes})


def rows_of(linear: Weights, rows: list[slice]) -> Weights:
    """A linear map cut down to these ranges of its outputs; a view where there is one range."""

    def cut(array: Any) -> Any:
        return array[rows[0]] if len(rows) == 1 else np.concatenate([array[part] for part in rows])

    return Weights(**{name: cut(value) for name, value in vars(linear).items()})


def assemble(config: ModelConfig, tensors: Mapping[str, Any], positions: int = 0) -> Weights:
    """Turn a flat mapping into `Weights`, after checking that every weight is there with its shape and is finite.

    Raises
    ------
    WeightsError
        Naming the first weight that is missing, superfluous, wrongly shaped or not finite.
    """
    expected = shapes(config, positions)
    _check(expected, tensors)
    root = Weights(layers=[Weights() for _ in range(config.layers)])
    for name in expected:
        *parents, leaf = name.split(".")
        node: Any = root
        for parent in parents:
            node = _child(node, parent)
        setattr(node, leaf, tensors[name])
    return root


def _child(node: Any, name: str) -> Any:
    if isinstance(node, list):
        while len(node) <= int(name):
            node.append(Weights())
        return node[int(name)]
    if not hasattr(node, name):
        setattr(node, name, [] if name == "convolutions" else Weights())
    return getattr(node, name)


def _check(expected: Mapping[str, Shape], tensors: Mapping[str, Any]) -> None:
    for name in tensors:
        if name not in expected:
            raise WeightsError(f"the weights hold '{name}', which this model does not have")
    for name, shape in expected.items():
        if name not in tensors:
            raise WeightsError(f"the weights lack '{name}' of shape {shape}")
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(f"'{name}' has shape {tuple(tensors[name].shape)}; the model needs {shape}")
        if isinstance(tensors[name], np.ndarray) and not np.isfinite(tensors[name]).all():
            raise WeightsError(f"'{name}' holds NaN or infinite values")
