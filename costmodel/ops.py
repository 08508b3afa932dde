"""What one call of each op costs: FLOPs and bytes from the sizes that decide them.

The formulas are plain arithmetic, so they take ints, NumPy arrays of lengths and SymPy symbols alike. Conventions: a
multiply-add is 2 FLOPs; matrix FLOPs (products over a shared dimension) and vector FLOPs are apart; one exp, erf, tanh,
square root, division, maximum or addition is one vector FLOP, a reduction over n elements n; comparisons, selections,
copies and index arithmetic are none. Bytes are compulsory: each used element of an operand read once, each element of
the result written once; a fused op has only its outer operands. Under a causal mask only the visible pairs count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Quantity = Any  # int, NumPy array of ints, or SymPy expression
INDEX_BYTES = 8  # token ids are int64
MASK_BYTES = 1  # masks are bool
CODE_BYTES = 1  # codes are int8
THRESHOLD_BYTES = COUNT_BYTES = 8  # thresholds are float64, counts int64


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes; bytes are told apart by what they carry."""

    matmul_flops: Quantity = 0
    vector_flops: Quantity = 0
    weight_bytes: Quantity = 0  # read: parameters
    table_bytes: Quantity = 0  # read: embeddings, position tables, indices
    activation_bytes: Quantity = 0  # read: what other ops wrote
    kv_bytes: Quantity = 0  # read: the keys and values that queries meet, from the cache where there is one
    bytes_written: Quantity = 0

    @property
    def flops(self) -> Quantity:
        """All FLOPs."""
        return self.matmul_flops + self.vector_flops

    @property
    def bytes_read(self) -> Quantity:
        """Weights, tables, activations, keys and values."""
        return self.weight_bytes + self.table_bytes + self.activation_bytes + self.kv_bytes

    @property
    def bytes_moved(self) -> Quantity:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, calls: Quantity) -> Cost:
        """The cost of so many calls."""
        return Cost(*(value * calls for value in vars(self).values()))


def visible_pairs(q_len: Quantity, k_len: Quantity, causal: int) -> Quantity:
    """Query-key pairs of one map: all, or those with j <= i + (Tk - Tq)."""
    if not causal:
        return q_len * k_len
    if isinstance(q_len, int) and isinstance(k_len, int) and q_len > k_len:
        return k_len * (k_len + 1) // 2  # the first rows see nothing
    return q_len * k_len - q_len * (q_len - 1) // 2


def smaller(a: Quantity, b: Quantity) -> Quantity:
    """The minimum of ints or arrays; a SymPy symbol stands for a size above every number."""
    symbolic = [x for x in (a, b) if getattr(x, "free_symbols", None)]
    if not symbolic:
        return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(int(a), int(b))
    if len(symbolic) == 1:
        return b if symbolic[0] is a else a
    import sympy

    return sympy.Min(a, b)


def band_pairs(q_len: Quantity, k_len: Quantity, causal: int, window: Quantity) -> Quantity:
    """Query-key pairs of one map at most `window` positions apart: of a query its own key, those before, those after.

    The position p has min(p, w) keys before it within the band, and min(T - 1 - p, w) behind it.
    """
    behind = 0 if causal else _capped_sum(q_len, window)
    return q_len + _capped_sum(k_len, window) - _capped_sum(k_len - q_len, window) + behind


def _capped_sum(n: Quantity, most: Quantity) -> Quantity:
    """min(0, w) + min(1, w) + ... + min(n - 1, w)."""
    turn = smaller(most, n - 1)
    return turn * (turn + 1) // 2 + (n - 1 - turn) * most


def _linear(b: int, rows: Quantity, d_in: Quantity, d_out: Quantity, bias: int) -> Cost:
    return Cost(
        matmul_flops=2 * rows * d_in * d_out,
        vector_flops=bias * rows * d_out,
        weight_bytes=(d_in * d_out + bias * d_out) * b,
        activation_bytes=rows * d_in * b,
        bytes_written=rows * d_out * b,
    )


def _conv1d(b: int, rows: Quantity, rows_in: Quantity, d_in: Quantity, d_out: Quantity, kernel: Quantity) -> Cost:
    return Cost(
        matmul_flops=2 * rows * kernel * d_in * d_out,
        vector_flops=rows * d_out,
        weight_bytes=(kernel * d_in * d_out + d_out) * b,
        activation_bytes=rows_in * d_in * b,
        bytes_written=rows * d_out * b,
    )


def _depthwise_conv(b: int, rows: Quantity, width: Quantity, kernel: Quantity) -> Cost:
    return Cost(
        vector_flops=2 * kernel * rows * width,
        weight_bytes=(kernel + 1) * width * b,
        activation_bytes=rows * width * b,
        bytes_written=rows * width * b,
    )


def _block_linear(b: int, rows: Quantity, blocks: Quantity, d_in: Quantity, d_out: Quantity, bias: int) -> Cost:
    one = _linear(b, rows, d_in, d_out, bias)  # the blocks share neither inputs nor outputs
    return one.times(blocks)


def _embedding(b: int, rows: Quantity, width: Quantity) -> Cost:
    return Cost(table_bytes=rows * width * b + rows * INDEX_BYTES, bytes_written=rows * width * b)


def _layer_norm(b: int, rows: Quantity, width: Quantity) -> Cost:
    # mean: n + 1; centre: n; square: n; mean: n + 1; + eps, sqrt: 2; divide, scale, shift: 3 n
    return _norm(b, rows, width, vector_flops=rows * (7 * width + 4), vectors=2)


def _rms_norm(b: int, rows: Quantity, width: Quantity) -> Cost:
    # square: n; mean: n + 1; + eps, sqrt: 2; divide, scale: 2 n
    return _norm(b, rows, width, vector_flops=rows * (4 * width + 3), vectors=1)


def _batch_norm(b: int, rows: Quantity, width: Quantity) -> Cost:
    # centre, divide, scale, shift: 4 per element; + eps, sqrt: 2 per channel
    return _norm(b, rows, width, vector_flops=4 * rows * width + 2 * width, vectors=4)


def _norm(b: int, rows: Quantity, width: Quantity, vector_flops: Quantity, vectors: int) -> Cost:
    return Cost(
        vector_flops=vector_flops,
        weight_bytes=vectors * width * b,
        activation_bytes=rows * width * b,
        bytes_written=rows * width * b,
    )


def _add(b: int, elements: Quantity, operand: Quantity, scaled: int) -> Cost:
    return Cost(
        vector_flops=elements + scaled * operand,
        activation_bytes=(elements + operand) * b,
        bytes_written=elements * b,
    )


def _elementwise(flops: int, operands: int = 1) -> Callable[..., Cost]:
    """An op that does `flops` per element of its result and reads `operands` elements for each."""

    def cost(b: int, elements: Quantity) -> Cost:
        return Cost(vector_flops=flops * elements, activation_bytes=operands * elements * b, bytes_written=elements * b)

    return cost


def _rotary(b: int, elements: Quantity, angles: Quantity) -> Cost:
    return Cost(
        vector_flops=3 * elements,
        table_bytes=2 * angles * b,
        activation_bytes=elements * b,
        bytes_written=elements * b,
    )


def _scores(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int,
    mask: Quantity,
) -> Cost:  # fmt: skip
    pairs = maps * visible_pairs(q_len, k_len, causal)
    return Cost(
        matmul_flops=2 * pairs * head_dim,
        vector_flops=maps * q_len * head_dim,  # the scale, on q
        activation_bytes=maps * q_len * head_dim * b + mask * MASK_BYTES,
        kv_bytes=kv_maps * k_len * head_dim * b,
        bytes_written=pairs * b,
    )


def _add_relative(b: int, maps: Quantity, length: Quantity) -> Cost:
    pairs = maps * length * length  # of the (T, 2T - 1) position scores each row uses T
    return Cost(vector_flops=pairs, activation_bytes=2 * pairs * b, bytes_written=pairs * b)


def _softmax(b: int, maps: Quantity, q_len: Quantity, k_len: Quantity, causal: int) -> Cost:
    pairs = maps * visible_pairs(q_len, k_len, causal)
    return Cost(vector_flops=5 * pairs, activation_bytes=pairs * b, bytes_written=pairs * b)  # max, -, exp, sum, /


def _weighted_sum(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int
) -> Cost:
    pairs = maps * visible_pairs(q_len, k_len, causal)
    return Cost(
        matmul_flops=2 * pairs * head_dim,
        activation_bytes=pairs * b,
        kv_bytes=kv_maps * k_len * head_dim * b,
        bytes_written=maps * q_len * head_dim * b,
    )


def _attention(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int,
    mask: Quantity,
) -> Cost:  # fmt: skip
    pairs = maps * visible_pairs(q_len, k_len, causal)
    return Cost(
        matmul_flops=4 * pairs * head_dim,
        vector_flops=4 * pairs + 2 * maps * q_len * head_dim,  # max, -, exp, sum; scale on q, division of the output
        activation_bytes=maps * q_len * head_dim * b + mask * MASK_BYTES,
        kv_bytes=2 * kv_maps * k_len * head_dim * b,
        bytes_written=maps * q_len * head_dim * b,
    )


def _relative_attention(
    b: int, maps: Quantity, heads: Quantity, length: Quantity, head_dim: Quantity, causal: int, mask: Quantity
) -> Cost:
    pairs = maps * visible_pairs(length, length, causal)
    offsets = length if causal else 2 * length - 1  # rows of the position table that are used
    return Cost(
        matmul_flops=6 * pairs * head_dim,
        vector_flops=5 * pairs + 3 * maps * length * head_dim,  # + the sum of both products; scale on both queries
        activation_bytes=(2 * maps * length + heads * offsets) * head_dim * b + mask * MASK_BYTES,
        kv_bytes=2 * maps * length * head_dim * b,
        bytes_written=maps * length * head_dim * b,
    )


def _local_attention(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int,
    mask: Quantity, window: Quantity,
) -> Cost:  # fmt: skip
    pairs = maps * band_pairs(q_len, k_len, causal, window)
    keys = smaller(q_len + window, k_len)  # that a query sees
    return Cost(
        matmul_flops=4 * pairs * head_dim,
        vector_flops=4 * pairs + 2 * maps * q_len * head_dim,  # as of `attention`
        activation_bytes=maps * q_len * head_dim * b + mask * MASK_BYTES,
        kv_bytes=2 * kv_maps * keys * head_dim * b,
        bytes_written=maps * q_len * head_dim * b,
    )


def _local_relative_attention(
    b: int, maps: Quantity, heads: Quantity, length: Quantity, head_dim: Quantity, causal: int, mask: Quantity,
    window: Quantity,
) -> Cost:  # fmt: skip
    pairs = maps * band_pairs(length, length, causal, window)
    ahead = smaller(window, length - 1)  # offsets on either side that are used
    offsets = ahead + 1 if causal else 2 * ahead + 1
    return Cost(
        matmul_flops=6 * pairs * head_dim,
        vector_flops=5 * pairs + 3 * maps * length * head_dim,  # as of `relative_attention`
        activation_bytes=(2 * maps * length + heads * offsets) * head_dim * b + mask * MASK_BYTES,
        kv_bytes=2 * maps * length * head_dim * b,
        bytes_written=maps * length * head_dim * b,
    )


def _project_length(
    b: int, maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, mask: Quantity
) -> Cost:
    return Cost(
        matmul_flops=2 * maps * q_len * k_len * head_dim,
        table_bytes=q_len * k_len * b,
        activation_bytes=maps * k_len * head_dim * b + mask * MASK_BYTES,
        bytes_written=maps * q_len * head_dim * b,
    )


def _linear_attention(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int,
    mask: Quantity,
) -> Cost:  # fmt: skip
    keys, queries = kv_maps * k_len * head_dim, maps * q_len * head_dim
    return Cost(
        matmul_flops=2 * keys * head_dim + 2 * queries * (head_dim + 1),  # the state; with it, and with the sum of keys
        vector_flops=keys * (1 + causal * head_dim) + queries,  # sums of keys; the running state; the division
        activation_bytes=queries * b + mask * MASK_BYTES,
        kv_bytes=2 * keys * b,
        bytes_written=queries * b,
    )


def _top(b: int, rows: Quantity, width: Quantity, n: Quantity) -> Cost:
    return Cost(activation_bytes=rows * width * b, bytes_written=rows * n * INDEX_BYTES)


def _refine(b: int, rows: Quantity, n: Quantity, d_in: Quantity, replace: int) -> Cost:
    words = rows * n  # each row reads its own: none is read once for two rows
    return Cost(
        matmul_flops=2 * words * d_in,
        vector_flops=(1 - replace) * words,
        weight_bytes=words * d_in * b,
        table_bytes=words * INDEX_BYTES,
        activation_bytes=(rows * d_in + (1 - replace) * words) * b,
        bytes_written=words * b,
    )


def _quantize(b: int, maps: Quantity, elements: Quantity) -> Cost:
    return Cost(
        vector_flops=4 * elements + maps,  # absolute value, maximum, division, rounding; sigma
        activation_bytes=elements * b,
        bytes_written=elements * CODE_BYTES + maps * b,
    )


def _filtered_attention(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int,
    mask: Quantity, heads: Quantity, exact: int, kept: Quantity,
) -> Cost:  # fmt: skip
    pairs = maps * visible_pairs(q_len, k_len, causal)
    queries, keys = maps * q_len * head_dim, kv_maps * k_len * head_dim
    return Cost(
        matmul_flops=2 * pairs * head_dim + 4 * kept * head_dim,  # estimates; kept scores and values
        # The row maximum; of kept pairs max, -, exp, sum and the scale, which is on q where the scores are of floats;
        # division of the output. The margin: 5 a map, and the subtraction of each row.
        vector_flops=pairs + (5 - exact) * kept + (1 + exact) * queries + maps * (q_len + 5),
        activation_bytes=(CODE_BYTES + exact * b) * queries + maps * b + heads * THRESHOLD_BYTES + mask * MASK_BYTES,
        kv_bytes=(CODE_BYTES + (1 + exact) * b) * keys + kv_maps * b,  # all keys and values: any may be kept
        bytes_written=queries * b + maps * COUNT_BYTES,
    )


def _filtered_map(
    b: int, maps: Quantity, kv_maps: Quantity, q_len: Quantity, k_len: Quantity, head_dim: Quantity, causal: int,
    mask: Quantity, heads: Quantity, exact: int, kept: Quantity,
) -> Cost:  # fmt: skip
    pairs = maps * visible_pairs(q_len, k_len, causal)
    queries, keys = maps * q_len * head_dim, kv_maps * k_len * head_dim
    return Cost(
        matmul_flops=2 * pairs * head_dim + 2 * kept * head_dim,  # estimates; kept scores
        # As of `_filtered_attention`, but that kept weights are divided instead of the output.
        vector_flops=pairs + (6 - exact) * kept + exact * queries + maps * (q_len + 5),
        activation_bytes=(CODE_BYTES + exact * b) * queries + maps * b + heads * THRESHOLD_BYTES + mask * MASK_BYTES,
        kv_bytes=(CODE_BYTES + exact * b) * keys + kv_maps * b,
        bytes_written=pairs * b + maps * COUNT_BYTES,  # zeros, too
    )


def _max_pool(b: int, elements: Quantity) -> Cost:
    return Cost(vector_flops=3 * elements, activation_bytes=4 * elements * b, bytes_written=elements * b)


def _nearest(b: int, rows: Quantity, points: Quantity, width: Quantity) -> Cost:
    # subtract, square, sum: 3 per element; minimum; square root
    return Cost(
        vector_flops=rows * (points * (3 * width + 1) + 1),
        table_bytes=points * width * b,
        activation_bytes=rows * width * b,
        bytes_written=rows * (b + INDEX_BYTES),
    )


def _search_graph(b: int, rows: Quantity, compared: Quantity, width: Quantity) -> Cost:
    # every visit reads a point; neighbours of a node are not counted
    return Cost(
        vector_flops=3 * compared * width,
        table_bytes=compared * width * b,
        activation_bytes=rows * width * b,
        bytes_written=rows * (b + INDEX_BYTES),
    )


def _fetch(b: int, elements: Quantity, copied: int) -> Cost:
    # mapped pages are read by the op that uses them
    return Cost(table_bytes=copied * elements * b, bytes_written=copied * elements * b)


FORMULAS: dict[str, Callable[..., Cost]] = {
    "linear": _linear,
    "project": _linear,
    "conv1d": _conv1d,
    "depthwise_conv": _depthwise_conv,
    "block_linear": _block_linear,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "add": _add,
    "gelu": _elementwise(5),  # / sqrt 2, erf, + 1, / 2, * x
    "gelu_tanh": _elementwise(9),  # x x x and its factor: 3; + x, factor, tanh, + 1, / 2, * x
    "silu": _elementwise(4),  # negate, exp, + 1, divide
    "relu": _elementwise(1),
    "glu": _elementwise(4, operands=2),
    "elu_plus_one": _elementwise(4),  # minimum, exp, maximum, +
    "swiglu": _elementwise(5, operands=2),
    "rotary": _rotary,
    "concat": _elementwise(0),
    "append": _elementwise(0),
    "max_pool": _max_pool,
    "nearest": _nearest,
    "search_graph": _search_graph,
    "fetch": _fetch,
    "take_rows": _elementwise(0),
    "scatter": _elementwise(0),
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


@dataclass(frozen=True)
class Op:
    """So many calls of an op with these sizes, as part of a component."""

    component: str
    name: str
    sizes: Mapping[str, Quantity]
    calls: Quantity = 1

    def cost_of_one(self, itemsize: int) -> Cost:
        """FLOPs and bytes of one call for elements of `itemsize` bytes."""
        return FORMULAS[self.name](itemsize, **self.sizes)

    def cost(self, itemsize: int) -> Cost:
        """FLOPs and bytes of all calls."""
        return self.cost_of_one(itemsize).times(self.calls)
