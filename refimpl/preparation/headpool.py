"""Weights of which some heads use those of others: as they are run, and as they are kept.

Run: every layer has its matrices Wq, Wk, Wv, Wo in full. Kept: a pool of distinct heads and, for each head, its place
in the pool. An entry holds a head's rows of Wq, Wk and Wv with their biases and, where Wo is shared, its columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import WeightsError
from refimpl.parameters.headshare import require_a_key_head_each
from refimpl.weights.layout import Weights, assemble

VERSION = 1  # of the file


def share(weights: Weights, config: ModelConfig, sources: Sequence[int], share_output: bool = True) -> Weights:
    """The weights in which every head has the slices of its source, layer by layer and in full.

    Parameters
    ----------
    weights : Weights
        Of the exact model, as NumPy arrays; they are not changed.
    config : ModelConfig
        With as many key heads as query heads.
    sources : sequence of int
        For each of the L H heads, as l H + h, the head whose weights it uses.
    share_output : bool
        The columns of Wo, too.

    Returns
    -------
    weights : Weights
        Layers without a replaced head are the same objects. Wq, Wk, Wv and Wo, and the biases of the first three, come
        from the source; the bias of Wo and the map and biases of relative positions stay those of the layer.
    """
    taken: dict[int, dict[int, tuple[int, int]]] = {}  # layer -> its head -> layer and head of the source
    for number, source in enumerate(sources):
        if source != number:
            layer, head = divmod(number, config.heads)
            taken.setdefault(layer, {})[head] = divmod(source, config.heads)
    layers = list(weights.layers)
    for index, heads in taken.items():
        layers[index] = _taking(weights, config, index, heads, share_output)
    return weights.but(layers=layers) if taken else weights


def _taking(
    weights: Weights, config: ModelConfig, index: int, taken: Mapping[int, tuple[int, int]], share_output: bool
) -> Weights:
    """A layer whose heads `taken` have the slices of other (layer, head)s."""
    layer: Weights = weights.layers[index]
    qkv = Weights(**{name: array.copy() for name, array in vars(layer.attention.qkv).items()})
    output = layer.attention.output
    if share_output:
        output = output.but(weight=output.weight.copy())
    for head, (source_layer, source_head) in taken.items():
        source = weights.layers[source_layer].attention
        for name, array in vars(qkv).items():
            _rows(array, config)[:, head] = _rows(getattr(source.qkv, name), config)[:, source_head]
        if share_output:
            _columns(output.weight, config)[:, head] = _columns(source.output.weight, config)[:, source_head]
    return layer.but(attention=layer.attention.but(qkv=qkv, output=output))


def _rows(array: Array, config: ModelConfig) -> Array:
    """Wq, Wk and Wv, or their biases, by head: (3, H, D, d) or (3, H, D), a view."""
    return array.reshape(3, config.heads, config.head_dim, *array.shape[1:])


def _columns(array: Array, config: ModelConfig) -> Array:
    """Wo by head: (d, H, D), a view."""
    return array.reshape(-1, config.heads, config.head_dim)


# --- kept ---------------------------------------------------------------------------------------------------------


def compact(
    weights: Weights, config: ModelConfig, sources: Sequence[int], share_output: bool = True
) -> dict[str, Array]:
    """The weights without what is in them twice: dotted name -> array.

    Parameters
    ----------
    weights, config, sources, share_output
        As in `share`, before or after it. Heads that are used must use their own weights.

    Returns
    -------
    tensors : dict
        The names of `refimpl.weights.layout.shapes` without those of Wq, Wk and Wv, and without Wo where it is shared;
        instead, for K distinct heads, ``heads.qkv`` (K, 3, D, d), ``heads.bias`` (K, 3, D) where there are biases,
        ``heads.output`` (K, d, D) where it is shared, and ``heads.index`` (L, H) int32, the place of each head.

    Raises
    ------
    ConfigError
        If query heads share key heads.
    """
    require_a_key_head_each(config)
    distinct, places = np.unique(np.asarray(sources), return_inverse=True)
    tensors = dict(_named(weights))
    pool: dict[str, list[Array]] = {"heads.qkv": [], "heads.bias": [], "heads.output": []}
    for index in range(config.layers):
        own = [head - index * config.heads for head in distinct.tolist() if head // config.heads == index]
        name = f"layers.{index}.attention"
        pool["heads.qkv"] += list(_rows(tensors.pop(f"{name}.qkv.weight"), config).swapaxes(0, 1)[own])
        if config.bias:
            pool["heads.bias"] += list(_rows(tensors.pop(f"{name}.qkv.bias"), config).swapaxes(0, 1)[own])
        if share_output:
            pool["heads.output"] += list(_columns(tensors.pop(f"{name}.output.weight"), config).swapaxes(0, 1)[own])
    tensors |= {name: np.stack(slices) for name, slices in pool.items() if slices}
    return tensors | {"heads.index": places.reshape(config.layers, config.heads).astype(np.int32)}


def expand(tensors: Mapping[str, Array], config: ModelConfig) -> Weights:
    """The weights as they are run, from those of `compact`; bit for bit those of `share`.

    Raises
    ------
    WeightsError
        If a tensor is missing, superfluous, wrongly shaped or not finite, or the index points outside the pool.
    """
    rest = dict(tensors)
    pool = {name: rest.pop(f"heads.{name}") for name in ("qkv", "bias", "output", "index") if f"heads.{name}" in rest}
    _check_pool(pool, config)
    for index, places in enumerate(pool["index"]):
        name = f"layers.{index}.attention"
        rest[f"{name}.qkv.weight"] = _joined_rows(pool["qkv"][places])
        if "bias" in pool:
            rest[f"{name}.qkv.bias"] = _joined_rows(pool["bias"][places])
        if "output" in pool:
            rest[f"{name}.output.weight"] = pool["output"][places].swapaxes(0, 1).reshape(config.d_model, -1)
    positions = np.atleast_1d(rest["stem.positions"]).shape[0] if "stem.positions" in rest else 0
    return assemble(config, rest, positions)


def _joined_rows(slices: Array) -> Array:
    """(H, 3, D, ...) -> (3 H D, ...)."""
    return slices.swapaxes(0, 1).reshape(-1, *slices.shape[3:])


def _check_pool(pool: Mapping[str, Array], config: ModelConfig) -> None:
    for name in ("qkv", "index"):
        if name not in pool:
            raise WeightsError(f"the weights lack 'heads.{name}': these are no weights with shared heads")
    index, count, d, D = pool["index"], np.atleast_1d(pool["qkv"]).shape[0], config.d_model, config.head_dim
    expected = {
        "qkv": (count, 3, D, d),
        "bias": (count, 3, D),
        "output": (count, d, D),
        "index": (config.layers, config.heads),
    }
    for name, array in pool.items():
        if array.shape != expected[name]:
            raise WeightsError(f"'heads.{name}' has shape {array.shape}; the model needs {expected[name]}")
    if index.dtype.kind != "i" or index.min() < 0 or index.max() >= count:
        raise WeightsError(f"'heads.index' must hold whole numbers from 0 to {count - 1}, one for each head")


def _named(node: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays of a tree of weights with their dotted names."""
    if isinstance(node, (list, Weights)):
        children = enumerate(node) if isinstance(node, list) else vars(node).items()
        for key, child in children:
            yield from _named(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


# --- files --------------------------------------------------------------------------------------------------------


def save(
    path: str | Path, weights: Weights, config: ModelConfig, sources: Sequence[int], share_output: bool = True
) -> None:
    """Write the weights of `compact` as ``.npz``, whole or not at all.

    Raises
    ------
    WeightsError
        If the file cannot be written.
    """
    path = Path(path)
    tensors = compact(weights, config, sources, share_output)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with scratch.open("wb") as file:
                np.savez(file, version=np.int32(VERSION), **tensors)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror}") from error


def load(path: str | Path, config: ModelConfig) -> Weights:
    """The weights of a file that `save` wrote, ready to be run by ``dense``.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, of another version, or does not fit the model.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            tensors = {name: archive[name] for name in archive.files}
            if not all(isinstance(array, np.ndarray) for array in tensors.values()):
                raise ValueError("a member is no array")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        raise WeightsError(f"{path} is not an .npz file of weights, or it is damaged") from error
    version = tensors.pop("version", None)
    if version is None or version.shape != () or version != VERSION:
        raise WeightsError(f"{path} was not written as weights with shared heads of version {VERSION}")
    wrong = [name for name, array in tensors.items() if name != "heads.index" and array.dtype.kind != "f"]
    if wrong:
        raise WeightsError(f"{path}: '{wrong[0]}' holds {tensors[wrong[0]].dtype}; weights are floating-point numbers")
    return expand(tensors, config)
