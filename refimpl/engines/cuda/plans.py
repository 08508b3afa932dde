"""Which kernel computes a fused attention, and its launch: pure functions, so that they are tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.shapes import PACK_BYTES, WARP, Launch, Strides

FAR = 1 << 30  # beyond every key; also the limit of lengths, which kernels count in 32 bits
GRID_LIMIT = 65_535  # blocks along the second and third axis (CUDA C++ Programming Guide, compute capabilities)


def band(q_len: int, k_len: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Query i sees keys i + low to i + high."""
    shift = k_len - q_len
    low = -FAR if window is None else shift - window
    high = shift if causal else FAR if window is None else shift + window
    return max(low, -FAR), min(high, FAR)


def padded(width: int, widths: tuple[int, ...]) -> int | None:
    """The narrowest of these widths, in ascending order, that holds `width`."""
    return next((w for w in widths if w >= width), None)


def aligned(address: int, strides: Strides, itemsize: int, vector: int = PACK_BYTES) -> bool:
    """Whether every row starts at a multiple of `vector` bytes and has contiguous columns."""
    return strides[-1] == 1 and address % vector == 0 and all(s * itemsize % vector == 0 for s in strides[:-1])


# --- tensor cores: fused_attention.cu -------------------------------------------------------------------------------

TENSOR_WIDTHS = (32, 64, 96, 128)  # D of kernel_fused
TENSOR_WARPS = 4
BLOCKS_EACH = 2  # of the larger tile that a multiprocessor holds, by its registers


@dataclass(frozen=True)
class Tiles:
    """A launch of a kernel whose blocks own `rows` queries of one head."""

    kernel: str
    rows: int
    launch: Launch


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
    launch = Launch((-(-q_len // rows), heads, batch), (WARP * TENSOR_WARPS,), shared)
    return Tiles(f"fused<{wide}, {stripes}>", rows, launch)


# --- float32: fused_attention_float.cu ------------------------------------------------------------------------------

FLOAT_WIDTHS = (64, 128)  # D of kernel_fused_float
FLOAT_TILE = 64
FLOAT_FLOPS = 2e9  # of one launch, beyond which cuBLAS's faster products make up for their many; ours, not measured


def float_tiles(batch: int, heads: int, q_len: int, k_len: int, width: int) -> Tiles | None:
    """Tiles of 64 queries for so little work that launches are most of the time; None for more, and where D > 128."""
    wide = padded(width, FLOAT_WIDTHS)
    if wide is None or max(batch, heads) > GRID_LIMIT or 4.0 * batch * heads * q_len * k_len * width > FLOAT_FLOPS:
        return None
    shared = 4 * FLOAT_TILE * (3 * (wide + 4) + FLOAT_TILE + 4)
    launch = Launch((-(-q_len // FLOAT_TILE), heads, batch), (256,), shared)
    return Tiles(f"fused_float<T, {wide}>", FLOAT_TILE, launch)


# --- few queries over many keys: decode_attention.cu ----------------------------------------------------------------

DECODE_WIDTHS = (64, 128)  # D of kernel_decode
DECODE_ROWS = (1, 4, 8)  # R of kernel_decode: queries of a block, of all heads of a key head
DECODE_MOST = 16  # queries of a key head that are few; more than 8 are two blocks, which read the same keys
DECODE_KEYS = 256  # of a range, at least: what a block starts and ends with is small beside them; ours, not measured
DECODE_BLOCKS = 3  # on a multiprocessor: what registers allow for 4 and 8 queries, with 16 KiB each under way


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
    if wide is None or rows > DECODE_MOST or width * itemsize % PACK_BYTES or max(batch, 2 * groups) > GRID_LIMIT:
        return None
    each = padded(rows, DECODE_ROWS) or DECODE_ROWS[-1]
    parts = -(-rows // each)
    first, stop = max(0, seen[0]), min(k_len, q_len + seen[1])
    span = max(1, stop - first)
    fitting = DECODE_BLOCKS * multiprocessors // (batch * groups * parts)  # one more would wait for all others
    share = -(-span // max(1, min(fitting, span // DECODE_KEYS)))
    return Ranges(wide, each, first, stop, share, Launch((-(-span // share), groups * parts, batch), (4 * WARP,)))


# --- softmax of rows: maps.cu ---------------------------------------------------------------------------------------

HELD = 16  # numbers of a row in the registers of each thread
MOST_THREADS = 1024  # of a block


def softmax_rows(rows: int, keys: int) -> Launch | None:
    """Teams that hold a row in registers: a warp, some of which share a block, or a block; None for longer rows."""
    team = max(WARP, 1 << (-(-max(keys, 1) // HELD) - 1).bit_length())
    if team > MOST_THREADS:
        return None
    together = max(1, min(rows, shapes.THREADS // WARP)) if team == WARP else 1
    return Launch((-(-rows // together),), (team, together))
