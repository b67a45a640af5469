"""A normalizer of streams against float64 NumPy, and against what brax and gymnasium made, tests/golden/streams.npz."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import streams

RNG = np.random.default_rng(0)
X = RNG.normal([0, 10, -3], [1, 0.1, 5], (40, 8, 3)).astype(np.float32)  # steps of eight environments


@partial(jax.jit, static_argnames="weighed")
def _seen(stream, batches, weights, horizon, weighed):
    def step(stream, each):
        x, mask = each
        return streams.observe(stream, x, weights=mask if weighed else None, horizon=horizon), None

    return jax.lax.scan(step, stream, (batches, weights))[0]


def seen(batches, stream=None, weights=None, horizon=np.inf):
    stream = streams.init(batches.shape[-1]) if stream is None else stream
    given = np.ones(batches.shape[:-1], bool) if weights is None else weights
    return _seen(stream, batches, given, horizon, weights is not None)


def right(values, found, rtol=1e-5):
    """`found` are the moments of `values` [..., features], where they are not NaN."""
    flat = np.float64(values).reshape(-1, values.shape[-1])
    assert_array_equal(found.count, np.isfinite(flat).sum(0))
    assert_allclose(found.var, np.nanvar(flat, 0), rtol=rtol)
    mean = np.float64(found.mean) + np.float64(found.mean_low)
    assert_allclose((mean - np.nanmean(flat, 0)) / np.nanstd(flat, 0), np.zeros(flat.shape[1]), atol=1e-5)


def test_it_is_the_mean_and_variance_of_all_that_was_seen():
    stream = seen(X)
    right(X, stream.moments)
    y = streams.normalize(stream, X[-1], clip=2.0)
    flat = np.float64(X).reshape(-1, 3)
    expected = np.clip((X[-1] - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-8), -2, 2)
    assert_allclose(y, expected, atol=2e-5)
    assert np.abs(expected).max() == 2
    assert_allclose(streams.normalize(stream, X[-1], center=False), X[-1] / flat.std(0), rtol=1e-5)


def test_one_row_at_a_time():
    right(X, seen(X.reshape(-1, 1, 3)).moments)


def test_a_mask_of_finished_episodes_and_values_that_are_not_finite():
    mask = RNG.uniform(size=X.shape[:2]) < 0.7
    x = np.where(mask[..., None], X, np.nan)
    x[3, 0, 1], x[5, 2, 2], x[7, 1, 0] = np.nan, np.inf, -np.inf
    stream = seen(x, weights=mask)
    right(np.where(np.isfinite(x), x, np.nan), stream.moments)
    right(np.where(np.isfinite(x), x, np.nan), seen(x).moments)  # also where nothing says so
    assert not np.asarray(streams.normalize(stream, x[3], weights=mask[3]))[~mask[3]].any()
    assert np.isnan(streams.normalize(stream, x[3])[0, 1])  # what is NaN and was not masked is not hidden


def test_before_anything_and_where_nothing_varies():
    fresh = streams.init(3)
    assert_allclose(streams.normalize(fresh, X[0], clip=4.0), np.clip(X[0], -4, 4), rtol=1e-6)
    constant = seen(np.full((3, 8, 1), 7, np.float32))
    assert_array_equal(streams.normalize(constant, jnp.array([[7.0]]), clip=10.0), [[0]])
    nothing = seen(np.full((3, 8, 1), np.nan, np.float32))
    jax.tree.map(assert_array_equal, nothing, streams.init(1))


# Values far from 0 are themselves rounded, to 2^-24 of 1e5: the variance is compared with that of what is given.
@pytest.mark.parametrize("batch", [1, 8, 512])
def test_a_mean_of_100_000_standard_deviations(batch):
    x = np.float32(RNG.normal([1e5, -1e5, 0], 1, (2048, 3))).reshape(-1, batch, 3)
    right(x, seen(x).moments, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 8])
def test_after_a_billion(batch):
    """A float32 count of 2^30 stays where it is when 1 is added, or 8; the values that come are of another kind."""
    before = jbn.Moments(*(np.full(1, value, np.float32) for value in (2**30, 3, 4, 0, 2**30)))
    stream = streams.Stream(before, streams.init(1).recent)
    count = 2**17
    new = np.float32(3e3 + 1e3 * RNG.standard_normal((count, 1)))
    found = seen(new.reshape(-1, batch, 1), stream).moments
    total, wide = 2.0**30 + count, np.float64(new)
    mean = (2.0**30 * 3 + wide.sum()) / total
    var = (2.0**30 * (4 + (3 - mean) ** 2) + ((wide - mean) ** 2).sum()) / total
    assert found.count[0] == total
    assert_allclose(found.mean, mean, rtol=1e-6)
    assert_allclose(found.var, var, rtol=1e-5)
    assert var > 1000  # which was 4


def test_a_horizon():
    """Of batches that are all joined at once: an average that fades by 1 - n / horizon, with what lies between."""
    horizon, n = 64.0, 8
    found = seen(X, horizon=horizon).moments
    count, mean, square = 0.0, np.zeros(3), np.zeros(3)
    for x in np.float64(X):
        kept = min(count, horizon - n)
        count = kept + n
        mean = (kept * mean + x.sum(0)) / count
        square = (kept * square + (x**2).sum(0)) / count
    assert_allclose(found.count, np.full(3, 64.0))
    assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-5)
    assert_allclose(found.var, square - mean**2, rtol=1e-4)


def test_weights_that_are_numbers():
    weights = RNG.uniform(0.5, 3, X.shape[:2]).astype(np.float32)
    found, share = seen(X, weights=weights).moments, np.float64(weights)[..., None] / np.float64(weights).sum()
    mean = (share * X).sum((0, 1))
    assert_allclose(found.mean, mean, rtol=1e-5)
    assert_allclose(found.var, (share * (X - mean) ** 2).sum((0, 1)), rtol=1e-5)
    assert_allclose(found.squares, np.full(3, (np.float64(weights) ** 2).sum()), rtol=1e-5)


def test_a_horizon_follows_a_stream_that_has_moved():
    x = RNG.normal(0, 1, (4000, 8, 1)).astype(np.float32)
    x[2000:] = 50 + 3 * x[2000:]
    short, long = seen(x, horizon=1000.0).moments, seen(x).moments
    assert abs(short.mean[0] - 50) < 0.5 and abs(short.var[0] - 9) < 1
    assert abs(long.mean[0] - 25) < 0.5 and long.var[0] > 600


SPLIT = partial(jax.shard_map, in_specs=(P(), P(None, "data")), out_specs=P())
WAYS = {
    "vmap": lambda run, mesh: jax.vmap(run, (None, 1), None, axis_name="data"),
    "shard_map": lambda run, mesh: SPLIT(run, mesh=mesh),
    "shard_map unchecked": lambda run, mesh: SPLIT(run, mesh=mesh, check_vma=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_over_devices_it_is_that_of_one(way):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = X.copy()
    x[2, 3] = np.nan  # all of a device

    def run(stream, batches):
        def step(stream, x):
            return streams.observe(stream, x, axis_name="data"), None

        return jax.lax.scan(step, stream, batches)[0]

    found = jax.jit(WAYS[way](run, mesh))(streams.init(3), x[:, :, None] if way == "vmap" else x)
    right(x, found.moments)


def test_sharded_under_jit_nothing_is_named():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        stream = seen(jax.device_put(X, jax.sharding.NamedSharding(mesh, P(None, "data"))))
    right(X, stream.moments)


def test_streams_of_several_processes_are_one_by_merge():
    right(X, jbn.merge(seen(X[:10]).moments, seen(X[10:]).moments))


def test_it_is_saved_and_restored(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")  # which a wheel is tested without

    half = seen(X[:20])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stream", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "stream", streams.init(3))
    jax.tree.map(assert_array_equal, seen(X[20:], restored), seen(X[20:], half))


def test_it_carries_no_gradient_and_passes_one_on():
    stream = seen(X)
    dx = jax.grad(lambda x: jnp.sum(streams.normalize(streams.observe(stream, x), x)))(X[0])
    after = streams.observe(stream, X[0]).moments
    assert_allclose(dx, np.broadcast_to(1 / np.sqrt(after.var + 1e-8), (8, 3)), rtol=1e-5)


def golden():
    with np.load(Path(__file__).parent / "golden/streams.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", ["brax", "brax masked"])
def test_brax_made_the_same_of_the_same_stream(name):
    made = golden()
    weights = None
    if name == "brax masked":
        ended = np.concatenate([np.zeros((2, 4), bool), made["terminated"][:-1]])
        weights = ~ended
    stream = seen(made["x"], weights=weights)
    assert_allclose(stream.moments.mean, made[f"{name}/mean"], rtol=1e-5, atol=1e-6)
    assert_allclose(np.sqrt(stream.moments.var), made[f"{name}/std"], rtol=1e-5)
    y = streams.normalize(stream, made["x"][-1], clip=1.0, epsilon=0.0)
    assert_allclose(y, made[f"{name}/y"], rtol=1e-5, atol=1e-5)
    assert np.abs(y).max() == 1


def as_gymnasium_starts(features):
    """Its statistics begin as those of a ten-thousandth of a value, of mean 0 and variance 1."""
    start = jbn.Moments(*(jnp.full(features, value) for value in (1e-4, 0.0, 1.0)))
    return streams.init(features)._replace(total=start)


def test_gymnasium_normalized_the_observations_to_the_same():
    """To float32, in which it keeps them too: outputs up to 10, of variances that begin at a few times 1e-4."""
    made, stream = golden(), as_gymnasium_starts(4)
    for x, expected in zip(made["x"], made["gymnasium/y"], strict=True):
        stream = streams.observe(stream, x)
        assert_allclose(streams.normalize(stream, x), expected, rtol=1e-3, atol=1e-3)
    assert_allclose(streams.normalize(stream, x), expected, rtol=1e-5, atol=1e-5)
    assert_allclose(
        streams.normalize(seen(made["x"]), x), expected, rtol=1e-4, atol=1e-4
    )  # by 244 values, 4e-7 of them


def test_gymnasium_divided_the_rewards_by_the_same():
    """By the spread of a return, which in its last step it takes without what came before."""
    made, stream = golden(), as_gymnasium_starts(1)
    gamma, returns, active = json.loads(str(made["settings"]))["gamma"], np.zeros(4, np.float32), np.ones(4, bool)
    for reward, terminated, expected in zip(made["reward"], made["terminated"], made["gymnasium/reward"], strict=True):
        returns = np.where(active, gamma * returns * ~terminated + reward, returns)
        stream = streams.observe(stream, returns[:, None], weights=active)
        y = streams.normalize(stream, reward[:, None], center=False)[:, 0]
        assert_allclose(y, expected, rtol=1e-4)
        active = ~terminated


def test_in_float64():
    with jax.enable_x64(True):
        x = RNG.normal(1e6, 1, (10, 8, 3))
        stream = streams.init(3, dtype=jnp.float64)
        for each in x:
            stream = streams.observe(stream, each)
        assert stream.moments.var.dtype == "float64"
        assert_allclose(stream.moments.var, x.reshape(-1, 3).var(0), rtol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match=r"horizon is 0\.5; expected a number of at least 1"):
        streams.observe(streams.init(3), X[0], horizon=0.5)
    with pytest.raises(ValueError, match=r"stream\.total\.count has shape \[3\]; expected \[2\]"):
        streams.observe(streams.init(3), X[0][:, :2])
    with pytest.raises(TypeError, match="cast x first"):
        streams.observe(streams.init(3), np.ones((8, 3), int))


def test_a_clip_of_a_wider_type_keeps_the_dtype_and_one_below_0_is_refused():
    x = jnp.full((2, 3), 99, jnp.bfloat16)
    for clip in (10, np.float32(10), jnp.float32(10)):
        y = streams.normalize(streams.init(3), x, clip=clip)
        assert y.dtype == x.dtype
        assert y.tolist() == [[10.0] * 3] * 2
    with pytest.raises(ValueError, match="clip is -1"):
        streams.normalize(streams.init(3), x, clip=-1.0)
