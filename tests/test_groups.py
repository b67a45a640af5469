"""Virtual batches: each group is a batch of its own, and the running statistics are those of all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jbn

ROWS, GROUPS = 24, 4
RANDOM = np.random.default_rng(0)
X = jnp.asarray(3 + RANDOM.standard_normal((ROWS, 3, 5)), jnp.float32)
DY = jnp.asarray(RANDOM.standard_normal(X.shape), jnp.float32)
PARAMS = jbn.Params(jnp.linspace(0.5, 2, 5), jnp.linspace(-1, 1, 5))
MASK = jnp.asarray(RANDOM.uniform(size=(ROWS, 3)) < 0.7)


def parts(array, interleaved):
    """The groups of `array`, cut by plain slices."""
    each = ROWS // GROUPS
    cuts = [slice(g, None, GROUPS) if interleaved else slice(g * each, (g + 1) * each) for g in range(GROUPS)]
    return [array[cut] for cut in cuts], cuts


def step(normalize, x, params, dy):
    y, backward, moments = jax.vjp(normalize, x, params, has_aux=True)
    return y, moments, backward(dy)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mask", [None, MASK, MASK[:, :1], MASK[:1]], ids=["plain", "mask", "by row", "by column"])
def test_each_group_is_a_batch_of_its_own(interleaved, mask):
    options = {"groups": GROUPS, "interleaved": interleaved, "weights": mask}
    run = jax.jit(partial(step, lambda x, params: jbn.normalize_batch(x, params, **options)))
    y, moments, (dx, dparams) = run(X, PARAMS, DY)
    total = jax.tree.map(jnp.zeros_like, PARAMS)
    xs, cuts = parts(X, interleaved)
    for group, cut in zip(xs, cuts, strict=True):
        weights = mask if mask is None or len(mask) == 1 else mask[cut]
        alone = partial(jbn.normalize_batch, weights=weights)
        y_alone, _, (dx_alone, dparams_alone) = step(alone, group, PARAMS, DY[cut])
        # float32; alone, one pass is enough up to a mean of 4 standard deviations, which costs 4 bits
        np.testing.assert_allclose(y[cut], y_alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx[cut], dx_alone, rtol=1e-5, atol=1e-5)
        total = jax.tree.map(jnp.add, total, dparams_alone)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5), dparams, total)
    whole = np.float64(X)[np.broadcast_to(True if mask is None else mask, X.shape[:2])]
    np.testing.assert_allclose(moments.count, len(whole))
    np.testing.assert_allclose(moments.mean, whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.var, whole.var(0), rtol=1e-6)


def test_a_group_without_data_is_an_empty_batch():
    mask = jnp.arange(ROWS)[:, None] >= ROWS // GROUPS  # the first group has nothing
    x = X.at[: ROWS // GROUPS].set(jnp.nan)
    run = partial(step, partial(jbn.normalize_batch, groups=GROUPS, weights=mask))
    y, moments, gradients = run(x, PARAMS, DY)
    assert not y[: ROWS // GROUPS].any() and not gradients[0][: ROWS // GROUPS].any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))
    np.testing.assert_allclose(moments.var, np.float64(X[ROWS // GROUPS :]).var((0, 1)), rtol=1e-6)


def test_the_running_statistics_are_those_of_the_whole_batch():
    _, state = jbn.init(5)
    _, grouped = jbn.batch_norm(X, PARAMS, state, train=True, groups=GROUPS)
    _, whole = jbn.batch_norm(X, PARAMS, state, train=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-6), grouped, whole)
    y, same = jbn.batch_norm(X[:5], PARAMS, state, train=False, groups=GROUPS)  # evaluation has no groups
    assert same is state and y.shape == X[:5].shape


def test_pooled_over_an_axis_group_by_group():
    run = partial(jbn.normalize_batch, groups=2, axis_name="i")
    y, moments = jax.vmap(run, in_axes=(0, None), axis_name="i")(X.reshape(4, 6, 3, 5), PARAMS)
    for group in (slice(0, 3), slice(3, 6)):
        rows = X.reshape(4, 6, 3, 5)[:, group]
        expected, _ = jbn.normalize_batch(rows, PARAMS)
        np.testing.assert_allclose(y[:, group], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.var[0], np.float64(X).var((0, 1)), rtol=5e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("groups", [8, 16])
def test_groups_that_lie_within_shards_communicate_nothing(kind, groups):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(jnp.tile(X, (4, 1, 1))[:64], sharding)
    with jax.set_mesh(mesh):
        normalize = jax.jit(lambda x: jbn.normalize_batch(x, PARAMS, groups=groups)[0])
        program = normalize.lower(x).compile().as_text()
        assert "all-" not in program and "collective" not in program and "reduce-scatter" not in program
        pooled = jax.jit(lambda x: jbn.normalize_batch(x, PARAMS)[0]).lower(x).compile().as_text()
        assert "all-reduce" in pooled
        expected, _ = jbn.normalize_batch(np.asarray(x), PARAMS, groups=groups)
        np.testing.assert_allclose(normalize(x), expected, atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("interleaved", [False, True])
def test_groups_across_shards(kind, interleaved):
    """More shards than groups: rows of one group lie on several devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    options = {"groups": GROUPS, "interleaved": interleaved}
    run = jax.jit(partial(step, lambda x, params: jbn.normalize_batch(x, params, **options)))
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
        found = run(put(X), params, put(DY))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5), found, run(X, PARAMS, DY))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("weights", [None, MASK[:, 0], jnp.asarray(RANDOM.uniform(size=(ROWS, 4)) < 0.7)])
def test_groups_of_sharded_features(kind, weights):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    run = jax.jit(lambda x, weights: jbn.normalize_batch(x, jbn.init(4)[0], groups=GROUPS, weights=weights))
    found = run(*(a if a is None else put_on(mesh, a) for a in (X[:, 0, :4], weights)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, run(X[:, 0, :4], weights))


def put_on(mesh, a):
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*mesh.axis_names[: a.ndim])))


def test_refusals():
    with pytest.raises(ValueError, match=r"groups is 5 and axis 0 of x has size 24; expected a divisor of 24"):
        jbn.normalize_batch(X, PARAMS, groups=5)
    with pytest.raises(ValueError, match=r"groups is 0; expected an int of at least 1"):
        jbn.normalize_batch(X, PARAMS, groups=0)
    with pytest.raises(ValueError, match=r"axis 0 of x \[24, 3, 5\] is a feature axis"):
        jbn.normalize_batch(X, jbn.init((24, 5))[0], groups=2, feature_axis=(0, 2))
    with pytest.raises(ValueError, match=r"one value per feature in each of 24 groups"):
        jbn.normalize_batch(X[:, 0], PARAMS, groups=24)
