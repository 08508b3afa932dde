"""The basis of SVD-softmax: directions in which the head A (V, D) differs most from word to word.

    none          A = U S Qᵀ, the eigenvectors Q of AᵀA, the largest values first:          R = A Q,   g = Qᵀ h
    activations   C = E[h hᵀ] + 1e-4 tr(C) / D I = G Gᵀ (Cholesky), eigenvectors E of Gᵀ AᵀA G:
                                                                                            R = A G E, g = Eᵀ G⁻¹ h

Both leave ``R g = A h``. The first W columns of R hold as much of ``|A|``, or of ``E |A h|``, as W columns can.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, InputError
from refimpl.methods.flash import Flash
from refimpl.methods.subject import Progress, Subject
from refimpl.model import Runner
from refimpl.parameters.svd_softmax import Basis, SVDSoftmaxParameters
from refimpl.recorder import At
from refimpl.weights.layout import Weights

GRAM_WEIGHTS = 2**24  # above, "auto" takes the Gram matrix: an SVD in float64 would hold three times 128 MiB
RIDGE = 1e-4  # added to C, in parts of its mean eigenvalue
BLOCK = 2**22  # weights turned at a time: 32 MiB in float64
SHARES = (16, 8, 4, 2)  # of the spectrum, in the first D / 16, ... directions


def find_basis(parameters: SVDSoftmaxParameters, subject: Subject) -> Basis:
    """Decompose the head of the subject's model.

    Raises
    ------
    ConfigError
        If `weighting` needs inputs and there are none.
    InputError
        If the hidden states on these inputs are not finite.
    """
    start, config, head = time.perf_counter(), subject.model.config, subject.model.weights.stem.embedding
    record = {"model": config.name, "vocab": config.vocab, "weighting": parameters.weighting}
    gram = gram_matrix(head, subject.progress)
    into: Array
    if parameters.weighting == "activations":
        states = hidden_states(subject)
        record["positions"] = len(states)
        into = weighted_directions(gram, states)
    elif decomposition_of(parameters, head) == "svd":
        subject.progress("decomposing the head", 0.5)
        into = np.linalg.svd(head.astype(np.float64), full_matrices=False)[2].T
    else:
        subject.progress("decomposing the head", 0.5)
        into = eigenvectors(gram)
    into = whole_basis(into)
    record["decomposition"] = decomposition_of(parameters, head)
    record |= spectrum(head, gram)
    subject.progress(f"decomposed the head in {time.perf_counter() - start:.1f} s", 1.0)
    return Basis(into, record)


def decomposition_of(parameters: SVDSoftmaxParameters, head: Array) -> str:
    """``"svd"`` or ``"gram"``; hidden states are weighed by way of the Gram matrix."""
    if parameters.weighting == "activations":
        return "gram"
    if parameters.decomposition != "auto":
        return parameters.decomposition
    return "gram" if head.size > GRAM_WEIGHTS else "svd"


def gram_matrix(head: Array, progress: Progress | None = None) -> Array:
    """``AᵀA`` (D, D), summed in float64."""
    gram = np.zeros((head.shape[1],) * 2)
    for rows in _blocks(head):
        part = head[rows].astype(np.float64)
        gram += part.T @ part
        if progress:
            progress("decomposing the head", 0.5 * rows.stop / len(head))
    return gram


def eigenvectors(matrix: Array) -> Array:
    """Of a symmetric matrix (D, D), as columns, the largest value first."""
    return np.linalg.eigh(matrix)[1][:, ::-1]


def weighted_directions(gram: Array, states: Array) -> Array:
    """``G E`` (D, D) for hidden states (positions, D)."""
    width = len(gram)
    moments = states.T @ states / len(states)
    moments += RIDGE * np.trace(moments) / width * np.eye(width)
    lower = np.linalg.cholesky(moments)
    return lower @ eigenvectors(lower.T @ gram @ lower)


def whole_basis(columns: Array) -> Array:
    """D columns (D, D): an SVD of fewer words than D gives fewer directions; any others across them complete it."""
    width, found = columns.shape
    if found == width:
        return columns
    rest = np.linalg.svd(columns, full_matrices=True)[0][:, found:]
    return np.concatenate([columns, rest], axis=1)


def hidden_states(subject: Subject) -> Array:
    """What the head is given on the subject's inputs: (positions, D), float64."""
    if subject.inputs is None:
        raise ConfigError("weighting='activations' needs inputs: prepare on a text, or take weighting='none'")
    reader = _Reader(subject.model.config, None)
    Runner(subject.model, subject.engine)(subject.inputs, reader, causal=subject.is_causal, record=False)
    states = subject.engine.to_numpy(reader.seen).astype(np.float64)
    states = states.reshape(-1, states.shape[-1])
    if not np.isfinite(states).all() or not states.any():
        raise InputError("the hidden states on these inputs are not finite, or all zero: take others")
    return states


class _Reader(Flash):
    """Exact attention that keeps what the head is given, and returns it."""

    seen: Array

    def head(self, at: At, x: Array, weights: Weights) -> Array:
        self.seen = x
        return x


def turned_head(embedding: Array, config: ModelConfig, parameters: SVDSoftmaxParameters) -> Weights:
    """The head in its basis: `rotation` (D, D), `preview` (V, W), `full_view` (V, D - W), or (V, D) to replace.

    Raises
    ------
    ConfigError
        If the basis is not known yet.
    """
    if parameters.basis is None:
        raise ConfigError("the head is not decomposed yet: let Runner.prepare do it, or give basis")
    window, dtype = parameters.preview_width(config), embedding.dtype
    first = config.d_model - parameters.remaining(config)  # direction of the full view: W, or 0 to replace
    preview = np.empty((len(embedding), window), dtype)
    full_view = np.empty((len(embedding), config.d_model - first), dtype)
    for rows in _blocks(embedding):
        turned = embedding[rows].astype(np.float64) @ parameters.basis.into  # (rows, D)
        preview[rows], full_view[rows] = turned[:, :window], turned[:, first:]
    return Weights(rotation=parameters.basis.onto.astype(dtype), preview=preview, full_view=full_view)


def _blocks(head: Array) -> Iterator[slice]:
    """Ranges of words."""
    step = max(1, BLOCK // head.shape[1])
    for first in range(0, len(head), step):
        yield slice(first, min(first + step, len(head)))


# --- the spectrum, and what can be said of the preview's error ------------------------------------------------------


def spectrum(head: Array, gram: Array) -> dict[str, Any]:
    """Shares of the squared singular values in the first directions, as is and with the mean row subtracted.

    The mean row adds the same number to every logit, which softmax does not see: the second shares are those that
    matter, the first flatter the method.
    """
    mean = head.mean(axis=0, dtype=np.float64)
    return {"shares": _shares(gram), "centred_shares": _shares(gram - len(head) * np.outer(mean, mean))}


def _shares(gram: Array) -> dict[str, float]:
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    total = values.sum() or 1.0
    return {f"D/{n}": round(float(values[: max(1, len(values) // n)].sum() / total), 4) for n in SHARES}


def tail_norms(full_view: Array) -> Array:
    """``|R[i, W:]|`` of every word: (V,), float64, a little above what rounding may have taken off."""
    squares = np.einsum("id,id->i", full_view, full_view, dtype=np.float64)
    return np.sqrt(squares) * (1 + 4 * np.finfo(full_view.dtype).eps)


def error_bounds(norms: Array, tail: Array) -> Array:
    """How far each preview can be from the exact logit: ``|R[i, W:]| |g[W:]|`` (..., V), by Cauchy and Schwarz.

    Ours, not the paper's.

    Parameters
    ----------
    norms : array, shape (V,)
        From `tail_norms`.
    tail : array, shape (..., D - W)
        ``g[W:]``.
    """
    return np.linalg.norm(tail.astype(np.float64), axis=-1)[..., None] * norms


def is_certain(logits: Array, ids: Array, bounds: Array, k: int) -> Array:
    """Whether the k largest mixed logits are surely the k largest exact ones: one bool a row.

    They are where all of them are candidates, and no other word's preview comes above the smallest of them even with
    its whole bound added.

    Parameters
    ----------
    logits : array, shape (rows, V)
        Mixed.
    ids : array, shape (rows, N)
        The candidates.
    bounds : array, shape (rows, V)
    k : int
    """
    certain = np.empty(len(logits), bool)
    for row, (z, chosen, bound) in enumerate(zip(logits, ids, bounds, strict=True)):
        if len(chosen) < k:
            certain[row] = False
            continue
        others = z + bound
        others[chosen] = -np.inf
        certain[row] = np.sort(z[chosen])[-k] > others.max(initial=-np.inf)
    return certain
