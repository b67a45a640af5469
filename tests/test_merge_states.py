"""States of several runs as one: by evidence, within plus between."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn

FEATURES = 3


def states(count=3, seed=0, features=FEATURES):
    rng = np.random.default_rng(seed)
    fields = (
        rng.normal(0, 3, (count, features)),
        rng.uniform(0.5, 4, (count, features)),
        rng.uniform(size=(count, features)),
    )
    return [jbn.State(*map(np.float32, each)) for each in zip(*fields, strict=True)]


compiled = jax.jit(jbn.merge_states)
FRESH = jbn.State(np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32), np.zeros(FEATURES, np.float32))


def expected(given, shares):
    """The formula, in float64."""
    mean, var, weight = (np.stack([np.float64(state[field]) for state in given]) for field in range(3))
    shares = np.float64(shares)[:, None] / np.sum(shares)
    evidence = shares * weight
    by = evidence / evidence.sum(0)
    center = (by * mean).sum(0)
    return center, (by * (var + (mean - center) ** 2)).sum(0), evidence.sum(0)


def assert_state(got, wanted):
    jax.tree.map(partial(assert_allclose, rtol=1e-6, atol=1e-6), tuple(got), tuple(wanted))


@pytest.mark.parametrize("shares", [[1, 1, 1], [0.2, 0.5, 0.3], [7.0, 0.0, 1e-3], [0, 0, 2], np.float32([3, 1, 2])])
def test_by_evidence(shares):
    given = states()
    assert_state(jbn.merge_states(*given, shares=shares), expected(given, shares))
    assert_state(compiled(*given, shares=np.float32(shares)), expected(given, shares))


def test_equal_shares_if_none_are_given():
    given = states()
    jax.tree.map(assert_array_equal, jbn.merge_states(*given), jbn.merge_states(*given, shares=[5, 5, 5]))


def test_a_state_of_parts_is_that_of_the_whole():
    x = np.random.default_rng(0).normal(2, 3, (64, FEATURES)).astype(np.float32)
    one = np.ones(FEATURES, np.float32)
    parts = [jbn.State(part.mean(0), part.var(0), one) for part in (x[:10], x[10:])]
    merged = jbn.merge_states(*parts, shares=[10, 54])
    assert_state(merged, (np.float64(x).mean(0), np.float64(x).var(0), np.ones(FEATURES)))


def test_far_from_0():
    """Where a plain weighted mean of float32 would lose the variance between."""
    given = [state._replace(mean=state.mean + 1e5) for state in states()]
    assert_allclose(jbn.merge_states(*given).var, expected(given, [1, 1, 1])[1], rtol=1e-6)


def test_a_state_without_evidence_adds_nothing():
    known, fresh = states(1)[0], FRESH._replace(mean=np.full(FEATURES, 1e3, np.float32))
    merged = jbn.merge_states(fresh, known, shares=[0.9, 0.1])
    assert_state(merged, (known.mean, known.var, 0.1 * known.weight))
    half = fresh._replace(weight=np.float32([0, 0.5, 0]))  # each feature by itself
    merged = jax.device_get(jbn.merge_states(half, known))
    assert_state(jax.tree.map(lambda a: a[::2], merged), jax.tree.map(lambda a: a[::2], (*known[:2], known.weight / 2)))
    assert merged.mean[1] > 100


def test_states_of_which_none_has_evidence():
    other = FRESH._replace(mean=FRESH.mean + 9)
    for first, second in ((FRESH, other), (other, FRESH)):
        jax.tree.map(assert_array_equal, jbn.merge_states(first, second), first)


def test_a_target_network_follows_by_soft_updates():
    """An average of variances and means without evidence would start from 0 and 1, and see a variance of thousands."""
    rng, tau = np.random.default_rng(0), 0.005
    params, online = jbn.init(1)
    target = online

    @jax.jit
    def step(online, target, x):
        online = jbn.batch_norm(x, params, online, train=True, decay=0.99)[1]
        return online, jbn.merge_states(target, online, shares=[1 - tau, tau])

    online, target = step(online, target, rng.normal(100, 1, (256, 1)).astype(np.float32))
    assert (target.weight < 1e-5).all()  # a first batch so far away is next to no evidence of a variance
    for _ in range(100):
        online, target = step(online, target, rng.normal(100, 1, (256, 1)).astype(np.float32))
        assert_allclose(target.mean, 100, rtol=1e-3)
        assert_allclose(target.var, 1, rtol=0.2)
    assert 0 < float(target.weight[0]) < float(online.weight[0]) < 1


def test_networks():
    one, other = ({"a": states(1, seed)[0], "b": [states(1, seed + 9)[0]], "step": seed} for seed in (1, 2))
    merged = jbn.merge_states(one, other, shares=[1, 3])
    assert merged["step"] == 1
    assert_state(merged["b"][0], expected([one["b"][0], other["b"][0]], [1, 3]))
    with pytest.raises(ValueError, match=r"states\[1\] \(dict\) is in another structure"):
        jbn.merge_states(one, {"a": one["a"]})


def test_what_stands_for_arrays():
    listed = jbn.State([0.0, 1, 2], [1, 2, 3])
    arrays = jbn.State(jnp.arange(3.0), jnp.arange(1, 4.0), jnp.ones(3))
    wanted = jbn.merge_states(arrays, states(1)[0])
    jax.tree.map(assert_array_equal, jbn.merge_states(listed, states(1)[0]), wanted)
    number = jbn.merge_states(jbn.State(0.0, 1.0), states(1)[0])
    assert_state(number, jbn.merge_states(jbn.State(jnp.zeros(3), jnp.ones(3), jnp.ones(3)), states(1)[0]))


def test_dtypes_and_gradients():
    one, other = states(2)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, one)
        for given, dtype in (((other, wide), np.float32), ((wide, other), np.float64)):
            assert {field.dtype for field in jax.eval_shape(jbn.merge_states, *given)} == {jnp.dtype(dtype)}
    f = lambda mean, share: jnp.sum(jbn.merge_states(one._replace(mean=mean), other, shares=[share, 1.0]).mean)  # noqa: E731
    assert not any(np.any(gradient) for gradient in jax.jit(jax.grad(f, (0, 1)))(one.mean, 0.5))


@pytest.mark.parametrize("shares", [[1.0], [1, 1, 1], [1, -1], [0, 0], [np.nan, 1], [np.inf, 1], [[1, 1]], 1.0])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match=r"shares is .*; expected 2 real numbers, not negative and not all 0"):
        jbn.merge_states(*states(2), shares=shares)


def test_large_shares():
    """Their sum is infinite in their own type."""
    given = states(5)
    large = np.float32([8e37] * 5)
    traced = jax.jit(lambda shares: jbn.merge_states(*given, shares=shares))(large)
    for got in (jbn.merge_states(*given, shares=large), traced, jbn.merge_states(*given, shares=np.float16([6e4] * 5))):
        assert_state(got, expected(given, [1] * 5))


def test_refusals():
    with pytest.raises(TypeError, match=r"merge_states was given one list of states: pass merge_states\(\*runs\)"):
        jbn.merge_states(states(2))
    with pytest.raises(TypeError, match=r"states\[2\] is 0.5; expected a State. Shares go by name: shares="):
        jbn.merge_states(*states(2), 0.5)
    with pytest.raises(ValueError, match=r"shares is .*; expected 2 real numbers"):
        jbn.merge_states(*states(2), shares=np.ones(2) * 1j)
    with pytest.raises(ValueError, match=r"states\[1\]\['a'\]\[1\].mean has shape \[4\]; expected \[3\]"):
        jbn.merge_states({"a": states(2)}, {"a": [states(1)[0], states(1, features=4)[0]]})
    with pytest.raises(TypeError, match=r"merge_states was given nothing.*merge_states\(\*runs\)"):
        jbn.merge_states()
    with pytest.raises(TypeError, match=r"states\[1\] is a Params without a jbn.State in it; is the order right"):
        jbn.merge_states(states(1)[0], jbn.init(3)[0])
    with pytest.raises(ValueError, match=r"states\[1\].mean has shape \[4\]; expected \[3\]"):
        jbn.merge_states(states(1)[0], states(1, features=4)[0])
