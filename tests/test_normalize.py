"""Outputs of the two ways to normalize, their dtypes, and input that is degenerate."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from ways import PARAMS

import jbn

STATE = jbn.State(np.float32([1, 2, 3]), np.float32([0.25, 1, 9]), np.float32(1))
MASK = np.array([True, False, True, True, False, True])
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def sample(shape=(6, 3), seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(np.float32)


def assert_close(got, expected, tolerance=1e-5):
    # float32 arithmetic on some tens of values near 1.
    assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_params_that_are_none():
    x, (scale, bias) = sample(), PARAMS
    _, *measured = reference.moments(x)

    @jax.jit
    def both(x, params):
        return [(jbn.normalize_batch(x, each)[0], jbn.normalize_running(x, each, STATE)) for each in params]

    given = [PARAMS, jbn.Params(scale, None), jbn.Params(None, bias), jbn.Params(None, None)]
    for params, (by_batch, by_running) in zip(given, both(x, given), strict=True):
        full = np.ones(3) if params.scale is None else scale, np.zeros(3) if params.bias is None else bias
        assert_close(by_batch, reference.normalize(x, *measured, *full))
        assert_close(by_running, reference.normalize(x, *STATE[:2], *full))


@pytest.mark.parametrize("of_x", [*FLOATS, jnp.float64])
@pytest.mark.parametrize("of_params", [*FLOATS, jnp.float64])
def test_output_has_the_dtype_of_x(of_x, of_params):
    def every(x, params, states):
        y, measured = jbn.normalize_batch(x, params)
        trained = [jbn.batch_norm(x, params, state, train=True) for state in states]
        return y, measured, trained, [jbn.normalize_running(x, params, state) for state in states]

    cast = lambda tree, dtype: jax.tree.map(lambda a: a.astype(dtype), tree)  # noqa: E731
    with jax.enable_x64(True):
        states = cast(STATE, np.float32), cast(STATE, np.float64)
        y, measured, trained, evaluated = jax.eval_shape(every, cast(sample(), of_x), cast(PARAMS, of_params), states)
    assert {(out.dtype, out.shape) for out in (y, *evaluated, *(y for y, _ in trained))} == {(jnp.dtype(of_x), (6, 3))}
    assert {field.dtype for field in measured} == {jnp.dtype(np.float64 if of_x == jnp.float64 else np.float32)}
    assert [after.mean.dtype for _, after in trained] == [np.float32, np.float64]


GARBAGE = [np.nan, np.inf, -np.inf, 3e38]


@cache
def masked_steps():
    """Training and evaluation with their gradients, compiled once for all that may be masked."""

    def step(apply):
        def run(x, params, dy, epsilon):
            loss = lambda *args: (jnp.sum(apply(*args) * dy), apply(*args))  # noqa: E731
            (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, params, epsilon)
            return y, *gradients

        return jax.jit(run)

    def by_batch(weights):
        return lambda x, params, epsilon: jbn.normalize_batch(x, params, weights=weights, epsilon=epsilon)[0]

    def by_running(x, params, epsilon):
        return jbn.normalize_running(x, params, STATE, weights=MASK, epsilon=epsilon)

    return step(by_batch(MASK)), step(by_batch(MASK.astype(np.float32) * 2)), step(by_running)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_positions_may_hold_anything(garbage):
    """In Flax the forward pass is fine then, and the gradients of the valid rows are NaN."""
    clean, dy = sample(), np.cos(np.arange(18, dtype=np.float32)).reshape(6, 3)
    dirty, rows = np.where(MASK[:, None], clean, np.float32(garbage)), np.flatnonzero(MASK)
    _, *measured = reference.moments(clean[rows])
    expected = reference.gradients(clean[rows], dy[rows], PARAMS.scale, 1e-2)
    xhat = reference.normalize(clean[rows], *STATE[:2], np.ones(3), np.zeros(3), 1e-2)
    slope = PARAMS.scale / np.sqrt(STATE.var + 1e-2)
    given = dy[rows] * slope, (dy[rows] * xhat).sum(0), dy[rows].sum(0)
    cases = [(measured, expected), (measured, expected), (STATE[:2], given)]
    for run, (statistics, wanted) in zip(masked_steps(), cases, strict=True):
        y, dx, dparams, depsilon = jax.device_get(run(dirty, PARAMS, dy, np.float32(1e-2)))
        assert_close(y[rows], reference.normalize(clean[rows], *statistics, *PARAMS, 1e-2))
        for got, exact in zip((dx[rows], *dparams), wanted, strict=True):
            assert_close(got, exact)
        assert np.isfinite(depsilon)
        assert not np.any(y[~MASK]) and not np.any(dx[~MASK])


def test_masked_positions_in_second_order():
    clean, rows = sample(), np.flatnonzero(MASK)
    dirty = np.where(MASK[:, None], clean, np.float32(np.nan))

    def directional(x, weights):
        loss = lambda x: jnp.sum(jnp.sin(jbn.normalize_batch(x, PARAMS, weights=weights)[0]))  # noqa: E731
        return jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x).at[0].set(3.0),))[1]

    got = np.asarray(jax.jit(directional)(dirty, MASK))
    assert_close(got[rows], jax.jit(directional)(clean[rows], None), 1e-4)
    assert_array_equal(got[~MASK], np.zeros((2, 3)))


@pytest.mark.parametrize("masked", [False, True], ids=["empty", "all masked"])
def test_no_data_at_all(masked):
    x = np.full((6, 3), np.nan, np.float32) if masked else np.zeros((0, 3), np.float32)
    weights = np.zeros(6, bool) if masked else None

    def loss(x, params):
        y, measured = jbn.normalize_batch(x, params, weights=weights)
        return jnp.sum(y), (y, measured)

    (_, (y, measured)), (dx, dparams) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, PARAMS)
    assert measured.count == 0
    for zero in (y, dx, *dparams, measured.mean, measured.var):
        assert_array_equal(zero, np.zeros(zero.shape))


@cache
def to_second_order():
    def everything(x, params, epsilon):
        def loss(x, params):
            y, _ = jbn.normalize_batch(x, params, epsilon=epsilon)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
        curvature = jax.jvp(lambda *a: jax.grad(loss, (0, 1), has_aux=True)(*a)[0], (x, params), (x, params))
        return y, (gradient, curvature)

    return jax.jit(everything)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e5, -3e7])
def test_a_dead_feature_gives_the_bias_and_finite_derivatives(value, epsilon):
    x = sample((7, 3))
    x[:, 1] = value
    y, derivatives = to_second_order()(x, PARAMS, np.float32(epsilon))
    assert_array_equal(np.asarray(y)[:, 1], np.full(7, PARAMS.bias[1]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives))


def test_running_statistics_are_not_rounded_to_the_dtype_of_x():
    """Flax NNX casts them to bfloat16: at mean 100.3 and std 0.1 that is an error of 4.5."""
    x = (100.3 + 0.1 * np.random.default_rng(0).standard_normal((100, 1))).astype(jnp.bfloat16)
    params, state = jbn.Params(None, None), jbn.State(np.float32([100.3]), np.float32([0.01]))
    expected = reference.normalize(np.float64(x), [100.3], [0.01], [1], [0])
    # The mean is float32: 100.3 is off by 3e-6, divided by 0.1; then y is rounded to bfloat16.
    assert_allclose(np.float64(jbn.normalize_running(x, params, state)), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_evaluation_takes_the_difference_first(offset):
    """x * inv + (bias - mean * inv), as in Keras on JAX, is off by 1.2e-3 at 1e4."""
    x = (offset + np.random.default_rng(0).standard_normal((1000, 3))).astype(np.float32)
    state = jbn.State(np.full(3, offset, np.float32), np.float32([0.5, 1, 1.5]))
    for f in (jbn.normalize_running, jax.jit(jbn.normalize_running)):
        assert_close(f(x, PARAMS, state), reference.normalize(x, state.mean, state.var, *PARAMS))


def test_a_broken_running_variance_shows():
    """As NaN, and not as the bias."""
    state = STATE._replace(var=np.float32([1, -1, np.nan]))
    y = np.asarray(jbn.normalize_running(sample(), PARAMS, state))
    assert np.isfinite(y[..., 0]).all()
    assert np.isnan(y[..., 1:]).all()


def test_epsilon_may_be_traced_or_a_concrete_array_inside_of_jit():
    x, concrete = sample(), jnp.asarray(0.5)
    _, *measured = reference.moments(x)

    @jax.jit
    def run(epsilon):
        by_batch = [jbn.normalize_batch(x, PARAMS, epsilon=each)[0] for each in (epsilon, concrete)]
        return by_batch, [jbn.normalize_running(x, PARAMS, STATE, epsilon=each) for each in (epsilon, concrete)]

    for found, statistics in zip(run(0.5), (measured, STATE[:2]), strict=True):
        for y in found:
            assert_close(y, reference.normalize(x, *statistics, *PARAMS, 0.5))
