"""PostShare: the training loss that pulls matched heads together (Cao, Yang, Zhao, arXiv 2402.11819).

    loss = L_LM / 2 + L_w / 2
    L_w  = mean over the matches of ( |Wq - Wq'| + |Wk - Wk'| + |Wv - Wv'| )

A prime marks the matched head's slice; norms are Frobenius norms, not squared; there is no term of Wo. As the authors'
``llmtuner/train/pt/workflow.py`` at de44feb; so are the other kinds. Here are L_w and its gradient, not the training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.parameters.base import require_choice
from refimpl.parameters.headshare import Pair, require_a_key_head_each
from refimpl.preparation.headshare import head_rows
from refimpl.weights.layout import Weights

Term = tuple[float, Array, Array]  # of two slices: value, gradient of the first, of the second


def stacked_heads(weights: Weights, config: ModelConfig) -> Array:
    """The slices of Wq, Wk and Wv of all heads: (L, 3, H, D, d), float64.

    Raises
    ------
    ConfigError
        If query heads share key heads.
    """
    require_a_key_head_each(config)
    return np.stack([head_rows(layer, config) for layer in weights.layers]).astype(np.float64)


def weight_loss(heads: Array, matches: Sequence[Pair], kind: str = "norm") -> tuple[float, Array]:
    """L_w and its gradient.

    Parameters
    ----------
    heads : array
        (L, 3, H, D, d), from `stacked_heads`.
    matches : sequence of (layer, head, source layer, source head)
        The selected ones, fixed before training.
    kind : {"norm", "mse", "kl", "js"}
        Of a slice w and its source's w', with P = softmax(w) and P' = softmax(w') over all their numbers:

        - norm: ``|w - w'|``, of q, k and v
        - mse: the mean of ``(w - w')^2``, of q and k
        - kl: ``sum P' log(P' / P)``, of q and k
        - js: ``(sum M log(M / P) + sum M log(M / P')) / 2`` with ``M = (P + P') / 2``, of q and k

        The divergences are those that the code computes: the arguments stand the other way round than in its names.

    Returns
    -------
    loss : float
        The mean over the matches; 0 without any.
    gradient : array
        (L, 3, H, D, d). A head that is in several matches, as target or as source, has the sum. Where a difference is
        zero, the gradient of its norm is 0.

    Raises
    ------
    ConfigError
        If the kind is unknown.
    """
    require_choice("kind", kind, tuple(TERMS))
    term, parts = TERMS[kind]
    loss, gradient = 0.0, np.zeros_like(heads)
    for layer, head, source_layer, source_head in matches:
        for part in parts:
            value, own, source = term(heads[layer, part, head], heads[source_layer, part, source_head])
            loss += value / len(matches)
            gradient[layer, part, head] += own / len(matches)
            gradient[source_layer, part, source_head] += source / len(matches)
    return loss, gradient


def _norm(w: Array, source: Array) -> Term:
    difference = w - source
    norm = float(np.linalg.norm(difference))
    gradient = difference / norm if norm > 0.0 else np.zeros_like(difference)
    return norm, gradient, -gradient


def _mse(w: Array, source: Array) -> Term:
    difference = w - source
    gradient = 2.0 * difference / w.size
    return float(np.mean(difference * difference)), gradient, -gradient


def _kl(w: Array, source: Array) -> Term:
    log_p, log_s = _log_softmax(w), _log_softmax(source)
    p, s = np.exp(log_p), np.exp(log_s)
    value = float(np.sum(s * (log_s - log_p)))
    return value, p - s, s * (log_s - log_p - value)


def _js(w: Array, source: Array) -> Term:
    log_p, log_s = _log_softmax(w), _log_softmax(source)
    p, s = np.exp(log_p), np.exp(log_s)
    m = (p + s) / 2.0
    log_m = np.log(m)
    value = float(np.sum(m * (log_m - (log_p + log_s) / 2.0)))
    common = (2.0 * log_m - log_p - log_s) / 4.0  # of M, which depends on both; its constant drops out
    return value, _through_softmax(p, common - m / (2.0 * p)), _through_softmax(s, common - m / (2.0 * s))


def _log_softmax(w: Array) -> Array:
    shifted = w - w.max()
    return shifted - np.log(np.exp(shifted).sum())


def _through_softmax(p: Array, gradient: Array) -> Array:
    """The gradient of the softmax's input from that of its output."""
    return p * (gradient - np.sum(p * gradient))


# kind -> its term, and of which of Q, K and V it is taken
TERMS: dict[str, tuple[Callable[[Array, Array], Term], tuple[int, ...]]] = {
    "norm": (_norm, (0, 1, 2)),
    "mse": (_mse, (0, 1)),
    "kl": (_kl, (0, 1)),
    "js": (_js, (0, 1)),
}
