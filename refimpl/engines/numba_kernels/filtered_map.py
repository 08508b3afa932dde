"""The map of filtered attention: as ``filtered``, but the weights of kept keys are written instead of used.

For methods that hand a map on. It is a full array, zero where a key was dropped.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from .codes import LANES, LINE, PANEL, WORD
from .few_rows import MASK
from .filtered import (
    BYTES,
    CODES,
    COUNTS,
    FLOATS,
    INTS,
    ROWS,
    VALUES,
    _estimate,
    _first,
    _row,
    _set_nibbles,
    _weigh_kept,
)  # fmt: skip
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
    weights, scaled, ends = (
        np.empty(stride, q.dtype),
        np.empty(D, q.dtype),
        np.empty((Tk + VALUES - 1) // VALUES, np.int64),
    )
    for item in range(first, last):
        head, start = item // blocks, item % blocks * ROWS
        b, h, rows = head // H, head % H, min(ROWS, Tq - start)
        g = h // (H // Hkv)
        for r in range(rows):
            _set_nibbles(span(nibbles, r * words * WORD, D), _row(q_codes, b, h, start + r), nearest)
        reach = min(Tk, max(0, start + rows + Tk - Tq)) if causal else Tk
        keys = offset(_first(panels), (b * Hkv + g) * n_panels * words * PANEL * WORD)
        _estimate(_first(estimates), stride, _first(nibbles), keys, (reach + PANEL - 1) // PANEL, words, rows)
        of_keys = offset(_first(code_rows), (b * Hkv + g) * n_panels * PANEL * lines * LINE)
        for r in range(rows):
            i = start + r
            of_row = span(estimates, r * stride, min(Tk, max(0, i + 1 + Tk - Tq)) if causal else Tk)
            kept, total = _weigh_kept(
                of_row, margins[b, h], masked, mask, q, k, q_codes, b, h, i, codes, scaled, of_keys, lines, exact,
                scale, steps[b, h], weights, indices, ends,
            )  # fmt: skip
            counts[head * Tq + i] = kept
            target, factor = _row(out, b, h, i), q.dtype.type(1) / total if kept else zero
            for j in range(Tk):
                target[j] = zero
            for n in range(kept):
                target[indices[n]] = weights[n] * factor


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
