"""What batch_norm promises about a running mean as the center: 40 steps of each kind of data, against float64.

The reference knows the rule alone. With doubt = 32 * 2^-24 * (mean - running mean)^2 a feature is unknown where the
doubt is more than 1e-3 of its variance (or than the rounding of x) and, if its running variance has evidence, more than
1e-4 of that. It then starts anew from the batch, whose weight is the usual one times 1e-3 (var - doubt) / doubt.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import ways
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from test_straight import lowered_for

import jbn

STEPS, ROWS, FEATURES = 40, 64, 6
FAR = np.array([0, 0, 0, 1e3, -1e4, 1e5])  # of the mean, in standard deviations
PARAMS, _ = jbn.init(FEATURES)


def ordinary(rng):
    return rng.normal(size=(STEPS, ROWS, FEATURES))


def far(rng):
    """Features far from 0 beside ordinary ones, from the first step."""
    return ordinary(rng) + FAR


def jump(rng):
    x = ordinary(rng)
    x[STEPS // 2 :, :, 3:] += 1e4
    return x


def sometimes_constant(rng):
    x = ordinary(rng)
    x[2::3, :, 3:] = np.array([0, 1, -2])
    return x


def freak(rng):
    x = ordinary(rng)
    x[STEPS // 2, :, 3:] += np.array([1e3, 1e5, -1e7])
    return x


KINDS = {f.__name__: f for f in (ordinary, far, jump, sometimes_constant, freak)}
FORMS = ("plain", "masked", "bfloat16", "pooled", "vmap", "cuda", "tpu")


def steps(x, mask, state, decay, axis_name=None):
    """All steps: y, and the state after each."""

    def one(state, batch):
        x, mask = batch
        y, state = jbn.batch_norm(x, PARAMS, state, train=True, decay=decay, weights=mask, axis_name=axis_name)
        return state, (y, state)

    return jax.lax.scan(one, state, (x, mask))[1]


@cache
def runner(form):
    if form == "pooled":
        rows = P(None, "i")
        split = jax.shard_map(
            lambda *operands: steps(*operands, axis_name="i"),
            mesh=ways.mesh(i=8),
            in_specs=(rows, rows, P(), P()),
            out_specs=(rows, P()),
        )
        return jax.jit(split)
    if form == "vmap":  # of two members, the first with other data
        both = jax.jit(jax.vmap(lambda x, state, decay: steps(x, None, state, decay), (0, None, None)))

        def second(x, mask, state, decay):
            return jax.tree.map(lambda a: a[1], both(jnp.stack([x[::-1], x]), state, decay))

        return second
    if form in ("cuda", "tpu"):
        rows = jax.ShapeDtypeStruct((STEPS, ROWS, FEATURES), jnp.float32)
        operands = rows, None, jbn.init(FEATURES)[1], jax.ShapeDtypeStruct((), jnp.float32)
        return jax.jit(lowered_for(form, steps, *operands))
    return jax.jit(steps)


def expected(x, mask, state, decay):
    """For each step the batch's moments, what rounding may add to the variance, which are unknown, and the state."""
    found, fields = [], [np.float64(field) for field in state]
    for batch, some in zip(x, mask if mask is not None else [None] * STEPS, strict=True):
        count, mean, var = reference.moments(batch, some)
        doubt = 32 * 2.0**-24 * (mean - fields[0]) ** 2
        unknown = (doubt > np.maximum(1e-3 * var, (2.0**-23 * mean) ** 2)) & (
            (fields[2] == 0) | (doubt > 1e-4 * fields[1])
        )
        moved = reference.update(fields, (count, mean, var), decay)
        used = np.maximum(var, doubt) * count / (count - 1)
        certain = (1 - decay) * 1e-3 * np.maximum(var / np.where(unknown, doubt, 1) - 1.001, 0)
        fields = [np.where(unknown, anew, to) for anew, to in zip((mean, used, certain), moved, strict=True)]
        found.append((mean, var, doubt, unknown, fields))
    return map(
        np.array, zip(*[(m, v, d, u, np.stack(np.broadcast_arrays(*f))) for m, v, d, u, f in found], strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_forty_steps(kind, form):
    rng = np.random.default_rng(0)
    data = KINDS[kind](rng).astype(np.float32)
    mask = rng.uniform(size=data.shape[:2]) < 0.7 if form == "masked" else None
    data = jnp.asarray(data, jnp.bfloat16 if form == "bfloat16" else jnp.float32)
    x = np.float64(data)
    given = data if mask is None else jnp.where(mask[..., None], data, jnp.nan)
    for decay in (0.9, 0.999):
        for debias in (True, False):
            state = jbn.init(FEATURES, debias=debias)[1]
            y, after = jax.device_get(runner(form)(given, mask, state, np.float32(decay)))
            check(form, x, mask, np.float64(y), np.float64(np.stack(after, 1)), expected(x, mask, state, decay))


def check(form, x, mask, y, after, wanted):
    mean, var, doubt, unknown, states = wanted
    xhat = (x - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
    if mask is not None:
        xhat = np.where(mask[..., None], xhat, 0)
    assert np.abs(y).max() < 8
    # Half of what the variance may be off by; a constant feature is at 0 but for the rounding of its mean.
    slack = 1e-4 + (doubt / (var + 1e-5))[:, None] + (2**-7 if form == "bfloat16" else 0)
    known = doubt <= 1e-3 * var
    constant = np.where(var < 1e-12, 3e-4 * np.maximum(np.abs(mean), 1), 1e-5)[:, None]
    apart = np.abs(y - xhat) - slack * np.abs(xhat) - constant
    assert np.moveaxis(apart, 1, -1)[known | (var < 1e-12)].max() <= 0
    # The state is that of float64 at every step: the mean but for what x - center loses where that is far, and the
    # variance for what doubt there has been.
    lost = 1e-6 * np.maximum.accumulate(np.sqrt(doubt) * 1e3 * (doubt > 1e-3 * var), 0)
    doubted = np.maximum.accumulate(np.where(unknown, 0, doubt), 0)
    spread = np.sqrt(np.maximum(states[:, 1], 1))
    assert (np.abs(after[:, 0] - states[:, 0]) <= 2e-6 * np.abs(states[:, 0]) + 1e-5 * spread + lost).all()
    assert (
        np.abs(after[:, 1] - states[:, 1]) <= 2e-4 * np.abs(states[:, 1]) + 1.1 * doubted + (2.0**-23 * mean) ** 2
    ).all()
    assert (np.abs(after[:, 2] - states[:, 2]) <= 1e-6 + 3e-4 * states[:, 2]).all()
    # The step after an unknown one, unless that is unknown too, is exact and replaces the state whole.
    renewed = unknown[:-1] & ~unknown[1:]
    assert (np.abs(after[1:, 0] - mean[1:]) <= 2e-7 * np.abs(mean[1:]) + 1e-6 * np.sqrt(var[1:]))[renewed].all()


def test_what_is_unknown_and_when():
    """The reference, said in full for the kinds of data above: which steps start anew."""
    unknown = {}
    for kind, make in KINDS.items():
        x = np.float64(make(np.random.default_rng(0)).astype(np.float32))
        found = [np.argwhere(list(expected(x, None, jbn.init(FEATURES, debias=on)[1], 0.9))[3]) for on in (True, False)]
        unknown[kind] = [{(int(step), int(feature)) for step, feature in each} for each in found]
    half, features = STEPS // 2, (3, 4, 5)
    assert unknown["ordinary"] == unknown["sometimes_constant"] == [set(), set()]
    assert unknown["far"] == [{(0, feature) for feature in features}] * 2
    assert unknown["jump"] == [{(half, feature) for feature in features}] * 2
    assert unknown["freak"] == [{(step, feature) for step in (half, half + 1) for feature in features}] * 2


@pytest.mark.parametrize("kind", ["far", "jump", "freak"])
def test_the_other_features_do_not_notice(kind):
    rng = np.random.default_rng(0)
    data = KINDS[kind](rng).astype(np.float32)
    alone = np.where(np.arange(FEATURES) < 3, data, np.random.default_rng(1).normal(size=data.shape)).astype(np.float32)
    state = jbn.init(FEATURES)[1]
    beside, without = (runner("plain")(x, None, state, np.float32(0.9)) for x in (data, alone))
    jax.tree.map(lambda a, b: assert_array_equal(a[..., :3], b[..., :3]), beside, without)


def test_constant_from_the_first_step():
    """A dead feature, at 0 and elsewhere: bias at every step, and its evidence comes with the second."""
    x = np.zeros((STEPS, ROWS, FEATURES), np.float32) + np.float32([0, 1, -3, 1e3, 1e5, 0])
    y, after = runner("plain")(x, None, jbn.init(FEATURES)[1], np.float32(0.9))
    assert not y.any()
    assert_allclose(after.mean, x[:, 0], rtol=10 * 1.5 * 2**-24)  # of ten steps' weighted means, each rounded thrice
    assert_array_equal(after.weight[0] > 0, x[0, 0] == 0)
    assert (after.weight[1:] > 0).all() and after.var[1:].max() < 1e-9


def test_two_steps_in_one_program():
    """Where the running mean is no array in memory, but an expression that compilers may make again."""
    x = far(np.random.default_rng(0)).astype(np.float32)[:4]

    @jax.jit
    def four(x):
        state, found = jbn.init(FEATURES)[1], []
        for batch in x:
            y, state = jbn.batch_norm(batch, PARAMS, state, train=True)
            found.append(y)
        return jnp.stack(found), state

    y, state = four(x)
    for batch, ours in list(zip(x, y, strict=True))[1:]:
        _, mean, var = reference.moments(batch)
        xhat = reference.normalize(batch, mean, var, np.ones(FEATURES), np.zeros(FEATURES))
        assert np.abs(np.float64(ours) - xhat).max() < 1e-3
    assert np.abs(state.var - 1).max() < 0.5


RATIOS = (5, 15, 22, 25, 50, 100, 200, 400, 700, 1e3, 1e4, 1e5)  # of the mean, in standard deviations
EVIDENCE = {"fresh": jbn.init(len(RATIOS))[1], "known": jbn.init(len(RATIOS), debias=False)[1]}


def first_steps(form):
    """Training and evaluation of the first batch [rows, ratios], the state after it, and that after another."""

    def run(x, again, state, axis_name=None):
        params, _ = jbn.init(len(RATIOS))
        y, after = jbn.batch_norm(x, params, state, train=True, axis_name=axis_name)
        evaluated, _ = jbn.batch_norm(x, params, after, train=False)
        return y, evaluated, after, jbn.batch_norm(again, params, after, train=True, axis_name=axis_name)[1]

    if form == "pooled":
        specs = {"in_specs": (P("i"), P("i"), P()), "out_specs": (P("i"), P("i"), P(), P())}
        return jax.jit(jax.shard_map(lambda *args: run(*args, axis_name="i"), mesh=ways.mesh(i=8), **specs))
    if form in ("cuda", "tpu"):
        rows = jax.ShapeDtypeStruct((4096, len(RATIOS)), jnp.float32)
        return jax.jit(lowered_for(form, run, rows, rows, EVIDENCE["fresh"]))
    return jax.jit(run)


@pytest.mark.parametrize("form", ["plain", "pooled", "cuda", "tpu"])
def test_a_far_first_step_keeps_what_it_knows(form):
    """Evaluation is as training was, whatever the distance, and the state holds what could be measured."""
    rng = np.random.default_rng(0)
    x, again = (rng.normal(size=(2, 4096, len(RATIOS))) * 7 + 7 * np.array(RATIOS)).astype(np.float32)
    run = first_steps(form)
    for name, state in EVIDENCE.items():
        y, evaluated, after, later = jax.device_get(run(x, again, state))
        doubt = 32 * 2.0**-24 * (np.float64(x).mean(0) - np.float64(state.mean)) ** 2
        exact = np.float64(x).var(0, ddof=1)
        far = doubt > 1e-3 * exact
        assert np.abs(y).max() < 8 and np.isfinite(evaluated).all()
        # Unbiased beside biased, 1 / 8192; a known state near enough to be averaged is what it was, by nine tenths.
        restarted = far | (name == "fresh")
        # The square of the distance, 2^-24 of which is doubt / 32, may be rounded in one fusion and not in another:
        # twice that of the variance, half of it of y.
        slack = 2e-3 + np.abs(y) * doubt / np.maximum(exact, doubt) / 32
        assert (np.abs(evaluated - y) <= slack)[:, restarted].all()
        known = restarted & (doubt < exact / 2)
        assert (np.abs(after.var - exact) <= 1e-4 * exact + 0.2 * doubt)[known].all()  # a tenth was seen
        assert_allclose(after.var[doubt > 2 * exact], doubt[doubt > 2 * exact], rtol=1e-3)
        weight = 0.1 * np.minimum(1e-3 * np.maximum(exact / doubt - 1, 0), 1)
        assert_allclose(after.weight[far], weight[far], rtol=0.02, atol=0.1 * 1e-3 * 0.2)
        assert (np.diff(after.weight[restarted]) <= 1e-7).all()  # no cliff: knowledge fades with distance
        measured = (4096, np.float64(again).mean(0), np.float64(again).var(0))
        _, var, _ = reference.update(np.float64(after), measured)
        assert_allclose(later.var[restarted], var[restarted], rtol=1e-3)


def test_a_far_first_step_in_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(512, 1)) + 1e5
        params, state = jbn.init(1, dtype=jnp.float64)
        y, after = jbn.batch_norm(x, params, state, train=True)
        evaluated, _ = jbn.batch_norm(x, params, after, train=False)
        assert_allclose(after.var, x.var(0, ddof=1), rtol=1e-4)
        assert_allclose(evaluated, y, atol=5e-3)
        assert_allclose(after.weight, 0.1)


def test_batches_that_lie_apart_at_every_step():
    """Each is known as well as it could be measured, though none is near the one before."""
    x = (np.random.default_rng(0).normal(size=(6, 4096, 1)) + 50 * np.array([1, -1, 2, -2, 1, -1])[:, None, None]) * 7
    _, state = jbn.init(1)
    for batch in x.astype(np.float32):
        _, state = jbn.batch_norm(batch, jbn.init(1)[0], state, train=True)
        assert_allclose(state.var, 49, rtol=0.1)
        assert_allclose(state.mean, batch.mean(0), rtol=1e-5)
