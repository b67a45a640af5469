"""Every way of splitting a batch gives the outputs, the state and the gradients of the whole."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import ways
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from ways import PARAMS, STATE

import jbn

# One of each kind: where the rows, the features or the members are split, by hand and by the compiler.
KINDS = (
    "one device",
    "vmap",
    "shard_map",
    "explicit, features in shard_map",
    "shard_map unchecked",
    "explicit, features",
    "scan in shard_map",
    "vmap of explicit, rows",
    "automatic, features",
    "explicit, partly manual",
)
CASES = [
    *product(ways.WAYS, [jnp.float32], [True]),
    *product(KINDS, [jnp.float32], [False]),
    *product(KINDS[1::2], [jnp.bfloat16], [True]),
]


def assert_close(got, wanted, tolerance=ways.TOLERANCE):
    jax.tree.map(partial(assert_allclose, rtol=tolerance, atol=tolerance), tuple(got), tuple(wanted))


@pytest.mark.parametrize(("way", "dtype", "masked"), CASES)
def test_the_split_batch_is_the_whole(way, dtype, masked):
    for offset in (0.0, 1e3):
        assert not ways.too_far(ways.compare(way, dtype, masked, offset))


@pytest.mark.parametrize("way", ways.STEPWISE)
def test_a_batch_wholly_masked_changes_nothing(way):
    x, mask, dy = ways.batch(masked=True)
    y, after, dx, dparams = ways.runner(way)(x * np.nan, np.zeros_like(mask), dy, PARAMS, STATE)
    jax.tree.map(assert_array_equal, after, STATE)
    for zero in (y, dx, *dparams):
        assert_array_equal(zero, np.zeros(zero.shape))


@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked"])
def test_real_weights(way):
    x, _, dy = ways.batch()
    weights = np.random.default_rng(1).uniform(0, 2, (*ways.SHAPE[:2], 1)).astype(np.float32)
    weights[:3] = 0
    operands = (x, weights, dy)
    (wanted,) = ways.expected([operands], PARAMS, STATE)
    assert not ways.too_far(ways.differences(ways.runner(way)(*operands, PARAMS, STATE), wanted))


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_value_a_device(check_vma):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32))
    f = jax.shard_map(
        lambda x: jbn.normalize_batch(x, PARAMS, axis_name="i")[0],
        mesh=ways.mesh(i=8),
        in_specs=P("i"),
        out_specs=P("i"),
        check_vma=check_vma,
    )
    _, mean, var = reference.moments(x)
    assert_allclose(jax.jit(f)(x), reference.normalize(x, mean, var, *PARAMS), rtol=1e-5, atol=1e-5)


def first_share(gradients, axis_name):
    """The gradients as they arrive at the first device, everywhere."""
    first = jax.lax.axis_index(axis_name) == 0
    return jax.lax.psum(jax.tree.map(lambda a: jnp.where(first, a, jnp.zeros_like(a)), gradients), axis_name)


@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map unchecked"])
def test_parameter_gradients_that_arrive_as_shares(way):
    """Without a psum they are those of a device's own losses, which are not those of the batch."""
    x, _, dy = operands = ways.batch()
    *_, got = ways.runner(way, line=first_share)(*operands, PARAMS, STATE)
    _, mean, var = reference.moments(x)
    xhat, dy = reference.normalize(x, mean, var, np.ones(3), np.zeros(3)), np.float64(dy)
    xhat, dy = xhat[: len(x) // 8], dy[: len(x) // 8]
    assert_close(got, (np.sum(dy * xhat, (0, 1)), np.sum(dy, (0, 1))))


@pytest.mark.parametrize("way", ["shard_map", "vmap of shard_map"])
def test_parameter_gradients_that_arrive_summed(way):
    """With a psum they are too large by the number of devices."""
    operands = ways.batch()
    *_, got = ways.runner(way, line=ways.psum)(*operands, PARAMS, STATE)
    ((*_, wanted),) = ways.expected([operands], PARAMS, STATE)
    assert_close(jax.tree.map(lambda a: a / 8, got), wanted)


@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map", "shard_map unchecked"])
def test_parameter_gradients_from_outside_arrive_summed(way):
    x, _, dy = ways.batch()

    def local(x, params):
        return jbn.normalize_batch(x, params, axis_name="i")[0]

    if "shard_map" in way:
        f = jax.shard_map(
            local, mesh=ways.mesh(i=8), in_specs=(P("i"), P()), out_specs=P("i"), check_vma=way == "shard_map"
        )
    else:
        f = getattr(jax, way)(local, axis_name="i", in_axes=(0, None))
    shape = x.shape if "shard_map" in way else (8, -1, *x.shape[1:])

    def loss(x, params):
        return jnp.sum(f(x, params) * dy.reshape(shape))

    differentiate = jax.grad(loss, (0, 1))
    dx, dparams = (differentiate if way == "pmap" else jax.jit(differentiate))(x.reshape(shape), PARAMS)
    dx = dx.reshape(x.shape)
    assert_close((dx, *dparams), reference.gradients(x, dy, PARAMS.scale))


@pytest.mark.parametrize(("check_vma", "masked"), [(True, True), (False, False)])
def test_derivatives_of_a_shard_map(check_vma, masked):
    """Forward mode, and second order, taken from outside."""
    x, scale = jnp.asarray(ways.batch()[0]), jnp.asarray(PARAMS.scale)
    mask = ways.batch(masked=True)[1]

    def ours(x, scale):
        def local(x, weights, scale):
            return jbn.normalize_batch(x, jbn.Params(scale, None), weights=weights, axis_name="i")[0]

        split = jax.shard_map(
            local, mesh=ways.mesh(i=8), in_specs=(P("i"), P("i"), P()), out_specs=P("i"), check_vma=check_vma
        )
        return split(x, mask if masked else None, scale)

    def textbook(x, scale):
        return reference.textbook(x, scale, jnp.zeros_like(scale), 1e-5, mask if masked else None, axes=(0, 1))

    def derivatives(f):
        def loss(x, scale):
            return jnp.sum(jnp.sin(f(x, scale)))

        tangents = (jnp.cos(x), jnp.sin(scale))
        first = jax.jvp(f, (x, scale), tangents)
        return first, jax.jvp(jax.grad(loss, (0, 1)), (x, scale), tangents)

    assert_close(jax.jit(lambda: derivatives(ours))(), jax.jit(lambda: derivatives(textbook))(), 1e-4)


def test_features_of_an_explicit_mesh_that_is_set():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 8, 16)).astype(np.float32)
    params, state = jbn.init(16)
    grid = ways.mesh(AxisType.Explicit, i=4, j=2)
    with jax.set_mesh(grid):
        put = lambda tree, spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(grid, spec)), tree)  # noqa: E731
        fields = jbn.State(*put(state[:2], P("j")), put(state.weight, P()))
        y, after, dx, dparams = jax.jit(partial(ways.step, jbn.batch_norm, ways.nothing))(
            put(x, P("i", "j")), None, put(dy, P("i", "j")), put(params, P("j")), fields
        )
    measured = reference.moments(x)
    assert_close((y,), (reference.normalize(x, *measured[1:], *params),))
    assert_close(after, reference.update([np.float64(field) for field in state], measured))
    assert_close((dx, *dparams), reference.gradients(x, dy, params.scale))


def test_a_state_on_no_mesh_and_moments_cut_on_an_explicit_one():
    """As `init` makes a state, before it is put anywhere; and `Moments` that lie like the features they accumulate."""
    x = np.random.default_rng(4).standard_normal((8, 16)).astype(np.float32)
    params, state = jbn.init(16)
    measured = reference.moments(x)
    moved = reference.update([np.float64(field) for field in state], measured)
    grid = ways.mesh(AxisType.Explicit, i=4, j=2)
    with jax.set_mesh(grid):
        cut = jax.device_put(x, NamedSharding(grid, P("i", "j")))
        total = jax.tree.map(lambda field: jax.device_put(field, NamedSharding(grid, P("j"))), jbn.empty_moments(state))
        after = jbn.batch_norm(cut, params, state, train=True)[1]
        after_update = jbn.update(state, jbn.moments(cut))
        total = jbn.batch_norm(cut, params, total, train=True)[1]
    assert_close(after, moved)
    assert_close(after_update, moved)
    assert_close(total[:3], [np.broadcast_to(field, 16) for field in measured])


@cache
def two_steps(normalize):
    def run(x, params, state):
        step = lambda state, _: normalize(x, params, state, train=True)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, length=2)[0]

    return jax.jit(run)


@pytest.mark.parametrize(
    ("of_x", "of_state", "normalize"),
    [
        (P("i", None, "j"), P(), jbn.batch_norm),
        (P("i"), P("j"), jbn.batch_norm),
        (P("i", None, "j"), P("j"), jbn.batch_renorm),
        (P("i"), P(), jbn.batch_renorm),
    ],
)
def test_a_state_keeps_its_own_layout(of_x, of_state, normalize):
    """On an explicit mesh the layout is part of the type: another one could not be carried by a scan."""
    grid = ways.mesh(AxisType.Explicit, i=2, j=3)
    x, *_ = ways.batch()
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(grid, spec))  # noqa: E731
    after = two_steps(normalize)(put(x, of_x), put(PARAMS, P()), put(STATE, of_state))
    assert all(field.sharding.is_equivalent_to(NamedSharding(grid, of_state), 1) for field in after)
    jax.tree.map(partial(assert_allclose, rtol=1e-6, atol=1e-6), after, two_steps(normalize)(x, PARAMS, STATE))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mask_that_differs_along_one_of_two_axes(check_vma):
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(3, 2, (8, 4, 3)).astype(np.float32)
    mask = np.arange(8)[:, None, None] % 3 > 0

    def moments(x, mask):
        return jbn.moments(x, weights=mask, axis_name=("rows", "columns"))

    split = jax.shard_map(
        moments, mesh=mesh, in_specs=(P("rows", "columns"), P("rows")), out_specs=P(), check_vma=check_vma
    )
    found, seen = jax.jit(split)(x, mask), x[mask[:, 0, 0]].astype(float)
    assert_array_equal(found.count, seen.size // 3)
    assert_allclose(found.mean, seen.mean((0, 1)), rtol=1e-5)
    assert_allclose(found.var, seen.var((0, 1)), rtol=1e-5)
