"""The op vocabulary: what every engine offers, in which shapes, and which sizes of a call decide its cost.

A method calls ``at(COMPONENT).op(...)`` and never asks which engine runs it. Letters: B batch, T length (Tq queries,
Tk keys), d width, H heads (Hkv of keys and values), D head width. Hidden states are (B, T, d), heads (B, H, T, D).
Ops never modify their inputs, `append`, `refine` and `scatter` excepted, and the dtype that goes in comes out, but for
indices and codes.

Cost conventions (the formulas are ``costmodel.ops``): a multiply-add is 2 FLOPs; matrix and vector FLOPs are apart; one
exp, erf, division, maximum or addition is one vector FLOP; bytes are what an op must move: the elements of its operands
that it uses, read once, and its result, written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

Array = Any  # numpy.ndarray, cupy.ndarray, ...: an engine's own


class Engine(Protocol):
    """The ops and the few services that a forward pass needs."""

    name: str

    # --- services -----------------------------------------------------------------------------------------------

    def asarray(self, host: Array) -> Array:
        """A NumPy array as this engine's array (a copy where the device has its own memory)."""

    def to_numpy(self, array: Array) -> Array:
        """This engine's array as a NumPy array; waits until it is computed."""

    def mark(self) -> Any:
        """A point in time; on a GPU an event in the stream."""

    def elapsed_s(self, start: Any, stop: Any) -> float:
        """Seconds between two marks."""

    def split_heads(self, x: Array, heads: int) -> Array:
        """(B, T, H D) as (B, H, T, D): a view, not an op."""

    def merge_heads(self, x: Array) -> Array:
        """(B, H, T, D) as (B, T, H D): a view where the op before wrote it that way."""

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The elements in row-major order under another shape: a view of an array that lies in this order."""

    # --- linear maps --------------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """``x Wᵀ + b``: x (..., d_in), weight (d_out, d_in), bias (d_out,) -> (..., d_out)."""

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        """`linear` whose output columns are cut into consecutive parts of the given widths; x is read once."""

    def conv1d(self, x: Array, weight: Array, bias: Array, stride: int) -> Array:
        """Convolution along time, zero-padded by (kernel - 1) / 2: x (B, T, d_in), weight (d_out, kernel, d_in), bias
        (d_out,) -> (B, ceil(T / stride), d_out)."""

    def depthwise_conv(self, x: Array, weight: Array, bias: Array) -> Array:
        """One filter per channel, zero-padded to keep the length: x (B, T, d), weight (kernel, d), bias (d,)."""

    def block_linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """`linear` with the block-diagonal matrix of n blocks: columns c q to (c + 1) q of x times ``weight[c]ᵀ``;
        x (..., n q), weight (n, p, q), bias (n p,) -> (..., n p)."""

    def embedding(self, table: Array, ids: Array) -> Array:
        """Rows of the table (V, d) by ids (...) -> (..., d)."""

    # --- norms --------------------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis (arXiv 1607.06450)."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (arXiv 1910.07467)."""

    def batch_norm(self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
        """``(x - mean) / sqrt(variance + eps) * weight + bias`` per channel with stored statistics: x (B, T, d)."""

    # --- elementwise --------------------------------------------------------------------------------------------

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        """``x + scale * y``; y broadcasts to x, as a residual of the same shape, a table (T, d) or
        a bias (d,)."""

    def gelu(self, x: Array) -> Array:
        """``x / 2 (1 + erf(x / sqrt 2))`` (arXiv 1606.08415)."""

    def gelu_tanh(self, x: Array) -> Array:
        """``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``, GPT-2's form."""

    def silu(self, x: Array) -> Array:
        """``x / (1 + exp(-x))``, also called Swish."""

    def relu(self, x: Array) -> Array:
        """``max(x, 0)``."""

    def glu(self, x: Array) -> Array:
        """``a / (1 + exp(-b))`` with a and b the two halves of the last axis: (..., 2 d) -> (..., d)."""

    def elu_plus_one(self, x: Array) -> Array:
        """``x + 1`` where x > 0, else ``exp(x)``: a positive feature map (arXiv 2006.16236, eq. 7)."""

    def swiglu(self, gate: Array, up: Array) -> Array:
        """``silu(gate) * up`` (arXiv 2002.05202)."""

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        """Rotate pairs of channels by the angle of their position: x (B, H, T, D), cos and sin (T, D / 2). Pairs are
        (2i, 2i + 1) when interleaved, else (i, i + D / 2) (arXiv 2104.09864, eq. 34)."""

    def concat(self, parts: tuple[Array, ...], axis: int) -> Array:
        """The parts one after the other along `axis`."""

    def append(self, store: Array, new: Array, start: int) -> Array:
        """Write new (B, H, T, D) into rows start to start + T - 1 of store (B, H, S, D), in place; the rows filled so
        far (B, H, start + T, D), a view."""

    # --- stored maps --------------------------------------------------------------------------------------------
    # `rows` are whole numbers that the program knows: a tuple, not an array.

    def max_pool(self, x: Array) -> Array:
        """The largest of each 2 x 2 elements: (B, T, d) -> (B, T // 2, d // 2); an odd last one is left out."""

    def nearest(self, x: Array, points: Array) -> tuple[Array, Array]:
        """Of each row of x (B, w) the Euclidean distance to the nearest of points (N, w), N > 0, and which that is:
        (B,) and (B,) of int64; the first of equally near ones."""

    def search_graph(self, x: Array, index: Any) -> tuple[Array, Array]:
        """As `nearest`, by ``index.search`` on the host: most often the nearest."""

    def fetch(self, records: Any, rows: tuple[int | None, ...], transfer: str) -> Array:
        """Stored maps (H, T, S) as one batch (B, H, T, S): mapped into memory without a copy, or copied; those of None
        are left for `scatter`. `records` as `refimpl.memo.mapping.gather` takes them."""

    def take_rows(self, x: Array, rows: tuple[int, ...]) -> Array:
        """These sequences of a batch: (B, ...) -> (n, ...)."""

    def scatter(self, store: Array, new: Array, rows: tuple[int, ...]) -> Array:
        """Write new (n, ...) into these sequences of store (B, ...), in place; returns store."""

    # --- attention ----------------------------------------------------------------------------------------------
    # A mask is a bool array that broadcasts to (B, H, Tq, Tk); True where a query may look. With `causal`, query i
    # sees keys j <= i + (Tk - Tq). Query head h uses key head h // (H / Hkv). A row that sees no key gives zeros.

    def scores(self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
        """``(scale q) kᵀ``, -inf where hidden: q (B, H, Tq, D), k (B or 1, Hkv, Tk, D) -> (B, H, Tq, Tk)."""

    def add_relative(self, scores: Array, position: Array) -> Array:
        """Add position scores (B, H, T, 2T - 1), shifted so that column ``T - 1 - i + j`` meets key j, to scores
        (B, H, T, T) (Transformer-XL, arXiv 1901.02860, appendix B)."""

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        """Row softmax with the row maximum subtracted: (B, H, Tq, Tk)."""

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        """``P v``: weights (B, H, Tq, Tk), v (B, Hkv, Tk, D) -> (B, H, Tq, D)."""

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        scale: float | None = None,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        """`scores`, `softmax` and `weighted_sum` as one op that never holds the map; default scale 1 / sqrt(D)."""

    def relative_attention(
        self,
        q: Array,
        q_position: Array,
        k: Array,
        v: Array,
        p: Array,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        """`attention` whose logit (i, j) has ``scale q_position[i] . p[T - 1 - i + j]`` added; p (H, 2T - 1, D)."""

    def local_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        window: int,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        """`attention` in which query i, at position ``p = i + (Tk - Tq)``, sees keys ``p - window <= j <= p + window``
        alone; Tq <= Tk. Nothing outside this band is computed."""

    def local_relative_attention(
        self,
        q: Array,
        q_position: Array,
        k: Array,
        v: Array,
        p: Array,
        window: int,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
    ) -> Array:
        """`relative_attention` within the band of `local_attention`."""

    def project_length(self, x: Array, weight: Array, mask: Array | None = None) -> Array:
        """``E x`` of each head, hidden rows of x taken as zeros: x (B, H, T, D), weight (k, T), mask (B or 1, 1, 1, T)
        -> (B, H, k, D)."""

    def linear_attention(self, q: Array, k: Array, v: Array, causal: bool = False, mask: Array | None = None) -> Array:
        """``q_i (sum_j k_j v_jᵀ) / (q_i . sum_j k_j)`` over the keys j that query i sees, of features q and k that are
        not negative (arXiv 2006.16236, eqs. 5 and 9 to 12); D numbers wide, like v. A mask hides keys from all queries:
        (B or 1, 1, 1, Tk). Causal: Tq <= Tk. A row whose divisor is 0 gives zeros."""

    def quantize(self, x: Array) -> tuple[Array, Array]:
        """``round(x / sigma)`` as int8 from -127 to 127 with ``sigma = max |x| / 127`` of each head: x (B, H, T, D) ->
        codes (B, H, T, D), sigma (B, H, 1, 1). A head of zeros, or too small to divide by, has the codes 0 and sigma 1;
        a head that is not finite has the codes 0 and a sigma that is not finite."""

    def filtered_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        q_codes: Array,
        k_codes: Array,
        q_scale: Array,
        k_scale: Array,
        thresholds: Array,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
        nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:
        """`attention` over the keys that a 4-bit estimate keeps (LATTE, arXiv 2404.07519), and how many those are.

        ``keep j  iff  c_ij >= max_j c_ij - theta_h / (256 scale sigma_q sigma_k)``, the maximum over visible keys, with
        ``c_ij = q^h_i . k^h_j`` of the upper nibbles of the codes: ``x >> 4`` (`nibble` "floor") or
        ``min((x + 8) >> 4, 7)`` ("round"). Kept scores are ``scale sigma_q sigma_k (q_i . k_j of the codes)``, or with
        `stage2` "float" ``scale q_i . k_j``. thresholds (H,) float64, of at least 0; scale above 0; codes and scales
        from `quantize` -> context (B, H, Tq, D), kept pairs (B, H) int64."""

    def filtered_map(
        self,
        q: Array,
        k: Array,
        q_codes: Array,
        k_codes: Array,
        q_scale: Array,
        k_scale: Array,
        thresholds: Array,
        scale: float,
        causal: bool = False,
        mask: Array | None = None,
        nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:
        """The map of `filtered_attention`, for methods that hand it on: softmax over the kept keys, zero elsewhere ->
        weights (B, H, Tq, Tk), kept pairs (B, H) int64."""

    # --- selection ----------------------------------------------------------------------------------------------

    def top(self, z: Array, n: int) -> Array:
        """Where the n largest numbers of each row stand: z (..., V) -> (..., n), int64, ascending. Of equal numbers
        those with the lower index are taken first. Rows must be free of NaN."""

    def refine(self, z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Array:
        """``z[i] += weight[i] . g`` (or ``=``, to replace) for the ids i of each row: z (..., V), ids (..., n), weight
        (V, K), g (..., K) -> z. Modifies its first operand."""


# --- the sizes that decide the cost of a call -----------------------------------------------------------------------
# op -> function of the call's own arguments -> {size: int}. The recorder notes them; the cost model predicts them.

Sizes = dict[str, int]


def _linear(x: Array, weight: Array, bias: Array | None = None, widths: tuple[int, ...] = ()) -> Sizes:
    d_out, d_in = weight.shape
    return {"rows": x.size // d_in, "d_in": d_in, "d_out": d_out, "bias": int(bias is not None)}


def _conv1d(x: Array, weight: Array, bias: Array, stride: int) -> Sizes:
    d_out, kernel, d_in = weight.shape
    rows = x.shape[0] * (-(-x.shape[1] // stride))
    return {"rows": rows, "rows_in": x.size // d_in, "d_in": d_in, "d_out": d_out, "kernel": kernel}


def _depthwise_conv(x: Array, weight: Array, bias: Array) -> Sizes:
    return {"rows": x.size // x.shape[-1], "width": x.shape[-1], "kernel": weight.shape[0]}


def _block_linear(x: Array, weight: Array, bias: Array | None = None) -> Sizes:
    blocks, d_out, d_in = weight.shape  # of one block
    rows = x.size // (blocks * d_in)
    return {"rows": rows, "blocks": blocks, "d_in": d_in, "d_out": d_out, "bias": int(bias is not None)}


def _embedding(table: Array, ids: Array) -> Sizes:
    return {"rows": ids.size, "width": table.shape[1]}


def _rows(x: Array, *_: Any, **__: Any) -> Sizes:
    return {"rows": x.size // x.shape[-1], "width": x.shape[-1]}


def _add(x: Array, y: Array, scale: float = 1.0) -> Sizes:
    return {"elements": x.size, "operand": y.size, "scaled": int(scale != 1.0)}


def _elements(x: Array, *_: Any) -> Sizes:
    return {"elements": x.size}


def _glu(x: Array) -> Sizes:
    return {"elements": x.size // 2}


def _rotary(x: Array, cos: Array, sin: Array, interleaved: bool) -> Sizes:
    return {"elements": x.size, "angles": cos.size}


def _concat(parts: tuple[Array, ...], axis: int) -> Sizes:
    return {"elements": sum(part.size for part in parts)}


def _append(store: Array, new: Array, start: int) -> Sizes:
    return {"elements": new.size}


def _max_pool(x: Array) -> Sizes:
    return {"elements": x.shape[0] * (x.shape[1] // 2) * (x.shape[2] // 2)}


def _nearest(x: Array, points: Array) -> Sizes:
    return {"rows": x.shape[0], "points": points.shape[0], "width": x.shape[1]}


def _search_graph(x: Array, index: Any) -> Sizes:
    return {"rows": x.shape[0], "compared": index.compared, "width": x.shape[1]}  # noted after the call


def _fetch(records: Any, rows: tuple[int | None, ...], transfer: str) -> Sizes:
    found = sum(row is not None for row in rows)
    return {"elements": found * math.prod(records.layout.shape), "copied": int(transfer == "copy")}


def _take_rows(x: Array, rows: tuple[int, ...]) -> Sizes:
    return {"elements": len(rows) * math.prod(x.shape[1:])}


def _scatter(store: Array, new: Array, rows: tuple[int, ...]) -> Sizes:
    return {"elements": new.size}


def _maps(x: Array) -> int:
    return int(x.shape[0] * x.shape[1])


def _mask(mask: Array | None, q_len: int, k_len: int, causal: bool) -> int:
    """Elements of a mask that are read: all, or under a causal mask those of the visible pairs."""
    if mask is None or not causal:
        return 0 if mask is None else int(mask.size)
    maps, seeing = mask.shape[0] * mask.shape[1], min(q_len, k_len)  # rows that see a key
    if mask.shape[2] == 1:
        return int(maps * mask.shape[3])
    return int(maps * (seeing if mask.shape[3] == 1 else seeing * k_len - seeing * (seeing - 1) // 2))


def _scores(q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Sizes:
    return {
        "maps": _maps(q), "kv_maps": _maps(k), "q_len": q.shape[2], "k_len": k.shape[2], "head_dim": q.shape[3],
        "causal": int(causal), "mask": _mask(mask, q.shape[2], k.shape[2], causal),
    }  # fmt: skip


def _add_relative(scores: Array, position: Array) -> Sizes:
    return {"maps": _maps(scores), "length": scores.shape[2]}


def _softmax(scores: Array, causal: bool = False) -> Sizes:
    return {"maps": _maps(scores), "q_len": scores.shape[2], "k_len": scores.shape[3], "causal": int(causal)}


def _weighted_sum(weights: Array, v: Array, causal: bool = False) -> Sizes:
    return {
        "maps": _maps(weights), "kv_maps": _maps(v), "q_len": weights.shape[2], "k_len": v.shape[2],
        "head_dim": v.shape[3], "causal": int(causal),
    }  # fmt: skip


def _attention(
    q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False, mask: Array | None = None
) -> Sizes:
    return _scores(q, k, 1.0, causal, mask)


def _relative_attention(
    q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float,
    causal: bool = False, mask: Array | None = None,
) -> Sizes:  # fmt: skip
    return {
        "maps": _maps(q), "heads": q.shape[1], "length": q.shape[2], "head_dim": q.shape[3],
        "causal": int(causal), "mask": _mask(mask, q.shape[2], q.shape[2], causal),
    }  # fmt: skip


def visible_band(q_len: int, k_len: int, causal: bool, window: int) -> list[tuple[int, int]]:
    """Of each query the first key within its band and the one behind the last."""
    positions = range(k_len - q_len, k_len)
    return [(max(0, p - window), p + 1 if causal else min(k_len, p + window + 1)) for p in positions]


def band_keys(q_len: int, k_len: int, window: int) -> int:
    """The last keys, which are all that any query sees within its band."""
    return min(k_len, q_len + window)


def _band_mask(mask: Array | None, q_len: int, k_len: int, causal: bool, window: int) -> int:
    """Elements of a mask that are read: those of the pairs in the band."""
    if mask is None:
        return 0
    maps, by_row, by_key = mask.shape[0] * mask.shape[1], mask.shape[2] > 1, mask.shape[3] > 1
    if by_row and by_key:
        return int(maps * sum(stop - first for first, stop in visible_band(q_len, k_len, causal, window)))
    return int(maps * (band_keys(q_len, k_len, window) if by_key else q_len if by_row else 1))


def _local_attention(
    q: Array, k: Array, v: Array, window: int, scale: float, causal: bool = False, mask: Array | None = None
) -> Sizes:
    sizes = _scores(q, k, scale, causal)
    read = _band_mask(mask, q.shape[2], k.shape[2], causal, window)
    return {**sizes, "mask": read, "window": window}


def _local_relative_attention(
    q: Array, q_position: Array, k: Array, v: Array, p: Array, window: int, scale: float,
    causal: bool = False, mask: Array | None = None,
) -> Sizes:  # fmt: skip
    sizes = _relative_attention(q, q_position, k, v, p, scale, causal)
    read = _band_mask(mask, q.shape[2], q.shape[2], causal, window)
    return {**sizes, "mask": read, "window": window}


def _project_length(x: Array, weight: Array, mask: Array | None = None) -> Sizes:
    length, positions = weight.shape
    return {
        "maps": _maps(x), "q_len": length, "k_len": positions, "head_dim": x.shape[3],
        "mask": 0 if mask is None else int(mask.size),
    }  # fmt: skip


def _linear_attention(q: Array, k: Array, v: Array, causal: bool = False, mask: Array | None = None) -> Sizes:
    return {**_scores(q, k, 1.0, causal), "mask": 0 if mask is None else int(mask.size)}


def _top(z: Array, n: int) -> Sizes:
    return {"rows": z.size // z.shape[-1], "width": z.shape[-1], "n": n}


def _refine(z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Sizes:
    n = ids.shape[-1]
    return {"rows": ids.size // n, "n": n, "d_in": weight.shape[1], "replace": int(replace)}


def _quantize(x: Array) -> Sizes:
    return {"maps": _maps(x), "elements": x.size}


def _filtered_attention(
    q: Array, k: Array, v: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array, thresholds: Array,
    scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor", stage2: str = "int8",
) -> Sizes:  # fmt: skip
    return {**_scores(q, k, 1.0, causal, mask), "heads": q.shape[1], "exact": int(stage2 == "float")}


def _filtered_map(
    q: Array, k: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array, thresholds: Array,
    scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor", stage2: str = "int8",
) -> Sizes:  # fmt: skip
    return {**_scores(q, k, 1.0, causal, mask), "heads": q.shape[1], "exact": int(stage2 == "float")}


SIZES: dict[str, Callable[..., Sizes]] = {
    "linear": _linear,
    "project": _linear,
    "conv1d": _conv1d,
    "depthwise_conv": _depthwise_conv,
    "block_linear": _block_linear,
    "embedding": _embedding,
    "layer_norm": _rows,
    "rms_norm": _rows,
    "batch_norm": _rows,
    "add": _add,
    "gelu": _elements,
    "gelu_tanh": _elements,
    "silu": _elements,
    "relu": _elements,
    "glu": _glu,
    "elu_plus_one": _elements,
    "swiglu": _elements,
    "rotary": _rotary,
    "concat": _concat,
    "append": _append,
    "max_pool": _max_pool,
    "nearest": _nearest,
    "search_graph": _search_graph,
    "fetch": _fetch,
    "take_rows": _take_rows,
    "scatter": _scatter,
    "scores": _scores,
    "add_relative": _add_relative,
    "softmax": _softmax,
    "weighted_sum": _weighted_sum,
    "attention": _attention,
    "relative_attention": _relative_attention,
    "local_attention": _local_attention,
    "local_relative_attention": _local_relative_attention,
    "project_length": _project_length,
    "linear_attention": _linear_attention,
    "top": _top,
    "refine": _refine,
    "quantize": _quantize,
    "filtered_attention": _filtered_attention,
    "filtered_map": _filtered_map,
}

# op -> function of the call's result -> {size: array whose sum it is}: sizes that nothing but the result tells. They
# are read when the calls are, so that a device is not waited for in between.
OUTCOMES: dict[str, Callable[[Any], dict[str, Array]]] = {
    "filtered_attention": lambda result: {"kept": result[1]},
    "filtered_map": lambda result: {"kept": result[1]},
}
