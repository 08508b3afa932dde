"""The map of filtered attention: as ``filtered``, but the weights of kept keys are written instead of used.

For methods that hand a map on. It is a full array, zero where a key was dropped.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from .codes import LANES, LINE, PANEL, WORD
from .few_rows import MASK, weigh
from .filtered import (
    BYTES,
    CODES,
    COUNTS,
    FLOATS,
    INTS,
    ROWS,
    _estimate,
    _first,
    _hide,
    _kept,
    _row,
    _score_codes,
    _score_rows,
    upper_nibble,
)
from .parallel import STEP, any_strides, read, share, write
from .polynomials import span
from .vector import offset


@njit(**STEP)
def _map_items(
    q, k, q_codes, panels, code_rows, steps, margins, nearest, exact, scale, causal, masked, mask, out, counts,
    first, last,
):  # fmt: skip
    (H, Tq, D), (Hkv, Tk), zero = q.shape[1:], k.shape[1:3], q.dtype.type(0)
    blocks, n_panels = (Tq + ROWS - 1) // ROWS, (Tk + PANEL - 1) // PANEL
    words, lines, stride = (D + WORD - 1) // WORD, (D + LINE - 1) // LINE, n_panels * PANEL + LANES
    estimates, indices = np.empty(ROWS * stride, np.int32), np.empty(stride, np.int32)
    nibbles, codes = np.zeros(ROWS * words * WORD, np.int8), np.zeros(lines * LINE, np.int8)
    logits, scaled = np.empty(stride, q.dtype), np.empty(D, q.dtype)
    for item in range(first, last):
        head, start = item // blocks, item % blocks * ROWS
        b, h, rows = head // H, head % H, min(ROWS, Tq - start)
        g = h // (H // Hkv)
        for r in range(rows):
            row = _row(q_codes, b, h, start + r)
            for d in range(D):
                nibbles[r * words * WORD + d] = upper_nibble(np.int32(row[d]), nearest)
        reach = min(Tk, max(0, start + rows + Tk - Tq)) if causal else Tk
        keys = offset(_first(panels), (b * Hkv + g) * n_panels * words * PANEL * WORD)
        _estimate(_first(estimates), stride, _first(nibbles), keys, (reach + PANEL - 1) // PANEL, words, rows)
        of_keys = offset(_first(code_rows), (b * Hkv + g) * Tk * lines * LINE)
        for r in range(rows):
            i = start + r
            of_row = span(estimates, r * stride, min(Tk, max(0, i + 1 + Tk - Tq)) if causal else Tk)
            if masked:
                _hide(of_row, mask, b, h, i)
            kept = _kept(of_row, margins[b, h], indices)
            counts[head * Tq + i] = kept
            whole = (kept + LANES - 1) // LANES * LANES
            if exact:
                _score_rows(_first(logits), _first(indices), whole, q, b, h, i, scaled, k, g, scale)
            else:
                places = _first(indices)
                _score_codes(
                    _first(logits), places, whole, q_codes, b, h, i, codes, of_keys, lines, steps[b, h]
                )  # fmt: skip
            _, total, _ = weigh(span(logits, 0, kept), q.dtype.type(-np.inf), zero)
            target = _row(out, b, h, i)
            for j in range(Tk):
                target[j] = zero
            factor = q.dtype.type(1) / total if kept else zero
            for n in range(kept):
                target[indices[n]] = logits[n] * factor


@any_strides(
    read(4), read(4), CODES, BYTES, BYTES, FLOATS, INTS, types.boolean, types.boolean, lambda number: number,
    types.boolean, types.boolean, MASK, write(4), COUNTS, types.intp,
)  # fmt: skip
def kernel_filtered_map(
    q, k, q_codes, panels, code_rows, steps, margins, nearest, exact, scale, causal, masked, mask, out, counts, parts
):
    """Set out (B, H, Tq, Tk) and, for each row, the number of kept keys: counts (B * H * Tq,)."""
    items = q.shape[0] * q.shape[1] * ((q.shape[2] + ROWS - 1) // ROWS)
    share(
        _map_items,
        (q, k, q_codes, panels, code_rows, steps, margins, nearest, exact, scale, causal, masked, mask, out, counts),
        items,
        parts,
    )
