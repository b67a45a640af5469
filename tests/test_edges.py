"""Shapes and values at the edges, on which the test suites of other libraries dwell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

LAYOUTS = {  # shape and feature axis
    "one feature": ((7, 1), -1),
    "a vector, one feature for all": ((7, 1, 1), (1, 2)),
    "two values": ((2, 3), -1),
    "two values of one row": ((1, 2, 3), -1),
    "no row axis": ((5, 3), 0),
    "channels first": ((2, 3, 4, 5), 1),
    "channels first, volume": ((2, 3, 2, 2, 3), 1),
    "channels in the middle": ((2, 4, 3, 5), 2),
    "two feature axes apart": ((3, 4, 2, 5), (0, 2)),
    "in another order": ((3, 4, 2, 5), [2, 0]),
    "from the end": ((3, 4, 2, 5), (-1, -3)),
    "size 1 all around": ((1, 8, 1, 3, 1), (3, 4)),
    "many axes": ((2, 1, 2, 1, 2, 1, 2, 3), -1),
}


def made(shape, feature_axis, seed=0):
    rng = np.random.default_rng(seed)
    kept = sorted(axis % len(shape) for axis in np.atleast_1d(feature_axis))
    features = tuple(shape[axis] for axis in kept)
    params = jbn.Params(*rng.normal(size=(2, *features)).astype(np.float32))
    return rng.normal(1, 2, shape).astype(np.float32), params, jbn.init(features)[1], tuple(kept)


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(shape, feature_axis):
    x, params, state, kept = made(shape, feature_axis)
    y, after = jbn.batch_norm(x, params, state, train=True, feature_axis=feature_axis)
    measured = reference.moments(x, feature_axis=kept)
    assert_allclose(y, reference.normalize(x, *measured[1:], *params, feature_axis=kept), rtol=1e-5, atol=1e-5)
    assert_allclose(after.mean, measured[1], rtol=1e-5, atol=1e-6)
    assert_allclose(after.var, measured[2] * measured[0] / (measured[0] - 1), rtol=1e-5)
    evaluated, _ = jbn.batch_norm(x, params, after, train=False, feature_axis=feature_axis)
    exact = reference.normalize(x, *after[:2], *params, feature_axis=kept)
    assert_allclose(evaluated, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (4, 0, 3)])
def test_no_rows(shape):
    """An empty batch, as the last of a loader may be: nothing comes out, nothing moves, nothing is NaN."""
    x, (params, state) = jnp.ones(shape), jbn.init(3)
    for layer in (jbn.batch_norm, jbn.batch_renorm):
        y, after = layer(x, params, state, train=True)
        assert y.shape == shape
        jax.tree.map(assert_array_equal, after, state)
    f = lambda x, params: jnp.sum(jbn.batch_norm(x, params, state, train=True)[0])  # noqa: E731
    jax.tree.map(lambda gradient: assert_array_equal(gradient, 0 * gradient), jax.grad(f, (0, 1))(x, params))
    assert jbn.moments(x).count == 0
    assert jbn.normalize_running(x, params, state).shape == shape


def test_one_row_in_evaluation_and_of_many_values():
    params, state = jbn.init(3)
    assert_allclose(jbn.normalize_running(jnp.ones((1, 3)), params, state), np.ones((1, 3)), rtol=1e-5)
    x = np.random.default_rng(0).normal(size=(1, 16, 3)).astype(np.float32)
    y, _ = jbn.batch_norm(x, params, state, train=True)
    assert_allclose(np.float64(y).var(1), 1, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e-3, 1e4, 1e15])
def test_tiny_and_huge_values(size):
    """The squares of the last are as large as float32 can hold; of the first they are 0, and the output is the bias."""
    x, params, state, _ = made((64, 3), -1)
    x = x * np.float32(size)
    y, after = jbn.batch_norm(x, params, state, train=True)
    measured = reference.moments(x)
    assert_allclose(y, reference.normalize(x, *measured[1:], *params), rtol=1e-4, atol=1e-4)
    assert_allclose(after.mean, measured[1], rtol=1e-5)
    for leaf in jax.tree.leaves(jax.grad(lambda x: jnp.sum(jbn.batch_norm(x, params, state, train=True)[0] ** 3))(x)):
        assert np.isfinite(leaf).all()


def test_values_whose_squares_are_infinite_leave_the_state():
    x, params, state, _ = made((64, 3), -1)
    _, after = jbn.batch_norm(x * np.float32([1, 1e30, 1]), params, state, train=True)
    assert all(np.isfinite(field).all() for field in after)
    assert_array_equal(after.weight > 0, [True, False, True])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_largest_of_narrow_types(dtype):
    """Their sum and their squares are beyond the type, not beyond that of the statistics."""
    largest = float(jnp.finfo(jnp.float16).max) / 2
    x = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, (64, 3)) * largest, dtype)
    params, state = jbn.init(3)
    y, after = jbn.batch_norm(x, params, state._replace(mean=x.astype(jnp.float32).mean(0)), train=True)
    measured = reference.moments(x)
    assert y.dtype == dtype
    assert_allclose(np.float64(y), reference.normalize(x, *measured[1:], *params), atol=2 * float(jnp.finfo(dtype).eps))
    assert_allclose(after.var, measured[2] * 64 / 63, rtol=1e-5)


def test_rows_that_are_all_alike():
    """Constant input, as of a padded or dead channel: the bias, exactly, whatever the constant."""
    params = jbn.Params(jnp.full(3, 2.0), jnp.asarray([0.5, -1.0, 3.0]))
    for value in (0.0, 0.1, -7.3, 1e4):
        y, measured = jbn.normalize_batch(jnp.full((50, 3), value), params)
        assert_allclose(y, np.broadcast_to(params.bias, (50, 3)), atol=1e-5)
        assert_allclose(measured.var, 0, atol=1e-12 * max(1, value**2))


def test_a_transposed_or_strided_array_is_no_other():
    x, params, state, _ = made((6, 8, 3), -1)
    for other in (
        np.asfortranarray(x),
        x[:, ::-1][:, ::-1],
        np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0),
    ):
        jax.tree.map(
            assert_array_equal,
            jbn.batch_norm(other, params, state, train=True),
            jbn.batch_norm(x, params, state, train=True),
        )
