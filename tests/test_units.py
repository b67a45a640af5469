"""Real-valued weights have no unit: multiplied by a constant, they change nothing. Whole numbers are repeats."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose
from ways import PARAMS

import jbn

FEATURES = 3
STATE = jbn.State(np.float32([1, 2, 3]), np.float32([4, 1, 9]), np.full(FEATURES, 0.5, np.float32))
FRESH = jbn.State(np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32), np.zeros(FEATURES, np.float32))
UNITS = [1e-6, 0.37, 2.0, 1e6]
# In both units each weight is rounded, and as often as there are values, 24, each of two sums; a scale of 2 doubles it.
TOLERANCE = 2 * 2 * 24 * 2**-24
close = partial(assert_allclose, rtol=TOLERANCE, atol=TOLERANCE)
train = jax.jit(partial(jbn.batch_norm, train=True))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 3, (24, FEATURES)).astype(np.float32)
    weights = rng.exponential(size=24).astype(np.float32)
    weights[3::5] = 0
    x[3::5] = np.nan
    return x, weights


def number(weights):
    """The effective number of values, in float64."""
    weights = np.float64(weights)
    return weights.sum(0) ** 2 / (weights**2).sum(0)


def in_all_units(f, weights):
    """`f(weights)` is the same in every unit, and is given back."""
    plain = f(weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    for unit in UNITS:
        other = f(np.float32(unit) * weights)
        jax.tree.map(close, other, plain)
    return plain


def without_unit(measured):
    """Mean, variance and effective number of `Moments`."""
    return measured.mean + measured.mean_low, measured.var, measured.count**2 / measured.squares


def accumulated(x, weights):
    """The state of two batches, by way of moments."""
    total = jbn.empty_moments(STATE)
    for part, its in zip(jnp.split(x, 2), jnp.split(weights, 2), strict=True):
        total = jbn.update(total, jbn.moments(part, weights=its), amount=0.5)
    return jbn.update(STATE, total)


def recalibrated(x, weights):
    apply = lambda params, state, batch: jbn.batch_norm(batch[0], params, state, train=True, weights=batch[1])  # noqa: E731
    return jbn.recalibrate(apply, PARAMS, STATE, list(zip(np.split(x, 2), np.split(weights, 2), strict=True)))


EVERY = {
    "batch_norm": lambda x, w: jbn.batch_norm(x, PARAMS, STATE, train=True, weights=w),
    "batch_norm, without evidence": lambda x, w: jbn.batch_norm(x, PARAMS, FRESH, train=True, weights=w),
    "batch_norm in groups": lambda x, w: jbn.batch_norm(x, PARAMS, STATE, train=True, weights=w, groups=2),
    "batch_norm in evaluation": lambda x, w: jbn.batch_norm(x, PARAMS, STATE, train=False, weights=w),
    "batch_renorm": lambda x, w: jbn.batch_renorm(x, PARAMS, STATE, train=True, weights=w),
    "normalize_batch": lambda x, w: jbn.normalize_batch(x, PARAMS, weights=w)[0],
    "normalize_running": lambda x, w: jbn.normalize_running(x, PARAMS, STATE, weights=w),
    "normalize_running by moments": lambda x, w: jbn.normalize_running(x, PARAMS, jbn.moments(x, weights=w), weights=w),
    "moments": lambda x, w: without_unit(jbn.moments(x, weights=w)),
    "moments about a center": lambda x, w: without_unit(jbn.moments(x, weights=w, center=STATE.mean)),
    "merge": lambda x, w: without_unit(jbn.merge(jbn.moments(x[:9], weights=w[:9]), jbn.moments(x[9:], weights=w[9:]))),
    "update": lambda x, w: jbn.update(STATE, jbn.moments(x, weights=w)),
    "update of moments": accumulated,
}


every = jax.jit(lambda x, w: {name: f(x, w) for name, f in EVERY.items()})


@pytest.mark.parametrize("seed", range(2))
def test_every_function(seed):
    """In one program."""
    x, weights = batch(seed)
    in_all_units(partial(every, x), weights)


def test_each_feature_in_a_unit_of_its_own():
    x, weights = batch()
    weights = np.stack([weights, weights[::-1], np.ones_like(weights)], 1)
    x = np.where(weights > 0, np.nan_to_num(x), np.float32(np.nan))
    f = jax.jit(lambda w: jbn.batch_norm(x, PARAMS, STATE, train=True, weights=w))
    plain, other = (f(w) for w in (weights, weights * np.float32([1e-6, 1, 1e6])))
    jax.tree.map(close, other, plain)


def test_gradients():
    x, weights = batch()

    def loss(x, params, w):
        return jnp.sum(jnp.sin(jbn.batch_norm(x, params, STATE, train=True, weights=w)[0]))

    def gradients(w):
        *of_others, of_weights = jax.grad(loss, (0, 1, 2))(x, PARAMS, w)
        return of_others, w * of_weights

    in_all_units(jax.jit(gradients), weights)


def test_recalibrate_and_drift():
    x, weights = batch()
    wanted = reference.moments(x, weights)
    for unit in UNITS:
        got = recalibrated(x, np.float32(unit) * weights)
        close(got.mean, wanted[1])
        close(got.var, wanted[2] / (1 - 1 / number(weights)))


def test_the_effective_number_makes_the_variance_unbiased():
    x, weights = batch()
    _, mean, var = reference.moments(x, weights)
    measure = jax.jit(lambda w: (jbn.moments(x, weights=w), jbn.update(FRESH, jbn.moments(x, weights=w))))
    for unit in (1.0, *UNITS):
        measured, state = measure(np.float32(unit) * weights)
        close(np.float64(measured.count) ** 2 / measured.squares, number(weights))
        close(state.mean, mean)
        close(state.var, var / (1 - 1 / number(weights)))


def test_it_is_unbiased():
    """The mean over many draws of values of variance 4, of which some weigh more than others."""
    x = np.random.default_rng(0).normal(100, 2, (8, 20_000)).astype(np.float32)
    measured = jbn.moments(x, weights=np.float32([5, 1, 1, 1, 2, 9, 1, 3]))
    var = np.float64(jbn.update(jbn.init(20_000)[1], measured).var)
    assert abs(var.mean() - 4) < 5 * var.std() / np.sqrt(20_000)
    assert abs(np.float64(measured.var).mean() - 4) > 0.5


def test_whole_numbers_are_repeats():
    x, repeats = np.nan_to_num(batch()[0]), np.arange(24) % 4
    _, wanted = train(np.repeat(x, repeats, 0), PARAMS, STATE)
    for given in (repeats.astype(np.int32), repeats.astype(np.uint8), repeats.tolist()):
        _, got = jbn.batch_norm(x, PARAMS, STATE, train=True, weights=given)
        jax.tree.map(close, got, wanted)
        measured = jbn.moments(x, weights=given)
        assert measured.count == measured.squares == float(repeats.sum())


def test_over_devices():
    """Each with weights of its own, some with none."""
    x, weights = batch()
    weights[:3] = 0
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    local = lambda x, w: jbn.batch_norm(x, PARAMS, STATE, train=True, weights=w, axis_name="i")  # noqa: E731
    pooled = jax.shard_map(local, mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P()))
    got = in_all_units(partial(jax.jit(pooled), x), weights)
    wanted = train(x, PARAMS, STATE, weights=weights)
    jax.tree.map(close, got, wanted)


def test_squares_are_differentiable():
    x, weights = np.nan_to_num(batch()[0]), batch()[1] + np.float32(0.5)
    effective = lambda w: jnp.sum(jbn.moments(x, weights=w).squares * 3) + jbn.moments(x, weights=w).count  # noqa: E731
    gradient, (_, tangent) = jax.jit(lambda w: (jax.grad(effective)(w), jax.jvp(effective, (w,), (w,))))(weights)
    assert_allclose(gradient, 6 * weights + 1, rtol=1e-6)
    assert_allclose(tangent, np.sum((6 * weights + 1) * weights), rtol=1e-5)


ONE = {
    "mask": np.arange(24) == 7,
    "weights": np.where(np.arange(24) == 7, np.float32(0.3), np.float32(0)),
    "tiny weights": np.where(np.arange(24) == 7, np.float32(1e-6), np.float32(0)),
    "beside next to nothing": np.where(np.arange(24) == 7, np.float32(0.3), np.float32(1e-7)),
}


@cache
def every_layer(unbiased):
    @jax.jit
    def run(x, state, weights):
        layers = [
            layer(x, PARAMS, state, train=True, weights=weights, unbiased=unbiased)
            for layer in (jbn.batch_norm, jbn.batch_renorm)
        ]
        updated = jbn.update(state, jbn.moments(x, weights=weights), unbiased=unbiased)
        return layers[0][0], [after for _, after in layers] + [updated]

    return run


@pytest.mark.parametrize("weights", ONE.values(), ids=ONE)
@pytest.mark.parametrize("state", [STATE, FRESH], ids=["evidence", "fresh"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_single_value_leaves_the_state_as_it_was(weights, state, unbiased):
    y, states = every_layer(unbiased)(np.nan_to_num(batch()[0]), state, weights)
    assert_allclose(np.asarray(y)[7], PARAMS.bias, atol=5e-3)  # a share of 8e-6 is 3e-3 standard deviations
    for after in states:
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_single_value_counts_among_others():
    """A state of moments that were each of one value."""
    x = np.nan_to_num(batch()[0])
    step = lambda total, row: (jbn.update(total, jbn.moments(row[None])), None)  # noqa: E731
    total, _ = jax.jit(lambda x: jax.lax.scan(step, jbn.empty_moments(STATE), x))(x)
    assert_allclose(jbn.update(STATE, total, decay=0.0).var, np.float64(x).var(0, ddof=1), rtol=1e-5)


def test_one_feature_of_a_single_value_leaves_only_itself():
    x, weights = np.nan_to_num(batch()[0]), np.ones((24, FEATURES), bool)
    weights[1:, 1] = False
    (_, after), (_, every) = jax.device_get((train(x, PARAMS, STATE, weights=weights), train(x, PARAMS, STATE)))
    for got, old, new in zip(after, STATE, every, strict=True):
        close(got, [new[0], old[1], new[2]])
