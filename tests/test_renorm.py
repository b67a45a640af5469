"""Batch renormalization against the formula in float64, and at its two ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ways
from numpy.testing import assert_allclose, assert_array_equal
from reference import gradients, moments, normalize, renormalize, update

import jbn

RANDOM = np.random.default_rng(0)
X = (2 + 1.5 * RANDOM.standard_normal((16, 4, 3))).astype(np.float32)
DY = RANDOM.standard_normal(X.shape).astype(np.float32)
PARAMS = jbn.Params(np.linspace(0.5, 2, 3, dtype=np.float32), np.linspace(-1, 1, 3, dtype=np.float32))
STATE = jbn.State(np.float32([1, 2.5, -4]), np.float32([1, 9, 0.04]), np.full(3, 0.7, np.float32))
FRESH = jbn.State(np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32))
EPSILON = 1e-5


def train(x, params, state, dy, **options):
    def run(x, params):
        return jbn.batch_renorm(x, params, state, train=True, **options)

    y, backward, after = jax.vjp(run, x, params, has_aux=True)
    return y, after, backward(dy)


compiled = jax.jit(train)  # once for all limits


@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.1, 0.2), (1.0, 0.0), (np.inf, np.inf)])
def test_the_formula_and_its_gradient(r_max, d_max):
    y, after, (dx, dparams) = compiled(X, PARAMS, STATE, DY, r_max=r_max, d_max=d_max)
    expected, r = renormalize(X, PARAMS, STATE, r_max, d_max)
    assert_allclose(y, expected, atol=2e-5)  # float32, outputs up to 30
    # r and d carry no gradient: dx is that of batch norm with the scale times r, dscale = sum(dy (y - bias) / scale)
    assert_allclose(dx, gradients(X, DY, PARAMS.scale * r)[0], atol=1e-5)
    corrected = (expected - np.float64(PARAMS.bias)) / np.float64(PARAMS.scale)
    assert_allclose(dparams.scale, (np.float64(DY) * corrected).sum((0, 1)), rtol=1e-4)
    assert_allclose(dparams.bias, np.float64(DY).sum((0, 1)), rtol=1e-4)
    # Sums of 64 values, squared about a center that is 4 standard deviations away, in a seventh of the new state.
    wanted = update([np.float64(field) for field in STATE], moments(X))
    jax.tree.map(partial(assert_allclose, rtol=64 * 2**-24 * 17 / 7), tuple(after), tuple(wanted))


@pytest.mark.parametrize("params", [PARAMS, jbn.Params(None, None)], ids=["both", "neither"])
def test_without_room_it_is_batch_norm(params):
    """Bit for bit but dx, whose scale is a product there: each of its three parts may be rounded once more."""

    def plain(x, params, state, dy):
        y, backward, after = jax.vjp(lambda x, p: jbn.batch_norm(x, p, state, train=True), x, params, has_aux=True)
        return y, after, backward(dy)

    y, after, (dx, dparams) = train(X, params, STATE, DY, r_max=1.0, d_max=0.0)
    wanted_y, wanted_after, (wanted_dx, wanted_dparams) = plain(X, params, STATE, DY)
    jax.tree.map(assert_array_equal, (y, after, dparams), (wanted_y, wanted_after, wanted_dparams))
    assert_allclose(dx, wanted_dx, rtol=0, atol=3 * 2**-24 * np.max(np.abs(wanted_dx)))


def test_with_all_room_it_normalizes_by_the_running_statistics():
    y, _, (dx, _) = compiled(X, PARAMS, STATE, DY, r_max=np.inf, d_max=np.inf)
    assert_allclose(y, normalize(X, *STATE[:2], *PARAMS), atol=2e-5)
    assert np.abs(np.sum(dx, (0, 1))).max() < 1e-4  # yet moving the whole batch moves nothing: it is in the statistics


@pytest.mark.parametrize("epsilon", [EPSILON, 0.0])
def test_without_evidence_it_is_batch_norm_and_gradients_stay_finite(epsilon):
    dead = np.where(np.arange(3) == 1, np.float32(7), X)
    none = np.zeros(3, np.float32)
    for state in (FRESH, FRESH._replace(var=none), STATE._replace(var=none)):
        found = compiled(dead, PARAMS, state, DY, epsilon=epsilon)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    y, _ = jbn.batch_renorm(dead, PARAMS, FRESH, train=True, epsilon=epsilon)
    assert_array_equal(y, jbn.normalize_batch(dead, PARAMS, center=FRESH.mean, epsilon=epsilon)[0])


def test_a_first_batch_that_is_far_away():
    """What rounding can have made of its variance is the running one, and is no evidence, as with batch_norm."""
    x = X[:, 0] + np.float32(1e5)
    _, after = jbn.batch_renorm(x, PARAMS, FRESH, train=True)
    count, mean, _ = moments(x)
    assert_allclose(after.mean, mean, rtol=2e-7)
    assert_allclose(after.var, 32 * 2.0**-24 * mean**2 * count / (count - 1), rtol=1e-3)
    assert_array_equal(after.weight, np.zeros(3))


@pytest.mark.parametrize("r_min", [0.0, 0.4, 1.0])
def test_a_lower_limit_of_its_own(r_min):
    """As Keras has it: the scale of a batch much narrower than the running statistics, 1 / 3 at least without it."""
    narrow = STATE._replace(var=STATE.var * 100)
    y, *_ = compiled(X, PARAMS, narrow, DY, r_max=3.0, r_min=r_min, d_max=np.inf)
    _, mean, var = moments(X)
    spread = np.sqrt(np.float64(narrow.var) + EPSILON)
    r = np.clip(np.sqrt(var + EPSILON) / spread, r_min, 3)
    d = (mean - np.float64(narrow.mean)) / spread
    corrected = (np.float64(X) - mean) / np.sqrt(var + EPSILON) * r + d
    assert_allclose(y, np.float64(PARAMS.scale) * corrected + np.float64(PARAMS.bias), atol=2e-5)
    assert_allclose(train(X, PARAMS, narrow, DY, r_max=3.0, r_min=r_min, d_max=np.inf)[0], y, atol=1e-6)
    without, *_ = compiled(X, PARAMS, narrow, DY, r_max=3.0, d_max=np.inf)
    assert_allclose(without, compiled(X, PARAMS, narrow, DY, r_max=3.0, r_min=1 / 3, d_max=np.inf)[0], atol=1e-6)


def test_limits_may_be_traced_and_follow_the_paper():
    @jax.jit
    def run(step):
        r_max, d_max = jbn.renorm_limits(step)
        return r_max, d_max, jbn.batch_renorm(X, PARAMS, STATE, train=True, r_max=r_max, d_max=d_max)[0]

    for step, r_max, d_max in [(0, 1, 0), (5_000, 1, 0), (25_000, 1 + 2 * 20 / 35, 5), (40_000, 3, 5), (10**6, 3, 5)]:
        found = run(step)
        assert_allclose(found[:2], (r_max, d_max), rtol=1e-6)
        assert_allclose(found[2], renormalize(X, PARAMS, STATE, r_max, d_max)[0], atol=2e-5)


@pytest.mark.parametrize("way", ["one device", "vmap", "shard_map", "shard_map unchecked"])
def test_masked_and_split_it_is_that_of_the_valid_rows(way):
    mask = np.random.default_rng(1).uniform(size=(16, 4)) < 0.6
    mask[:2] = False  # the first of 8 devices has nothing
    x = np.where(mask[..., None], X, np.float32(np.nan))
    y, after, dx, dparams = jax.device_get(ways.runner(way, jbn.batch_renorm)(x, mask, DY, PARAMS, STATE))
    assert not y[~mask].any() and not dx[~mask].any()
    valid, dy = (np.float64(a)[mask][None] for a in (X, DY))
    expected, r = renormalize(valid, PARAMS, STATE, 3.0, 5.0)
    corrected = (expected - np.float64(PARAMS.bias)) / np.float64(PARAMS.scale)
    got = y[mask], dx[mask], *after, *dparams
    wanted = (
        expected[0],
        gradients(valid, dy, PARAMS.scale * r)[0][0],
        *update([np.float64(field) for field in STATE], moments(valid)),
        (dy * corrected).sum((0, 1)),
        dy.sum((0, 1)),
    )
    for ours, exact in zip(got, wanted, strict=True):
        assert_allclose(ours, exact, rtol=1e-5, atol=2e-5)  # float32, outputs up to 30


def test_second_derivatives_take_r_and_d_as_constants():
    def loss(x):
        return jnp.sum(jnp.sin(jbn.batch_renorm(x, PARAMS, STATE, train=True)[0]))

    x = X[:4, 0]
    mean, deviation, running = x.mean(0), np.sqrt(x.var(0) + EPSILON), np.sqrt(STATE.var + EPSILON)
    r, d = np.clip(deviation / running, 1 / 3, 3), np.clip((mean - STATE.mean) / running, -5, 5)

    def plain(x):
        normalized = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + EPSILON)
        corrected = normalized * r[None] + d[None]
        return jnp.sum(jnp.sin(PARAMS.scale[None] * corrected + PARAMS.bias[None]))

    # second derivatives in float32 reach 20
    assert_allclose(jax.jit(jax.hessian(loss))(x), jax.jit(jax.hessian(plain))(x), atol=2e-3)


def test_evaluation_and_refusals():
    y, same = jbn.batch_renorm(X, PARAMS, STATE, train=False)
    assert_array_equal(y, jbn.normalize_running(X, PARAMS, STATE))
    assert same is STATE
    with pytest.raises(ValueError, match=r"start is 10, r_end 10, d_end 25000; both ends must come after the start"):
        jbn.renorm_limits(0, start=10, r_end=10)
