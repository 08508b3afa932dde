"""Launch shapes of the kernels that memory bounds: who reads which part of (rows, width), 16 bytes at a time.

Pure functions; the kernels' side is ``tiles.cuh`` and ``norms.cuh``.
"""

from __future__ import annotations

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.shapes import PACK_BYTES, WARP, Launch
from refimpl.errors import UnsupportedError

FULL = 1_024  # blocks that fill a large GPU: some 8 on each of the 132 multiprocessors of an H100
ROWS_EACH = 4  # at most, of a thread of an elementwise kernel: ROWS of tiles.cuh
RUN = 4  # consecutive times of a thread of a depthwise convolution: RUN of convolutions.cu
HELD = (1, 2, 3, 4)  # packs that a thread of a norm can hold: the kernels' P
ROW_THREADS = 1_024  # at most, that share a row of a norm
MOST = 1 << 30  # rows or columns: the kernels count them in 32 bits


def pack_elements(itemsize: int, width: int, *places: tuple[int, int]) -> int:
    """Elements that a thread reads at once: `PACK_BYTES` of them where that is possible, else 1.

    Parameters
    ----------
    itemsize : bytes of an element
    width : elements of a row
    places : of each array its address and the elements between its rows
    """
    pack = PACK_BYTES // itemsize
    even = all(address % PACK_BYTES == 0 and stride % pack == 0 for address, stride in places)
    return pack if even and width % pack == 0 else 1


def tiles(rows: int, packs: int, rows_each: int = ROWS_EACH) -> Launch:
    """For an elementwise kernel: a thread has one pack of columns in up to `rows_each` rows.

    One row each while that does not fill the GPU; then more, whose reads are under way together. Blocks that cover a
    wide row are neighbours.
    """
    check_size(rows, packs)
    chunks = max(1, -(-packs // shapes.THREADS))  # blocks side by side
    across = max(1, -(-packs // chunks))
    across = 1 << (across - 1).bit_length() if across < WARP else _warps(across) * WARP
    down = max(1, shapes.THREADS // across)
    each = min(rows_each, max(1, rows * chunks // (down * FULL)))
    return Launch((-(-rows // (down * each)) * chunks,), (across, down))


def row_holders(rows: int, packs: int, held: tuple[int, ...] = HELD) -> tuple[int, Launch]:
    """For a norm: packs that a thread holds, and the launch.

    As few places as hold the row, of these the most per thread: a row of up to 4 packs per lane is a warp's own, which
    needs no barrier. What is beyond the places of `ROW_THREADS` threads is read again.
    """
    check_size(rows, packs)

    def warps(each: int) -> int:
        return _warps(-(-packs // each))

    fits = [each for each in held if warps(each) * WARP <= ROW_THREADS]
    each = min(fits, key=lambda each: (warps(each) * each, -each), default=held[-1])
    across = min(warps(each) * WARP, ROW_THREADS)
    down = min(4, max(1, rows // FULL)) if across == WARP else 1
    return each, Launch((-(-rows // down),), (across, down))


def check_size(rows: int, packs: int) -> None:
    """Raise UnsupportedError where the kernels could not count."""
    if max(rows, packs) >= MOST:
        raise UnsupportedError(
            f"{rows} rows by {packs}: the CuPy engine takes fewer than 2^30 of each; split the batch"
        )


def _warps(threads: int) -> int:
    return max(1, -(-threads // WARP))
