"""The everyday composition equals its pieces, and fits into the loops that people write."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from ways import PARAMS

import jbn

FEATURES = 3
STATE = jbn.State(np.float32([1, 2, 3]), np.float32([0.25, 1, 9]), np.full(FEATURES, 0.5, np.float32))
MASK = np.array([True, False, True, True, False, True, True, True])


def sample(shape=(8, FEATURES), seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(np.float32)


def assert_same(got, expected):
    jax.tree.map(assert_array_equal, got, expected)


@pytest.mark.parametrize("options", [{}, {"weights": MASK, "epsilon": 1e-2, "feature_axis": (-1,)}])
@pytest.mark.parametrize("unbiased", [True, False])
def test_training_is_normalize_batch_and_update(options, unbiased):
    y, state = jbn.batch_norm(sample(), PARAMS, STATE, train=True, decay=0.7, unbiased=unbiased, **options)
    expected, measured = jbn.normalize_batch(sample(), PARAMS, center=STATE.mean, **options)
    # Two programs, in which a multiply-add may be rounded once or twice; the numbers of y are up to 8.
    assert_allclose(y, expected, rtol=3e-7, atol=5e-7)
    after = jbn.update(STATE, measured, decay=0.7, unbiased=unbiased)
    jax.tree.map(partial(assert_allclose, rtol=3e-7), state, after)


@pytest.mark.parametrize("weights", [None, MASK], ids=["plain", "mask"])
def test_a_run_of_steps_and_an_evaluation(weights):
    step = jax.jit(partial(jbn.batch_norm, train=True), donate_argnums=2)
    state, plain = jbn.init(FEATURES)[1], (np.zeros(FEATURES), np.ones(FEATURES), 0.0)
    for seed in range(4):
        x = sample(seed=seed)
        y, state = step(x, PARAMS, state, weights=weights)
        y = np.asarray(y)
        measured = reference.moments(x, weights)
        expected = reference.normalize(x, *measured[1:], *PARAMS)
        plain = reference.update(plain, measured)
        rows = slice(None) if weights is None else np.flatnonzero(weights)
        assert_allclose(y[rows], expected[rows], rtol=1e-5, atol=1e-5)
    y, _ = jbn.batch_norm(sample(), PARAMS, state, train=False)
    assert_allclose(y, reference.normalize(sample(), *plain[:2], *PARAMS), rtol=1e-5, atol=1e-5)


def test_evaluation_leaves_the_state_and_ignores_the_axis_name():
    y, state = jbn.batch_norm(sample(), PARAMS, STATE, train=False, axis_name="bound nowhere")
    assert state is STATE
    assert_same(y, jbn.normalize_running(sample(), PARAMS, STATE))


def test_a_traced_train_is_refused_with_the_alternatives():
    f = jax.jit(lambda train: jbn.batch_norm(sample(), PARAMS, STATE, train=train)[0])
    with pytest.raises(TypeError, match=r"(?s)train.*bool.*amount.*normalize_batch"):
        f(True)
    jbn.batch_norm(sample(), PARAMS, STATE, train=np.True_)
    for wrong in (1, None, "yes", jnp.asarray(True)):
        with pytest.raises(TypeError, match="train"):
            jbn.batch_norm(sample(), PARAMS, STATE, train=wrong)


def test_the_alternatives_choose_at_run_time():
    @jax.jit
    def step(x, state, train):
        batch, measured = jbn.normalize_batch(x, PARAMS, center=state.mean)
        y = jnp.where(train, batch, jbn.normalize_running(x, PARAMS, state))
        return y, jbn.update(state, measured, amount=train)

    for train in (True, False):
        expected = jbn.batch_norm(sample(), PARAMS, STATE, train=train)
        jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), step(sample(), STATE, train), expected)
    assert_same(step(sample(), STATE, False)[1], STATE)


@pytest.mark.parametrize("params", [PARAMS, PARAMS._replace(bias=None), jbn.Params(None, None)])
def test_values_are_plain_pytrees(params):
    for value in (params, STATE, jbn.moments(sample())):
        leaves, structure = jax.tree.flatten(value)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(value)
        assert_same(again, value)
        assert type(jax.tree.map(np.shape, value)) is type(value)


def test_a_bad_batch_does_not_poison_the_state():
    bad = sample()
    bad[2, 1] = np.nan
    y, after = jax.device_get(jbn.batch_norm(bad, PARAMS, STATE, train=True))
    good = jax.device_get(jbn.batch_norm(sample(), PARAMS, STATE, train=True))
    assert_same([field[1] for field in after], [field[1] for field in STATE])
    assert np.isnan(y[:, 1]).all()
    others = lambda tree: jax.tree.map(lambda a: a[..., [0, 2]], tree)  # noqa: E731
    assert_same(others((y, after)), others(good))


def test_init():
    params, state = jbn.init((2, 3), bias=False, debias=False, dtype=jnp.bfloat16)
    assert params.bias is None
    assert (params.scale.dtype, state.mean.dtype, state.var.dtype, state.weight.dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.float32,
        jnp.float32,
    )
    assert_same((params.scale, *state), (np.ones((2, 3)), np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3))))
    assert jbn.init(4, scale=False)[0].scale is None
    with jax.enable_x64(True):
        assert jbn.init(4, dtype=jnp.float64)[1].mean.dtype == jnp.float64
        assert jbn.init(4)[1].mean.dtype == jnp.float32


def test_called_again_outside_of_jit_nothing_is_compiled(compilations):
    def step(weights=None):
        def loss(x):
            y, state = jbn.batch_norm(x, PARAMS, STATE, train=True, weights=weights)
            return jnp.sum(y), (y, state)

        return jax.grad(loss, has_aux=True)(sample((9, FEATURES)))

    first = step(), step(np.arange(9) < 5)
    assert any("backend_compile" in event for event in compilations)
    compilations.clear()
    assert_same((step(), step(np.arange(9) < 5)), first)
    assert not any("backend_compile" in event for event in compilations)


SAME = jbn.State(np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32), np.ones(FEATURES, np.float32))
AS_GIVEN = {
    "numbers": (jbn.Params(1.0, 0.0), jbn.State(0.0, 1.0)),
    "lists": (jbn.Params([1.0] * FEATURES, [0.0] * FEATURES), jbn.State([0.0] * FEATURES, [1.0] * FEATURES)),
    "whole numbers": (jbn.Params(1, 0), jbn.State(0, 1, 1)),
    "lists of whole numbers": (jbn.Params([1] * FEATURES, (0,) * FEATURES), jbn.State([0] * FEATURES, [1] * FEATURES)),
    "NumPy in float64": (jbn.Params(np.ones(FEATURES), np.zeros(FEATURES)), jax.tree.map(np.float64, SAME)),
    "NumPy scalars": (jbn.Params(np.float32(1), np.float64(0)), jbn.State(np.float32(0), np.float64(1), np.ones(()))),
}


def every(x, params, state):
    """What every public function gives."""
    return (
        train(params, state, x),
        jbn.batch_norm(x, params, state, train=False)[0],
        jbn.batch_renorm(x, params, state, train=True),
        jbn.normalize_batch(x, params, center=state.mean),
        jbn.normalize_running(x, params, state),
        jbn.update(state, jbn.moments(x, center=0)),
        jbn.merge(jbn.Moments(0.0, state.mean, state.var), jbn.moments(x)),
        jbn.merge_states(state, SAME, shares=[1, 2]),
        jbn.update(jbn.empty_moments(SAME), jbn.moments(x)),
        jbn.normalize_running(x, params, jbn.Moments(2, state.mean, state.var)),
        jbn.batch_norm(x, params, jbn.Moments(0, state.mean, state.var, 0, 0), train=True),
        jbn.batch_norm(x[None], params, state, train=True, feature_axis=[2], weights=[[1, 0, 2, 1, 1, 1, 1, 1]]),
    )


def train(params, state, x):
    return jbn.batch_norm(x, params, state, train=True)


@cache
def of_arrays():
    params = jbn.Params(np.ones(FEATURES, np.float32), np.zeros(FEATURES, np.float32))
    over = [f(train, params, SAME, [sample()]) for f in (jbn.recalibrate, jbn.drift)]
    return *jax.jit(every)(sample(), params, SAME), *over


@pytest.mark.parametrize(("params", "state"), AS_GIVEN.values(), ids=AS_GIVEN)
def test_what_stands_for_arrays(params, state):
    """In every public function, outside of jit and inside."""
    over = [f(train, params, state, [sample()]) for f in (jbn.recalibrate, jbn.drift)]
    found = *every(sample(), params, state), *over
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), found, of_arrays())
    inside = jax.eval_shape(lambda x: every(x, params, state), sample())
    assert jax.tree.map(lambda a: a.shape, inside) == jax.tree.map(lambda a: a.shape, of_arrays()[:-2])


def test_lists_of_features_and_axes():
    jax.tree.map(assert_array_equal, jbn.init([2, 3]), jbn.init((2, 3)))
    x, (params, state) = sample((4, 2, 5, 3)), jbn.init([2, 3])
    run = partial(jbn.batch_norm, params=params, state=state, train=True)
    for given in ([1, 3], [3, -3]):
        assert_same(run(x, feature_axis=given), run(x, feature_axis=(1, 3)))
    lane = lambda x: run(x, feature_axis=[0, 2], axis_name=["i"])  # noqa: E731
    assert jax.eval_shape(jax.vmap(lane, axis_name="i"), x)[0].shape == x.shape
