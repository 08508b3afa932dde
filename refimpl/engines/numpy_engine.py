"""The reference engine: every op is its equation, in the array API standard, so that NumPy, CuPy and array_api_strict
all run it. Float64 through this engine is the truth that every other engine is tested against."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from refimpl.engines.protocol import Array, visible_band
from refimpl.errors import ShapeError
from refimpl.memo.mapping import check_rows, gather

QUERY_BLOCK = 64  # rows of the map that the fused op holds at a time; changes memory, not the function


class NumpyEngine:
    """The op vocabulary of ``refimpl.engines.protocol`` as equations over an array namespace `xp`."""

    name = "numpy"

    def __init__(self, xp: Any = np, erf: Callable[[Array], Array] | None = None) -> None:
        self.xp = xp
        self._erf = erf

    # --- services -----------------------------------------------------------------------------------------------

    def asarray(self, host: Array) -> Array:
        return self.xp.asarray(host)

    def to_numpy(self, array: Array) -> Array:
        return np.asarray(array)

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_s(self, start: float, stop: float) -> float:
        return stop - start

    def split_heads(self, x: Array, heads: int) -> Array:
        batch, length, width = x.shape
        return self.xp.permute_dims(self.xp.reshape(x, (batch, length, heads, width // heads)), (0, 2, 1, 3))

    def merge_heads(self, x: Array) -> Array:
        batch, heads, length, width = x.shape
        return self.xp.reshape(self.xp.permute_dims(x, (0, 2, 1, 3)), (batch, length, heads * width))

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return self.xp.reshape(x, shape)

    # --- linear maps --------------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        y = x @ weight.T  # (..., d_out)
        return y if bias is None else y + bias

    def project(self, x: Array, weight: Array, bias: Array | None, widths: tuple[int, ...]) -> tuple[Array, ...]:
        # One product per part, so that a part is bit for bit what it is when it is computed alone.
        parts, row = [], 0
        for width in widths:
            rows = slice(row, row + width)
            parts.append(self.linear(x, weight[rows, :], None if bias is None else bias[rows]))
            row += width
        return tuple(parts)

    def conv1d(self, x: Array, weight: Array, bias: Array, stride: int) -> Array:
        d_out, kernel, d_in = weight.shape
        padded = self._pad_time(x, kernel)
        last = x.shape[1] - 1 + kernel
        taps = [padded[:, tap : last - kernel + 1 + tap : stride, :] for tap in range(kernel)]
        windows = self.xp.concat(taps, axis=-1)  # (B, ceil(T / stride), kernel d_in)
        return windows @ self.xp.reshape(weight, (d_out, kernel * d_in)).T + bias

    def depthwise_conv(self, x: Array, weight: Array, bias: Array) -> Array:
        kernel, length = weight.shape[0], x.shape[1]
        padded = self._pad_time(x, kernel)
        y = bias
        for tap in range(kernel):
            y = y + padded[:, tap : tap + length, :] * weight[tap, :]  # (B, T, d)
        return y

    def block_linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        blocks, _, d_in = weight.shape
        parts = self.xp.reshape(x, (*x.shape[:-1], blocks, d_in))  # (..., n, q)
        y = self.xp.concat([self.linear(parts[..., c, :], weight[c, :, :]) for c in range(blocks)], axis=-1)
        return y if bias is None else y + bias

    def _pad_time(self, x: Array, kernel: int) -> Array:
        before = (kernel - 1) // 2
        zeros = [self.xp.zeros((x.shape[0], n, x.shape[2]), dtype=x.dtype) for n in (before, kernel - 1 - before)]
        return self.xp.concat([zeros[0], x, zeros[1]], axis=1)  # (B, T + kernel - 1, d)

    def embedding(self, table: Array, ids: Array) -> Array:
        rows = self.xp.take(table, self.xp.reshape(ids, (-1,)), axis=0)
        return self.xp.reshape(rows, (*ids.shape, table.shape[1]))

    # --- norms --------------------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        centred = x - self.xp.mean(x, axis=-1, keepdims=True)
        variance = self.xp.mean(centred * centred, axis=-1, keepdims=True)
        return centred / self.xp.sqrt(variance + eps) * weight + bias

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        mean_square = self.xp.mean(x * x, axis=-1, keepdims=True)
        return x / self.xp.sqrt(mean_square + eps) * weight

    def batch_norm(self, x: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Array:
        return (x - mean) / self.xp.sqrt(variance + eps) * weight + bias

    # --- elementwise --------------------------------------------------------------------------------------------

    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        return x + y if scale == 1.0 else x + scale * y

    def gelu(self, x: Array) -> Array:
        return 0.5 * x * (1.0 + self.erf(x / math.sqrt(2.0)))

    def gelu_tanh(self, x: Array) -> Array:
        with np.errstate(over="ignore"):  # x^3 = inf gives the right limit
            return 0.5 * x * (1.0 + self.xp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))

    def silu(self, x: Array) -> Array:
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
            return x / (1.0 + self.xp.exp(-x))

    def relu(self, x: Array) -> Array:
        return self.xp.maximum(x, self.xp.zeros_like(x[..., :1]))

    def elu_plus_one(self, x: Array) -> Array:
        zero = self.xp.zeros_like(x[..., :1])
        return self.xp.exp(self.xp.minimum(x, zero)) + self.xp.maximum(x, zero)

    def glu(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        with np.errstate(over="ignore"):
            return x[..., :half] / (1.0 + self.xp.exp(-x[..., half:]))

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self.silu(gate) * up

    def rotary(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        pairs = (*x.shape[:-1], x.shape[-1] // 2)
        if interleaved:
            split = self.xp.reshape(x, (*pairs, 2))
            a, b = split[..., 0], split[..., 1]
        else:
            a, b = x[..., : pairs[-1]], x[..., pairs[-1] :]
        turned = self.xp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1 if interleaved else -2)
        return self.xp.reshape(turned, x.shape)

    def concat(self, parts: tuple[Array, ...], axis: int) -> Array:
        return self.xp.concat(list(parts), axis=axis)

    def append(self, store: Array, new: Array, start: int) -> Array:
        stop = start + new.shape[2]
        if stop > store.shape[2]:
            raise ShapeError(f"append: the store has {store.shape[2]} rows; rows {start} to {stop - 1} were given")
        store[:, :, start:stop, :] = new
        return store[:, :, :stop, :]

    def erf(self, x: Array) -> Array:
        """The error function; NumPy has none, SciPy has."""
        if self._erf is None:
            from scipy.special import erf

            self._erf = erf
        return self.xp.astype(self._erf(x), x.dtype, copy=False)  # SciPy has no float16

    # --- stored maps --------------------------------------------------------------------------------------------

    def max_pool(self, x: Array) -> Array:
        rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        upper, lower = x[:, 0:rows:2, :columns], x[:, 1:rows:2, :columns]
        tall = self.xp.maximum(upper, lower)  # (B, T // 2, d)
        return self.xp.maximum(tall[:, :, 0::2], tall[:, :, 1::2])

    def nearest(self, x: Array, points: Array) -> tuple[Array, Array]:
        distances = self.xp.zeros((x.shape[0],), dtype=x.dtype)
        rows = self.xp.zeros((x.shape[0],), dtype=self.xp.int64)
        for b in range(x.shape[0]):
            difference = points - x[b : b + 1, :]  # (N, w)
            squared = self.xp.sum(difference * difference, axis=-1, dtype=x.dtype)  # (N,)
            rows[b] = self.xp.argmin(squared)
            distances[b] = self.xp.sqrt(self.xp.min(squared))
        return distances, rows

    def search_graph(self, x: Array, index: Any) -> tuple[Array, Array]:
        distances, rows = index.search(self.to_numpy(x))
        return self.xp.asarray(distances), self.xp.asarray(rows)

    def fetch(self, records: Any, rows: tuple[int | None, ...], transfer: str) -> Array:
        return self.xp.asarray(gather(records, rows, transfer))

    def take_rows(self, x: Array, rows: tuple[int, ...]) -> Array:
        return self.xp.concat([x[b : b + 1, ...] for b in rows], axis=0) if rows else x[:0, ...]

    def scatter(self, store: Array, new: Array, rows: tuple[int, ...]) -> Array:
        check_rows("scatter", store, new, rows)
        for i, b in enumerate(rows):
            store[b, ...] = new[i, ...]
        return store

    # --- attention ----------------------------------------------------------------------------------------------

    def scores(self, q: Array, k: Array, scale: float, causal: bool = False, mask: Array | None = None) -> Array:
        q_len, k_len = q.shape[2], k.shape[2]
        if not causal:
            s = self._products(q * scale, k)  # (B, H, Tq, Tk)
            return s if mask is None else self._hide(s, mask)
        s = self.xp.full((*q.shape[:3], k_len), -math.inf, dtype=q.dtype)
        for i, seen in visible_keys(q_len, k_len):
            row = slice(i, i + 1)
            products = self._products(q[:, :, row, :] * scale, k[:, :, :seen, :])  # (B, H, 1, seen)
            s[:, :, row, :seen] = products if mask is None else self._hide(products, _mask_part(mask, row, seen))
        return s

    def add_relative(self, scores: Array, position: Array) -> Array:
        length = scores.shape[2]
        rows = [position[:, :, i : i + 1, length - 1 - i : 2 * length - 1 - i] for i in range(length)]
        return scores + self.xp.concat(rows, axis=2) if rows else scores

    def softmax(self, scores: Array, causal: bool = False) -> Array:
        if not causal:
            e, total = self._exponentials(scores)
            return e / total
        p = self.xp.zeros_like(scores)
        for i, seen in visible_keys(*scores.shape[2:]):
            p[:, :, i : i + 1, :seen] = self.softmax(scores[:, :, i : i + 1, :seen])
        return p

    def weighted_sum(self, weights: Array, v: Array, causal: bool = False) -> Array:
        if not causal:
            return self._mix(weights, v)
        out = self.xp.zeros((*weights.shape[:3], v.shape[3]), dtype=v.dtype)
        for i, seen in visible_keys(*weights.shape[2:]):
            out[:, :, i : i + 1, :] = self._mix(weights[:, :, i : i + 1, :seen], v[:, :, :seen, :])
        return out

    def attention(
        self, q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = False,
        mask: Array | None = None,
    ) -> Array:  # fmt: skip
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        blocks = ((rows, slice(0, seen)) for rows, seen in _query_blocks(q.shape[2], k.shape[2], causal))
        return self._attend(q, k, v, scale, mask, blocks)

    def relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        length = q.shape[2]
        rows = ((slice(i, i + 1), slice(0, i + 1 if causal else length)) for i in range(length))
        return self._attend(q, k, v, scale, mask, rows, (q_position, p))

    def local_attention(
        self, q: Array, k: Array, v: Array, window: int, scale: float, causal: bool = False, mask: Array | None = None
    ) -> Array:
        check_band("local_attention", q, k, window)
        return self._attend(q, k, v, scale, mask, _band_blocks(q.shape[2], k.shape[2], causal, window))

    def local_relative_attention(
        self, q: Array, q_position: Array, k: Array, v: Array, p: Array, window: int, scale: float,
        causal: bool = False, mask: Array | None = None,
    ) -> Array:  # fmt: skip
        check_band("local_relative_attention", q, k, window)
        rows = _band_blocks(q.shape[2], k.shape[2], causal, window, 1)
        return self._attend(q, k, v, scale, mask, rows, (q_position, p))

    def project_length(self, x: Array, weight: Array, mask: Array | None = None) -> Array:
        check_keys_mask("project_length", mask, x)
        return weight @ (x if mask is None else self._only_seen(x, mask))  # (B, H, k, D)

    def linear_attention(self, q: Array, k: Array, v: Array, causal: bool = False, mask: Array | None = None) -> Array:
        check_keys_mask("linear_attention", mask, k)
        k = k if mask is None else self._only_seen(k, mask)
        if not causal:
            state = self.xp.matrix_transpose(k) @ v  # (B, Hkv, D, D)
            total = self.xp.sum(k, axis=2)[..., None]  # (B, Hkv, D, 1)
            return self._over(self._mix(q, state), self._mix(q, total))
        check_band("linear_attention", q, k, 0)
        out, first = self.xp.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype), k.shape[2] - q.shape[2]
        state = self.xp.zeros((*k.shape[:2], k.shape[3], v.shape[3]), dtype=q.dtype)  # of the keys so far
        total = self.xp.zeros((*k.shape[:2], k.shape[3], 1), dtype=q.dtype)
        for j in range(k.shape[2]):
            key = self.xp.matrix_transpose(k[:, :, j : j + 1, :])  # (B, Hkv, D, 1)
            state = state + key @ v[:, :, j : j + 1, :]
            total = total + key
            if j >= first:
                query = q[:, :, j - first : j - first + 1, :]
                out[:, :, j - first : j - first + 1, :] = self._over(self._mix(query, state), self._mix(query, total))
        return out

    def _only_seen(self, x: Array, mask: Array) -> Array:
        """Zeros for the rows of x (B, H, T, D) that a mask (B or 1, 1, 1, T) hides."""
        return self.xp.where(self.xp.matrix_transpose(mask), x, self.xp.zeros((1, 1, 1, 1), dtype=x.dtype))

    def _over(self, x: Array, divisor: Array) -> Array:
        return x / self.xp.where(divisor == 0.0, self.xp.ones_like(divisor), divisor)

    def _attend(
        self, q: Array, k: Array, v: Array, scale: float, mask: Array | None, blocks: Iterable[tuple[slice, slice]],
        position: tuple[Array, Array] | None = None,
    ) -> Array:  # fmt: skip
        """Softmax of scores, times values, for blocks of queries and the keys that they see; zeros for all others.

        With `position`, queries and offsets (H, 2T - 1, D), blocks are single queries.
        """
        out = self.xp.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype)
        for rows, keys in blocks:
            s = self._products(q[:, :, rows, :] * scale, k[:, :, keys, :])  # (B, H, block, seen)
            if position is not None:
                q_position, p = position
                zero = q.shape[2] - 1 - rows.start  # where the offset of key 0 stands
                offsets = p[None, :, zero + keys.start : zero + keys.stop, :]  # (1, H, seen, D)
                s = s + self._products(q_position[:, :, rows, :] * scale, offsets)
            if mask is not None:
                s = self._hide(s, _mask_of(mask, rows, keys))
            e, total = self._exponentials(s)
            out[:, :, rows, :] = self._mix(e, v[:, :, keys, :]) / total
        return out

    def quantize(self, x: Array) -> tuple[Array, Array]:
        xp, tiny = self.xp, self.xp.finfo(x.dtype).smallest_normal
        if x.size == 0:
            return xp.zeros(x.shape, dtype=xp.int8), xp.ones((*x.shape[:2], 1, 1), dtype=x.dtype)
        sigma = xp.max(xp.abs(x), axis=(2, 3), keepdims=True) / 127.0  # (B, H, 1, 1)
        sigma = xp.where(sigma < tiny, xp.ones_like(sigma), sigma)
        with np.errstate(invalid="ignore"):  # in a head that is not finite
            codes = xp.where(xp.isfinite(sigma), xp.round(x / sigma), xp.zeros_like(sigma))
        return xp.astype(codes, xp.int8), sigma

    def filtered_attention(
        self, q: Array, k: Array, v: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array,
        thresholds: Array, scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:  # fmt: skip
        operands = q, k, q_codes, k_codes, q_scale, k_scale, thresholds
        weights, kept = self.filtered_map(*operands, scale, causal, mask, nibble, stage2)  # (B, H, Tq, Tk), (B, H)
        return self.weighted_sum(weights, v, causal), kept

    def filtered_map(
        self, q: Array, k: Array, q_codes: Array, k_codes: Array, q_scale: Array, k_scale: Array,
        thresholds: Array, scale: float, causal: bool = False, mask: Array | None = None, nibble: str = "floor",
        stage2: str = "int8",
    ) -> tuple[Array, Array]:  # fmt: skip
        xp, wide = self.xp, self.xp.float64  # whole numbers below 2^53 are exact in it
        sigma_k = xp.repeat(k_scale, q.shape[1] // k.shape[1], axis=1)
        step = scale * xp.astype(q_scale, wide) * xp.astype(sigma_k, wide)  # (B, H, 1, 1)
        high_q, high_k = (xp.astype(upper_nibble(xp, x, nibble), wide) for x in (q_codes, k_codes))
        estimates = self.scores(high_q, high_k, 1.0, causal, mask)  # (B, H, Tq, Tk)
        with np.errstate(invalid="ignore"):  # in a head that is not finite
            keep = self._near_the_maximum(estimates, xp.reshape(thresholds, (1, -1, 1, 1)) / (256.0 * step))
            if stage2 == "float":
                s = self.scores(q, k, scale, causal, mask)
            else:
                s = step * self.scores(xp.astype(q_codes, wide), xp.astype(k_codes, wide), 1.0, causal, mask)
        s = xp.where(keep, xp.astype(s, q.dtype), xp.full((1, 1, 1, 1), -math.inf, dtype=q.dtype))
        return self.softmax(s, causal), xp.sum(xp.astype(keep, xp.int64), axis=(2, 3))

    def _near_the_maximum(self, estimates: Array, margin: Array) -> Array:
        """Where whole numbers are at most `margin` (B, H, 1, 1) below the maximum of their row, and not -inf."""
        if estimates.shape[-1] == 0:
            return estimates > 0.0
        margin = self.xp.where(self.xp.isfinite(margin), margin, self.xp.full_like(margin, math.inf))
        least = self.xp.max(estimates, axis=-1, keepdims=True) - self.xp.floor(margin)
        return (estimates >= least) & (estimates > -math.inf)

    # --- selection ----------------------------------------------------------------------------------------------

    def top(self, z: Array, n: int) -> Array:
        width = z.shape[-1]
        rising = self.xp.argsort(self.xp.flip(z, axis=-1), axis=-1, stable=True)  # of equal ones the lowest index last
        return self.xp.sort(width - 1 - rising[..., width - n :], axis=-1)  # (..., n)

    def refine(self, z: Array, ids: Array, weight: Array, g: Array, replace: bool = False) -> Array:
        n, (width, depth) = ids.shape[-1], weight.shape
        rows = ids.size // n
        logits, chosen = self.xp.reshape(z, (rows, width)), self.xp.reshape(ids, (rows, n))  # a view of z
        inner = self.xp.reshape(g, (rows, depth))
        for row in range(rows):
            products = self.xp.take(weight, chosen[row, :], axis=0) @ inner[row, :]  # (n,)
            if not replace:
                products = self.xp.take(logits[row, :], chosen[row, :], axis=0) + products
            for i in range(n):
                logits[row, int(chosen[row, i])] = products[i]
        return z

    # --- shared steps -------------------------------------------------------------------------------------------

    def _products(self, q: Array, k: Array) -> Array:
        """``q kᵀ`` with query head h on key head h // (H / Hkv)."""
        return self._grouped(q, self.xp.matrix_transpose(k))

    def _mix(self, weights: Array, v: Array) -> Array:
        """``P v`` with the same grouping."""
        return self._grouped(weights, v)

    def _grouped(self, a: Array, b: Array) -> Array:
        batch, heads, rows, _ = a.shape
        groups = b.shape[1]
        if groups == heads:
            return a @ b
        a = self.xp.reshape(a, (batch, groups, heads // groups, rows, a.shape[3]))
        return self.xp.reshape(a @ b[:, :, None, :, :], (batch, heads, rows, b.shape[3]))

    def _exponentials(self, s: Array) -> tuple[Array, Array]:
        """``exp(s - row maximum)`` and its row sum; a row of -inf gives zeros and the sum 1."""
        if s.shape[-1] == 0:
            return s, self.xp.ones((*s.shape[:-1], 1), dtype=s.dtype)
        maximum = self.xp.max(s, axis=-1, keepdims=True)
        zero = self.xp.zeros_like(maximum)
        e = self.xp.exp(s - self.xp.where(maximum == -math.inf, zero, maximum))
        total = self.xp.sum(e, axis=-1, keepdims=True)
        return e, self.xp.where(total == 0.0, self.xp.ones_like(total), total)

    def _hide(self, s: Array, mask: Array) -> Array:
        return self.xp.where(mask, s, self.xp.full((1, 1, 1, 1), -math.inf, dtype=s.dtype))


def upper_nibble(xp: Any, codes: Array, nibble: str) -> Array:
    """q^h of int8 codes, from -8 to 7: ``q >> 4``, an arithmetic shift, or the nearest, ``min((q + 8) >> 4, 7)``."""
    wide = xp.astype(codes, xp.int16)
    if nibble == "round":
        nearest = (wide + 8) >> 4
        return xp.where(nearest > 7, xp.full_like(nearest, 7), nearest)
    return wide >> 4


def visible_keys(q_len: int, k_len: int) -> Iterator[tuple[int, int]]:
    """Each query i that sees a key under a causal mask, with the number of keys it sees."""
    for i in range(max(0, q_len - k_len), q_len):
        yield i, i + 1 + k_len - q_len


def _query_blocks(q_len: int, k_len: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of query rows, with the number of keys that they see; single rows under a causal mask."""
    if causal:
        for i, seen in visible_keys(q_len, k_len):
            yield slice(i, i + 1), seen
    else:
        for start in range(0, q_len, QUERY_BLOCK):
            yield slice(start, min(start + QUERY_BLOCK, q_len)), k_len


def _band_blocks(
    q_len: int, k_len: int, causal: bool, window: int, most: int = QUERY_BLOCK
) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most so many query rows that see the same keys of their band, with these keys."""
    start = 0
    for (first, stop), alike in itertools.groupby(visible_band(q_len, k_len, causal, window)):
        end = start + len(list(alike))
        for row in range(start, end, most):
            yield slice(row, min(row + most, end)), slice(first, stop)
        start = end


def check_band(op: str, q: Array, k: Array, window: int) -> None:
    """Raise ShapeError where there is no band: more queries than keys, or a window below 0."""
    if q.shape[2] > k.shape[2] or window < 0:
        raise ShapeError(
            f"{op}: {q.shape[2]} queries, {k.shape[2]} keys, window {window}; it takes Tq <= Tk, window >= 0"
        )


def check_keys_mask(op: str, mask: Array | None, k: Array) -> None:
    """Raise ShapeError unless a mask is absent, or the same for all heads and queries."""
    if mask is not None and (mask.shape[0] not in (1, k.shape[0]) or tuple(mask.shape[1:]) != (1, 1, k.shape[2])):
        raise ShapeError(f"{op}: expected a mask ({k.shape[0]} or 1, 1, 1, {k.shape[2]}) of keys; got {mask.shape}")


def _mask_part(mask: Array, rows: slice, seen: int) -> Array:
    """The part of a broadcastable mask that concerns these rows and the first `seen` keys."""
    return _mask_of(mask, rows, slice(0, seen))


def _mask_of(mask: Array, rows: slice, keys: slice) -> Array:
    """The part of a broadcastable mask that concerns these rows and keys."""
    if mask.shape[2] > 1:
        mask = mask[:, :, rows, :]
    return mask[:, :, :, keys] if mask.shape[3] > 1 else mask
