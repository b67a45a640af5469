"""Outputs of the two ways to normalize, their dtypes, and input that is degenerate."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

PARAMS = jbn.Params(jnp.asarray([0.5, -1.0, 2.0]), jnp.asarray([0.0, 1.0, -3.0]))
STATE = jbn.State(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.25, 1.0, 9.0]), jnp.asarray(1.0))
MASK = np.array([True, False, True, True, False, True])
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def sample(shape=(6, 3), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape).astype(np.float32))


def assert_close(got, expected, tolerance=1e-5):
    # float32 arithmetic on some tens of values near 1.
    assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "feature_axis"), [((6, 3), -1), ((3, 6), 0), ((2, 3, 4, 5), 1), ((4, 2, 3), (2, 1)), ((2, 3, 2, 2, 2), 1)]
)
def test_values(shape, feature_axis):
    x = sample(shape)
    features = np.delete(shape, reference.reduced_axes(len(shape), feature_axis))
    scale, bias, mean, var = np.random.default_rng(1).uniform(0.5, 2, (4, *features)).astype(np.float32)
    params, state = jbn.Params(scale, bias), jbn.State(mean, var, jnp.ones(()))
    y, measured = jbn.normalize_batch(x, params, feature_axis=feature_axis, epsilon=1e-3)
    count, batch_mean, batch_var = reference.moments(x, None, feature_axis)
    assert_close(y, reference.normalize(x, batch_mean, batch_var, scale, bias, 1e-3, feature_axis))
    assert measured.count == count
    assert_close(measured.mean, batch_mean)
    assert_close(measured.var, batch_var)
    y = jbn.normalize_running(x, params, state, feature_axis=feature_axis, epsilon=1e-3)
    assert_close(y, reference.normalize(x, mean, var, scale, bias, 1e-3, feature_axis))


@pytest.mark.parametrize(("scale", "bias"), list(product([True, False], repeat=2)))
def test_params_that_are_none(scale, bias):
    x = sample()
    params = jbn.Params(PARAMS.scale if scale else None, PARAMS.bias if bias else None)
    full = PARAMS.scale if scale else np.ones(3), PARAMS.bias if bias else np.zeros(3)
    _, mean, var = reference.moments(x)
    assert_close(jbn.normalize_batch(x, params)[0], reference.normalize(x, mean, var, *full))
    running = reference.normalize(x, STATE.mean, STATE.var, *full)
    assert_close(jbn.normalize_running(x, params, STATE), running)


@pytest.mark.parametrize(("of_x", "of_params"), list(product([*FLOATS, jnp.float64], repeat=2)))
def test_output_has_the_dtype_of_x(of_x, of_params):
    with jax.enable_x64(True):
        x = sample().astype(of_x)
        params = jax.tree.map(lambda a: a.astype(of_params), PARAMS)
        y, measured = jbn.normalize_batch(x, params)
        assert (y.dtype, y.shape) == (of_x, x.shape)
        assert measured.mean.dtype == (jnp.float64 if of_x == jnp.float64 else jnp.float32)
        for of_state in (jnp.float32, jnp.float64):
            state = jax.tree.map(lambda a: a.astype(of_state), STATE)  # noqa: B023
            assert jbn.normalize_running(x, params, state).dtype == of_x
            y, after = jbn.batch_norm(x, params, state, train=True)
            assert (y.dtype, after.mean.dtype) == (of_x, of_state)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
        params, _ = jbn.init(3, dtype=jnp.float64)
        _, mean, var = reference.moments(x)
        y = jbn.normalize_batch(x, params)[0]
        assert_allclose(y, reference.normalize(x, mean, var, *params), rtol=1e-13, atol=1e-13)


GARBAGE = [np.nan, np.inf, -np.inf, 3e38]


@pytest.mark.parametrize("weights", [MASK, MASK.astype(np.float32) * 2], ids=["mask", "real"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_positions_may_hold_anything(garbage, weights):
    """In Flax the forward pass is fine then, and the gradients of the valid rows are NaN."""
    clean = sample()
    dirty = clean.at[np.flatnonzero(~MASK)].set(garbage)
    dy = jnp.cos(jnp.arange(18.0).reshape(6, 3))

    def both(x, params):
        def loss(x, params, epsilon):
            y = jbn.normalize_batch(x, params, weights=weights, epsilon=epsilon)[0]
            return jnp.sum(y * dy), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, params, 1e-2)
        return y, gradients

    y, (dx, dparams, depsilon) = jax.jit(both)(dirty, PARAMS)
    rows = np.flatnonzero(MASK)
    _, mean, var = reference.moments(clean[rows])
    assert_close(y[rows], reference.normalize(clean[rows], mean, var, *PARAMS, 1e-2))
    expected = reference.gradients(clean[rows], dy[rows], PARAMS.scale, 1e-2)
    assert_close(dx[rows], expected[0])
    assert_close(dparams.scale, expected[1])
    assert_close(dparams.bias, expected[2])
    assert np.isfinite(depsilon)
    for blank in (y[~MASK], dx[~MASK]):
        assert_array_equal(blank, np.zeros((2, 3)))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_positions_in_evaluation(garbage):
    dirty = sample().at[np.flatnonzero(~MASK)].set(garbage)
    dy = np.cos(np.arange(18, dtype=np.float32)).reshape(6, 3)
    f = lambda x, params: jbn.normalize_running(x, params, STATE, weights=MASK)  # noqa: E731
    y, pullback = jax.vjp(f, dirty, PARAMS)
    dx, dparams = pullback(jnp.asarray(dy))
    scale, bias = map(np.asarray, PARAMS)
    xhat = reference.normalize(dirty, STATE.mean, STATE.var, np.ones(3), np.zeros(3))
    assert_close(y, np.where(MASK[:, None], xhat * scale + bias, 0))
    assert_close(dx, np.where(MASK[:, None], dy * scale / np.sqrt(np.asarray(STATE.var) + 1e-5), 0))
    assert_close(dparams.scale, np.where(MASK[:, None], xhat * dy, 0).sum(0))
    assert_close(dparams.bias, np.where(MASK[:, None], dy, 0).sum(0))


def test_masked_positions_in_second_order():
    clean = sample()
    dirty = clean.at[np.flatnonzero(~MASK)].set(np.nan)
    rows = np.flatnonzero(MASK)

    def directional(x, weights):
        loss = lambda x: jnp.sum(jnp.sin(jbn.normalize_batch(x, PARAMS, weights=weights)[0]))  # noqa: E731
        return jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x).at[0].set(3.0),))[1]

    got = jax.jit(directional)(dirty, MASK)
    assert_close(got[rows], jax.jit(directional)(clean[rows], None), 1e-4)
    assert_array_equal(got[~MASK], np.zeros((2, 3)))


@pytest.mark.parametrize("masked", [False, True], ids=["empty", "all masked"])
def test_no_data_at_all(masked):
    x = jnp.full((6, 3), jnp.nan) if masked else jnp.zeros((0, 3))
    weights = np.zeros(6, bool) if masked else None

    def loss(x, params):
        y, measured = jbn.normalize_batch(x, params, weights=weights)
        return jnp.sum(y), (y, measured)

    (_, (y, measured)), (dx, dparams) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, PARAMS)
    assert measured.count == 0
    for zero in (y, dx, *dparams, measured.mean, measured.var):
        assert_array_equal(zero, np.zeros(zero.shape))


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e5, -3e7])
def test_a_dead_feature_gives_the_bias_and_finite_derivatives(value, epsilon):
    x = sample((7, 3)).at[:, 1].set(value)

    def loss(x, params):
        y, _ = jbn.normalize_batch(x, params, epsilon=epsilon)
        return jnp.sum(jnp.sin(y)), y

    def everything(x, params):
        (_, y), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
        curvature = jax.jvp(lambda *a: jax.grad(loss, (0, 1), has_aux=True)(*a)[0], (x, params), (x, params))
        return y, (gradient, curvature)

    y, derivatives = jax.jit(everything)(x, PARAMS)
    assert_array_equal(y[:, 1], np.full(7, PARAMS.bias[1]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives))


def test_one_value_of_many_devices_worth_is_not_needed_for_evaluation():
    assert_close(
        jbn.normalize_running(sample((1, 3)), PARAMS, STATE),
        reference.normalize(sample((1, 3)), STATE.mean, STATE.var, *PARAMS),
    )


def test_a_state_without_evidence_is_the_identity():
    params, state = jbn.init(3)
    x = sample()
    # 1 / sqrt(1 + 1e-5) is 5e-6 from 1.
    assert_close(jbn.normalize_running(x, params, state), x)
    assert_allclose(jbn.normalize_running(x, params, state, epsilon=0.0), x, rtol=1e-6)


def test_running_statistics_are_not_rounded_to_the_dtype_of_x():
    """Flax NNX casts them to bfloat16: at mean 100.3 and std 0.1 that is an error of 4.5."""
    x = jnp.asarray(100.3 + 0.1 * np.random.default_rng(0).standard_normal((100, 1)), jnp.bfloat16)
    params, state = jbn.init(1)
    state = state._replace(mean=jnp.asarray([100.3]), var=jnp.asarray([0.01]))
    expected = reference.normalize(np.float64(x), [100.3], [0.01], [1], [0])
    # The mean is float32: 100.3 is off by 3e-6, divided by 0.1; then y is rounded to bfloat16.
    assert_allclose(np.float64(jbn.normalize_running(x, params, state)), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_evaluation_takes_the_difference_first(offset):
    """x * inv + (bias - mean * inv), as in Keras on JAX, is off by 1.2e-3 at 1e4."""
    x = jnp.asarray(offset + np.random.default_rng(0).standard_normal((1000, 3)), jnp.float32)
    state = jbn.State(jnp.full(3, offset, jnp.float32), jnp.asarray([0.5, 1.0, 1.5]), jnp.ones(()))
    for f in (jbn.normalize_running, jax.jit(jbn.normalize_running)):
        assert_close(f(x, PARAMS, state), reference.normalize(x, state.mean, state.var, *PARAMS))


def test_a_broken_running_variance_shows():
    """As NaN, and not as the bias."""
    state = STATE._replace(var=jnp.asarray([1.0, -1.0, jnp.nan]))
    y = jbn.normalize_running(sample(), PARAMS, state)
    assert np.isfinite(y[..., 0]).all()
    assert np.isnan(y[..., 1:]).all()


def test_epsilon_may_be_traced():
    x = sample()
    _, mean, var = reference.moments(x)
    for f, statistics in (
        (lambda epsilon: jbn.normalize_batch(x, PARAMS, epsilon=epsilon)[0], (mean, var)),
        (lambda epsilon: jbn.normalize_running(x, PARAMS, STATE, epsilon=epsilon), STATE[:2]),
    ):
        assert_close(jax.jit(f)(0.5), reference.normalize(x, *statistics, *PARAMS, 0.5))


def test_a_concrete_array_may_be_epsilon_inside_jit():
    epsilon, x = jnp.asarray(0.5), sample()
    _, mean, var = reference.moments(x)
    y = jax.jit(lambda x: jbn.normalize_batch(x, PARAMS, epsilon=epsilon)[0])(x)
    assert_close(y, reference.normalize(x, mean, var, *PARAMS, 0.5))


def test_numpy_arrays_will_do():
    x, params, state = np.asarray(sample()), jbn.Params(*map(np.asarray, PARAMS)), jbn.State(*map(np.asarray, STATE))
    assert_array_equal(jbn.normalize_batch(x, params)[0], jbn.normalize_batch(sample(), PARAMS)[0])
    assert_array_equal(jbn.normalize_running(x, params, state), jbn.normalize_running(sample(), PARAMS, STATE))
