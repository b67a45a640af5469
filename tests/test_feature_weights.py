"""Weights of the full shape of x: a table with holes, where each feature has values of its own that are missing."""

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

ROWS, FEATURES = 24, 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (ROWS, FEATURES)).astype(np.float32)
DY = RANDOM.standard_normal(X.shape).astype(np.float32)
MASK = RANDOM.uniform(size=X.shape) < 0.7
HOLES = np.where(MASK, X, np.nan)
PARAMS = jbn.Params(np.float32([0.5, -1, 2, 1]), np.float32([0, 1, -3, 2]))
STATE = jbn.State(np.float32([3, 2, 4, 3]), np.float32([4, 5, 6, 3]), np.full(FEATURES, 0.5, np.float32))
REAL = MASK * np.float32(0.5) * (1 + np.arange(FEATURES, dtype=np.float32))
kinds = pytest.mark.parametrize("weights", [MASK, REAL], ids=["mask", "real"])
step = jax.jit(partial(ways.step, jbn.batch_norm, ways.nothing))
close = partial(assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums of tens of values


@kinds
def test_training(weights):
    x = np.where(weights > 0, X, np.nan)
    y, after, dx, dparams = step(x, weights, DY, PARAMS, STATE)
    measured = reference.moments(x, weights)
    close(y, np.where(weights > 0, reference.normalize(x, *measured[1:], *PARAMS), 0))
    wanted = reference.update(
        [np.float64(field) for field in STATE], (reference.number(weights, X.shape), *measured[1:])
    )
    jax.tree.map(close, tuple(after), tuple(np.broadcast_to(field, FEATURES) for field in wanted))
    for ours, exact in zip((dx, *dparams), reference.gradients(x, DY, PARAMS.scale, weights=weights), strict=True):
        close(ours, exact)
    assert_array_equal(np.asarray(jbn.normalize_running(x, PARAMS, STATE, weights=weights)) == 0, ~(weights > 0))


def test_a_feature_without_data_stays_and_the_others_move():
    mask = MASK & (np.arange(FEATURES) != 2)
    y, after, dx, dparams = jax.device_get(step(np.where(mask, X, np.nan), mask, DY, PARAMS, STATE))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, after, dx, dparams)))
    for still, was in zip(after, STATE, strict=True):
        assert still[2] == was[2]
    assert not (y[:, 2].any() or dx[:, 2].any() or dparams.scale[2] or dparams.bias[2])
    whole = jax.device_get(step(HOLES, MASK, DY, PARAMS, STATE))
    others = lambda tree: jax.tree.map(lambda a: a[..., [0, 1, 3]], tree)  # noqa: E731
    jax.tree.map(close, others((y, after, dx, dparams)), others(whole))


@pytest.mark.parametrize("check_vma", [True, False])
def test_pooled_over_eight_devices(check_vma):
    weights = REAL if check_vma else MASK
    weights = weights * (np.arange(ROWS) >= 3)[:, None]  # the first device has nothing
    weights = weights.astype(bool) if weights.dtype != np.float32 else weights
    local = partial(ways.step, jbn.batch_norm, ways.nothing if check_vma else ways.psum)
    operands = np.where(weights > 0, X, np.nan), weights, DY, PARAMS, STATE
    jax.tree.map(close, ways.in_shard_map(local, check_vma, i=8)(*operands), step(*operands))


def test_pooled_over_lanes_and_over_subgroups_of_devices():
    parts = HOLES.reshape(8, 3, -1), MASK.reshape(8, 3, -1)
    count, mean, var = reference.moments(HOLES, MASK)
    lanes = jax.vmap(lambda x, w: jbn.moments(x, weights=w, axis_name="i"), axis_name="i", out_axes=None)
    jax.tree.map(close, tuple(jax.jit(lanes)(*parts)[:3]), (count, mean, var))
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    pooled = jax.pmap(lambda x, w: jbn.moments(x, weights=w, axis_name="i", axis_index_groups=halves), "i")(*parts)
    for device in range(8):
        rows = slice(12 * (device // 4), 12 * (device // 4 + 1))
        got = tuple(np.asarray(field)[device] for field in pooled[:3])
        jax.tree.map(close, got, reference.moments(HOLES[rows], MASK[rows]))


def test_features_that_are_sharded_too():
    data, vectors = P("i", "j"), P("j")

    def local(x, mask, params, state):
        return jbn.batch_norm(x, params, state, train=True, weights=mask, axis_name="i")

    y, after, *_ = step(HOLES, MASK, DY, PARAMS, STATE)
    specs = {"in_specs": (data, data, vectors, vectors), "out_specs": (data, vectors)}
    for check_vma in (True, False):
        split = jax.shard_map(local, mesh=ways.mesh(i=4, j=2), check_vma=check_vma, **specs)
        jax.tree.map(close, jax.jit(split)(HOLES, MASK, PARAMS, STATE), (y, after))


@pytest.mark.parametrize(("weights", "interleaved"), [(MASK, True), (REAL, False)])
def test_groups(weights, interleaved):
    f = jax.jit(partial(jbn.normalize_batch, groups=3, interleaved=interleaved))
    y, measured = f(np.where(weights > 0, X, np.nan), PARAMS, weights=weights)
    for group in range(3):
        cut = slice(group, None, 3) if interleaved else slice(group * 8, (group + 1) * 8)
        _, *statistics = reference.moments(X[cut], weights[cut])
        close(np.asarray(y)[cut], np.where(weights[cut] > 0, reference.normalize(X[cut], *statistics, *PARAMS), 0))
    jax.tree.map(close, tuple(measured[:3]), reference.moments(X, weights))


@kinds
def test_merge_update_and_recalibrate(weights):
    cuts, whole = (slice(0, 5), slice(5, 20), slice(20, ROWS)), reference.moments(X, weights)

    @jax.jit
    def accumulated(parts):
        measured, total = [jbn.moments(x, weights=some) for x, some in parts], jbn.empty_moments(STATE)
        for part in measured:
            total = jbn.update(total, part)
        with_one_count = jbn.merge(measured[0], jbn.moments(parts[1][0]))
        return jbn.merge(*measured), with_one_count, jbn.update(STATE, total, decay=0.0)

    merged, with_one_count, state = accumulated([(X[cut], weights[cut]) for cut in cuts])
    jax.tree.map(close, tuple(merged[:3]), whole)
    assert with_one_count.count.shape == (FEATURES,)
    nothing = np.zeros(FEATURES), np.ones(FEATURES), np.zeros(FEATURES)
    exact = reference.update(nothing, (reference.number(weights, X.shape), *whole[1:]), decay=0.0)
    jax.tree.map(close, tuple(state), tuple(exact))

    def apply(params, state, batch):
        return jbn.batch_norm(batch[0], params, state, train=True, weights=batch[1])

    state = jbn.recalibrate(apply, PARAMS, STATE, [(X[cut], weights[cut]) for cut in cuts])
    jax.tree.map(close, tuple(state), tuple(exact))


@kinds
def test_renorm(weights):
    """Each feature is what it is by itself."""

    @jax.jit
    def both(x, weights):
        run = partial(jbn.batch_renorm, train=True)
        alone = [
            run(x[:, i : i + 1], *jax.tree.map(lambda a: a[i : i + 1], (PARAMS, STATE)), weights=weights[:, i])  # noqa: B023
            for i in range(FEATURES)
        ]
        return run(x, PARAMS, STATE, weights=weights), jax.tree.map(lambda *a: jnp.concatenate(a, -1), *alone)

    jax.tree.map(close, *both(X, weights))


def test_derivatives_in_real_weights():
    weights = jnp.asarray(RANDOM.uniform(0.5, 2, (6, 3)))
    x, probe = jnp.asarray(X[:6, :3]), jnp.asarray(DY[:6, :3])

    def ours(x, weights):
        y, measured = jbn.normalize_batch(x, jbn.Params(None, None), weights=weights)
        return jnp.sum(probe * y) + jnp.sum(jnp.log(measured.var)) + jnp.sum(measured.count * measured.squares)

    def plain(x, weights):
        count = jnp.sum(weights, 0, keepdims=True)
        mean = jnp.sum(weights * x, 0, keepdims=True) / count
        var = jnp.sum(weights * (x - mean) ** 2, 0, keepdims=True) / count
        return (
            jnp.sum(probe * (x - mean) / jnp.sqrt(var + 1e-5))
            + jnp.sum(jnp.log(var))
            + jnp.sum(count[0] * jnp.sum(weights**2, 0))
        )

    def orders(f):
        return jax.jit(lambda x, weights: (jax.grad(f, (0, 1))(x, weights), jax.hessian(f, (0, 1))(x, weights)))

    # Second derivatives in float32.
    jax.tree.map(partial(assert_allclose, rtol=1e-3, atol=1e-4), *(orders(f)(x, weights) for f in (ours, plain)))


def test_rows_of_images_and_sequences():
    """Trailing reduced axes may be left out."""
    x, rows = RANDOM.standard_normal((4, 3, 2, FEATURES)).astype(np.float32), np.array([True, False, True, True])
    steps = RANDOM.uniform(size=(4, 3)) < 0.7
    both = jax.jit(lambda pairs: [[jbn.moments(x, weights=weights) for weights in pair] for pair in pairs])
    for short, full in both([(rows, rows[:, None, None]), (steps, steps[..., None])]):
        jax.tree.map(assert_array_equal, short, full)
    first = np.moveaxis(x, -1, 1)
    jax.tree.map(assert_array_equal, jbn.moments(first, feature_axis=1, weights=rows)[0], np.float32(18))
