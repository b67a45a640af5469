"""Shapes and values at the edges, on which the test suites of other libraries dwell."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

PARAMS, STATE = jbn.init(3)


@jax.jit
def train(x, params, state):
    """A step, and the gradients of the cubes of what comes out."""

    def loss(x, params):
        y, after = jbn.batch_norm(x, params, state, train=True)
        return jnp.sum(y.astype(jnp.float32) ** 3), (y, after)

    (_, (y, after)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    return y, after, gradients


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (128, 0, 3), (0, 128, 3)])
def test_no_rows(shape):
    """An empty batch, as the last of a loader may be: nothing comes out, nothing moves, nothing is NaN."""
    x = np.ones(shape, np.float32)
    y, after, gradients = train(x, PARAMS, STATE)
    renormalized, same = jbn.batch_renorm(x, PARAMS, STATE, train=True)
    assert y.shape == renormalized.shape == jbn.normalize_running(x, PARAMS, STATE).shape == shape
    for state in (after, same):
        jax.tree.map(assert_array_equal, state, STATE)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert jbn.moments(x).count == 0


def test_one_row_in_evaluation_and_of_many_values():
    one = np.ones((1, 3), np.float32)
    assert_allclose(jbn.normalize_running(one, PARAMS, STATE), one, rtol=1e-5)
    x = np.random.default_rng(0).normal(size=(1, 16, 3)).astype(np.float32)
    y, _ = jbn.batch_norm(x, PARAMS, STATE, train=True)
    assert_allclose(np.float64(y).var(1), 1, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e-3, 1e4, 1e15])
def test_tiny_and_huge_values(size):
    """The squares of the last are as large as float32 can hold; of the first they are 0, and the output is the bias."""
    x, params, _ = cases.batch((64, 3))
    x = x * np.float32(size)
    y, after, gradients = train(x, params, STATE)
    measured = reference.moments(x)
    assert_allclose(y, reference.normalize(x, *measured[1:], *params), rtol=1e-4, atol=1e-4)
    assert_allclose(after.mean, measured[1], rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_values_whose_squares_are_infinite_leave_the_state():
    x, params, _ = cases.batch((64, 3))
    _, after, _ = train(x * np.float32([1, 1e30, 1]), params, STATE)
    assert all(np.isfinite(field).all() for field in after)
    assert_array_equal(np.asarray(after.weight) > 0, [True, False, True])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_largest_of_narrow_types(dtype):
    """Their sum and their squares are beyond the type, not beyond that of the statistics."""
    largest = float(jnp.finfo(jnp.float16).max) / 2
    x = (np.random.default_rng(0).uniform(0.5, 1, (64, 3)) * largest).astype(dtype)
    y, after = jbn.batch_norm(x, PARAMS, STATE._replace(mean=np.float32(x).mean(0)), train=True)
    measured = reference.moments(x)
    assert y.dtype == dtype
    assert_allclose(np.float64(y), reference.normalize(x, *measured[1:], *PARAMS), atol=2 * float(jnp.finfo(dtype).eps))
    assert_allclose(after.var, measured[2] * 64 / 63, rtol=1e-5)
