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
kinds = pytest.mark.parametrize(
    "weights", [MASK, MASK * np.float32(0.5) * (1 + np.arange(FEATURES))], ids=["mask", "real"]
)
close = partial(assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums of tens of values


@pytest.mark.parametrize(
    ("shape", "feature_axis"), [((6, 3), -1), ((3, 6), 0), ((4, 5, 3), (0, 2)), ((4, 2, 3), 1), ((2, 3, 2, 3), (3, 1))]
)
@pytest.mark.parametrize("kept", [None, 0], ids=["full", "one for all of an axis"])
def test_moments_in_any_layout(shape, feature_axis, kept):
    x, mask = RANDOM.normal(1, 2, shape).astype(np.float32), RANDOM.uniform(size=shape) < 0.7
    axes = reference.reduced_axes(len(shape), feature_axis)
    if kept is not None:
        mask = mask[tuple(slice(1) if axis == axes[kept] else slice(None) for axis in range(len(shape)))]
    mask[(0,) * len(shape)] = True
    mask = mask | (np.arange(mask.shape[axes[-1]]) == 0).reshape(
        [-1 if axis == axes[-1] else 1 for axis in range(x.ndim)]
    )
    full = np.broadcast_to(mask, shape)
    measured = jbn.moments(np.where(full, x, np.nan), feature_axis=feature_axis, weights=mask)
    count, mean, var = reference.moments(x, mask, feature_axis)
    assert measured.count.shape == measured.mean.shape
    assert_allclose(measured.count, np.broadcast_to(count, mean.shape))
    close(measured.mean, mean)
    close(measured.var, var)


@kinds
def test_training(weights):
    x = np.where(weights > 0, X, np.nan)
    y, after, dx, dparams = jax.jit(partial(ways.step, jbn.batch_norm, ways.nothing))(x, weights, DY, PARAMS, STATE)
    measured = reference.moments(x, weights)
    close(y, np.where(weights > 0, reference.normalize(x, *measured[1:], *PARAMS), 0))
    wanted = reference.update(
        [np.float64(field) for field in STATE], (reference.number(weights, X.shape), *measured[1:])
    )
    jax.tree.map(close, tuple(after), tuple(np.broadcast_to(field, FEATURES) for field in wanted))
    for ours, exact in zip((dx, *dparams), reference.gradients(x, DY, PARAMS.scale, weights=weights), strict=True):
        close(ours, exact)
    assert_array_equal(jbn.normalize_running(x, PARAMS, STATE, weights=weights) == 0, ~(weights > 0))


def test_a_feature_without_data_stays_and_the_others_move():
    mask = MASK & (np.arange(FEATURES) != 2)
    y, after, dx, dparams = ways.step(jbn.batch_norm, ways.nothing, np.where(mask, X, np.nan), mask, DY, PARAMS, STATE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, after, dx, dparams)))
    for still, was in zip(after, STATE, strict=True):
        assert still[2] == was[2]
    assert not (y[:, 2].any() or dx[:, 2].any() or dparams.scale[2] or dparams.bias[2])
    others = np.array([0, 1, 3])
    alone = jbn.batch_norm(
        HOLES[:, others], *jax.tree.map(lambda a: a[others], (PARAMS, STATE)), train=True, weights=MASK[:, others]
    )
    jax.tree.map(lambda a, b: close(a[..., others], b), (y, tuple(after)), (alone[0], tuple(alone[1])))


@pytest.mark.parametrize("check_vma", [True, False])
@kinds
def test_pooled_over_eight_devices(check_vma, weights):
    weights = weights * (np.arange(ROWS) >= 3)[:, None]  # the first device has nothing
    weights = weights.astype(bool) if weights.dtype != np.float32 else weights
    step = partial(ways.step, jbn.batch_norm, ways.nothing if check_vma else ways.psum)
    operands = np.where(weights > 0, X, np.nan), weights, DY, PARAMS, STATE
    split = ways.in_shard_map(step, check_vma, i=8)(*operands)
    jax.tree.map(close, split, ways.step(jbn.batch_norm, ways.nothing, *operands))


def test_pooled_over_lanes_and_over_subgroups_of_devices():
    whole = jbn.moments(HOLES, weights=MASK)
    lanes = jax.vmap(lambda x, w: jbn.moments(x, weights=w, axis_name="i"), axis_name="i", out_axes=None)
    jax.tree.map(close, lanes(HOLES.reshape(8, 3, -1), MASK.reshape(8, 3, -1)), whole)
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    pooled = jax.pmap(lambda x, w: jbn.moments(x, weights=w, axis_name="i", axis_index_groups=halves), "i")
    parts = jax.tree.map(lambda a: a[np.array([0, 4])], pooled(HOLES.reshape(8, 3, -1), MASK.reshape(8, 3, -1)))
    jax.tree.map(close, jbn.merge(*(jax.tree.map(lambda a, i=i: a[i], parts) for i in range(2)))[:3], whole[:3])


def test_features_that_are_sharded_too():
    data, vectors = P("i", "j"), P("j")

    def local(x, mask, params, state):
        return jbn.batch_norm(x, params, state, train=True, weights=mask, axis_name="i")

    for check_vma in (True, False):
        split = jax.shard_map(
            local,
            mesh=ways.mesh(i=4, j=2),
            in_specs=(data, data, vectors, vectors),
            out_specs=(data, vectors),
            check_vma=check_vma,
        )
        whole = jbn.batch_norm(HOLES, PARAMS, STATE, train=True, weights=MASK)
        jax.tree.map(close, jax.jit(split)(HOLES, MASK, PARAMS, STATE), whole)


@kinds
@pytest.mark.parametrize("interleaved", [False, True])
def test_groups(weights, interleaved):
    y, measured = jbn.normalize_batch(
        np.where(weights > 0, X, np.nan), PARAMS, weights=weights, groups=3, interleaved=interleaved
    )
    for group in range(3):
        cut = slice(group, None, 3) if interleaved else slice(group * 8, (group + 1) * 8)
        close(y[cut], jbn.normalize_batch(np.nan_to_num(X[cut]), PARAMS, weights=weights[cut])[0])
    jax.tree.map(close, measured[:3], jbn.moments(X, weights=weights)[:3])


@kinds
def test_merge_update_and_recalibrate(weights):
    cuts, whole = (slice(0, 5), slice(5, 20), slice(20, ROWS)), reference.moments(X, weights)
    parts = [jbn.moments(X[cut], weights=weights[cut]) for cut in cuts]
    jax.tree.map(close, tuple(jbn.merge(*parts)[:3]), whole)
    with_one_count = jbn.merge(parts[0], jbn.moments(X[cuts[1]]))
    assert with_one_count.count.shape == (FEATURES,)
    total = jbn.empty_moments(STATE)
    for part in parts:
        total = jbn.update(total, part)
    nothing = np.zeros(FEATURES), np.ones(FEATURES), np.zeros(FEATURES)
    exact = reference.update(nothing, (reference.number(weights, X.shape), *whole[1:]), decay=0.0)
    jax.tree.map(close, tuple(jbn.update(STATE, total, decay=0.0)), tuple(exact))

    def apply(params, state, batch):
        return jbn.batch_norm(batch[0], params, state, train=True, weights=batch[1])

    state = jbn.recalibrate(apply, PARAMS, STATE, [(X[cut], weights[cut]) for cut in cuts])
    jax.tree.map(close, tuple(state), tuple(exact))


@kinds
def test_renorm(weights):
    y, after = jbn.batch_renorm(X, PARAMS, STATE, train=True, weights=weights)
    for feature in range(FEATURES):
        one = jax.tree.map(lambda a, feature=feature: a[feature : feature + 1], (PARAMS, STATE))
        alone = jbn.batch_renorm(X[:, feature : feature + 1], *one, train=True, weights=weights[:, feature])
        close(y[:, feature], alone[0][:, 0])
        jax.tree.map(lambda a, b, feature=feature: close(a[feature], b[0]), tuple(after), tuple(alone[1]))


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

    for transform in (jax.grad, jax.hessian):
        got, wanted = (jax.jit(transform(f, (0, 1)))(x, weights) for f in (ours, plain))
        jax.tree.map(partial(assert_allclose, rtol=1e-3, atol=1e-4), got, wanted)  # second derivatives in float32


def test_rows_of_images_and_sequences():
    """Trailing reduced axes may be left out."""
    x, rows = RANDOM.standard_normal((4, 3, 2, FEATURES)).astype(np.float32), np.array([True, False, True, True])
    steps = RANDOM.uniform(size=(4, 3)) < 0.7
    for short, full in ((rows, rows[:, None, None]), (steps, steps[..., None])):
        jax.tree.map(assert_array_equal, jbn.moments(x, weights=short), jbn.moments(x, weights=full))
    first = np.moveaxis(x, -1, 1)
    jax.tree.map(assert_array_equal, jbn.moments(first, feature_axis=1, weights=rows)[0], np.float32(18))
