"""What is communicated: one sum forward and one backward, of a size that does not grow with the devices."""

from functools import partial

import hlo
import jax
import numpy as np
import pytest
import ways
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn

FEATURES = 16
PARAMS, STATE = jbn.init(FEATURES)
X, DY = np.random.default_rng(0).standard_normal((2, 64, 32, FEATURES)).astype(np.float32)
MASK = X[..., :1] > 0
FORWARD = 2 * FEATURES + 1  # the count, and the sums of x - center and of its square
# Checked: the gradients of scale and bias, which are all that dx needs. Else: of the moments but for their count, and
# what the user sums.
BACKWARD = {True: 2 * FEATURES, False: 4 * FEATURES}
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])  # elsewhere one of the two


def collectives(compiled):
    """(kind, how many float32 numbers, where) of each collective of a program."""
    return [(found.kind, found.bytes // 4, found.place) for found in hlo.collectives(compiled.as_text())]


def assert_messages(found, numbers):
    """One forward and one backward. With dy given, as here, XLA may send some of the backward one with the first."""
    assert {(kind, place) for kind, _, place in found} == {("all-reduce", hlo.ONCE)} and len(found) <= 2
    assert sum(size for _, size, _ in found) == numbers


def training(way, mask):
    return collectives(ways.runner(way).lower(X, mask, DY, PARAMS, STATE).compile())


@pytest.mark.parametrize(("devices", "check_vma"), [(2, True), (8, False)])
@masks
def test_shard_map(devices, check_vma, mask):
    step = partial(ways.step, jbn.batch_norm, ways.nothing if check_vma else ways.psum)
    found = collectives(ways.in_shard_map(step, check_vma, i=devices).lower(X, mask, DY, PARAMS, STATE).compile())
    assert_messages(found, FORWARD + BACKWARD[check_vma])


@pytest.mark.parametrize(
    ("way", "mask"),
    [
        ("shard_map of two axes", MASK),
        ("shard_map of two axes unchecked", None),
        ("vmap in unchecked shard_map", MASK),
    ],
    ids=["two axes", "unchecked", "vmap"],
)
def test_several_axes_are_summed_at_once(way, mask):
    assert_messages(training(way, mask), FORWARD + BACKWARD[way == "shard_map of two axes"])


def test_pmap():
    parts = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), (X, MASK, DY))
    step = jax.pmap(partial(ways.step, jbn.batch_norm, ways.psum, axis_name="i"), "i", in_axes=(0, 0, 0, None, None))
    found = collectives(step.lower(*parts, PARAMS, STATE).compile())
    assert found == [("all-reduce", FORWARD, hlo.ONCE), ("all-reduce", BACKWARD[False], hlo.ONCE)]


def test_vmap_of_shard_map_sums_all_members_at_once():
    assert_messages(training("vmap of shard_map", MASK), 2 * (FORWARD + BACKWARD[True]))


def test_scan_in_shard_map():
    stacked = jax.tree.map(lambda a: a[None], (X, None, DY))
    found = collectives(ways.runner("scan in shard_map").lower(stacked, PARAMS, STATE).compile())
    assert_messages(found, FORWARD + BACKWARD[True])


@pytest.mark.parametrize("way", ["automatic", "explicit"])
@masks
def test_sharded_arrays(way, mask):
    assert_messages(training(way, mask), 4 * FEATURES + (mask is not None))  # without a mask the count is known


@pytest.mark.parametrize(("kind", "mask"), [("automatic", MASK), ("explicit", None)], ids=["automatic", "explicit"])
def test_sharded_features(kind, mask):
    """Along the rows alone: each device sends what it has of the features."""
    x, dy, (params, state) = X[..., :12], DY[..., :12], jax.tree.map(lambda a: a[:12], (PARAMS, STATE))

    def of(way):
        return collectives(ways.runner(f"{kind}, {way}").lower(x, mask, dy, params, state).compile())

    assert_messages(of("features"), 4 * 4 + (mask is not None))
    assert_messages(of("features in shard_map"), 4 * 4 + 1)
    if kind == "automatic":
        assert_messages(of("partly manual"), 4 * 4 + 1)
    # A state and gradients that are asked for whole are gathered: at most five vectors.
    names = [name for name, *_ in of("features, replicated state")]
    assert names.count("all-reduce") <= 2 and names.count("all-gather") == len(names) - names.count("all-reduce") <= 5


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mask_of_each_feature_sends_a_count_of_each(check_vma):
    mask = X > 0
    step = partial(ways.step, jbn.batch_norm, ways.nothing if check_vma else ways.psum)
    found = collectives(ways.in_shard_map(step, check_vma, i=8).lower(X, mask, DY, PARAMS, STATE).compile())
    assert_messages(found, 3 * FEATURES + (2 if check_vma else 4) * FEATURES)


@pytest.mark.parametrize("check_vma", [True, False])
def test_without_a_center_there_are_two_messages_forward(check_vma):
    split = jax.shard_map(
        lambda x: jbn.moments(x, axis_name="i"),
        mesh=ways.mesh(i=8),
        in_specs=P("i"),
        out_specs=P(),
        check_vma=check_vma,
    )
    found = collectives(jax.jit(split).lower(X).compile())
    assert found == [("all-reduce", FEATURES + 1, hlo.ONCE), ("all-reduce", 2 * FEATURES, hlo.ONCE)]


def test_centers_that_types_show_to_differ_are_averaged_first():
    def local(x, means):
        y, state = jbn.batch_norm(x, PARAMS, STATE._replace(mean=means[0]), train=True, axis_name="i")
        return y, state.var[None]

    split = jax.jit(jax.shard_map(local, mesh=ways.mesh(i=8), in_specs=P("i"), out_specs=P("i")))
    means = np.linspace(-2, 2, 8)[:, None] + np.zeros(FEATURES)
    found = collectives(split.lower(X, np.float32(means)).compile())
    assert found == [("all-reduce", FEATURES, hlo.ONCE), ("all-reduce", FORWARD, hlo.ONCE)]
    y, var = split(X, np.float32(means))
    assert_allclose(var, np.tile(np.float64(X).var((0, 1), ddof=1), (8, 1)), rtol=1e-5)
    assert_allclose(y, jbn.normalize_batch(X, PARAMS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["one device", "vmap"])
def test_one_device_communicates_nothing(way):
    assert not training(way, MASK)


def evaluate(*operands, train, **options):
    return jbn.batch_norm(*operands, train=False, **options)


def of_x_alone(gradients, axis_name):
    """The gradients of params are sums over the batch in evaluation too."""


# One of each kind. Where states are replicated their user wants them gathered, and where an explicit mesh is partly
# manual JAX gathers at its edge.
SILENT = (
    "shard_map",
    "shard_map unchecked",
    "vmap of shard_map",
    "automatic",
    "automatic, features",
    "automatic, partly manual",
    "explicit",
    "explicit, features",
    "vmap of explicit, rows",
)


@pytest.mark.parametrize("way", SILENT)
def test_evaluation_communicates_nothing(way):
    operands = jax.tree.map(lambda a: a[..., : min(a.shape[-1], 12)], (X, MASK, DY, PARAMS, STATE))
    assert not collectives(ways.runner(way, evaluate, of_x_alone).lower(*operands).compile())


def test_evaluation_in_pmap_communicates_nothing():
    evaluation = jax.pmap(partial(evaluate, train=True, axis_name="i"), "i", in_axes=(0, None, None))
    assert not collectives(evaluation.lower(X.reshape(8, -1, FEATURES), PARAMS, STATE).compile())
