"""What a search was made on, as a short text: the same weights, inputs and settings give the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.weights.layout import Weights


def checksum(weights: Weights, inputs: Array, *settings: Any) -> str:
    """SHA-256 of all weights, of the inputs, and of the settings as they print; 64 hexadecimal digits.

    Parameters
    ----------
    weights : Weights
        NumPy arrays.
    inputs : ndarray
    *settings : frozen dataclasses, numbers, texts
        Whatever else decides the result.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for array in (inputs, *_arrays(weights)):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _arrays(node: Any) -> Iterator[Array]:
    """The arrays of a tree of weights, in order."""
    if isinstance(node, list):
        for child in node:
            yield from _arrays(child)
    elif isinstance(node, Weights):
        for _, child in sorted(vars(node).items()):
            yield from _arrays(child)
    else:
        yield node
