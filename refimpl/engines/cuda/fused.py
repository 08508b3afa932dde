"""Fused attention by kernels that never write the map: tiles on tensor cores."""

from __future__ import annotations

import math

from refimpl.engines.cuda import plans
from refimpl.engines.cuda.launch import Source, dtype_of
from refimpl.engines.cuda.products import Products
from refimpl.engines.cuda.shapes import batch_strides, element_strides
from refimpl.engines.protocol import Array

TENSOR = Source(
    "fused_attention.cu",
    tuple(f"fused<{width}, {stripes}>" for width in plans.TENSOR_WIDTHS for stripes in (1, 2)),
    dtypes=("float16",),
    capability=80,
    apart=True,
)
LOG2_E = 1.4426950408889634  # 1 / ln 2


class FusedAttention(Products):
    """One kernel for `attention` and `local_attention` where there is one for these arrays on this device."""

    def _fused_by_kernel(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None, window: int | None
    ) -> Array | None:
        """The result (B, H, Tq, D), which lies in memory as (B, Tq, H, D); None where no kernel takes the call."""
        (batch, heads, q_len, width), k_len = q.shape, k.shape[2]
        if not (math.isfinite(scale) and scale != 0.0 and q.dtype == k.dtype == v.dtype and k.shape == v.shape):
            return None
        if max(q_len, k_len) >= plans.FAR or 0 in (batch, heads, q_len):
            return None
        if dtype_of(q) == "float16" and self.capability() >= TENSOR.capability:
            tiles = plans.tensor_tiles(batch, heads, q_len, width, self.multiprocessors())
            if tiles is not None:
                arrays = (self._vector_rows(x) for x in (q if scale > 0 else -q, k, v))
                return self._by_tiles(
                    TENSOR, tiles, *arrays, abs(scale), plans.band(q_len, k_len, causal, window), mask
                )
        return None

    def _by_tiles(
        self, source: Source, tiles: plans.Tiles, q: Array, k: Array, v: Array, scale: float, seen: tuple[int, int],
        mask: Array | None,
    ) -> Array:  # fmt: skip
        batch, heads, q_len, width = q.shape
        groups, k_len = k.shape[1:3]
        out = self.xp.empty((batch, q_len, heads, width), q.dtype).transpose(0, 2, 1, 3)
        pointer, *masked = self._mask_of((batch, heads, q_len, k_len), q, mask)
        sizes = groups, q_len, k_len, width, *seen, scale * LOG2_E
        strides = (s for x in (q, k, v, out) for s in (*batch_strides(x, (batch,)), *element_strides(x)[1:3]))
        self._launch(source, tiles.kernel, q, tiles.launch, q, k, v, out, pointer, *sizes, *strides, *masked)
        return out

    def _vector_rows(self, x: Array) -> Array:
        """x with rows that are read 16 bytes at a time; a copy where they cannot be."""
        fits = plans.aligned(x.data.ptr, element_strides(x), x.dtype.itemsize)
        return x if fits else self.xp.ascontiguousarray(x)

    def _mask_of(self, shape: tuple[int, ...], other: Array, mask: Array | None) -> tuple[Array | int, ...]:
        """A kernel's mask arguments: its array, 1 and its strides; any array, 0 and zeros where there is none."""
        if mask is None:
            return other, 0, 0, 0, 0, 0
        mask = self.xp.broadcast_to(mask if mask.dtype == bool else mask != 0, shape)
        return mask, 1, *element_strides(mask)
