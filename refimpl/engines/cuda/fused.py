"""Fused attention by kernels that never write the map: tiles, and ranges of keys for few queries."""

from __future__ import annotations

import math

from refimpl.engines.cuda import plans
from refimpl.engines.cuda.launch import Source, dtype_of
from refimpl.engines.cuda.products import Products
from refimpl.engines.cuda.shapes import WARP, WIDE, Launch, element_strides, head_strides
from refimpl.engines.protocol import Array

TENSOR = Source(
    "fused_attention.cu",
    tuple(f"fused<{width}, {stripes}>" for width in plans.TENSOR_WIDTHS for stripes in (1, 2)),
    dtypes=("float16",),
    capability=80,
    apart=True,
)
FLOAT = Source(
    "fused_attention_float.cu",
    tuple(f"fused_float<T, {width}>" for width in plans.FLOAT_WIDTHS),
    dtypes=("float32",),
    capability=80,
)
DECODE = Source(
    "decode_attention.cu",
    (
        *(f"decode<T, A, {width}, {rows}>" for width in plans.DECODE_WIDTHS for rows in plans.DECODE_ROWS),
        "combine<T, A>",
    ),
    apart=True,
)
LOG2_E = 1.4426950408889634  # 1 / ln 2


class FusedAttention(Products):
    """One kernel for `attention` and `local_attention` where there is one for these arrays on this device."""

    def _fused_by_kernel(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None, window: int | None
    ) -> Array | None:
        """The result (B, H, Tq, D), which lies in memory as (B, Tq, H, D); None where no kernel takes the call."""
        (batch, heads, q_len, width), (k_batch, groups, k_len, k_width) = q.shape, k.shape
        alike = q.dtype == k.dtype == v.dtype and k.shape == v.shape and k_width == width and k_batch in (1, batch)
        if not alike or 0 in q.shape or heads % groups or max(q_len, k_len) >= plans.FAR:
            return None
        if not math.isfinite(scale) or scale == 0.0:
            return None
        dtype, seen = dtype_of(q), plans.band(q_len, k_len, causal, window)
        ranges = plans.decode_ranges(
            batch, heads, groups, q_len, k_len, width, q.dtype.itemsize, seen, self.multiprocessors()
        )
        if ranges is not None:
            return self._by_ranges(ranges, q, k, v, scale, seen, mask)
        if self.capability() < TENSOR.capability:  # for the copies and shared memory of tiles
            return None
        tiles = None
        if dtype == "float16":
            tiles = plans.tensor_tiles(batch, heads, q_len, width, self.multiprocessors())
        if dtype == "float32":
            tiles = plans.float_tiles(batch, heads, q_len, k_len, width)
        if tiles is None or tiles.launch.shared_bytes > self.block_shared_bytes():
            return None
        if dtype == "float32":
            return self._by_float_tiles(tiles, q, k, v, scale, seen, mask)
        return self._by_tiles(tiles, q if scale > 0 else -q, k, v, abs(scale), seen, mask)

    def _by_tiles(
        self, tiles: plans.Tiles, q: Array, k: Array, v: Array, scale: float, seen: tuple[int, int], mask: Array | None
    ) -> Array:
        q, k, v = (self._vector_rows(x) for x in (q, k, v))
        out, pointer, masked = self._heads_last(q.shape, q.dtype), *self._mask_of((*q.shape[:3], k.shape[2]), q, mask)
        sizes = k.shape[1], q.shape[2], k.shape[2], q.shape[3], *seen, scale * LOG2_E
        strides = head_strides(q, k, v, out)
        self._launch(TENSOR, tiles.kernel, q, tiles.launch, q, k, v, out, pointer, *sizes, *strides, *masked)
        return out

    def _by_float_tiles(
        self, tiles: plans.Tiles, q: Array, k: Array, v: Array, scale: float, seen: tuple[int, int], mask: Array | None
    ) -> Array:
        q, k, v = (self._unit_columns(x) for x in (q, k, v))
        out, pointer, masked = self._heads_last(q.shape, q.dtype), *self._mask_of((*q.shape[:3], k.shape[2]), q, mask)
        packed = q.shape[3] % 4 == 0 and all(plans.aligned(x.data.ptr, element_strides(x), 4) for x in (q, k, v, out))
        sizes = k.shape[1], q.shape[2], k.shape[2], q.shape[3], *seen, float(scale), int(packed)
        strides = head_strides(q, k, v, out)
        self._launch(FLOAT, tiles.kernel, q, tiles.launch, q, k, v, out, pointer, *sizes, *strides, *masked)
        return out

    def _by_ranges(
        self, ranges: plans.Ranges, q: Array, k: Array, v: Array, scale: float, seen: tuple[int, int],
        mask: Array | None,
    ) -> Array:  # fmt: skip
        batch, heads, q_len, width = q.shape
        q, k, v = self._unit_columns(q), self._vector_rows(k), self._vector_rows(v)
        out, pointer, masked = self._heads_last(q.shape, q.dtype), *self._mask_of((*q.shape[:3], k.shape[2]), q, mask)
        partial = out  # one range needs none
        if ranges.count > 1:
            partial = self.xp.empty((batch, heads, q_len, ranges.count, width + 2), WIDE[dtype_of(q)])
        sizes = heads, k.shape[1], q_len, width, *seen, ranges.first, ranges.stop, ranges.share, float(scale)
        strides = head_strides(q, k, v, out)
        self._launch(DECODE, ranges.kernel, q, ranges.launch, q, k, v, out, pointer, partial, *sizes, *strides, *masked)
        if ranges.count > 1:
            shape = Launch((batch * heads * q_len,), (4 * WARP,))
            counts = heads, q_len, width, ranges.count
            self._launch(DECODE, "combine<T, A>", q, shape, partial, out, *counts, *element_strides(out)[:3])
        return out

    def _vector_rows(self, x: Array) -> Array:
        """x with rows that are read 16 bytes at a time; a copy where they cannot be."""
        fits = plans.aligned(x.data.ptr, element_strides(x), x.dtype.itemsize)
        return x if fits else self.xp.ascontiguousarray(x)
