"""What the tests of the CuPy engine's ops share: inputs, and the comparison with the NumPy engine.

Rule: ``max|fast - truth| <= 2 max|honest - truth| + floor``, truth in float64, honest the NumPy engine in the same
dtype, floor two roundings of the largest value (a sum in another order, and its result). For float64 the truth of
attention is in long double where that is wider; other ops have no better truth, and their honest error is that of
float32 times the ratio of the two roundings.
"""

from __future__ import annotations

import numpy as np

from refimpl.engines.numpy_engine import NumpyEngine

DTYPES = ("float16", "float32", "float64")
REFERENCE = NumpyEngine()
IN_LONG_DOUBLE = ("attention", "local_attention", "scores", "softmax", "weighted_sum")


def normal(dtype, *shape, size=1.0, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (size * rng.standard_normal(shape)).astype(dtype)


def heads(dtype, shape, size=1.0):
    batch, count, groups, q_len, k_len, width = shape
    q = normal(dtype, batch, count, q_len, width, size=size)
    return q, normal(dtype, batch, groups, k_len, width, seed=1), normal(dtype, batch, groups, k_len, width, seed=2)


def some_mask(shape, seed=0):
    batch, count, _, q_len, k_len, _ = shape
    mask = np.random.default_rng(seed).random((batch, count, q_len, k_len)) < 0.7
    mask[:, :, :1, :] = False  # a query that sees nothing
    return mask


def on_device(engine, value):
    if isinstance(value, tuple):
        return tuple(on_device(engine, part) for part in value)
    return engine.asarray(value) if isinstance(value, np.ndarray) else value


def leaves(values):
    """The arrays among values and tuples of them."""
    for value in values:
        if isinstance(value, tuple):
            yield from leaves(value)
        elif isinstance(value, np.ndarray):
            yield value


def cast(value, dtype):
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def in_dtype(dtype, function, *args, **kwargs):
    with np.errstate(all="ignore"):  # float16 overflows in x^3, where its limit is right
        return function(*(cast(a, dtype) for a in args), **kwargs)


def flat(result):
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def honest_errors(dtype, function, *args, **kwargs):
    """max|honest - truth| of each result, over what is finite."""
    lower = np.float32 if dtype == np.float64 else dtype
    args = [cast(a, lower) for a in args]
    truth = flat(in_dtype(np.float64, function, *args, **kwargs))
    honest = flat(in_dtype(lower, function, *args, **kwargs))
    ratio = float(np.finfo(dtype).eps / np.finfo(lower).eps)
    return [
        ratio * largest(h.astype(np.float64)[np.isfinite(t)] - t[np.isfinite(t)])
        for h, t in zip(honest, truth, strict=True)
    ]


def largest(x):
    return float(np.abs(x).max(initial=0.0))


def compare(engine, op, *args, **kwargs):
    """Assert the rule for one call, and that dtype, shape and inputs are what they should be."""
    given = [on_device(engine, a) for a in args]
    fast = getattr(engine, op)(*given, **{name: on_device(engine, a) for name, a in kwargs.items()})
    fast = [engine.to_numpy(part) for part in (fast if isinstance(fast, tuple) else (fast,))]
    for before, after in zip(args, given, strict=True):
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(engine.to_numpy(after), before, f"{op} changed an input")
    dtype = fast[0].dtype
    reference = getattr(REFERENCE, op)
    if op in IN_LONG_DOUBLE and dtype == np.float64 and np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        truth = flat(in_dtype(np.longdouble, reference, *args, **kwargs))
        honest = flat(in_dtype(np.float64, reference, *args, **kwargs))
        errors = [largest(h[np.isfinite(t)] - t[np.isfinite(t)]) for h, t in zip(honest, truth, strict=True)]
    else:
        truth = flat(in_dtype(np.float64, reference, *args, **kwargs))
        errors = honest_errors(dtype, reference, *args, **kwargs)
    for f, t, error in zip(fast, truth, errors, strict=True):
        assert f.dtype == next(a for a in leaves(args) if a.dtype.kind == "f").dtype or f.dtype.kind == "i"
        assert f.shape == t.shape
        assert_close(f, t, error, op)


def assert_close(fast, truth, honest_error, what):
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(np.isnan(fast), np.isnan(truth), f"{what}: NaN in other places")
    np.testing.assert_array_equal(fast[~finite].astype(truth.dtype), truth[~finite], f"{what}: other infinities")
    bound = 2 * honest_error + 2 * float(np.finfo(fast.dtype).eps) * largest(truth[finite])
    error = largest(fast[finite].astype(np.float64) - truth[finite])
    assert error <= bound, f"{what}: error {error:.3g} beyond {bound:.3g}"
