"""LATTE's ops: codes of eight bits, and attention over the keys that an estimate keeps; kernels of ``filtered.cu``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.launch import Launcher, Source, dtype_of
from refimpl.engines.cuda.rows import pack_of
from refimpl.engines.cuda.selection import BLOCKS
from refimpl.engines.cuda.shapes import WIDE, Launch, batch_strides, block_per_row, element_strides
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError, UnsupportedError

FILTERED = Source(
    "filtered.cu",
    (
        "maxima<true>", "maxima<false>",
        *(f"filtered<T, A, {columns}, {nearest}>" for columns in (1, 2, 4) for nearest in ("true", "false")),
        "filtered_map<T, A, true>", "filtered_map<T, A, false>", "merge<T, A>",
    ),
    capability=80,
    apart=True,
)  # fmt: skip
HALF = Source("filtered_half.cu", ("filtered_half<true>", "filtered_half<false>"), ("float16",), 80, apart=True)
QUANTIZE = Source("quantize.cu", ("most<T, true>", "most<T, false>", "codes<T, true>", "codes<T, false>"))
MARGINS = Source("margins.cu", ("margins<__half>", "margins<float>", "margins<double>"), dtypes=("float64",))

TILE, KEYS, PAD, ROOM = 16, 64, 16, 40  # rows of a warp, keys of a tile, bytes and numbers between rows: filtered.cu
VALUE_PAD = 8  # numbers behind a row of values and of sums: filtered_half.cu
WARPS = 4  # of a block
HEAD_PACKS = 2048  # of 16 bytes: a longer head is quantised by several blocks
SHARED_BYTES = 227 << 10  # that a block can have on an H100 (CUDA C++ Programming Guide, compute capability 9.0)
LEAST_KEYS = 256  # keys of a block where several share those of a row
LOWEST = -(2**31)  # no estimate


@dataclass(frozen=True)
class Tiles:
    """How rows and keys are cut.

    Attributes
    ----------
    tiles : int
        Blocks that share the rows of a key head.
    splits : int
        Blocks that share the keys of a row.
    span : int
        Keys of each of those.
    launch : Launch
    """

    tiles: int
    splits: int
    span: int
    launch: Launch


class Filtered(Launcher):
    """Rows of a block are the queries of all heads that share a key head. Nothing waits for the device."""

    def quantize(self, x: Array) -> tuple[Array, Array]:
        if x.ndim != 4:
            raise ShapeError(f"quantize: x has shape {x.shape}; it takes (B, H, T, D)")
        batch, heads, length, width = x.shape
        codes, sigma = self.xp.empty(x.shape, np.int8), self.xp.ones((batch, heads, 1, 1), x.dtype)
        if not x.size:
            return codes, sigma
        x = self._unit_columns(x)
        strides = element_strides(x)[:3]
        vector = pack_of(width, tuple((x, stride) for stride in strides)) > 1
        packs = length * width // (16 // x.dtype.itemsize if vector else 1)
        parts, span = parts_of_heads(batch * heads, packs)
        bits = np.uint64 if x.dtype == np.float64 else np.uint32
        most = (self.xp.zeros if parts > 1 else self.xp.empty)((batch, heads), bits)
        launch = Launch((batch * heads * parts,), (shapes.THREADS,))
        sizes = heads, length, width, *strides, parts, span
        flag = "true" if vector else "false"
        if parts > 1:
            self._launch(QUANTIZE, f"most<T, {flag}>", x, launch, x, most, *sizes)
        tiny = float(np.finfo(x.dtype).smallest_normal)
        self._launch(QUANTIZE, f"codes<T, {flag}>", x, launch, x, most, codes, sigma, *sizes, tiny)
        return codes, sigma

    def filtered_attention(
        self, q: Array, k: Array, v: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array,
        thresholds: Array, scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:  # fmt: skip
        check_filter("filtered_attention", q, k, q_codes, k_codes, q_scale, k_scale, thresholds, nibble, stage2, v)
        (batch, heads, q_len, width), (groups, k_len), v_width = q.shape, k.shape[1:3], v.shape[3]
        out = self.xp.empty((batch, q_len, heads, v_width), q.dtype).transpose(0, 2, 1, 3)  # merge_heads is a view
        counts = self.xp.zeros((batch, heads), np.int64)
        if 0 in (*out.shape, k_len):
            out[...] = 0
            return out, counts
        rows, itemsize = heads // groups * q_len, np.dtype(WIDE[dtype_of(q)]).itemsize
        given = self._operands(q, k, q_codes, k_codes, mask)
        most, steps, margins = self._maxima(given, q_scale, k_scale, thresholds, scale, causal, nibble)
        v = self._unit_columns(v)
        v_strides, out_strides = strides_of(v, batch), element_strides(out)[:3]
        half = q.dtype == np.float16 and pack_of(v_width, tuple((v, stride) for stride in v_strides)) > 1
        tiles = cut(batch * groups, rows, k_len, warps_that_fit(width, itemsize, v_width, half), True)
        shared = shared_bytes(width, tiles.launch.block[1], itemsize, v_width, half)
        splits, maps = tiles.splits, batch * heads
        parts = self.xp.empty((splits, maps * q_len, v_width) if splits > 1 else (1,), WIDE[dtype_of(q)])
        stats = self.xp.empty((splits, maps * q_len, 2) if splits > 1 else (1,), WIDE[dtype_of(q)])
        source, nearest, exact = HALF if half else FILTERED, flag(nibble == "round"), stage2 == "float"
        sparse = f"filtered<T, A, {columns_per_lane(v, v_strides)}, {nearest}>"
        self._launch(
            source, f"filtered_half<{nearest}>" if half else sparse, q,
            Launch(tiles.launch.grid, tiles.launch.block, shared),
            given.q, given.k, given.q_codes, given.k_codes, most, steps, margins, given.mask, v, out, parts, stats,
            counts, maps, heads, groups, q_len, k_len, width, tiles.tiles, splits, tiles.span, int(causal), int(exact),
            given.masked, given.packed, float(scale), *given.strides, v_width, *v_strides, *out_strides,
        )  # fmt: skip
        if splits > 1:
            sizes = maps, heads, q_len, splits, v_width, int(exact), float(scale), *out_strides
            self._launch(
                FILTERED, "merge<T, A>", q, block_per_row(maps * q_len, v_width), parts, stats, steps, out, *sizes
            )
        return out, counts

    def filtered_map(
        self, q: Array, k: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array,
        thresholds: Array, scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:  # fmt: skip
        check_filter("filtered_map", q, k, q_codes, k_codes, q_scale, k_scale, thresholds, nibble, stage2)
        (batch, heads, q_len, width), (groups, k_len) = q.shape, k.shape[1:3]
        out = self.xp.empty((batch, heads, q_len, k_len), q.dtype)
        counts = self.xp.zeros((batch, heads), np.int64)
        if not out.size:
            return out, counts
        itemsize = np.dtype(WIDE[dtype_of(q)]).itemsize
        given = self._operands(q, k, q_codes, k_codes, mask)
        most, steps, margins = self._maxima(given, q_scale, k_scale, thresholds, scale, causal, nibble)
        tiles = cut(batch * groups, heads // groups * q_len, k_len, warps_that_fit(width, itemsize, 0), False)
        shared = shared_bytes(width, tiles.launch.block[1], itemsize, 0)
        self._launch(
            FILTERED, f"filtered_map<T, A, {flag(nibble == 'round')}>", q,
            Launch(tiles.launch.grid, tiles.launch.block, shared),
            given.q, given.k, given.q_codes, given.k_codes, most, steps, margins, given.mask, out, counts, heads,
            groups, q_len, k_len, width, tiles.tiles, int(causal), int(stage2 == "float"), given.masked, given.packed,
            float(scale), *given.strides,
        )  # fmt: skip
        return out, counts

    # --- shared steps -------------------------------------------------------------------------------------------

    def _operands(self, q: Array, k: Array, q_codes: Array, k_codes: Array, mask: Array | None) -> Operands:
        if self.capability() < FILTERED.capability:
            raise UnsupportedError(
                f"filtered attention multiplies bytes on tensor cores, from compute capability 8.0 on; "
                f"{self.device_name()} has {self.capability() / 10}: use the numba or numpy engine"
            )
        q, k, q_codes, k_codes = (self._unit_columns(x) for x in (q, k, q_codes, k_codes))
        shape, masked = (*q.shape[:3], k.shape[2]), mask is not None
        if mask is not None:
            mask = self.xp.broadcast_to(mask if mask.dtype == bool else mask != 0, shape)
        strides = [strides_of(x, q.shape[0]) for x in (q, k, q_codes, k_codes)]
        codes = tuple((x, stride) for x, steps in ((q_codes, strides[2]), (k_codes, strides[3])) for stride in steps)
        return Operands(
            q, k, q_codes, k_codes, mask if masked else q_codes, int(masked), int(pack_of(q.shape[3], codes) > 1),
            (*(stride for steps in strides for stride in steps), *(element_strides(mask) if masked else (0, 0, 0, 0))),
        )  # fmt: skip

    def _maxima(
        self,
        given: Operands,
        q_scale: Array,
        k_scale: Array,
        thresholds: Array,
        scale: float,
        causal: bool,
        nibble: str,
    ) -> tuple[Array, Array, Array]:
        """Largest estimates (B, H, Tq), steps and margins (B, H)."""
        (batch, heads, q_len, width), (groups, k_len) = given.q.shape, given.k.shape[1:3]
        maps, c_type = batch * heads, shapes.C_TYPES[dtype_of(given.q)]
        q_scale, k_scale, thresholds = (self.xp.ascontiguousarray(x) for x in (q_scale, k_scale, thresholds))
        steps, margins = self.xp.empty((batch, heads), np.float64), self.xp.empty((batch, heads), np.int32)
        k_batch = groups if k_scale.shape[0] > 1 else 0
        self._launch(
            MARGINS, f"margins<{c_type}>", thresholds, Launch((-(-maps // shapes.THREADS),), (shapes.THREADS,)),
            q_scale, k_scale, thresholds, steps, margins, maps, heads, heads // groups, k_batch, float(scale),
        )  # fmt: skip
        most = self.xp.full((batch, heads, q_len), LOWEST, np.int32)
        tiles = cut(batch * groups, heads // groups * q_len, k_len, warps_that_fit(width, 0, 0), True)
        shared = shared_bytes(width, tiles.launch.block[1], 0, 0)
        self._launch(
            FILTERED, f"maxima<{flag(nibble == 'round')}>", given.q,
            Launch(tiles.launch.grid, tiles.launch.block, shared), given.q_codes, given.k_codes, given.mask, most,
            heads, groups, q_len, k_len, width, tiles.tiles, tiles.splits, tiles.span, int(causal), given.masked,
            given.packed, *given.strides[6:],
        )  # fmt: skip
        return most, steps, margins


@dataclass(frozen=True)
class Operands:
    """Arrays as the kernels read them; strides (batch, head, row) of the first four, and those of the mask."""

    q: Array
    k: Array
    q_codes: Array
    k_codes: Array
    mask: Any
    masked: int
    packed: int
    strides: tuple[int, ...]


# --- launch shapes --------------------------------------------------------------------------------------------------


def flag(value: bool) -> str:
    """A truth value as C++ writes it."""
    return "true" if value else "false"


def strides_of(x: Array, batch: int) -> tuple[int, ...]:
    """Strides of batch, head and row of (B or 1, H, T, D)."""
    return (*batch_strides(x, (batch,)), *element_strides(x)[1:3])


def parts_of_heads(maps: int, packs: int) -> tuple[int, int]:
    """Blocks that quantise a head together, and packs of each: one where heads are short or many."""
    parts = max(1, min(-(-packs // HEAD_PACKS), -(-2 * BLOCKS // maps)))
    span = -(-packs // parts)
    return -(-packs // span), span


def shared_bytes(width: int, warps: int, itemsize: int, v_width: int, half: bool = False) -> int:
    """Shared memory of a block: codes of its rows and of a tile of keys, weights, sums; with `half` values too."""
    row, rows = -(-width // 32) * 32 + PAD, warps * TILE
    sums = v_width + (VALUE_PAD if half else 0)
    return row * (rows + KEYS) + rows * (ROOM + sums) * itemsize + (2 * KEYS * sums if half else 0)


def warps_that_fit(width: int, itemsize: int, v_width: int, half: bool = False) -> int:
    """Warps of a block, so that it leaves room for a second one; fewer where heads are wide."""
    for most in (SHARED_BYTES // 2, SHARED_BYTES):
        for warps in (WARPS, WARPS // 2, 1):
            if shared_bytes(width, warps, itemsize, v_width, half) <= most:
                return warps
    raise UnsupportedError(
        f"filtered attention: heads of {width} numbers and values of {v_width} do not fit into {SHARED_BYTES} bytes of "
        "shared memory; use narrower heads or another engine"
    )


def cut(maps: int, rows: int, k_len: int, warps: int, splits_keys: bool) -> Tiles:
    """Rows of each of so many key heads in tiles, and keys too where there are too few of them for the device."""
    warps = min(warps, -(-rows // TILE))
    tiles = -(-rows // (TILE * warps))
    wanted = -(-BLOCKS // (maps * tiles)) if splits_keys else 1
    splits = max(1, min(wanted, k_len // LEAST_KEYS))
    span = -(-k_len // (splits * KEYS)) * KEYS
    splits = -(-k_len // span)
    return Tiles(tiles, splits, span, Launch((maps * tiles * splits,), (32, warps)))


def columns_per_lane(v: Array, strides: tuple[int, ...]) -> int:
    """Columns of a row of values that a lane takes at once: 4 or 2 where every lane has so many, else 1."""
    for columns in (4, 2):
        aligned = v.data.ptr % (columns * v.dtype.itemsize) == 0 and all(stride % columns == 0 for stride in strides)
        if aligned and v.shape[3] % (32 * columns) == 0 and columns * v.dtype.itemsize <= 16:
            return columns
    return 1


def check_filter(
    op: str, q: Array, k: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array, thresholds: Array,
    nibble: str, stage2: str, v: Array | None = None,
) -> None:  # fmt: skip
    """Raise unless the arrays fit each other and the words are known; what is in the arrays is not looked at."""
    heads = q.ndim == k.ndim == 4 and 0 < k.shape[1] <= q.shape[1] and q.shape[1] % k.shape[1] == 0
    fits = heads and q.shape[3] == k.shape[3] > 0 and k.shape[0] in (1, q.shape[0]) and q.dtype == k.dtype
    fits = fits and (v is None or (v.ndim == 4 and v.shape[:3] == k.shape[:3] and v.dtype == q.dtype))
    for x, codes, sigma in ((q, q_codes, q_scale), (k, k_codes, k_scale)):
        fits = fits and codes.shape == x.shape and codes.dtype == np.int8
        fits = fits and sigma.shape == (*x.shape[:2], 1, 1) and sigma.dtype == x.dtype
    fits = fits and thresholds.shape == q.shape[1:2] and thresholds.dtype == np.float64
    if not fits:
        values = "" if v is None else f", v {v.shape} {v.dtype}"
        raise ShapeError(
            f"{op}: q {q.shape} {q.dtype}, k {k.shape} {k.dtype}{values}, codes {q_codes.shape} {q_codes.dtype} and "
            f"{k_codes.shape} {k_codes.dtype}, scales {q_scale.shape} and {k_scale.shape}, thresholds "
            f"{thresholds.shape} {thresholds.dtype} do not go together: (B, H, T, D) heads, int8 codes, scales "
            "(B, H, 1, 1), thresholds (H,) float64"
        )
    if nibble not in ("floor", "round") or stage2 not in ("int8", "float"):
        raise ShapeError(f"{op}: nibble={nibble!r}, stage2={stage2!r}; known: floor and round, int8 and float")
