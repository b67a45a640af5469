"""The largest of every window against XLA's own reduction and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from pooling import max_pool


def reference(x, size):
    window = (1, size, size, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


@pytest.mark.parametrize(
    ("size", "shape"), [(2, (3, 4, 6, 5)), (2, (2, 7, 5, 3)), (3, (2, 3, 3, 4)), (3, (1, 8, 7, 2))]
)
def test_value_and_gradient(size, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    dy = np.random.default_rng(1).standard_normal((shape[0], shape[1] // size, shape[2] // size, shape[3]))
    both = [jax.vjp(lambda x, pool=pool: pool(x, size), x) for pool in (max_pool, reference)]
    np.testing.assert_array_equal(*[y for y, _ in both])
    np.testing.assert_array_equal(*[pull(jnp.float32(dy))[0] for _, pull in both])


def test_the_largest_values_of_a_window_share_its_gradient():
    x = jnp.array([[1.0, 2.0], [2.0, 0.0]]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x, 2).sum())(x).ravel(), [0, 0.5, 0.5, 0])


def test_what_is_not_a_number_stays_so():
    x = jnp.array([[1.0, jnp.nan], [2.0, 0.0]]).reshape(1, 2, 2, 1)
    assert np.isnan(max_pool(x, 2)).all()
    assert np.isnan(jax.grad(lambda x: (max_pool(x, 2) ** 2).sum())(x)).all()
