"""Top-N selection, the exact logits of candidates, and the softmax of long rows: kernels of ``selection.cu``."""

from __future__ import annotations

import numpy as np

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.launch import Launcher, Source, dtype_of, flag
from refimpl.engines.cuda.rows import pack_of
from refimpl.engines.cuda.shapes import BLOCKS, WIDE, Launch, element_strides, row_stride
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError

SELECTION = Source(
    "selection.cu",
    (
        "digits<T>", "reaching<T>", "place<T>", "refine<T, A, true>", "refine<T, A, false>",
        "part_sums<T, A>", "long_softmax<T, A>",
    ),
)  # fmt: skip

DIGIT, BINS = 11, 2**11  # bits of a digit that `top` selects by, and its values: selection.cu
FOUND_BYTES = 16  # what a launch knows of a row
TOGETHER = 4  # candidates of a warp of `refine`
LEAST_SPAN = 4096  # numbers of a block: fewer do not pay for its 2,048 counters
LONG_ROW = 16_384  # numbers from which several blocks share the softmax of a row


class Selection(Launcher):
    """Ops of SVD-softmax. Nothing waits for the device, so that calls queue up behind each other."""

    def top(self, z: Array, n: int) -> Array:
        width = z.shape[-1]
        if not 1 <= n <= width:
            raise ShapeError(f"top: z has shape {z.shape}; it has no {n} numbers in a row")
        ids = self.xp.empty((*z.shape[:-1], n), np.int64)
        z, rows, _, stride = self._rows(z)
        z, flat, digits = z.reshape(rows, width), ids.reshape(rows, n), digit_count(z.dtype.itemsize)  # views
        group = max(1, shapes.SCRATCH_BYTES // (4 * BINS * digits))  # rows whose counts are held at a time
        for first in range(0, rows, group):
            part = slice(first, min(first + group, rows))
            self._select(z[part], flat[part], stride, digits)
        return ids

    def _select(self, z: Array, ids: Array, stride: int, digits: int) -> None:
        """Set ids (rows, n) for rows of z (rows, V) that begin `stride` apart."""
        (rows, width), n = z.shape, ids.shape[1]
        blocks, span, launch = blocks_of_rows(rows, width)
        warps = launch.block[0] // 32
        histograms = self.xp.zeros((digits, rows, BINS), np.int32)
        found = self.xp.empty((digits + 1, rows, FOUND_BYTES), np.uint8)
        counts = self.xp.empty((rows, blocks * warps, 2), np.int32)
        sizes = width, stride, n, blocks, span
        for digit in range(digits):
            self._launch(SELECTION, "digits<T>", z, launch, z, histograms, found, rows, *sizes, digit)
        self._launch(SELECTION, "reaching<T>", z, launch, z, histograms, found, counts, rows, *sizes, digits)
        self._launch(SELECTION, "place<T>", z, launch, z, found[digits], counts, ids, *sizes)

    def refine(self, z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Array:
        n, (width, depth) = ids.shape[-1], weight.shape
        z_stride = row_stride(z.shape, element_strides(z))
        fits = z.shape[-1] == width and g.shape[-1] == depth and z.shape[:-1] == ids.shape[:-1] == g.shape[:-1]
        if not fits or z_stride is None or not z.dtype == weight.dtype == g.dtype:
            raise ShapeError(
                f"refine: z {z.shape} {z.dtype} with even rows, ids {ids.shape} and g {g.shape} {g.dtype} do not go "
                f"with weight {weight.shape} {weight.dtype}"
            )
        weight, (g, rows, _, g_stride) = self._unit_columns(weight), self._rows(g)
        ids = self.xp.ascontiguousarray(ids)
        weight_stride = element_strides(weight)[0]
        packed = pack_of(depth, ((weight, weight_stride), (g, g_stride))) > 1
        blocks, launch = warps_over(rows, -(-n // TOGETHER))
        sizes = width, n, depth, z_stride, weight_stride, g_stride, int(replace), blocks
        self._launch(SELECTION, f"refine<T, A, {flag(packed)}>", z, launch, z, ids, weight, g, *sizes)
        return z


class LongRows(Launcher):
    """The softmax of few, long rows: logits of a large vocabulary."""

    def _long_softmax(self, scores: Array) -> Array:
        """Softmax over the last axis; several blocks share a row."""
        scores, rows, width, stride = self._rows(scores)
        out = self.xp.empty(scores.shape, scores.dtype)
        blocks, span, launch = blocks_of_rows(rows, width)
        stats = self.xp.empty((rows, blocks, 2), WIDE[dtype_of(scores)])
        sizes = width, stride, blocks, span
        self._launch(SELECTION, "part_sums<T, A>", scores, launch, scores, stats, *sizes)
        self._launch(SELECTION, "long_softmax<T, A>", scores, launch, scores, stats, out, *sizes)
        return out


# --- launch shapes --------------------------------------------------------------------------------------------------


def digit_count(itemsize: int) -> int:
    """Digits of a number of so many bytes: 2, 3 or 6."""
    return -(-8 * itemsize // DIGIT)


def blocks_of_rows(rows: int, width: int) -> tuple[int, int, Launch]:
    """Blocks that share a row, numbers of each, and their launch: as many as keep the device busy, if rows are long."""
    wanted = max(1, min(-(-width // LEAST_SPAN), -(-BLOCKS // max(1, rows))))
    span = -(-width // (wanted * shapes.THREADS)) * shapes.THREADS  # whole warps have stretches of the same length
    blocks = max(1, -(-width // span))
    return blocks, span, Launch((rows * blocks,), (shapes.THREADS,))


def warps_over(rows: int, items: int) -> tuple[int, Launch]:
    """Blocks per row where a warp takes one of a row's items, and their launch."""
    blocks = -(-items // (shapes.THREADS // 32))
    return blocks, Launch((rows * blocks,), (shapes.THREADS,))


def is_long(rows: int, width: int) -> bool:
    """Whether several blocks should share the softmax of each row: few rows, and long ones."""
    return width >= LONG_ROW and rows < BLOCKS // 2
