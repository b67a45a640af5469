"""Count, mean and variance of any batch, and of batches merged, against float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

LAYOUTS = [
    ((5,), 0),
    ((6, 3), -1),
    ((3, 6), 0),
    ((4, 5, 3), 1),
    ((4, 5, 3), (-1, 0)),
    ((2, 3, 4, 5), 1),
    ((2, 3, 4, 5), (3, 1)),
    ((2, 3, 2, 3, 4), -1),
    ((2, 3, 2, 3, 4), (4, -3, 0)),
    ((4, 3), (0, 1)),
]
measure = jax.jit(jbn.moments, static_argnames=("feature_axis", "axis_name"))


def sample(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(3, 2, shape), dtype)


def assert_moments(measured, expected, rtol=1e-5):
    # float32 sums of some tens of values round by about 1e-7 of each value.
    count, mean, var = expected
    assert_allclose(measured.count, count, rtol=rtol)
    assert_allclose(measured.mean, mean, rtol=rtol, atol=rtol)
    assert_allclose(measured.var, var, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
def test_any_axes_and_dtype(shape, feature_axis, dtype):
    x = sample(shape, dtype)
    measured = measure(x, feature_axis=feature_axis)
    assert_moments(measured, reference.moments(x, None, feature_axis))
    assert measured.count.shape == ()
    assert {field.dtype for field in measured} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS[1:6:2])
def test_float64_is_kept(shape, feature_axis):
    with jax.enable_x64(True):
        x = sample(shape, jnp.float64)
        measured = measure(x, feature_axis=feature_axis)
        assert {field.dtype for field in measured} == {jnp.dtype(jnp.float64)}
        assert_moments(measured, reference.moments(x, None, feature_axis), rtol=1e-14)


def test_float32_statistics_under_x64():
    with jax.enable_x64(True):
        measured = measure(sample((6, 3)), weights=np.ones(6))
        assert {field.dtype for field in measured} == {jnp.dtype(jnp.float32)}


def test_feature_axes_come_in_the_order_of_x():
    x = sample((2, 3, 4))
    assert measure(x, feature_axis=(2, 0)).mean.shape == (2, 4)
    assert_array_equal(measure(x, feature_axis=(2, 0)).mean, measure(x, feature_axis=(0, 2)).mean)


WEIGHT_SHAPES = [(4, 6, 3), (4, 6, 1, 3), (4, 1, 1), (1, 6, 3), (1, 1, 1, 3), (1, 1, 1)]


WEIGHT_KINDS = [(shape, kind) for shape in WEIGHT_SHAPES for kind in (bool, np.float32)]
WEIGHT_KINDS += [((4, 6, 3), kind) for kind in (np.int32, np.uint8, jnp.float16, jnp.bfloat16)]


@pytest.mark.parametrize(("shape", "kind"), WEIGHT_KINDS)
def test_weights_of_every_shape_and_kind(shape, kind):
    x = sample((4, 6, 5, 3))
    weights = jnp.asarray(np.random.default_rng(1).integers(0, 4, shape), kind).at[(0,) * len(shape)].set(kind(1))
    assert_moments(measure(x, feature_axis=2, weights=weights), reference.moments(x, weights, 2))


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
def test_mask_in_any_layout(shape, feature_axis):
    x = sample(shape)
    axes = reference.reduced_axes(len(shape), feature_axis)
    mask = np.random.default_rng(2).uniform(size=[shape[axis] for axis in axes]) < 0.6
    mask.flat[0] = True
    assert_moments(measure(x, feature_axis=feature_axis, weights=mask), reference.moments(x, mask, feature_axis))


def test_integer_weights_repeat_rows():
    x = sample((4, 3))
    assert_moments(measure(x, weights=np.array([2, 0, 1, 3])), reference.moments(np.repeat(x, [2, 0, 1, 3], 0)))


def test_count_is_the_sum_of_what_weights_broadcast_to():
    x = sample((4, 6, 3))
    assert measure(x).count == 24
    assert measure(x, weights=np.array([[True], [False], [True], [True]])).count == 18
    assert measure(x, weights=np.full((1, 6), 0.5, np.float32)).count == 12


@pytest.mark.parametrize("kind", [bool, np.float32])
def test_what_has_weight_0_is_never_read(kind):
    x = sample((6, 3)).at[1].set(jnp.nan).at[4].set(jnp.inf)
    weights = np.array([1, 0, 1, 1, 0, 1], kind)
    assert_moments(measure(x, weights=weights), reference.moments(x[np.array([0, 2, 3, 5])]))


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
    x = jnp.asarray(1e5 + np.random.default_rng(0).standard_normal((1000, 3)), jnp.float32)
    measured, (_, mean, _) = measure(x), reference.moments(x)
    # One ulp of a float32 near 1e5 is 0.0078; the mean to twice the precision is exact to that of values near 1.
    assert_allclose(np.float64(measured.mean) + np.float64(measured.mean_low), mean, rtol=0, atol=1e-6)
    assert np.abs(measured.mean_low).max() > 1e-4


def split(x, *sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


def test_merge_of_uneven_parts_is_the_whole():
    x = np.asarray(sample((50, 3)))
    parts = [measure(part) for part in split(x, 2, 30, 1, 0, 17)]
    assert_moments(jax.jit(jbn.merge)(*parts), reference.moments(x))


def test_merge_of_several_feature_axes_and_weights():
    x, weights = np.asarray(sample((20, 2, 3))), np.random.default_rng(3).uniform(size=20).astype(np.float32)
    parts = [
        measure(part, feature_axis=(1, 2), weights=some)
        for part, some in zip(split(x, 4, 15, 1), split(weights, 4, 15, 1), strict=True)
    ]
    assert_moments(jax.jit(jbn.merge)(*parts), reference.moments(x, weights, (1, 2)))


def test_a_part_of_count_0_may_hold_anything():
    whole = jbn.moments(sample((8, 3)))
    nothing = jbn.Moments(jnp.zeros(()), jnp.full(3, jnp.nan), jnp.full(3, jnp.inf), jnp.full(3, jnp.nan))
    assert_moments(jbn.merge(nothing, whole, nothing), whole[:3], rtol=1e-7)
    assert_array_equal(np.stack(jbn.merge(nothing, nothing)[1:4]), np.zeros((3, 3)))
    assert jbn.merge(nothing._replace(squares=jnp.nan), whole).squares == 8


def test_merge_of_one_is_itself():
    whole = jbn.moments(sample((8, 3)))
    jax.tree.map(partial(assert_allclose, rtol=1e-7), jbn.merge(whole), whole)


def test_merge_is_associative_and_commutative():
    a, b, c = (measure(part) for part in split(np.asarray(sample((40, 3))), 3, 30, 7))
    merge = jax.jit(jbn.merge)
    for other in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b)):
        assert_moments(other, merge(a, b, c)[:3], rtol=1e-6)


@pytest.mark.parametrize("features", [2, 3])
def test_merge_takes_moments_made_by_hand(features):
    a, b = (jbn.Moments(jnp.asarray(2.0), jnp.full(features, mean), jnp.ones(features)) for mean in (1.0, 5.0))
    assert_moments(jbn.merge(a, b), (4, np.full(features, 3.0), np.full(features, 5.0)))


def test_merge_keeps_the_widest_dtype():
    with jax.enable_x64(True):
        a, b = jbn.moments(sample((8, 3))), jbn.moments(sample((8, 3), jnp.float64))
        assert {field.dtype for field in jbn.merge(a, b)} == {jnp.dtype(jnp.float64)}


def test_merge_inside_scan_measures_a_stream():
    x = sample((5, 8, 3))
    nothing = jax.tree.map(jnp.zeros_like, jbn.moments(x[0]))
    merged, _ = jax.lax.scan(lambda so_far, part: (jbn.merge(so_far, jbn.moments(part)), None), nothing, x)
    assert_moments(merged, reference.moments(x.reshape(40, 3)))


def test_merge_is_differentiable():
    x, probe = np.asarray(sample((9, 3))), np.random.default_rng(4).standard_normal((2, 3)).astype(np.float32)
    empty = jbn.Moments(jnp.zeros(()), jnp.full(3, jnp.nan), jnp.full(3, jnp.nan), jnp.full(3, jnp.nan))

    def loss(x):
        merged = jbn.merge(jbn.moments(x[:2]), empty, jbn.moments(x[2:]))
        return jnp.sum(probe[0] * merged.mean + probe[1] * merged.var)

    # d mean = 1/n and d var = 2 (x - mean) / n.
    expected = (probe[0] + probe[1] * 2 * (x - x.mean(0))) / 9
    assert_allclose(jax.jit(jax.grad(loss))(x), expected, atol=1e-6)
    assert_allclose(jax.jit(lambda x: jax.jvp(loss, (x,), (x,)))(x)[1], (expected * x).sum(), rtol=1e-5)


@pytest.mark.parametrize("center", [None, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_masked_is_never_computed_with(center, compiled):
    """Nothing is raised for it where JAX looks for NaN in every result, forward and backward."""
    x, mask = np.asarray(sample((6, 3))), np.array([True, False, True, True, False, True])
    x = jnp.asarray(np.where(mask[:, None], x, np.float32([np.nan, np.inf, -np.inf])))
    params, state = jbn.init(3)

    def everything(x):
        y, measured = jbn.normalize_batch(x, params, weights=mask, center=center)
        trained, after = jbn.batch_norm(x, params, state, train=True, weights=mask)
        evaluated, _ = jbn.batch_norm(x, params, state, train=False, weights=mask)
        return sum(jnp.sum(part**2) for part in (y, trained, evaluated, measured.var)), after

    with jax.debug_nans(True), jax.debug_infs(True):
        step = jax.value_and_grad(everything, has_aux=True)
        _, dx = (jax.jit(step) if compiled else step)(x)
        assert not dx[~mask].any()
