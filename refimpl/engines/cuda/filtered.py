"""LATTE's ops: codes of eight bits, and attention over the keys that an estimate keeps; kernels of ``filtered.cu``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refimpl.engines.cuda import shapes
from refimpl.engines.cuda.launch import Launcher, Source, dtype_of, flag
from refimpl.engines.cuda.rows import pack_of
from refimpl.engines.cuda.shapes import BLOCKS, WIDE, Launch, block_per_row, element_strides, head_strides
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
HALF = Source(
    "filtered_half.cu", ("filtered_half<true>", "filtered_half<false>"), dtypes=("float16",), capability=80, apart=True
)
QUANTIZE = Source("quantize.cu", ("most<T, true>", "most<T, false>", "codes<T, true>", "codes<T, false>"))
MARGINS = Source("margins.cu", ("margins<__half>", "margins<float>", "margins<double>"), dtypes=("float64",))

TILE, KEYS, PAD, ROOM = 16, 64, 16, 40  # rows of a warp, keys of a tile, bytes and numbers between rows: filtered.cuh
VALUE_PAD = 8  # numbers behind a row of values and of sums: filtered_half.cu
WARPS = 4  # of a block
HEAD_PACKS = 2048  # of 16 bytes: a longer head is quantised by several blocks
LEAST_KEYS = 256  # keys of a block where several share those of a row
LOWEST = -(2**31)  # no estimate


@dataclass(frozen=True)
class Cut:
    """How rows and keys are shared among blocks.

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
        if parts > 1:
            self._launch(QUANTIZE, f"most<T, {flag(vector)}>", x, launch, x, most, *sizes)
        tiny = float(np.finfo(x.dtype).smallest_normal)
        self._launch(QUANTIZE, f"codes<T, {flag(vector)}>", x, launch, x, most, codes, sigma, *sizes, tiny)
        return codes, sigma

    def filtered_attention(
        self, q: Array, k: Array, v: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array,
        thresholds: Array, scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:  # fmt: skip
        check_filter("filtered_attention", q, k, q_codes, k_codes, q_scale, k_scale, thresholds, nibble, stage2, v)
        (batch, heads, q_len, _), (k_len, v_width) = q.shape, v.shape[2:]
        out, counts = self._heads_last((batch, heads, q_len, v_width), q.dtype), self.xp.zeros((batch, heads), np.int64)
        if 0 in (*out.shape, k_len):
            out[...] = 0
            return out, counts
        given = self._operands(q, k, q_codes, k_codes, mask)
        bounds = self._bounds(given, q_scale, k_scale, thresholds, scale, causal, nibble)
        v = self._unit_columns(v)
        v_strides, out_strides = head_strides(v), element_strides(out)[:3]
        half = q.dtype == np.float16 and pack_of(v_width, tuple((v, stride) for stride in v_strides)) > 1
        wide = np.dtype(WIDE[dtype_of(q)])
        cut = shared_out(given, True, self.block_shared_bytes(), wide.itemsize, v_width, half)
        parts = self.xp.empty((cut.splits, batch * heads * q_len, v_width) if cut.splits > 1 else (1,), wide)
        stats = self.xp.empty((cut.splits, batch * heads * q_len, 2) if cut.splits > 1 else (1,), wide)
        nearest, exact = flag(nibble == "round"), int(stage2 == "float")
        source, kernel = FILTERED, f"filtered<T, A, {columns_per_lane(v, v_strides)}, {nearest}>"
        if half:
            source, kernel = HALF, f"filtered_half<{nearest}>"
        self._launch(
            source, kernel, q, cut.launch, given.q, given.k, given.q_codes, given.k_codes, *bounds, given.mask, v, out,
            parts, stats, counts, batch * heads, *given.sizes, cut.tiles, cut.splits, cut.span, int(causal), exact,
            given.masked, given.packed, float(scale), *given.strides, v_width, *v_strides, *out_strides,
        )  # fmt: skip
        if cut.splits > 1:
            _, steps, _ = bounds
            sizes = batch * heads, heads, q_len, cut.splits, v_width, exact, float(scale), *out_strides
            launch = block_per_row(batch * heads * q_len, v_width)
            self._launch(FILTERED, "merge<T, A>", q, launch, parts, stats, steps, out, *sizes)
        return out, counts

    def filtered_map(
        self, q: Array, k: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array,
        thresholds: Array, scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:  # fmt: skip
        check_filter("filtered_map", q, k, q_codes, k_codes, q_scale, k_scale, thresholds, nibble, stage2)
        batch, heads, q_len, _ = q.shape
        out = self.xp.empty((batch, heads, q_len, k.shape[2]), q.dtype)
        counts = self.xp.zeros((batch, heads), np.int64)
        if not out.size:
            return out, counts
        given = self._operands(q, k, q_codes, k_codes, mask)
        bounds = self._bounds(given, q_scale, k_scale, thresholds, scale, causal, nibble)
        cut = shared_out(given, False, self.block_shared_bytes(), np.dtype(WIDE[dtype_of(q)]).itemsize)
        self._launch(
            FILTERED, f"filtered_map<T, A, {flag(nibble == 'round')}>", q, cut.launch, given.q, given.k, given.q_codes,
            given.k_codes, *bounds, given.mask, out, counts, *given.sizes, cut.tiles, int(causal),
            int(stage2 == "float"), given.masked, given.packed, float(scale), *given.strides,
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
        codes = tuple((x, stride) for x in (q_codes, k_codes) for stride in head_strides(x))
        pointer, (masked, *m_strides) = self._mask_of((*q.shape[:3], k.shape[2]), q_codes, mask)
        strides = *head_strides(q, k, q_codes, k_codes), *m_strides
        return Operands(q, k, q_codes, k_codes, pointer, masked, int(pack_of(q.shape[3], codes) > 1), strides)

    def _bounds(
        self, given: Operands, q_scale: Array, k_scale: Array, thresholds: Array, scale: float, causal: bool,
        nibble: str,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """What decides which keys are kept: the largest estimates (B, H, Tq), steps and margins (B, H)."""
        (batch, heads, q_len, _), groups = given.q.shape, given.k.shape[1]
        maps, c_type = batch * heads, shapes.C_TYPES[dtype_of(given.q)]
        q_scale, k_scale, thresholds = (self.xp.ascontiguousarray(x) for x in (q_scale, k_scale, thresholds))
        steps, margins = self.xp.empty((batch, heads), np.float64), self.xp.empty((batch, heads), np.int32)
        k_batch = groups if k_scale.shape[0] > 1 else 0
        self._launch(
            MARGINS, f"margins<{c_type}>", thresholds, Launch((-(-maps // shapes.THREADS),), (shapes.THREADS,)),
            q_scale, k_scale, thresholds, steps, margins, maps, heads, heads // groups, k_batch, float(scale),
        )  # fmt: skip
        most = self.xp.full((batch, heads, q_len), LOWEST, np.int32)
        cut = shared_out(given, True, self.block_shared_bytes())
        self._launch(
            FILTERED, f"maxima<{flag(nibble == 'round')}>", given.q, cut.launch, given.q_codes, given.k_codes,
            given.mask, most, *given.sizes, cut.tiles, cut.splits, cut.span, int(causal), given.masked, given.packed,
            *given.strides[6:],
        )  # fmt: skip
        return most, steps, margins


@dataclass(frozen=True)
class Operands:
    """Arrays as the kernels read them; strides (batch, head, row) of the first four, and those of the mask."""

    q: Array
    k: Array
    q_codes: Array
    k_codes: Array
    mask: Array
    masked: int
    packed: int
    strides: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Heads, key heads, queries, keys, width."""
        (_, heads, q_len, width), (_, groups, k_len, _) = self.q.shape, self.k.shape
        return heads, groups, q_len, k_len, width


# --- launch shapes --------------------------------------------------------------------------------------------------


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


def warps_that_fit(available: int, width: int, itemsize: int, v_width: int, half: bool = False) -> int:
    """Warps of a block, so that its `available` bytes leave room for a second one; fewer where heads are wide."""
    for most in (available // 2, available):
        for warps in (WARPS, WARPS // 2, 1):
            if shared_bytes(width, warps, itemsize, v_width, half) <= most:
                return warps
    raise UnsupportedError(
        f"filtered attention: heads of {width} numbers and values of {v_width} do not fit into {available} bytes of "
        "shared memory; use narrower heads or another engine"
    )


def shared_out(
    given: Operands, splits_keys: bool, available: int, itemsize: int = 0, v_width: int = 0, half: bool = False
) -> Cut:
    """The blocks of a launch, with room for weights and sums of `itemsize` bytes, if any, in `available` bytes each."""
    heads, groups, q_len, k_len, width = given.sizes
    warps = warps_that_fit(available, width, itemsize, v_width, half)
    found = cut_of(len(given.q) * groups, heads // groups * q_len, k_len, warps, splits_keys)
    shared = shared_bytes(width, found.launch.block[1], itemsize, v_width, half)
    return replace(found, launch=replace(found.launch, shared_bytes=shared))


def cut_of(maps: int, rows: int, k_len: int, warps: int, splits_keys: bool) -> Cut:
    """Rows of each of so many key heads in tiles, and keys too where there are too few of them for the device."""
    warps = min(warps, -(-rows // TILE))
    tiles = -(-rows // (TILE * warps))
    wanted = -(-BLOCKS // (maps * tiles)) if splits_keys else 1
    splits = max(1, min(wanted, k_len // LEAST_KEYS))
    span = -(-k_len // (splits * KEYS)) * KEYS
    splits = -(-k_len // span)
    return Cut(tiles, splits, span, Launch((maps * tiles * splits,), (32, warps)))


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
