"""Top-N selection and the exact logits of candidates."""

from __future__ import annotations

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.products import Products
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError


class Selection(Products):
    """Ops of SVD-softmax."""

    def top(self, z: Array, n: int) -> Array:
        width = z.shape[-1]
        smallest = self.xp.partition(z, width - n, axis=-1)[..., width - n : width - n + 1]  # the n-th largest
        larger, tied = z > smallest, z == smallest
        wanted = n - larger.sum(-1, keepdims=True)  # of those that tie, the first
        chosen = larger | (tied & (self.xp.cumsum(tied, axis=-1) <= wanted))  # n in each row
        return self.xp.nonzero(chosen)[-1].reshape(*z.shape[:-1], n)

    def refine(self, z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Array:
        n, (width, depth) = ids.shape[-1], weight.shape
        if z.shape[-1] != width or g.shape[-1] != depth or not z.flags.c_contiguous:
            raise ShapeError(f"refine: z {z.shape} in row-major order and g {g.shape} do not go with {weight.shape}")
        rows = ids.size // n
        logits, chosen = z.reshape(rows, width), ids.reshape(rows, n)  # the first is a view
        inner = self.xp.ascontiguousarray(g).reshape(rows, 1, depth)
        size = max(1, shapes.SCRATCH_BYTES // (n * depth * z.dtype.itemsize))
        for first in range(0, rows, size):
            part = slice(first, min(first + size, rows))
            products = self.xp.empty((part.stop - first, 1, n), z.dtype)
            self._multiply(inner[part], weight[chosen[part]], products, transposed=True)
            here = self.xp.arange(first, part.stop)[:, None], chosen[part]
            logits[here] = products[:, 0] if replace else logits[here] + products[:, 0]
        return z
