"""Virtual batches: each group is a batch of its own, and the running statistics are those of all."""

from functools import partial

import jax
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

import jbn

ROWS, GROUPS = 24, 4
RANDOM = np.random.default_rng(0)
X = (3 + RANDOM.standard_normal((ROWS, 3, 5))).astype(np.float32)
DY = RANDOM.standard_normal(X.shape).astype(np.float32)
PARAMS = jbn.Params(np.linspace(0.5, 2, 5, dtype=np.float32), np.linspace(-1, 1, 5, dtype=np.float32))
MASK = RANDOM.uniform(size=(ROWS, 3)) < 0.7
# float32; one pass is enough up to a mean of 4 standard deviations, which costs 4 bits; sums of 72 values of dy
close = partial(assert_allclose, rtol=1e-5, atol=3e-5)


def step(normalize, x, params, dy):
    y, backward, moments = jax.vjp(normalize, x, params, has_aux=True)
    return y, moments, backward(dy)


def cut_into(groups, interleaved):
    each = ROWS // groups
    return [slice(g, None, groups) if interleaved else slice(g * each, (g + 1) * each) for g in range(groups)]


@pytest.mark.parametrize(
    ("interleaved", "mask"),
    [(False, None), (True, None), (False, MASK), (True, MASK), (True, MASK[:, :1]), (False, MASK[:1])],
    ids=["plain", "plain, interleaved", "mask", "mask, interleaved", "by row, interleaved", "by column"],
)
def test_each_group_is_a_batch_of_its_own(interleaved, mask):
    options = {"groups": GROUPS, "interleaved": interleaved, "weights": mask}
    full = np.broadcast_to(True if mask is None else mask, X.shape[:2])
    holes = np.where(full[..., None], X, np.float32(np.nan))
    run = jax.jit(partial(step, lambda x, params: jbn.normalize_batch(x, params, **options)))
    y, moments, (dx, dparams) = jax.device_get(run(holes, PARAMS, DY))
    total = np.zeros((2, 5))
    for cut in cut_into(GROUPS, interleaved):
        valid = full[cut][..., None]
        _, mean, var = reference.moments(X[cut], full[cut])
        close(y[cut], np.where(valid, reference.normalize(X[cut], mean, var, *PARAMS), 0))
        expected = reference.gradients(X[cut], DY[cut], PARAMS.scale, weights=full[cut])
        close(dx[cut], expected[0])
        total += expected[1:]
    close(dparams, total)
    for got, exact in zip(moments[:3], reference.moments(X, full), strict=True):
        assert_allclose(got, exact, rtol=72 * 2**-24)  # sums of as many values


def test_a_group_without_data_is_an_empty_batch():
    empty = ROWS // GROUPS
    mask = np.arange(ROWS)[:, None] >= empty
    x = np.where(mask[..., None], X, np.float32(np.nan))
    run = jax.jit(partial(step, partial(jbn.normalize_batch, groups=GROUPS, weights=mask)))
    y, moments, gradients = jax.device_get(run(x, PARAMS, DY))
    assert not y[:empty].any() and not gradients[0][:empty].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))
    assert_allclose(moments.var, np.float64(X[empty:]).var((0, 1)), rtol=1e-6)


def test_the_running_statistics_are_those_of_the_whole_batch():
    _, state = jbn.init(5)
    _, grouped = jbn.batch_norm(X, PARAMS, state, train=True, groups=GROUPS)
    _, whole = jbn.batch_norm(X, PARAMS, state, train=True)
    jax.tree.map(partial(assert_allclose, rtol=5e-6), grouped, whole)
    y, same = jbn.batch_norm(X[:5], PARAMS, state, train=False, groups=GROUPS)  # evaluation has no groups
    assert same is state and y.shape == X[:5].shape


def test_batch_norm_takes_interleaved_groups():
    y, _ = jbn.batch_norm(X, PARAMS, jbn.init(5)[1], train=True, groups=GROUPS, interleaved=True)
    for cut in cut_into(GROUPS, True):
        close(np.asarray(y)[cut], reference.normalize(X[cut], *reference.moments(X[cut])[1:], *PARAMS))


def test_pooled_over_an_axis_group_by_group():
    run = partial(jbn.normalize_batch, groups=2, axis_name="i")
    lanes = X.reshape(4, 6, 3, 5)
    y, moments = jax.jit(jax.vmap(run, in_axes=(0, None), axis_name="i"))(lanes, PARAMS)
    for group in (slice(0, 3), slice(3, 6)):
        rows = lanes[:, group]
        close(np.asarray(y)[:, group], reference.normalize(rows, *reference.moments(rows)[1:], *PARAMS))
    assert_allclose(np.asarray(moments.var)[0], np.float64(X).var((0, 1)), rtol=5e-6)


@pytest.mark.parametrize(("kind", "groups"), [(AxisType.Auto, 16), (AxisType.Explicit, 8)])
def test_groups_that_lie_within_shards_communicate_nothing(kind, groups):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(np.tile(X, (4, 1, 1))[:64], sharding)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: jbn.normalize_batch(x, PARAMS, groups=groups)[0]).lower(x).compile()
        program = compiled.as_text()
        assert "all-" not in program and "collective" not in program and "reduce-scatter" not in program
        pooled = jax.jit(lambda x: jbn.normalize_batch(x, PARAMS)[0]).lower(x).compile().as_text()
        assert "all-reduce" in pooled
        for rows, y in zip(*(np.split(np.asarray(a), groups) for a in (x, compiled(x))), strict=True):
            close(y, reference.normalize(rows, *reference.moments(rows)[1:], *PARAMS))


@pytest.mark.parametrize(("kind", "interleaved"), [(AxisType.Auto, False), (AxisType.Explicit, True)])
def test_groups_across_shards(kind, interleaved):
    """More shards than groups: rows of one group lie on several devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    options = {"groups": GROUPS, "interleaved": interleaved}
    run = jax.jit(partial(step, lambda x, params: jbn.normalize_batch(x, params, **options)))
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
        found = run(put(X), params, put(DY))
    jax.tree.map(close, found, run(X, PARAMS, DY))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (AxisType.Auto, None),
        (AxisType.Auto, RANDOM.uniform(size=(ROWS, 4)) < 0.7),
        (AxisType.Explicit, MASK[:, 0]),
        (AxisType.Explicit, RANDOM.uniform(size=(ROWS, 4)) < 0.7),
    ],
    ids=["automatic", "automatic, by feature", "explicit, by row", "explicit, by feature"],
)
def test_groups_of_sharded_features(kind, weights):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    x, params = X[:, 0, :4], jbn.init(4)[0]
    run = jax.jit(lambda x, weights: jbn.normalize_batch(x, params, groups=GROUPS, weights=weights))
    found = run(*(a if a is None else put_on(mesh, a) for a in (x, weights)))
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), found, run(x, weights))


def put_on(mesh, a):
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*mesh.axis_names[: a.ndim])))


def test_refusals():
    with pytest.raises(ValueError, match=r"groups is 5 and axis 0 of x has size 24; expected a divisor of 24"):
        jbn.normalize_batch(X, PARAMS, groups=5)
    with pytest.raises(ValueError, match=r"axis 0 of x \[24, 3, 5\] is a feature axis"):
        jbn.normalize_batch(X, jbn.init((24, 5))[0], groups=2, feature_axis=(0, 2))
    with pytest.raises(ValueError, match=r"one value per feature in each of 24 groups"):
        jbn.normalize_batch(X[:, 0], PARAMS, groups=24)
