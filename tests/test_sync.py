"""Every way of splitting a batch gives the outputs, the state and the gradients of the whole."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn

SHAPE = (16, 4, 3)
PARAMS = jbn.Params(jnp.asarray([0.5, -1.0, 2.0]), jnp.asarray([0.0, 1.0, -3.0]))
STATE = jbn.State(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([4.0, 5.0, 6.0]), jnp.asarray(0.5))


def step(x, weights, dy, params, state, axis_name=None):
    """A training step: y, the new state, and the gradients of sum(y * dy)."""

    def loss(x, params):
        y, after = jbn.batch_norm(x, params, state, train=True, weights=weights, axis_name=axis_name)
        return jnp.sum(y * dy), (y, after)

    (_, (y, after)), (dx, dparams) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    return y, after, dx, dparams


def mesh(axis_type=AxisType.Auto, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


def over_lanes(transforms, names, lanes):
    """`step` under nested `vmap` or `pmap`, whose parameter gradients are each lane's share."""

    def run(x, weights, dy, params, state):
        def split(a):
            return a.reshape(*lanes, a.shape[0] // 8, *a.shape[1:])

        def first(a):
            return a[(0,) * len(lanes)]

        f = partial(step, axis_name=names if len(names) > 1 else names[0])
        axes = (0, None if weights is None else 0, 0, None, None)
        for transform, name in zip(reversed(transforms), reversed(names), strict=True):
            f = transform(f, axis_name=name, in_axes=axes)
        f = f if jax.pmap in transforms else jax.jit(f)
        y, after, dx, dparams = f(split(x), None if weights is None else split(weights), split(dy), params, state)
        every_lane_agrees(after, len(lanes))
        dparams = jax.tree.map(lambda a: a.sum(tuple(range(len(lanes)))), dparams)
        return y.reshape(x.shape), jax.tree.map(first, after), dx.reshape(x.shape), dparams

    return run


def every_lane_agrees(after, depth):
    for leaf in jax.tree.leaves(after):
        lanes = np.asarray(leaf).reshape(8, *leaf.shape[depth:])
        assert_array_equal(lanes, np.broadcast_to(lanes[0], lanes.shape))


def in_shard_map(check_vma, data, over, **axes):
    """`step` under `shard_map`, with the line that makes parameter gradients global in each mode."""

    def local(x, weights, dy, params, state):
        y, after, dx, dparams = step(x, weights, dy, params, state, over)
        if not check_vma:
            dparams = jax.lax.psum(dparams, over)
        return y, after, dx, dparams

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh(**axes),
            in_specs=(data, data, data, P(), P()),
            out_specs=(data, P(), data, P()),
            check_vma=check_vma,
        )
    )


def vmap_in_shard_map():
    """Unchecked: with `check_vma` on, JAX knows no collective over an axis of `vmap` in there."""

    def local(x, weights, dy, params, state):
        def split(a):
            return a if a is None else a.reshape(2, -1, *a.shape[1:])

        axes = (0, None if weights is None else 0, 0, None, None)
        f = jax.vmap(partial(step, axis_name=("lane", "i")), axes, axis_name="lane")
        y, after, dx, dparams = f(split(x), split(weights), split(dy), params, state)
        dparams = jax.tree.map(lambda a: jax.lax.psum(a.sum(0), "i"), dparams)
        return y.reshape(x.shape), jax.tree.map(lambda a: a[0], after), dx.reshape(x.shape), dparams

    data = P("i")
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh(i=4),
            in_specs=(data, data, data, P(), P()),
            out_specs=(data, P(), data, P()),
            check_vma=False,
        )
    )


def over_sharded_arrays(axis_type, spec):
    def run(x, weights, dy, params, state):
        with jax.set_mesh(mesh(axis_type, i=4, j=2)):
            x, weights, dy = (a if a is None else jax.device_put(a, spec) for a in (x, weights, dy))
            return compiled(x, weights, dy, params, state)

    compiled = jax.jit(step)
    return run


WAYS = {
    "one device": lambda: jax.jit(step),
    "vmap": lambda: over_lanes([jax.vmap], ["i"], (8,)),
    "nested vmap": lambda: over_lanes([jax.vmap, jax.vmap], ("a", "b"), (4, 2)),
    "pmap": lambda: over_lanes([jax.pmap], ["i"], (8,)),
    "vmap in pmap": lambda: over_lanes([jax.pmap, jax.vmap], ("a", "b"), (4, 2)),
    "shard_map": lambda: in_shard_map(True, P("i"), "i", i=8),
    "shard_map unchecked": lambda: in_shard_map(False, P("i"), "i", i=8),
    "shard_map of two axes": lambda: in_shard_map(True, P("a", "b"), ("a", "b"), a=4, b=2),
    "shard_map of two axes unchecked": lambda: in_shard_map(False, P("a", "b"), ("a", "b"), a=4, b=2),
    "vmap in unchecked shard_map": vmap_in_shard_map,
    "automatic sharding": lambda: over_sharded_arrays(AxisType.Auto, P(("i", "j"))),
    "explicit sharding": lambda: over_sharded_arrays(AxisType.Explicit, P("i", "j")),
}
ways = pytest.mark.parametrize("way", WAYS)


@cache
def runner(way):
    return WAYS[way]()


def batch(offset=0.0):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    mask = rng.uniform(size=SHAPE[:2]) < 0.6
    mask[2:4] = False  # one of eight shards has nothing at all
    mask[6:8] = True
    return jnp.asarray(x + np.float32(offset)), jnp.asarray(mask[..., None]), jnp.asarray(dy)


def expected(x, weights, dy):
    """y, state and gradients in float64 NumPy."""
    measured = reference.moments(x, weights)
    y = reference.normalize(x, *measured[1:], *PARAMS)
    y = y if weights is None else np.where(weights, y, 0)
    dx, dscale, dbias = reference.gradients(x, dy, PARAMS.scale, weights=weights)
    return y, jbn.State(*reference.update(np_state(STATE), measured)), dx, jbn.Params(dscale, dbias)


def np_state(state):
    return [np.asarray(field, np.float64) for field in state]


def assert_close(got, wanted, tolerance=2e-5):
    # Outputs and gradients are sums of up to 64 float32 values near 1, with the rounding of each.
    jax.tree.map(partial(assert_allclose, rtol=tolerance, atol=tolerance), tuple(got), tuple(wanted))


@ways
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_split_batch_is_the_whole(way, masked):
    for offset in (0.0, 1e3):
        x, mask, dy = batch(offset)
        weights = mask if masked else None
        assert_close(runner(way)(x, weights, dy, PARAMS, STATE), expected(x, weights, dy))


@ways
def test_a_batch_wholly_masked_changes_nothing(way):
    x, mask, dy = batch()
    y, after, dx, dparams = runner(way)(x * jnp.nan, jnp.zeros_like(mask), dy, PARAMS, STATE)
    jax.tree.map(assert_array_equal, after, STATE)
    for zero in (y, dx, *dparams):
        assert_array_equal(zero, np.zeros(zero.shape))


@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "vmap", "pmap"])
def test_real_weights(way):
    x, _, dy = batch()
    weights = jnp.asarray(np.random.default_rng(1).uniform(0, 2, (*SHAPE[:2], 1)).astype(np.float32)).at[:3].set(0)
    wanted = list(expected(x, weights, dy))
    wanted[0] = np.where(weights > 0, wanted[0], 0)
    assert_close(runner(way)(x, weights, dy, PARAMS, STATE), wanted)


def test_uneven_counts_are_pooled_by_count():
    """Averaging the shards' means gives 2.04 for data like these, where the mean is 1.86."""
    counts = [8, 1, 2, 5]
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(mean, 1, (8, 1)) for mean in (1, 5, 2, 3)]).astype(np.float32)
    mask = np.arange(8) < np.array(counts)[:, None]
    pooled = jax.jit(jax.vmap(lambda x, mask: jbn.moments(x, weights=mask, axis_name="i"), axis_name="i"))(x, mask)
    values = np.float64(x[mask])
    assert_allclose(pooled.count, np.full(4, 16))
    assert_allclose(pooled.mean, np.tile(values.mean(0), (4, 1)), rtol=1e-6)
    assert_allclose(pooled.var, np.tile(values.var(0), (4, 1)), rtol=1e-6)
    of_shards = np.mean([shard[some].mean() for shard, some in zip(x, mask, strict=True)])
    assert abs(of_shards - values.mean()) > 0.1


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_value_a_device(check_vma):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32))
    f = jax.shard_map(
        lambda x: jbn.normalize_batch(x, PARAMS, axis_name="i")[0],
        mesh=mesh(i=8),
        in_specs=P("i"),
        out_specs=P("i"),
        check_vma=check_vma,
    )
    _, mean, var = reference.moments(x)
    assert_allclose(jax.jit(f)(x), reference.normalize(x, mean, var, *PARAMS), rtol=1e-5, atol=1e-5)


def collectives(compiled):
    text = compiled.as_text()
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}


@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "shard_map of two axes"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_one_collective_forward_and_one_backward(way, masked):
    x, mask, dy = batch()
    compiled = runner(way).lower(x, mask if masked else None, dy, PARAMS, STATE).compile()
    found = collectives(compiled)
    assert (found["all-reduce"], sum(found.values())) == (2, 2)


def test_one_collective_forward():
    f = jax.shard_map(
        lambda x: jbn.normalize_batch(x, PARAMS, axis_name="i"),
        mesh=mesh(i=8),
        in_specs=P("i"),
        out_specs=(P("i"), P()),
    )
    found = collectives(jax.jit(f).lower(batch()[0]).compile())
    assert (found["all-reduce"], sum(found.values())) == (1, 1)


@pytest.mark.parametrize("check_vma", [True, False])
def test_evaluation_never_communicates(check_vma):
    f = jax.shard_map(
        lambda x: jbn.batch_norm(x, PARAMS, STATE, train=False, axis_name="i")[0],
        mesh=mesh(i=8),
        in_specs=P("i"),
        out_specs=P("i"),
        check_vma=check_vma,
    )
    assert not any(collectives(jax.jit(f).lower(batch()[0]).compile()).values())


@pytest.mark.parametrize("check_vma", [True, False])
def test_parameter_gradients_inside_shard_map(check_vma):
    """Summed already where `check_vma` is on, so that a pmean is a mistake; each device's own share where it is off."""
    x, _, dy = batch()

    def local(x, dy, params):
        return jax.tree.map(lambda a: a[None], step(x, None, dy, params, STATE, "i")[3])

    each = jax.jit(
        jax.shard_map(local, mesh=mesh(i=8), in_specs=(P("i"), P("i"), P()), out_specs=P("i"), check_vma=check_vma)
    )(x, dy, PARAMS)
    *_, wanted = expected(x, None, dy)
    got = jax.tree.map((lambda a: a[3]) if check_vma else (lambda a: a.sum(0)), each)
    assert_close(got, wanted)


@pytest.mark.parametrize("check_vma", [True, False])
def test_scan_inside_shard_map(check_vma):
    rng = np.random.default_rng(2)
    x, dy = jnp.asarray(rng.standard_normal((2, 3, *SHAPE)).astype(np.float32))
    masks = jnp.asarray(rng.uniform(size=(3, *SHAPE[:2], 1)) < 0.6)

    def train(x, masks, dy, params, state):
        def one(state, part):
            y, after, dx, dparams = step(*part, params, state, "i")
            return after, (y, dx, dparams if check_vma else jax.lax.psum(dparams, "i"))

        return jax.lax.scan(one, state, (x, masks, dy))

    data = P(None, "i")
    split = jax.shard_map(
        train,
        mesh=mesh(i=8),
        in_specs=(data, data, data, P(), P()),
        out_specs=(P(), (data, data, P())),
        check_vma=check_vma,
    )
    after, rest = jax.jit(split)(x, masks, dy, PARAMS, STATE)
    state, each = np_state(STATE), []
    for part in zip(x, masks, dy, strict=True):
        y, _, dx, dparams = expected(*part)
        state = reference.update(state, reference.moments(*part[:2]))
        each.append((y, dx, dparams))
    assert_close(after, state)
    assert_close(rest, jax.tree.map(lambda *a: np.stack(a), *each))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_derivatives_of_a_shard_map(check_vma, masked):
    """Forward mode, and second order, taken from outside."""
    x, mask, _ = batch()

    def ours(x, scale):
        def local(x, weights, scale):
            return jbn.normalize_batch(x, jbn.Params(scale, None), weights=weights, axis_name="i")[0]

        split = jax.shard_map(
            local, mesh=mesh(i=8), in_specs=(P("i"), P("i"), P()), out_specs=P("i"), check_vma=check_vma
        )
        return split(x, mask if masked else None, scale)

    def textbook(x, scale):
        return reference.textbook(x, scale, jnp.zeros_like(scale), 1e-5, mask if masked else None, axes=(0, 1))

    def derivatives(f):
        def loss(x, scale):
            return jnp.sum(jnp.sin(f(x, scale)))

        tangents = (jnp.cos(x), jnp.sin(PARAMS.scale))
        first = jax.jvp(f, (x, PARAMS.scale), tangents)
        return first, jax.jvp(jax.grad(loss, (0, 1)), (x, PARAMS.scale), tangents)

    assert_close(jax.jit(lambda: derivatives(ours))(), jax.jit(lambda: derivatives(textbook))(), 1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_features(axis_type):
    rng = np.random.default_rng(3)
    x, dy = jnp.asarray(rng.standard_normal((2, 8, 16)).astype(np.float32))
    params, state = jbn.init(16)
    grid = mesh(axis_type, i=4, j=2)
    with jax.set_mesh(grid):
        put = lambda tree, spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(grid, spec)), tree)  # noqa: E731
        fields = jbn.State(*put(state[:2], P("j")), put(state.weight, P()))
        y, after, dx, dparams = jax.jit(step)(
            put(x, P("i", "j")), None, put(dy, P("i", "j")), put(params, P("j")), fields
        )
    measured = reference.moments(x)
    assert_close((y,), (reference.normalize(x, *measured[1:], *params),))
    assert_close(after, reference.update(np_state(state), measured))
    assert_close((dx, *dparams), reference.gradients(x, dy, params.scale))
