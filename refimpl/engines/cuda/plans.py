"""Which kernel computes a fused attention, and its launch: pure functions, so that they are tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.engines.cuda.shapes import Launch, Strides

FAR = 1 << 30  # beyond every key; also the limit of lengths, which kernels count in 32 bits
GRID_LIMIT = (
    65_535  # blocks along the second and third axis (CUDA C++ Programming Guide, table of compute capabilities)
)

WARP = 32
VECTOR_BYTES = 16  # the widest access of a thread


def band(q_len: int, k_len: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Query i sees keys i + low to i + high."""
    shift = k_len - q_len
    low = -FAR if window is None else shift - window
    high = shift if causal else FAR if window is None else shift + window
    return max(low, -FAR), min(high, FAR)


def padded(width: int, widths: tuple[int, ...]) -> int | None:
    """The narrowest of these widths, in ascending order, that holds `width`."""
    return next((w for w in widths if w >= width), None)


def aligned(address: int, strides: Strides, itemsize: int, vector: int = VECTOR_BYTES) -> bool:
    """Whether every row starts at a multiple of `vector` bytes and has contiguous columns."""
    return strides[-1] == 1 and address % vector == 0 and all(s * itemsize % vector == 0 for s in strides[:-1])


# --- tensor cores: fused_attention.cu -------------------------------------------------------------------------------

TENSOR_WIDTHS = (32, 64, 96, 128)  # D of kernel_fused
TENSOR_WARPS = 4
BLOCKS_EACH = 2  # of the larger tile that a multiprocessor holds, by its registers


@dataclass(frozen=True)
class Tiles:
    """A launch of ``fused<D, STRIPES>``."""

    width: int
    stripes: int
    launch: Launch

    @property
    def kernel(self) -> str:
        return f"fused<{self.width}, {self.stripes}>"


def tile_keys(width: int) -> int:
    """Keys of a tile, as the kernel has them."""
    return 64 if width <= 64 else 32


def tensor_tiles(batch: int, heads: int, q_len: int, width: int, multiprocessors: int) -> Tiles | None:
    """Tiles of 128 queries where they fill the device, else of 64; None for what the kernel does not take.

    That the device is full from `BLOCKS_EACH` blocks on each multiprocessor is our reading, not a measurement.
    """
    wide = padded(width, TENSOR_WIDTHS)
    if wide is None or width % 8 or max(batch, heads) > GRID_LIMIT:
        return None
    stripes = 2 if -(-q_len // 128) * heads * batch >= BLOCKS_EACH * multiprocessors else 1
    rows = 16 * stripes * TENSOR_WARPS
    shared = (rows + 4 * tile_keys(wide)) * (wide + 8) * 2
    return Tiles(wide, stripes, Launch((-(-q_len // rows), heads, batch), (WARP * TENSOR_WARPS,), shared))


# --- few queries over many keys: decode_attention.cu ----------------------------------------------------------------

DECODE_WIDTHS = (64, 128)  # D of kernel_decode
DECODE_ROWS = (1, 4, 8)  # R of kernel_decode: queries of a block, of all heads of a key head
DECODE_MOST = 16  # queries of a key head that are few; more than 8 are two blocks, which read the same keys
DECODE_KEYS = 256  # of a range, at least: what a block starts and ends with is small beside them
DECODE_BLOCKS = 4  # on a multiprocessor: loads of 16 KiB each under way; both numbers are ours, not measured


@dataclass(frozen=True)
class Ranges:
    """A launch of ``decode<T, A, D, R>``: keys `first` to `stop` - 1 in `count` ranges of `share` keys."""

    width: int
    rows: int
    first: int
    stop: int
    share: int
    launch: Launch

    @property
    def kernel(self) -> str:
        return f"decode<T, A, {self.width}, {self.rows}>"

    @property
    def count(self) -> int:
        return self.launch.grid[0]


def decode_ranges(
    batch: int, heads: int, groups: int, q_len: int, k_len: int, width: int, itemsize: int, seen: tuple[int, int],
    multiprocessors: int,
) -> Ranges | None:  # fmt: skip
    """Ranges of the keys that any query sees; None where there are too many queries, or for what no kernel takes."""
    wide, rows = padded(width, DECODE_WIDTHS), heads // groups * q_len
    if wide is None or rows > DECODE_MOST or width * itemsize % VECTOR_BYTES or max(batch, 2 * groups) > GRID_LIMIT:
        return None
    each = padded(rows, DECODE_ROWS) or DECODE_ROWS[-1]
    parts = -(-rows // each)
    first, stop = max(0, seen[0]), min(k_len, q_len + seen[1])
    span = max(1, stop - first)
    wanted = -(-DECODE_BLOCKS * multiprocessors // (batch * groups * parts))
    share = -(-span // max(1, min(wanted, span // DECODE_KEYS)))
    return Ranges(wide, each, first, stop, share, Launch((-(-span // share), groups * parts, batch), (4 * WARP,)))
