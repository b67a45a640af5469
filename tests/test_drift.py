"""How far running statistics are from the data, against float64 NumPy and against outputs that are really off."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

FEATURES = 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal([0, 5, -3, 100], [1, 2, 0.5, 10], (240, FEATURES)).astype(np.float32)
KERNEL = RANDOM.normal(size=(FEATURES, FEATURES)).astype(np.float32)
PARAMS = [jbn.Params(*RANDOM.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)) for _ in range(2)]
STATE = jbn.State(np.float32([0, 7, -3, 90]), np.float32([1, 4, 4, 100]), np.ones(FEATURES, np.float32))


def one(params, state, x, train=True):
    return jbn.batch_norm(x, params, state, train=train)


def biased(params, state, x):
    return jbn.batch_norm(x, params, state, train=True, unbiased=False)


def two(params, states, x):
    x, first = jbn.batch_norm(x, params[0], states["first"], train=True)
    y, second = jbn.batch_norm(jnp.tanh(x) @ KERNEL, params[1], states["second"], train=True)
    return y, {**states, "first": first, "second": second}


def test_shift_ratio_and_error():
    found = jbn.drift(one, PARAMS[0], STATE, X.reshape(8, 30, FEATURES))
    x, running = np.float64(X), np.sqrt(np.float64(STATE.var) + 1e-5)
    ratio, shift = np.sqrt(x.var(0, ddof=1) + 1e-5) / running, (x.mean(0) - np.float64(STATE.mean)) / running
    assert_allclose(found.ratio, ratio, rtol=1e-5)
    assert_allclose(found.shift, shift, rtol=1e-4, atol=1e-6)
    assert_allclose(found.error, np.sqrt(shift**2 + (ratio - 1) ** 2), rtol=1e-4, atol=1e-6)
    assert_array_equal(found.count, np.full(FEATURES, 240))
    assert np.argmax(found.error) == 1 or found.error[2] > 0.7


def test_the_error_is_what_the_output_is_off():
    """In units of |scale|, the root mean square over the data."""
    found = jbn.drift(biased, PARAMS[0], STATE, [X])
    training, _ = one(PARAMS[0], STATE, X)
    evaluation, _ = one(PARAMS[0], STATE, X, train=False)
    off = np.sqrt(np.mean((np.float64(training) - np.float64(evaluation)) ** 2, 0)) / PARAMS[0].scale
    assert_allclose(found.error, off, rtol=1e-3)


def test_no_drift_after_recalibration():
    state = jbn.recalibrate(one, PARAMS[0], STATE, X.reshape(8, 30, FEATURES))
    found = jbn.drift(one, PARAMS[0], state, X.reshape(8, 30, FEATURES))
    for name, exact in (("shift", 0), ("ratio", 1), ("error", 0)):
        assert_allclose(getattr(found, name), exact, atol=1e-6)


def test_a_layer_shows_its_own_fault_and_not_that_of_the_one_before():
    batches = list(X.reshape(8, 30, FEATURES))
    states = {"first": STATE, "second": STATE, "steps": 7}
    exact = jbn.recalibrate(two, PARAMS, states, batches, passes=1)
    spoiled = {**exact, "first": exact["first"]._replace(mean=np.asarray(exact["first"].mean) + 30)}
    found = jbn.drift(two, PARAMS, spoiled, batches)
    assert found["steps"] == 7
    assert isinstance(found["first"], jbn.Drift)
    assert (np.asarray(found["first"].error) > 2).all()
    assert (np.asarray(found["second"].error) < 1e-5).all()
    jax.tree.map(assert_array_equal, spoiled["second"], exact["second"])


def test_in_evaluation_frozen_layers_are_not_measured():
    def frozen(params, states, x):
        x, first = jbn.batch_norm(x, params[0], states["first"], train=False)
        y, second = jbn.batch_norm(x @ KERNEL, params[1], states["second"], train=True)
        return y, {"first": first, "second": second}

    found = jbn.drift(frozen, PARAMS, {"first": STATE, "second": STATE}, [X])["first"]
    for name, value in (("count", 0), ("shift", 0), ("ratio", 1), ("error", 0)):
        assert_array_equal(getattr(found, name), np.full(FEATURES, value))


def test_masked_stacked_and_constant():
    mask = np.arange(240) < 200
    masked = lambda params, state, x: jbn.batch_norm(x, params, state, train=True, weights=mask)  # noqa: E731
    found = jbn.drift(masked, PARAMS[0], STATE, [np.where(mask[:, None], X, np.nan)])
    wanted = jbn.drift(one, PARAMS[0], STATE, [X[:200]])
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)
    stacked = jax.tree.map(lambda a: np.stack([a, a]), (PARAMS[0], STATE))
    many = jbn.drift(jax.vmap(one, (0, 0, None)), *stacked, [X])
    assert many.error.shape == (2, FEATURES)
    for var in (0.0, 1e-4, 1.0):  # running statistics that remember a start at 1: what is constant comes out the same
        dead = jbn.drift(
            one, PARAMS[0], jbn.State(0 * STATE.mean, 0 * STATE.var + np.float32(var), STATE.weight), [np.zeros_like(X)]
        )
        assert_allclose(dead.error, np.zeros(4), atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 3e-3, 1.0])
def test_the_error_of_features_whose_variance_is_beside_epsilon(size):
    x = np.float32(size) * X
    state = jbn.State(STATE.mean * np.float32(size), STATE.var * np.float32(size**2), STATE.weight)
    found = jbn.drift(biased, PARAMS[0], state, [x])
    exact = (reference.normalize(x, *of[-2:], 1, 0) for of in (reference.moments(x), state[:2]))
    assert_allclose(found.error, np.sqrt(np.mean(np.subtract(*exact) ** 2, 0)), rtol=1e-3)


def test_a_generator_will_do_and_nothing_will_not():
    found = jbn.drift(one, PARAMS[0], STATE, (part for part in X.reshape(8, 30, FEATURES)))
    jax.tree.map(assert_array_equal, found, jbn.drift(one, PARAMS[0], STATE, lambda: X.reshape(8, 30, FEATURES)))
    with pytest.raises(ValueError, match="batches is a list in which there are none"):
        jbn.drift(one, PARAMS[0], STATE, [])
    with pytest.raises(ValueError, match=r"apply measured nothing: .*train=True"):
        jbn.drift(partial(one, train=False), PARAMS[0], STATE, [X])
    with pytest.raises(TypeError, match=r"states is a Params without a jbn.State in it"):
        jbn.drift(one, STATE, PARAMS[0], [X])
