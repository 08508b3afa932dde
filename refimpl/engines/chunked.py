"""Linear attention as products of matrices, for engines whose products are fast: all keys at once, or causal by chunks.

With S and z the sums of k_j v_jᵀ and k_j over the chunks before, a chunk of queries Q, keys K and values V gives

    (tril(Q Kᵀ) V + Q S) / (tril(Q Kᵀ) 1 + Q z),     then  S += Kᵀ V,  z += Kᵀ 1

which are the sums of the running form in another order (arXiv 2006.16236, section 3.3).
"""

from __future__ import annotations

from typing import Any

from refimpl.engines.protocol import Array

CHUNK = 128  # positions: products of matrices about as large as the state


def chunked_linear_attention(xp: Any, q: Array, k: Array, v: Array, causal: bool, out: Array | None = None) -> Array:
    """The op `linear_attention` over NumPy or CuPy; its mask is in k. q (B, H, Tq, D) -> (B, H, Tq, Dv)."""
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1:3]
    out = xp.empty((batch, heads, q_len, v.shape[3]), q.dtype) if out is None else out
    q = q.reshape(batch, kv_heads, heads // kv_heads, *q.shape[2:])  # (B, Hkv, G, Tq, D)
    k, v = k[:, :, None], v[:, :, None]
    first = k_len - q_len if causal else k_len  # keys that every query sees
    state = k[..., :first, :].swapaxes(3, 4) @ v[..., :first, :]  # (B, Hkv, 1, D, Dv)
    total = k[..., :first, :].sum(axis=3)[..., None]  # (B, Hkv, 1, D, 1)
    size = CHUNK if causal else max(q_len, 1)
    for start in range(0, q_len, size):
        rows, keys = slice(start, start + size), slice(first + start, first + start + size)
        queries = q[..., rows, :]
        context, divisor = queries @ state, queries @ total
        if causal:
            new, values = k[..., keys, :], v[..., keys, :]
            products = xp.tril(queries @ new.swapaxes(3, 4))  # (B, Hkv, G, chunk, chunk)
            context = context + products @ values
            divisor = divisor + products.sum(axis=4, keepdims=True)
            state, total = state + new.swapaxes(3, 4) @ values, total + new.sum(axis=3)[..., None]
        divisor = xp.where(divisor == 0, divisor.dtype.type(1), divisor)
        out[:, :, rows] = (context / divisor).reshape(batch, heads, -1, v.shape[4])
    return out
