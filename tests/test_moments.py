"""Count, mean and variance of any batch, and of batches merged, against float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

measure = jax.jit(jbn.moments, static_argnames=("feature_axis", "axis_name"))
merge = jax.jit(jbn.merge)


def sample(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)


def assert_moments(measured, expected, rtol=1e-5):
    # float32 sums of some tens of values round by about 1e-7 of each value.
    count, mean, var = expected
    assert_allclose(measured.count, count, rtol=rtol)
    assert_allclose(measured.mean, mean, rtol=rtol, atol=rtol)
    assert_allclose(measured.var, var, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float32, np.float64])
def test_dtypes(dtype):
    """float64 is kept, and float32 stays what it is beside it."""
    with jax.enable_x64(True):
        x = sample((4, 5, 3), dtype)
        measured = measure(x, weights=np.ones((4, 5)))
    assert {field.dtype for field in measured} == {jnp.dtype(np.float64 if dtype == np.float64 else np.float32)}
    assert_moments(measured, reference.moments(x), rtol=1e-14 if dtype == np.float64 else 1e-5)


def test_one_value_of_each_feature():
    for shape, feature_axis in (((5,), 0), ((4, 3), (0, 1))):
        x = sample(shape)
        measured = measure(x, feature_axis=feature_axis)
        assert measured.count == 1
        assert_array_equal(measured.mean, x)
        assert not np.any(measured.var)


WEIGHT_SHAPES = [(4, 6, 3), (4, 6, 1, 3), (4, 1, 1), (1, 6, 3), (1, 1, 1, 3), (1, 1, 1), (4, 6, 5, 3), (4, 1, 5, 3)]
WEIGHT_KINDS = [(shape, kind) for shape in WEIGHT_SHAPES for kind in (bool, np.float32)]
WEIGHT_KINDS += [((4, 6, 3), kind) for kind in (np.int32, np.uint8, jnp.float16, jnp.bfloat16)]


def test_weights_of_every_shape_and_kind():
    x, rng = sample((4, 6, 5, 3)), np.random.default_rng(1)
    given = [rng.integers(0, 4, shape).astype(kind) for shape, kind in WEIGHT_KINDS]
    for weights in given:
        weights[0] = 1
    found = jax.jit(lambda x, given: [jbn.moments(x, feature_axis=2, weights=weights) for weights in given])(x, given)
    for weights, measured in zip(given, found, strict=True):
        count, *expected = reference.moments(x, weights, 2)
        by_feature = weights.shape[2:3] == (5,)
        assert measured.count.shape == measured.squares.shape == ((5,) if by_feature else ())
        assert_moments(measured, (np.broadcast_to(count, measured.count.shape), *expected))
        squares = reference.full_weights(x, weights, 2) ** (2 if jnp.issubdtype(weights.dtype, jnp.floating) else 1)
        assert_allclose(measured.squares, squares.sum((0, 1, 3)) if by_feature else squares.sum() / 5, rtol=1e-6)


def test_negative_and_nan_weights_count_as_0():
    x = sample((4, 3))
    weights = np.array([1, -2, np.nan, 3], np.float32)
    assert_moments(measure(x, weights=weights), reference.moments(x, np.array([1, 0, 0, 3])))


@pytest.mark.parametrize(
    ("x", "weights"), [(np.zeros((0, 3), np.float32), None), (np.full((4, 3), np.nan, np.float32), np.zeros(4, bool))]
)
def test_nothing_to_measure_is_0(x, weights):
    count, *fields, squares = measure(x, weights=weights)
    assert_array_equal(np.stack(fields), np.zeros((3, 3)))
    assert count == squares == 0


def test_mean_low_is_what_rounding_took():
    x = (1e5 + np.random.default_rng(0).standard_normal((1000, 3))).astype(np.float32)
    measured, (_, mean, _) = measure(x), reference.moments(x)
    # One ulp of a float32 near 1e5 is 0.0078; the mean to twice the precision is exact to that of values near 1.
    assert_allclose(np.float64(measured.mean) + np.float64(measured.mean_low), mean, rtol=0, atol=1e-6)
    assert np.max(np.abs(np.asarray(measured.mean_low))) > 1e-4


def split(x, *sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


def test_merge_of_uneven_parts_is_the_whole():
    x = sample((50, 3))
    merged = jax.jit(lambda parts: jbn.merge(*map(jbn.moments, parts)))(split(x, 2, 30, 1, 0, 17))
    assert_moments(merged, reference.moments(x))


def test_merge_of_several_feature_axes_and_weights():
    x, weights = sample((20, 2, 3)), np.random.default_rng(3).uniform(size=20).astype(np.float32)

    @jax.jit
    def merged(parts, weights):
        options = [{"feature_axis": (1, 2), "weights": each} for each in weights]
        return jbn.merge(*(jbn.moments(part, **each) for part, each in zip(parts, options, strict=True)))

    assert_moments(merged(split(x, 4, 15, 1), split(weights, 4, 15, 1)), reference.moments(x, weights, (1, 2)))


def test_a_part_of_count_0_may_hold_anything():
    whole, bad = measure(sample((8, 3))), np.float32([[np.nan] * 3, [np.inf] * 3, [np.nan] * 3])
    nothing = jbn.Moments(np.float32(0), *bad)
    assert_moments(merge(nothing, whole, nothing), whole[:3], rtol=2**-22)  # multiplied by a count and divided again
    assert not np.any(np.stack(merge(nothing, nothing)[1:4]))
    assert merge(nothing._replace(squares=np.float32(np.nan)), whole).squares == 8


def test_merge_of_one_is_itself():
    whole = measure(sample((8, 3)))
    jax.tree.map(partial(assert_allclose, rtol=2**-22), merge(whole), whole)


def test_merge_is_associative_and_commutative():
    @jax.jit
    def orders(parts):
        a, b, c = map(jbn.moments, parts)
        both = jbn.merge(jbn.merge(a, b), c), jbn.merge(a, jbn.merge(b, c))
        return jbn.merge(a, b, c), *both, jbn.merge(c, a, b)

    first, *others = orders(split(sample((40, 3)), 3, 30, 7))
    for other in others:
        assert_moments(other, first[:3], rtol=1e-6)


@pytest.mark.parametrize("features", [2, 3])
def test_merge_takes_moments_made_by_hand(features):
    one, two = np.ones(features, np.float32), np.float32(2)
    a, b = (jbn.Moments(two, mean * one, one) for mean in np.float32([1, 5]))
    assert_moments(merge(a, b), (4, 3 * one, 5 * one))


def test_merge_keeps_the_widest_dtype():
    with jax.enable_x64(True):
        moments = [jax.eval_shape(jbn.moments, sample((8, 3), dtype)) for dtype in (np.float32, np.float64)]
        assert {field.dtype for field in jax.eval_shape(jbn.merge, *moments)} == {jnp.dtype(np.float64)}


def test_merge_is_differentiable():
    x, probe = sample((9, 3)), np.random.default_rng(4).standard_normal((2, 3)).astype(np.float32)
    empty = jbn.Moments(jnp.zeros(()), jnp.full(3, jnp.nan), jnp.full(3, jnp.nan), jnp.full(3, jnp.nan))

    def loss(x):
        merged = jbn.merge(jbn.moments(x[:2]), empty, jbn.moments(x[2:]))
        return jnp.sum(probe[0] * merged.mean + probe[1] * merged.var)

    # d mean = 1/n and d var = 2 (x - mean) / n.
    expected = (probe[0] + probe[1] * 2 * (x - x.mean(0))) / 9
    gradient, (_, tangent) = jax.jit(lambda x: (jax.grad(loss)(x), jax.jvp(loss, (x,), (x,))))(x)
    assert_allclose(gradient, expected, atol=1e-6)
    assert_allclose(tangent, (expected * x).sum(), rtol=1e-5)
