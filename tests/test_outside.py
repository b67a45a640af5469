"""States from elsewhere: what is not finite, or a variance below 0, is no evidence, for that feature alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import ways
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn

FEATURES = 8
PARAMS, FRESH = jbn.init(FEATURES)
GOOD = jbn.State(*np.float32([[2.0] * FEATURES, [9.0] * FEATURES, [1.0] * FEATURES]))
X = np.random.default_rng(0).normal(2, 3, (16, FEATURES)).astype(np.float32)
nan, inf = np.nan, np.inf


def broken(weight=1.0):
    """Every kind of broken feature, one each, and two that are not."""
    mean = np.float32([2, nan, inf, -inf, 2, 2, 2, 2])
    var = np.float32([9, 9, 9, 9, nan, inf, -1, 9])
    return jbn.State(mean, var, np.full(FEATURES, weight, np.float32))


def healed(weight=1.0):
    """What `broken` is to training."""
    whole = np.arange(FEATURES) % 7 == 0
    return jax.tree.map(lambda good, fresh: np.where(whole, good, fresh), broken(weight), FRESH)


TRAINING = {
    "batch_norm": partial(jbn.batch_norm, train=True),
    "masked": partial(jbn.batch_norm, train=True, weights=np.arange(16) % 5 > 0),
    "groups": partial(jbn.batch_norm, train=True, groups=2),
    "renorm": partial(jbn.batch_renorm, train=True),
    "update": lambda x, params, state: (x, jbn.update(state, jbn.moments(x))),
    "update, decay 0": lambda x, params, state: (x, jbn.update(state, jbn.moments(x), decay=0.0)),
}


def both(f):
    """`f` of a state, for the broken one and for what it is to training."""

    def run(f):
        return jax.jit(lambda x, state: f(x, PARAMS, state))

    run = run(f)
    return [[run(X, make(weight)) for weight in (1.0, 0.0)] for make in (broken, healed)]


@pytest.mark.parametrize("name", TRAINING)
def test_training_takes_it_as_fresh(name):
    ours, wanted = both(TRAINING[name])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
    jax.tree.map(assert_array_equal, ours, wanted)


def test_the_next_batch_replaces_it_whole():
    _, after = jbn.batch_norm(X, PARAMS, broken(), train=True)
    assert_allclose(after.mean[1:7], np.float64(X).mean(0)[1:7], rtol=1e-6)
    assert_allclose(after.var[1:7], np.float64(X).var(0, ddof=1)[1:7], rtol=1e-6)
    assert_allclose(after.weight, np.float32([1, *[0.1] * 6, 1]), rtol=1e-6)


def test_a_center_that_is_not_finite():
    measured = jax.jit(lambda x, center: jbn.moments(x, center=center))(X, broken().mean)
    assert_allclose(measured.mean, np.float64(X).mean(0), rtol=1e-6)
    assert_allclose(measured.var, np.float64(X).var(0), rtol=1e-5)


def test_pooled_over_devices():
    local = lambda x, state: jbn.batch_norm(x, PARAMS, state, train=True, axis_name="i")  # noqa: E731
    split = jax.shard_map(local, mesh=ways.mesh(i=8), in_specs=(P("i"), P()), out_specs=(P("i"), P()))
    got, wanted = jax.jit(split)(X, broken()), jbn.batch_norm(X, PARAMS, healed(), train=True)
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), got, wanted)  # sums in another order


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_what_says_nothing_leaves_it_as_it_was(amount):
    """Bit for bit, broken as it is: `amount` 0, and a batch of no value."""
    measured = jbn.moments(X, weights=np.zeros(16, bool) if amount else None)
    jax.tree.map(assert_array_equal, jbn.update(broken(), measured, amount=amount), broken())


def test_evaluation_shows_it():
    y, after = jbn.batch_norm(X, PARAMS, broken(), train=False)
    assert np.isnan(y[:, [1, 4, 6]]).all() and np.isfinite(y[:, [0, 7]]).all()
    jax.tree.map(assert_array_equal, after, broken())


def test_merged_states():
    merged = jbn.merge_states(broken(), GOOD)
    assert_allclose(merged.mean, 2)
    assert_allclose(merged.var, 9)
    assert_allclose(merged.weight, [1, *[0.5] * 6, 1])


def test_moments_that_accumulate():
    total = jbn.Moments(*np.float32([[4.0, 4.0], [nan, 1.0], [1.0, 1.0], [0.0, 0.0], [4.0, 4.0]]))
    total = jbn.update(total, jbn.moments(X[:, :2]))
    assert_allclose(total.count, [16, 20])
    assert_allclose(total.mean[0], np.float64(X).mean(0)[0], rtol=1e-6)


def test_recalibrated_and_named():
    apply = lambda params, state, x: jbn.batch_norm(x, params, state, train=True)  # noqa: E731
    exact = jbn.recalibrate(apply, PARAMS, broken(), [X])
    _, mean, var = reference.moments(X)
    assert_allclose(exact.mean, mean, rtol=1e-5)
    assert_allclose(exact.var, var * 16 / 15, rtol=1e-5)
    error = jbn.drift(apply, PARAMS, broken(), [X]).error
    assert not np.isfinite(error[1:7]).any() and np.isfinite(error[jnp.array([0, 7])]).all()
