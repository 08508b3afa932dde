"""`top`, `refine` and the softmax of long rows on the numba engine, against sorts and float64 formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.special import softmax

from refimpl.engines.numba_engine import NumbaEngine
from refimpl.engines.numba_kernels import layout, selection
from refimpl.engines.numpy_engine import NumpyEngine

Array = Any
NUMBA, NUMPY = NumbaEngine(), NumpyEngine()
RNG = np.random.default_rng(0)


def largest(z: Array, n: int) -> Array:
    """By a stable sort of the whole row: of equal numbers the first."""
    return np.sort(np.argsort(-z, axis=-1, kind="stable")[..., :n], axis=-1)


@settings(max_examples=60, deadline=None)
@given(
    z=npst.arrays(
        st.sampled_from([np.float32, np.float64]),
        npst.array_shapes(min_dims=1, max_dims=3, max_side=30),
        elements=st.integers(-3, 3)
        | st.floats(-(2.0**100), 2.0**100, width=32)
        | st.sampled_from([-np.inf, 0.0, -0.0, np.inf]),
    ),
    part=st.floats(0, 1),
)
def test_top_is_the_beginning_of_a_stable_sort(z: Array, part: float) -> None:
    n = 1 + int(part * (z.shape[-1] - 1))
    for engine in (NUMBA, NUMPY):
        found = engine.top(z, n)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, largest(z, n))


LONG = 100_003  # longer than `SAMPLE` and several times `BLOCK`, and no multiple of either
ROWS = {
    "normal": RNG.standard_normal(LONG),
    "rising": np.arange(LONG, dtype=float),
    "falling": -np.arange(LONG, dtype=float),
    "equal": np.zeros(LONG),
    "few values": RNG.integers(0, 5, LONG).astype(float),
    "one giant": np.concatenate([RNG.standard_normal(LONG - 1), [1e30]]),
    "with infinities": np.where(RNG.random(LONG) < 0.3, -np.inf, np.where(RNG.random(LONG) < 0.01, np.inf, 1.0)),
    "the sample sees small ones": np.where(np.arange(LONG) % (LONG // selection.SAMPLE) == 0, -9.0, RNG.random(LONG)),
    "the sample sees large ones": np.where(np.arange(LONG) % (LONG // selection.SAMPLE) == 0, 9.0, RNG.random(LONG)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ROWS)
def test_top_of_long_rows_whatever_the_sample_says(name: str, dtype: Any) -> None:
    z = np.stack([ROWS[name], ROWS["normal"]]).astype(dtype)
    for n in (1, 2, 700, 6251, LONG // 2, LONG - 1, LONG):
        np.testing.assert_array_equal(NUMBA.top(z, n), largest(z, n), f"{name}, n={n}")


def test_top_of_a_strided_view_and_of_more_rows_than_are_noted_at_a_time() -> None:
    z = RNG.standard_normal((layout.GROUP_ELEMENTS // 2**18 + 3, 2**18), dtype=np.float32)
    np.testing.assert_array_equal(NUMBA.top(z, 9), largest(z, 9))
    np.testing.assert_array_equal(NUMBA.top(z[::2, 5:70_000], 900), largest(z[::2, 5:70_000], 900))


def test_not_a_number_breaks_nothing() -> None:
    for width in (10, LONG):
        z = RNG.standard_normal((1, width)).astype(np.float32)
        z[0, :: width // 5] = np.nan
        for n in (1, width // 2, width):
            ids = NUMBA.top(z, n)
            assert 0 <= ids.min() <= ids.max() < width


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("shape", [(1, 50, 3, 1), (2, 700, 100, 33), (3, 2000, 1999, 224), (1, 30_000, 2003, 7)])
def test_refine_within_twice_the_rounding_of_numpy(shape: tuple[int, ...], replace: bool) -> None:
    rows, width, n, depth = shape
    for dtype in (np.float32, np.float64):
        wide = RNG.standard_normal((rows, depth + 5)).astype(dtype)
        g, weight = wide[:, 2 : depth + 2], RNG.standard_normal((width, depth)).astype(dtype)
        z = RNG.standard_normal((rows, width)).astype(dtype)
        ids = np.stack([np.sort(RNG.permutation(width)[:n]) for _ in range(rows)])
        exact = z.astype(np.longdouble)
        products = np.einsum("rnk,rk->rn", weight.astype(np.longdouble)[ids], g.astype(np.longdouble))
        here = np.arange(rows)[:, None], ids
        exact[here] = products if replace else exact[here] + products
        honest, fast = (engine.refine(z.copy(), ids, weight, g, replace) for engine in (NUMPY, NUMBA))
        floor = 4 * np.finfo(dtype).eps * np.abs(exact).max()
        assert np.abs(fast - exact).max() <= 2 * np.abs(honest - exact).max() + floor
        others = np.ones_like(z, bool)
        others[here] = False
        np.testing.assert_array_equal(fast[others], z[others])


def test_refine_takes_ids_in_any_order_and_weights_with_gaps() -> None:
    z, weight, g = RNG.standard_normal((1, 40)), RNG.standard_normal((40, 30)), RNG.standard_normal((1, 9))
    ids = np.array([[7, 3, 39, 0, 11]])
    expected = NUMPY.refine(z.copy(), ids, weight[:, 4:13], g)
    np.testing.assert_allclose(NUMBA.refine(z.copy(), ids, weight[:, 4:13], g), expected, rtol=1e-13)
    gaps = np.zeros((1, 80))[:, ::2]
    gaps[:] = z
    assert NUMBA.refine(gaps, ids, weight[:, 4:13], g) is gaps
    np.testing.assert_allclose(gaps, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [layout.LONG_ROW, 3 * layout.LONG_ROW + 17])
def test_softmax_of_long_rows(width: int, dtype: Any) -> None:
    rows = RNG.standard_normal((4, width)) * 5
    rows[1] += 1e4
    rows[2, width // 3 :] = -np.inf
    rows[3] = -np.inf
    scores = rows.astype(dtype).reshape(1, 4, 1, width)
    exact = softmax(np.where(np.isneginf(scores), -np.inf, scores.astype(np.longdouble))[:, :3], axis=-1)
    honest, fast = NUMPY.softmax(scores), NUMBA.softmax(scores)
    floor = 4 * np.finfo(dtype).eps * float(exact.max())
    assert np.abs(fast[:, :3] - exact).max() <= 2 * np.abs(honest[:, :3] - exact).max() + floor
    np.testing.assert_array_equal(fast[:, 3], 0.0)
    spoilt = scores[:, :1].copy()
    spoilt[..., 5] = np.nan
    assert np.isnan(NUMBA.softmax(spoilt)).all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = NUMBA.threads
    if threads == 1:
        pytest.skip("one core")
    z, weight = RNG.standard_normal((1, LONG), dtype=np.float32), RNG.standard_normal((LONG, 40), dtype=np.float32)
    g = RNG.standard_normal((1, 40), dtype=np.float32)

    def results() -> list[Array]:
        ids = NUMBA.top(z, 6000)
        return [ids, NUMBA.refine(z.copy(), ids, weight, g), NUMBA.softmax(z.reshape(1, 1, 1, LONG)).copy()]

    many = results()
    try:
        NUMBA.set_threads(1)
        for one, other in zip(results(), many, strict=True):
            np.testing.assert_array_equal(one, other)
    finally:
        NUMBA.set_threads(threads)
