"""What is communicated: one sum forward and one backward, of a size that does not grow with the devices."""

from functools import partial

import hlo
import jax
import numpy as np
import pytest
import ways
from jax.sharding import PartitionSpec as P

import jbn

FEATURES = 16
PARAMS, STATE = jbn.init(FEATURES)
X, DY = np.random.default_rng(0).standard_normal((2, 16, 4, FEATURES)).astype(np.float32)
MASK = X[..., :1] > 0
FORWARD = 2 * FEATURES + 1  # the count, and the sums of x and of x^2
# Checked: the gradients of scale and bias, which are all that dx needs. Else: of the moments, and what the user sums.
BACKWARD = {True: 2 * FEATURES, False: FORWARD + 2 * FEATURES}
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])


def collectives(compiled):
    """(kind, how many float32 numbers, where) of each collective of a program."""
    return [(found.kind, found.bytes // 4, found.place) for found in hlo.collectives(compiled.as_text())]


def training(way, mask):
    return collectives(ways.runner(way).lower(X, mask, DY, PARAMS, STATE).compile())


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("check_vma", [True, False])
@masks
def test_shard_map(devices, check_vma, mask):
    step = partial(ways.step, jbn.batch_norm, ways.nothing if check_vma else ways.psum)
    found = collectives(ways.in_shard_map(step, check_vma, i=devices).lower(X, mask, DY, PARAMS, STATE).compile())
    assert found == [("all-reduce", FORWARD, hlo.LOOP), ("all-reduce", BACKWARD[check_vma], hlo.ONCE)]


@pytest.mark.parametrize(
    "way", ["shard_map of two axes", "shard_map of two axes unchecked", "vmap in unchecked shard_map"]
)
@masks
def test_several_axes_are_summed_at_once(way, mask):
    backward = BACKWARD[way == "shard_map of two axes"]
    assert training(way, mask) == [("all-reduce", FORWARD, hlo.LOOP), ("all-reduce", backward, hlo.ONCE)]


@masks
def test_pmap(mask):
    parts = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), (X, mask, DY))
    step = jax.pmap(partial(ways.step, jbn.batch_norm, ways.psum, axis_name="i"), "i", in_axes=(0, 0, 0, None, None))
    found = collectives(step.lower(*parts, PARAMS, STATE).compile())
    assert found == [("all-reduce", FORWARD, hlo.LOOP), ("all-reduce", BACKWARD[False], hlo.ONCE)]


@masks
def test_vmap_of_shard_map_sums_all_members_at_once(mask):
    assert training("vmap of shard_map", mask) == [
        ("all-reduce", 2 * FORWARD, hlo.LOOP),
        ("all-reduce", 4 * FEATURES, hlo.ONCE),
    ]


@masks
def test_scan_in_shard_map(mask):
    stacked = jax.tree.map(lambda a: a[None], (X, mask, DY))
    found = collectives(ways.runner("scan in shard_map").lower(stacked, PARAMS, STATE).compile())
    assert sorted(size for _, size, _ in found) == [2 * FEATURES, FORWARD]


@pytest.mark.parametrize("way", ["automatic", "explicit"])
@masks
def test_sharded_arrays(way, mask):
    """One forward, one backward, and one in each branch that sums again where the mean is far from 0.

    Without a mask the sums of the backward pass do not wait for the mean: as dy is given here, all are in one message.
    """
    found = training(way, mask)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    branches, messages, vectors = (2, 1, 8) if mask is None else (1, 2, 6)
    assert sorted(place for *_, place in found) == [hlo.BRANCH] * branches + [hlo.ONCE] * messages
    assert sum(size for _, size, _ in found) <= vectors * FEATURES + 1


@pytest.mark.parametrize("way", ["one device", "vmap", "nested vmap"])
@masks
def test_one_device_communicates_nothing(way, mask):
    assert not training(way, mask)


def evaluate(*operands, train, **options):
    return jbn.batch_norm(*operands, train=False, **options)


def of_x_alone(gradients, axis_name):
    """The gradients of params are sums over the batch in evaluation too."""


@pytest.mark.parametrize("way", [way for way in ways.STEPWISE if "pmap" not in way])
def test_evaluation_communicates_nothing(way):
    step = ways.runner(way, evaluate, of_x_alone)
    assert not collectives(step.lower(X, MASK, DY, PARAMS, STATE).compile())


def test_evaluation_in_pmap_communicates_nothing():
    evaluation = jax.pmap(partial(evaluate, train=True, axis_name="i"), "i", in_axes=(0, None, None))
    assert not collectives(evaluation.lower(X.reshape(8, -1, FEATURES), PARAMS, STATE).compile())


@pytest.fixture
def rounds(monkeypatch):
    """One entry for each device and each round of a loop that really ran."""
    ran, while_loop = [], jax.lax.while_loop

    def counted(condition, body, start):
        def one(carry):
            jax.debug.callback(lambda: ran.append(None))
            return body(carry)

        return while_loop(condition, one, start)

    jax.clear_caches()  # what was traced before is not counted
    monkeypatch.setattr(jax.lax, "while_loop", counted)
    yield ran
    jax.clear_caches()


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_second_round_only_where_a_mean_is_far_from_0(check_vma, rounds):
    """Beyond 4 standard deviations, in any feature."""
    split = jax.shard_map(
        lambda x: jbn.moments(x, axis_name="i"),
        mesh=ways.mesh(i=8),
        in_specs=P("i"),
        out_specs=P(),
        check_vma=check_vma,
    )
    one_far, constant = np.zeros(FEATURES, np.float32), X * 0
    one_far[-1] = 8
    for x, wanted in [(X, 1), (X - 2, 1), (X + one_far, 2), (X - 1e3, 2), (constant, 1), (constant + 1, 2)]:
        rounds.clear()
        jax.block_until_ready(jax.jit(split)(np.float32(x)))
        jax.effects_barrier()
        assert len(rounds) == 8 * wanted


@pytest.mark.parametrize("check_vma", [True, False])
def test_pools_beside_each_other_always_take_two_rounds(check_vma, rounds):
    """Where one went round again and another did not, some hardware would wait for ever."""
    split = jax.shard_map(
        lambda x: jbn.moments(x, axis_name="member").mean[None],
        mesh=ways.mesh(pair=4, member=2),
        in_specs=P(("pair", "member")),
        out_specs=P("pair"),
        check_vma=check_vma,
    )
    jax.block_until_ready(jax.jit(split)(X))
    jax.effects_barrier()
    assert len(rounds) == 8 * 2


def test_subgroups_always_take_two_rounds(rounds):
    """As pools beside each other do."""
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    pooled = jax.pmap(lambda x: jbn.moments(x, axis_name="i", axis_index_groups=halves), "i")
    jax.block_until_ready(pooled(X.reshape(8, -1, FEATURES)))
    jax.effects_barrier()
    assert len(rounds) == 8 * 2
