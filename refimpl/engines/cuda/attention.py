"""Attention: materialised maps, and the fused ops, which hold a few rows of the map at a time.

A fused op holds at most `shapes.SCRATCH_BYTES`, in float32 where the arrays are float16. A hidden weight is not read,
but a NaN or infinite value at a hidden key reaches the rows of its block (0 times NaN).
"""

from __future__ import annotations

import math

from refimpl.engines.chunked import chunked_linear_attention
from refimpl.engines.cuda import plans, shapes
from refimpl.engines.cuda.fused import FusedAttention
from refimpl.engines.cuda.launch import Source, dtype_of
from refimpl.engines.cuda.selection import LongRows, is_long
from refimpl.engines.cuda.shapes import (
    WIDE,
    Launch,
    as_map,
    band_of,
    element_strides,
    grouped,
    head_blocks,
    map_row_bytes,
    query_blocks,
    rows_by_columns,
    rows_that_fit,
    visible,
)  # fmt: skip
from refimpl.engines.numpy_engine import check_band, check_keys_mask
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError

MAPS = Source(  # a fused op's scores are wide
    "maps.cu", ("relative<T>", "hide<T>", "softmax<T, T>", "softmax<A, T>", "softmax_long<T, T>", "softmax_long<A, T>")
)


class Attention(FusedAttention, LongRows):
    """Stacks of products have the batch axes (B, Hkv, G), G = H / Hkv query heads on one key head."""

    def scores(self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
        batch, heads, q_len, _ = q.shape
        groups, k_len = k.shape[1:3]
        stack = self.xp.empty((batch, groups, heads // groups, q_len, k_len), q.dtype)
        q, k = grouped(q, groups), k[:, :, None]
        for rows, seen in query_blocks(q_len, k_len, shapes.CAUSAL_ROWS if causal else q_len, causal):
            products = stack[:, :, :, rows, :seen]
            self._multiply(q[:, :, :, rows], k[:, :, :, :seen], products, transposed=True, alpha=scale)
        s = stack.reshape(batch, heads, q_len, k_len)
        if causal or mask is not None:
            self._hide_keys(s, causal, mask)
        return s

    def add_relative(self, scores: Array, position: Array) -> Array:
        batch, heads, length, keys = scores.shape
        if position.shape != (batch, heads, length, 2 * length - 1) or length != keys:
            raise ShapeError(f"position scores {position.shape} do not go with scores {scores.shape}")
        out = self.xp.empty(scores.shape, scores.dtype)
        self._add_relative(scores, position, out)
        return out

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        if not causal and is_long(math.prod(scores.shape[:3]), scores.shape[3]):
            return self._long_softmax(scores)
        out = self.xp.empty(scores.shape, scores.dtype)
        self._softmax(scores, out, *visible(scores, causal), None)
        return out

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        batch, heads, q_len, k_len = weights.shape
        out = self._heads_last((batch, heads, q_len, v.shape[3]), v.dtype, zeros=True)
        stack, weights, v = grouped(out, v.shape[1]), grouped(weights, v.shape[1]), v[:, :, None]
        if not causal:
            self._multiply(weights, v, stack)
            return out
        for rows, seen in query_blocks(q_len, k_len, shapes.CAUSAL_ROWS, causal):
            all_see = rows.start + 1 + k_len - q_len  # keys that every row of the block sees
            self._multiply(weights[:, :, :, rows, :all_see], v[:, :, :, :all_see], stack[:, :, :, rows])
            corner = self._strictly_lower(weights[:, :, :, rows, all_see:seen])
            self._multiply(corner, v[:, :, :, all_see:seen], stack[:, :, :, rows], beta=1.0)
        return out

    def attention(
        self, q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False,
        mask: Array | None = None,
    ) -> Array:  # fmt: skip
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        return self._fused(q, k, v, scale, causal, mask)

    def relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        return self._fused(q, k, v, scale, causal, mask, (q_position, p[None]))

    def local_attention(
        self, q: Array, k: Array, v: Array, window: int, scale: float, causal: bool = False, mask: Array | None = None
    ) -> Array:
        check_band("local_attention", q, k, window)
        return self._fused(q, k, v, scale, causal, mask, window=window)

    def local_relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, window: int, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        check_band("local_relative_attention", q, k, window)
        return self._fused(q, k, v, scale, causal, mask, (q_position, p[None]), window)

    def project_length(self, x: Array, weight: Array, mask: Array | None = None) -> Array:
        check_keys_mask("project_length", mask, x)
        x = x if mask is None else self._only_seen(x, mask)
        out = self.xp.empty((*x.shape[:2], len(weight), x.shape[3]), x.dtype)
        self._multiply(weight[None, None], x, out)
        return out

    def linear_attention(self, q: Array, k: Array, v: Array, causal: bool = False, mask: Array | None = None) -> Array:
        check_keys_mask("linear_attention", mask, k)
        k = k if mask is None else self._only_seen(k, mask)
        if causal:
            check_band("linear_attention", q, k, 0)
        wide = WIDE[dtype_of(q)]  # sums over all keys leave the range of float16
        out = chunked_linear_attention(self.xp, q.astype(wide), k.astype(wide), v.astype(wide), causal)
        return out.astype(q.dtype, copy=False)

    # --- shared steps -------------------------------------------------------------------------------------------

    def _fused(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None,
        position: tuple[Array, Array] | None = None, window: int | None = None,
    ) -> Array:  # fmt: skip
        """Attention by a kernel that never writes the map, or by blocks of the map."""
        if position is None:
            out = self._fused_by_kernel(q, k, v, scale, causal, mask, window)
            if out is not None:
                return out
        return self._by_blocks(q, k, v, scale, causal, mask, position, window)

    def _by_blocks(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None,
        position: tuple[Array, Array] | None, window: int | None,
    ) -> Array:  # fmt: skip
        """Attention by blocks: scores of a few rows, their softmax, their product with the values.

        Within a band, a block of rows meets the keys that any of them sees; those that one row does not see are masked.
        """
        (batch, heads, q_len, _), (groups, k_len) = q.shape, k.shape[1:3]
        out = self._heads_last((batch, heads, q_len, v.shape[3]), v.dtype, zeros=True)
        stack = grouped(out, groups)
        mask = None if mask is None else self.xp.broadcast_to(mask, (batch, heads, q_len, k_len))
        q, k, v = grouped(q, groups), self._per_batch(k, batch), self._per_batch(v, batch)
        if position is not None:
            position = grouped(position[0], groups), grouped(position[1], groups)
        row_bytes = map_row_bytes(k_len, q.dtype.name, position is not None)
        for b, g, h in head_blocks(batch, groups, heads // groups, q_len, row_bytes):
            size = rows_that_fit((b.stop - b.start) * (h.stop - h.start), q_len, row_bytes)
            size = size if window is None else min(size, max(shapes.BLOCK_ROWS, window))
            for rows, seen in query_blocks(q_len, k_len, size, causal):
                keys = slice(0, seen) if window is None else band_of(rows, q_len, k_len, window, seen)
                s = self._wide_products(q[b, g, :, rows], k[b, g, :, keys], scale)  # (b, g, G, rows, keys)
                if position is not None:
                    q_position, p = position
                    self._add_position(s, q_position[b, g, :, rows], p[:, g], scale, rows, keys.start)
                weights = s if s.dtype == q.dtype else self.xp.empty(s.shape, q.dtype)
                part = None if mask is None else mask[b, h, rows, keys]
                if window is not None:
                    part = self._near(rows, keys, k_len - q_len, window) & (True if part is None else part)
                first = rows.start + 1 + k_len - q_len - keys.start if causal else k_len  # keys that the first row sees
                self._softmax(as_map(s), as_map(weights), first, int(causal), part)
                self._multiply(weights, v[b, g, :, keys], stack[b, g, :, rows])
        return out

    def _near(self, rows: slice, keys: slice, shift: int, window: int) -> Array:
        """True where a key is at most `window` positions from its row: (1, 1, rows, keys)."""
        positions = self.xp.arange(rows.start + shift, rows.stop + shift)[:, None]
        return (abs(self.xp.arange(keys.start, keys.stop) - positions) <= window)[None, None]

    def _add_position(self, s: Array, q: Array, p: Array, scale: float, rows: slice, first: int) -> None:
        """Add ``scale q_i . p[T - 1 - i + j]`` to scores (b, g, G, rows, keys) of these rows and keys from `first`."""
        length, keys = (p.shape[3] + 1) // 2, s.shape[-1]
        start = length - rows.stop + first
        met = p[:, :, :, start : start + rows.stop - rows.start + keys - 1]  # (1, g, G, rows + keys - 1, D)
        shifted = self._wide_products(q, met, scale)  # (b, g, G, rows, rows + keys - 1)
        self._add_relative(as_map(s), as_map(shifted), s)

    def _wide_products(self, q: Array, k: Array, scale: float) -> Array:
        """``scale q kᵀ`` in the dtype that float16 is computed in."""
        s = self.xp.empty((*q.shape[:-1], k.shape[-2]), WIDE[dtype_of(q)])
        self._multiply(q, k, s, transposed=True, alpha=scale)
        return s

    def _per_batch(self, x: Array, batch: int) -> Array:
        """Keys or values (B or 1, Hkv, T, D) as (B, Hkv, 1, T, D), without a copy."""
        return self.xp.broadcast_to(x, (batch, *x.shape[1:]))[:, :, None]

    # --- launches -----------------------------------------------------------------------------------------------

    def _hide_keys(self, s: Array, causal: bool, mask: Array | None) -> None:
        batch, heads, block, keys = s.shape
        rows = batch * heads * block
        pointer, masked = self._mask_of(s.shape, s, mask)
        sizes = rows, keys, heads, block, *visible(s, causal), *masked
        self._launch(MAPS, "hide<T>", s, rows_by_columns(rows, keys), s, pointer, *sizes)

    def _add_relative(self, scores: Array, position: Array, out: Array) -> None:
        scores, position = self._unit_columns(scores), self._unit_columns(position)
        batch, heads, block, keys = scores.shape
        rows = batch * heads * block
        strides = *element_strides(scores)[:3], *element_strides(position)[:3]
        shape, packed = rows_by_columns(rows, keys), self._packed(scores, out)
        sizes = rows, keys, heads, block, *strides, packed
        self._launch(MAPS, "relative<T>", scores, shape, scores, position, out, *sizes)

    def _softmax(self, scores: Array, out: Array, seen: int, step: int, mask: Array | None) -> None:
        scores = self._unit_columns(scores)
        batch, heads, block, keys = scores.shape
        rows = batch * heads * block
        pointer, masked = self._mask_of(scores.shape, scores, mask)
        kinds = "<T, T>" if scores.dtype == out.dtype else "<A, T>"
        sizes = keys, heads, block, seen, step, *element_strides(scores)[:3], self._packed(scores, out), *masked
        short = plans.softmax_rows(rows, keys)
        if short is not None:
            self._launch(MAPS, "softmax" + kinds, out, short, scores, out, pointer, rows, *sizes)
        else:
            shape = Launch((rows,), (plans.MOST_THREADS,))
            self._launch(MAPS, "softmax_long" + kinds, out, shape, scores, out, pointer, *sizes)

    def _packed(self, scores: Array, out: Array) -> int:
        """Whether rows of scores, and those of out beside them, move 16 bytes of scores at a time."""
        whole = scores.shape[-1] * scores.dtype.itemsize % shapes.PACK_BYTES == 0
        steps = shapes.PACK_BYTES // scores.dtype.itemsize * out.dtype.itemsize
        return int(
            whole
            and plans.aligned(scores.data.ptr, element_strides(scores), scores.dtype.itemsize)
            and plans.aligned(out.data.ptr, element_strides(out), out.dtype.itemsize, steps)
        )

    def _strictly_lower(self, weights: Array) -> Array:
        """A contiguous copy in which row i keeps its first i columns; zeros elsewhere."""
        kept = self.xp.arange(weights.shape[-1]) < self.xp.arange(weights.shape[-2])[:, None]
        return self.xp.where(kept, weights, weights.dtype.type(0))
