"""Attention over the keys that a threshold keeps, with the way back: LATTE's filter (arXiv 2404.07519), our reading.

    distance_ij = max_j m_ij - m_ij >= 0                          m: a low-precision estimate of the scores
    mask_ij     = 1[distance_ij <= theta_h]                       on the way back: sigmoid((theta_h - distance_ij) / t)
    P_ij        = exp(s_ij) mask_ij / sum_j exp(s_ij) mask_ij

The hard mask has no gradient of use, so the way back takes that of a sigmoid of the temperature t (straight through).
It goes through the rounding of quantised values as if there were none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.parameters.base import require_choice, require_number
from refimpl.training.blocks import OPS, masked_softmax, products_back, sigmoid, weighted_sum_back

Chooser = Callable[[Array], Array]  # distances (B, H, T, S), inf where a key is not visible -> thresholds (H,)
INT8_MAX = 127.0


@dataclass(frozen=True)
class Rule:
    """What the filter looks at and how it is smoothed; ours where the paper is silent.

    Attributes
    ----------
    estimate : {"ms4b", "exact"}
        Distances are those of estimates from the upper 4 bits of int8 queries and keys, or of the scores themselves.
    nibble : {"floor", "round"}
        How the upper 4 bits are taken: ``q >> 4``, or to the nearest within -8 to 7.
    stage2 : {"int8", "float"}
        Scores of kept keys: products of int8 queries and keys, or of floating-point ones.
    temperature : float
        t, in units of scores.
    mask : {"hard", "soft"}
        "soft" takes the sigmoid on the way forth too; then every gradient is exact.
    """

    estimate: Literal["ms4b", "exact"] = "ms4b"
    nibble: Literal["floor", "round"] = "floor"
    stage2: Literal["int8", "float"] = "int8"
    temperature: float = 1.0
    mask: Literal["hard", "soft"] = "hard"

    def __post_init__(self) -> None:
        require_choice("estimate", self.estimate, ("ms4b", "exact"))
        require_choice("nibble", self.nibble, ("floor", "round"))
        require_choice("stage2", self.stage2, ("int8", "float"))
        require_number("temperature", self.temperature, 1e-6, 1e6)
        require_choice("mask", self.mask, ("hard", "soft"))


@dataclass(frozen=True)
class Attended:
    """One attention, forth.

    Attributes
    ----------
    output : array, shape (B, H, T, D)
    thresholds : array, shape (H,)
    kept : array, shape (H,), float64
        Share of the visible pairs of query and key that the mask lets through.
    """

    output: Array
    thresholds: Array
    kept: Array


def quantised(x: Array) -> tuple[Array, Array]:
    """Symmetric int8 of each sequence and head: (B, H, T, D) -> whole numbers in [-127, 127] as floats, and scales.

    ``scale = max |x| / 127``, shape (B, H, 1, 1); 1 where all is zero.
    """
    largest = np.abs(x).max(axis=(2, 3), keepdims=True)
    scale = np.where(largest > 0, largest / INT8_MAX, 1.0).astype(x.dtype)
    return np.clip(np.rint(x / scale), -INT8_MAX, INT8_MAX), scale


def upper_nibble(x: Array, nibble: str) -> Array:
    """The upper 4 bits of int8 values: ``floor(x / 16)``, or the nearest in [-8, 7]."""
    return np.floor(x / 16.0) if nibble == "floor" else np.clip(np.floor((x + 8.0) / 16.0), -8.0, 7.0)


def scores_and_distances(q: Array, k: Array, scale: float, visible: Array, rule: Rule) -> tuple[Array, Array]:
    """Scores of stage 2 (-inf where not visible) and distances of estimates to their row maximum (inf there).

    Parameters
    ----------
    q, k : array, shapes (B, H, T, D) and (B, Hkv, T, D)
    scale : float
        1 / sqrt(D).
    visible : array of bool, shape (T, T)
    rule : Rule

    Returns
    -------
    scores, distances : array, shape (B, H, T, T)
    """
    (q8, q_scale), (k8, k_scale) = quantised(q), quantised(k)
    step = q_scale * np.repeat(k_scale, q.shape[1] // k.shape[1], axis=1) * q.dtype.type(scale)  # (B, H, 1, 1)
    s = OPS.scores(q, k, scale) if rule.stage2 == "float" else step * OPS.scores(q8, k8, 1.0)
    s = np.where(visible, s, -np.inf)
    if rule.estimate == "exact":
        estimate = s
    else:
        upper = OPS.scores(upper_nibble(q8, rule.nibble), upper_nibble(k8, rule.nibble), 1.0)
        estimate = np.where(visible, 256.0 * step * upper, -np.inf)
    return s, estimate.max(axis=-1, keepdims=True) - estimate


def thresholded_attention(
    q: Array, k: Array, v: Array, scale: float, visible: Array, choose: Chooser, rule: Rule
) -> tuple[Attended, Callable[[Array, Array], tuple[Array, Array, Array, Array]]]:
    """Filtered attention.

    Parameters
    ----------
    q : array, shape (B, H, T, D)
    k, v : array, shape (B, Hkv, T, D)
    scale : float
    visible : array of bool, shape (T, T)
        Every query sees a key.
    choose : callable
        Gives the thresholds, which may depend on the distances.
    rule : Rule

    Returns
    -------
    attended : Attended
    back : callable
        Gradients of output (B, H, T, D) and kept shares (H,) -> those of q, k, v and thresholds. The maps are made
        again rather than kept.
    """
    s, distances = scores_and_distances(q, k, scale, visible, rule)
    thresholds = choose(distances)
    pairs = len(q) * int(visible.sum())
    mask, _ = _mask(thresholds, distances, visible, rule)
    output = OPS.weighted_sum(masked_softmax(s, mask)[0], v)
    kept = mask.sum(axis=(0, 2, 3), dtype=np.float64) / pairs
    del s, distances, mask

    def back(do: Array, dkept: Array) -> tuple[Array, Array, Array, Array]:
        s, distances = scores_and_distances(q, k, scale, visible, rule)
        mask, slope = _mask(thresholds, distances, visible, rule)
        p, softmax_back = masked_softmax(s, mask)
        dp, dv = weighted_sum_back(p, v, do)
        ds, dmask = softmax_back(dp)
        dmask += (dkept / pairs).astype(q.dtype)[:, None, None]
        margin = dmask * slope  # (B, H, T, T), gradient of theta - distance
        ds += margin
        nearest = distances.argmin(axis=-1, keepdims=True)  # where the row maximum is from
        pulled = np.take_along_axis(ds, nearest, axis=-1) - margin.sum(axis=-1, keepdims=True)
        np.put_along_axis(ds, nearest, pulled, axis=-1)
        dq, dk = products_back(q, k, scale, ds)
        return dq, dk, dv, margin.sum(axis=(0, 2, 3), dtype=np.float64)

    return Attended(output, thresholds, kept), back


def _mask(thresholds: Array, distances: Array, visible: Array, rule: Rule) -> tuple[Array, Array]:
    """The mask and, for the way back, its slope over theta - distance: (B, H, T, T) each."""
    margin = np.full_like(distances, -np.inf)
    np.subtract(thresholds.astype(distances.dtype)[:, None, None], distances, out=margin, where=visible)
    soft = sigmoid(margin / rule.temperature)
    slope = soft * (1.0 - soft) / rule.temperature
    return (soft if rule.mask == "soft" else (margin >= 0).astype(distances.dtype)), slope
