"""The engine's door: what kernels rely on and do not test. Errors are one line and name arrays and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import ShapeError, UnsupportedError

Array = Any

DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}


def expect(op: str, expected: str, holds: bool, /, **arrays: Array | None) -> None:
    """Raise unless the arrays have one supported dtype and `holds`, the condition on their shapes."""
    same_dtype(op, **arrays)
    if not holds:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if array is not None)
        message = f"{op}: expected {expected}; got {listed}"
        raise ShapeError(message)


def same_dtype(op: str, /, **arrays: Array | None) -> None:
    """Raise unless all arrays are float32 or all are float64."""
    kind = None
    for array in arrays.values():
        if array is not None and array.dtype is not kind:
            if kind is not None or array.dtype not in DTYPES:
                break
            kind = array.dtype
    else:
        return
    _refuse(op, {name: array for name, array in arrays.items() if array is not None})


def _refuse(op: str, given: dict[str, Array]) -> None:
    """Raise with all dtypes in the message, if they do differ: equal ones may be different objects."""
    kinds = {array.dtype for array in given.values()}
    if len(kinds) == 1 and kinds <= DTYPES:
        return
    if len(kinds) > 1:
        listed = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in given.items())
        message = f"{op}: expected one dtype; got {listed}"
        raise ShapeError(message)
    message = (
        f"{op}: the numba engine takes float32 and float64, not {kinds.pop()}; "
        "float16 runs on the engines 'cupy' (GPU) and 'numpy' (slow)"
    )
    raise UnsupportedError(message)


def per_channel(op: str, x: Array, /, **vectors: Array) -> None:
    """Raise unless every vector has one number for each channel of x (..., d)."""
    channels = x.shape[-1:]
    for vector in vectors.values():
        if vector.shape != channels or not channels:
            expect(op, f"x (..., d), {', '.join(vectors)} (d,)", False, x=x, **vectors)
    same_dtype(op, x=x, **vectors)


def divides(a: Array, b: Array) -> bool:
    """Whether the heads of b (B, Hkv, ...) can be shared by the heads of a (B, H, ...)."""
    return a.ndim == b.ndim == 4 and b.shape[1] > 0 and a.shape[1] % b.shape[1] == 0


def heads(op: str, q: Array, k: Array, v: Array | None = None) -> None:
    """Raise unless queries, keys and values fit each other."""
    fits = divides(q, k) and q.shape[3] == k.shape[3] and k.shape[0] in (1, q.shape[0])
    fits = fits and (v is None or (v.ndim == 4 and v.shape[:3] == k.shape[:3]))
    expected = "q (B, H, Tq, D), k (B or 1, Hkv, Tk, D), v (B or 1, Hkv, Tk, Dv), H a multiple of Hkv"
    expect(op, expected, fits, q=q, k=k, v=v)


def mask(op: str, given: Array | None, q: Array, k: Array) -> None:
    """Raise unless the mask is absent, or bool and of a shape that broadcasts to the map."""
    if given is None:
        return
    full = (*q.shape[:3], k.shape[2])
    if (
        given.dtype != np.bool_
        or given.ndim != 4
        or any(m not in (1, n) for m, n in zip(given.shape, full, strict=True))
    ):
        message = f"{op}: expected a bool mask that broadcasts to {full}; got {given.shape} {given.dtype}"
        raise ShapeError(message)


def band(op: str, q: Array, k: Array, window: int) -> None:
    """Raise unless queries have positions among the keys, and a band around them."""
    if q.ndim == k.ndim == 4 and (q.shape[2] > k.shape[2] or window < 0):
        message = f"{op}: expected Tq <= Tk and a window of at least 0; got q {q.shape}, k {k.shape}, window {window}"
        raise ShapeError(message)


def codes(op: str, given: Array, scale: Array, x: Array) -> None:
    """Raise unless codes and scales are those of heads x."""
    expected = "scales of the dtype of the heads, (B, H, 1, 1)"
    expect(op, expected, scale.shape == (*x.shape[:2], 1, 1), scale=scale, heads=x)
    if given.dtype != np.int8 or given.shape != x.shape:
        raise ShapeError(f"{op}: expected int8 codes {x.shape}; got {given.shape} {given.dtype}")


def filter(op: str, thresholds: Array, heads: int, scale: float, nibble: str, stage2: str) -> None:
    """Raise unless the numbers and words of a filter are among those that are known."""
    if thresholds.shape != (heads,) or thresholds.dtype != np.float64 or not (thresholds >= 0).all():
        raise ShapeError(
            f"{op}: expected thresholds ({heads},) float64 of at least 0; got {thresholds.shape} {thresholds.dtype}"
        )
    if not scale > 0:
        raise ShapeError(f"{op}: the scale is {scale}; it must be above 0")
    if nibble not in ("floor", "round") or stage2 not in ("int8", "float"):
        raise ShapeError(f"{op}: nibble={nibble!r}, stage2={stage2!r}; known: floor and round, int8 and float")
