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
    found = jbn.drift(one, PARAMS[0], STATE, [X])
    x, running = np.float64(X), np.sqrt(np.float64(STATE.var) + 1e-5)
    ratio, shift = np.sqrt(x.var(0, ddof=1) + 1e-5) / running, (x.mean(0) - np.float64(STATE.mean)) / running
    assert_allclose(found.ratio, ratio, rtol=1e-5)
    assert_allclose(found.shift, shift, rtol=1e-4, atol=1e-6)
    apart = x.std(0) / np.sqrt(x.var(0) + 1e-5) - x.std(0) / running
    assert_allclose(found.error, np.sqrt(shift**2 + apart**2), rtol=1e-4, atol=1e-6)
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
    state = jbn.recalibrate(one, PARAMS[0], STATE, [X], unbiased=False)
    found = jbn.drift(biased, PARAMS[0], state, [X])
    for name, exact in (("shift", 0), ("ratio", 1), ("error", 0), ("between", 0)):
        assert_allclose(getattr(found, name), exact, atol=1e-6)


KINDS = {
    "one kind twice": [(0, 1), (0, 1)],
    "levels of a pyramid": [(0, 1), (3, 1.5), (-2, 0.7)],
    "real and fake": [(0, 1), (3, 0.3)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_turns", [False, True], ids=["in one call", "by turns"])
def test_what_lies_between_calls(kind, by_turns):
    """A layer that is shared by inputs of several kinds: the error is that of the outputs, exact as statistics are."""
    random = np.random.default_rng(0)
    batches = [tuple(random.normal(*of, (256, FEATURES)).astype(np.float32) for of in KINDS[kind]) for _ in range(4)]

    def head(params, state, levels):
        found = []
        for x in levels:
            y, state = jbn.batch_norm(x, params, state, train=True)
            found.append(y)
        return found, state

    given = [(x,) for batch in batches for x in batch] if by_turns else batches
    state = jbn.recalibrate(head, PARAMS[0], STATE, given, passes=1)
    found = jbn.drift(head, PARAMS[0], state, given)
    scale, apart = np.float64(PARAMS[0].scale), []
    for levels in given:
        for x, y in zip(levels, head(PARAMS[0], state, levels)[0], strict=True):
            evaluated = jbn.normalize_running(x, PARAMS[0], state)
            apart.append(np.mean((np.float64(y) - np.float64(evaluated)) ** 2, 0))
    assert_allclose(found.error, np.sqrt(np.mean(apart, 0)) / scale, rtol=1e-3)
    assert_allclose(found.between, found.error, rtol=1e-3)  # as nothing lies between the statistics
    assert (found.error > 0.6).all() if kind != "one kind twice" else (found.error < 0.2).all()


def test_a_layer_shows_its_own_fault_and_not_that_of_the_one_before():
    batches = list(X.reshape(8, 30, FEATURES))
    states = {"first": STATE, "second": STATE, "steps": 7}
    exact = jbn.recalibrate(two, PARAMS, states, batches, passes=1)
    spoiled = {**exact, "first": exact["first"]._replace(mean=np.asarray(exact["first"].mean) + 30)}
    found = jbn.drift(two, PARAMS, spoiled, batches)
    assert found["steps"] == 7
    assert isinstance(found["first"], jbn.Drift)
    assert (np.asarray(found["first"].error) > 2).all()
    second = jax.device_get(found["second"])
    assert (abs(second.shift) < 1e-5).all() and (second.error < 0.4).all()  # of batches of 30
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
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), found[:4], wanted[:4])
    assert_allclose(found.between, wanted.between, atol=2**-11)  # the root of what is left of two numbers near 1
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


def test_the_formula_by_calls_beside_a_large_epsilon():
    """Where it is beside the variances it shows in every field."""
    epsilon, calls = 0.5, np.split(X + np.repeat(np.float32([0, 1, 3]), 80)[:, None], 3)
    found = jbn.drift(biased, PARAMS[0], STATE, calls, epsilon=epsilon)
    _, mean, var = reference.moments(np.concatenate(calls))
    spread, running = (np.sqrt(np.float64(of) + epsilon) for of in (var, STATE.var))
    shift, ratio = (mean - STATE.mean) / running, spread / running
    squared = np.mean(
        [
            var * (1 / np.sqrt(var + epsilon) - 1 / running) ** 2 + ((mean - STATE.mean) / running) ** 2
            for _, mean, var in map(reference.moments, calls)
        ],
        0,
    )
    between = np.sqrt(np.maximum(squared - shift**2 - (ratio - 1) ** 2 * var / spread**2, 0))
    assert between.min() > 0.1
    for name, exact in (("shift", shift), ("ratio", ratio), ("error", np.sqrt(squared)), ("between", between)):
        assert_allclose(getattr(found, name), exact, rtol=1e-4, atol=1e-6)


def test_a_generator_will_do_and_nothing_will_not():
    found = jbn.drift(one, PARAMS[0], STATE, (part for part in X.reshape(8, 30, FEATURES)))
    jax.tree.map(assert_array_equal, found, jbn.drift(one, PARAMS[0], STATE, lambda: X.reshape(8, 30, FEATURES)))
    with pytest.raises(ValueError, match="batches is a list in which there are none"):
        jbn.drift(one, PARAMS[0], STATE, [])
    with pytest.raises(ValueError, match=r"apply measured nothing: .*train=True"):
        jbn.drift(partial(one, train=False), PARAMS[0], STATE, [X])
    with pytest.raises(TypeError, match=r"states is a Params without a jbn.State in it"):
        jbn.drift(one, STATE, PARAMS[0], [X])
