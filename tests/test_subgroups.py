"""Statistics shared within subgroups of an axis: each subgroup is a training of its own."""

from functools import cache, partial

import jax
import numpy as np
import pytest
import reference
import ways
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose
from ways import PARAMS

import jbn

NEIGHBOURS = ((0, 1), (2, 3), (4, 5), (6, 7))
APART = ((3, 0), (7, 4), (1, 6), (2, 5))
STATE = jbn.State(np.float32([1, 2, 3]), np.float32([4, 5, 6]), np.float32([0.5, 0.5, 0.5]))
ROWS = ways.SHAPE[0] // 8
close = partial(assert_allclose, rtol=ways.TOLERANCE, atol=ways.TOLERANCE)


def by_device(tree):
    """The rows of each of 8 devices, along a new leading axis."""
    return jax.tree.map(lambda a: a.reshape(8, ROWS, *a.shape[1:]), tree)


def by_member(rows):
    return rows.reshape(2, ROWS, *rows.shape[1:])


def rows_of(members, tree):
    return jax.tree.map(lambda a: np.concatenate([a[device] for device in members]), by_device(tree))


def on_devices(mode, f):
    """`f` of one device's rows on each of 8, for results with a leading axis of devices."""
    if mode == "pmap":
        return jax.pmap(f, "i")

    def local(*operands):
        return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], operands)))

    return jax.jit(jax.shard_map(local, mesh=ways.mesh(i=8), in_specs=P("i"), out_specs=P("i"), check_vma=False))


@cache
def in_subgroups(mode, subgroups):
    def psum(gradients, axis_name):
        return jax.lax.psum(gradients, axis_name, axis_index_groups=subgroups)

    def step(x, weights, dy, mean):
        normalize = partial(jbn.batch_norm, axis_index_groups=subgroups)
        return ways.step(normalize, psum, x, weights, dy, PARAMS, STATE._replace(mean=mean), axis_name="i")

    return on_devices(mode, step)


@cache
def on_two_devices():
    return ways.in_shard_map(partial(ways.step, jbn.batch_norm, ways.psum), False, i=2)


@pytest.mark.parametrize(
    ("mode", "subgroups", "masked"),
    [("pmap", APART, True), ("shard_map", NEIGHBOURS, True), ("shard_map", APART, False)],
    ids=["pmap, masked", "neighbours, masked", "apart"],
)
def test_two_of_eight_give_what_a_run_of_two_gives(mode, subgroups, masked):
    mask = np.random.default_rng(1).uniform(size=(*ways.SHAPE[:2], 1)) < 0.6
    mask[6:8] = False  # the fourth device has nothing
    for offset in (0.0, 1e3):
        x, _, dy = ways.batch(offset=offset)
        operands, near = (x, mask if masked else None, dy), STATE._replace(mean=np.float32(offset + STATE.mean / 4))
        together = in_subgroups(mode, subgroups)(*by_device(operands), np.tile(near.mean, (8, 1)))
        for members in subgroups:
            part = rows_of(members, operands)
            run_of_two = on_two_devices()(*part, PARAMS, near)
            for y, after, dx, dparams in (run_of_two, *ways.expected([part], PARAMS, near)):
                for place, device in enumerate(members):
                    rows = slice(place * ROWS, (place + 1) * ROWS)
                    got = jax.tree.map(lambda a, device=device: a[device], together)
                    assert not ways.too_far(ways.differences(got, (y[rows], after, dx[rows], dparams)))


def test_every_function_takes_subgroups():
    def every(x):
        options = {"axis_name": "i", "axis_index_groups": APART}
        y, measured = jbn.normalize_batch(x, PARAMS, **options)
        renormalized, after = jbn.batch_renorm(x, PARAMS, STATE, train=True, **options)
        return y, renormalized, measured, jbn.moments(x, **options), after

    x, *_ = ways.batch()
    together = jax.device_get(on_devices("shard_map", every)(by_device(x)))
    for members in APART:
        part = rows_of(members, x)
        count, mean, var = reference.moments(part)
        xhat = reference.normalize(part, mean, var, np.ones(3), np.zeros(3))
        # Ioffe 2017, "Batch Renormalization", with the limits 3 and 5.
        r = np.clip(np.sqrt((var + 1e-5) / (STATE.var + 1e-5)), 1 / 3, 3)
        d = np.clip((mean - STATE.mean) / np.sqrt(STATE.var + 1e-5), -5, 5)
        outputs = by_member(PARAMS.scale * xhat + PARAMS.bias), by_member(PARAMS.scale * (xhat * r + d) + PARAMS.bias)
        state = reference.update([np.float64(field) for field in STATE], (count, mean, var))
        for place, device in enumerate(members):
            *got, measured, again, after = jax.tree.map(lambda a, device=device: a[device], together)
            for a, wanted in zip(got, outputs, strict=True):
                close(a, wanted[place])
            for a, wanted in zip((*measured[:3], *again[:3], *after), (count, mean, var) * 2 + state, strict=True):
                close(a, wanted)


FUNCTIONS = {
    "batch_norm": lambda x, **options: jbn.batch_norm(x, PARAMS, STATE, train=True, **options)[0],
    "batch_renorm": lambda x, **options: jbn.batch_renorm(x, PARAMS, STATE, train=True, **options)[0],
    "normalize_batch": lambda x, **options: jbn.normalize_batch(x, PARAMS, **options)[0],
    "moments": lambda x, **options: jbn.moments(x, **options).mean,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", ["vmap", "shard_map"])
def test_where_jax_has_none_the_error_names_the_alternative(function, mode):
    f = partial(FUNCTIONS[function], axis_name="i", axis_index_groups=NEIGHBOURS)
    if mode == "vmap":
        split = jax.vmap(f, axis_name="i")
    else:
        split = jax.shard_map(f, mesh=ways.mesh(i=8), in_specs=P("i"), out_specs=P("i"))
    with pytest.raises(NotImplementedError, match=r"check_vma=False.*axis 'i' in two.*mesh of 4 x 2.*the inner one"):
        split(by_device(ways.batch()[0]))


@pytest.mark.parametrize("mode", ["vmap", "shard_map"])
def test_the_alternative_gives_the_same(mode):
    def f(x):
        return jbn.normalize_batch(x, PARAMS, axis_name="inner")[0]

    x, *_ = ways.batch()
    if mode == "vmap":
        y = jax.vmap(jax.vmap(f, axis_name="inner"))(x.reshape(4, 2, ROWS, *x.shape[1:])).reshape(x.shape)
    else:
        data = P(("outer", "inner"))
        y = jax.jit(jax.shard_map(f, mesh=ways.mesh(outer=4, inner=2), in_specs=data, out_specs=data))(x)
    for members in NEIGHBOURS:
        part = rows_of(members, x)
        close(rows_of(members, y), reference.normalize(part, *reference.moments(part)[1:], *PARAMS))


@pytest.mark.parametrize(
    ("names", "subgroups", "message"),
    [
        (None, NEIGHBOURS, r"needs one axis_name to cut, and was given \(\)"),
        (("i", "j"), NEIGHBOURS, r"needs one axis_name to cut, and was given \('i', 'j'\)"),
        ("i", [[0, 1], [2, 3], [4, 5]], r"axis 'i' has size 8; expected lists of equal length.*from 0 to 7 once"),
        ("i", [[0, 1, 2, 3], [4, 5, 6, 6]], r"expected lists of equal length that hold every index"),
        ("i", [[0, 1, 2], [3, 4, 5], [6, 7]], r"expected lists of equal length that hold every index"),
        ("i", [[0, 1, 2, 3], [4, 5, 6, 8]], r"expected lists of equal length that hold every index"),
        ("i", [], r"expected lists of equal length that hold every index"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_partition_is_refused(function, names, subgroups, message):
    f = partial(FUNCTIONS[function], axis_name=names, axis_index_groups=subgroups)
    split = jax.shard_map(f, mesh=ways.mesh(i=8, j=1), in_specs=P("i"), out_specs=P("i"), check_vma=False)
    with pytest.raises(ValueError, match=message):
        split(ways.batch()[0])


def test_a_subgroup_has_more_than_one_value():
    x = np.float32(np.arange(24)).reshape(8, 1, 3)
    f = partial(FUNCTIONS["batch_norm"], axis_name="i")
    assert jax.pmap(partial(f, axis_index_groups=NEIGHBOURS), "i")(x).shape == x.shape
    with pytest.raises(ValueError, match="one value per feature"):
        jax.pmap(partial(f, axis_index_groups=[[device] for device in range(8)]), "i")(x)
