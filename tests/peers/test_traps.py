"""Faults of released libraries, each with the wrong number there and the right one here."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

import jbn

MASK = np.array([True, True, False, True])


def normal(mean, shape=(512, 64), dtype=np.float32):
    return (mean + np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def standardized(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(0)) / x.std(0)


def flax_step(x, running=None, mask=None, **options):
    layer = nn.BatchNorm(use_running_average=False, momentum=0.9, **options)
    variables = layer.init(jax.random.key(0), x)
    variables = variables if running is None else {**variables, "batch_stats": running}
    y, after = layer.apply(variables, x, mask=mask, mutable="batch_stats")
    return y, after["batch_stats"]


def haiku_layer(decay_rate=0.9):
    layer = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, decay_rate)(x, train))
    )
    return layer, lambda x: layer.init(None, x, True)


def largest_error(y, x):
    """Infinite where `y` holds NaN."""
    return np.nan_to_num(np.abs(np.asarray(y, np.float64) - standardized(x)), nan=np.inf).max()


def jbn_step(x, weights=None, state=None, **options):
    params, fresh = jbn.init(x.shape[-1])
    return jbn.batch_norm(x, params, fresh if state is None else state, train=True, weights=weights, **options)


def jbn_errors(x, **options):
    """The largest error of the second step of a training on such data, and of a first step without a center."""
    state = jbn_step((x + 1).astype(x.dtype))[1]
    params, _ = jbn.init(x.shape[-1])
    outputs = jbn_step(x, state=state, **options)[0], jbn.normalize_batch(x, params, **options)[0]
    return max(largest_error(y, x) for y in outputs)


@pytest.mark.parametrize(("mean", "wrong"), [(1e3, 0.02), (3e3, 1.0), (1e4, 100.0)])
def test_flax_fast_variance(mean, wrong):
    x = normal(mean)
    y, _ = flax_step(x)
    assert largest_error(y, x) > wrong
    assert jbn_errors(x) < 1e-4
    assert np.abs(jbn_step(x)[0]).max() < 8  # a first step about 0, which is far: bounded


def test_haiku_fast_variance():
    x = normal(1e4)
    layer, init = haiku_layer()
    y, _ = layer.apply(*init(x), x, True)
    assert np.isnan(y).mean() > 0.1
    assert jbn_errors(x) < 1e-4


def test_haiku_float16():
    x = normal(300, dtype=np.float16)
    layer, init = haiku_layer()
    y, _ = layer.apply(*init(x), x, True)
    assert not np.isfinite(y).all()
    # What remains is the rounding of y to float16.
    assert jbn_errors(x) < 4e-3


def test_flax_masked_means_over_devices():
    counts = np.array([8, 1, 2, 5])
    x = np.stack([normal(mean, (8, 1)) for mean in (1, 5, 2, 3)])
    mask = np.arange(8) < counts[:, None]
    layer = nn.BatchNorm(use_running_average=False, axis_name="i", momentum=0.0, use_fast_variance=False)
    variables = layer.init(jax.random.key(0), x[0])

    def theirs(x, mask):
        return layer.apply(variables, x, mask=mask[:, None], mutable="batch_stats")[1]["batch_stats"]["mean"]

    def ours(x, mask):
        return jbn.moments(x, weights=mask, axis_name="i").mean

    over_devices = lambda f, mask: jax.vmap(f, axis_name="i")(x, mask)[0, 0]  # noqa: E731
    mean = x[mask].mean()
    assert abs(over_devices(theirs, mask) - mean) > 0.2
    assert abs(over_devices(ours, mask) - mean) < 1e-6
    mask[1] = False
    assert np.isnan(over_devices(theirs, mask))
    assert abs(over_devices(ours, mask) - x[mask].mean()) < 1e-6


def test_all_masked():
    x, nothing = normal(5, (4, 3)), np.zeros(4, bool)
    running = {"mean": jnp.full(3, 5.0), "var": jnp.ones(3)}
    _, after = flax_step(x, running, nothing[:, None])
    assert np.isnan(after["mean"]).all()

    layer = keras.layers.BatchNormalization(momentum=0.9)
    layer.build(x.shape)
    layer.moving_mean.assign(running["mean"])
    layer(x, training=True, mask=nothing)
    assert np.abs(np.asarray(layer.moving_mean) - 4.5).max() < 1e-5

    state = jbn.State(running["mean"], running["var"], jnp.ones(()))
    _, after = jbn_step(x, nothing, state)
    assert (after.mean == 5).all()


def test_nan_in_a_masked_slot():
    x = normal(0, (4, 3))
    x[~MASK] = np.nan
    theirs = jax.grad(lambda x: jnp.where(MASK[:, None], flax_step(x, mask=MASK[:, None])[0] ** 3, 0).sum())(x)
    ours = jax.grad(lambda x: (jbn_step(x, MASK)[0] ** 3).sum())(x)
    assert np.isnan(theirs[MASK]).all()
    assert np.isfinite(ours).all()


def test_equinox_divides_what_had_started_at_1():
    layer, theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", momentum=0.99, mode="batch")
    x = 2 * normal(0, (512, 1))
    _, theirs = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, theirs)
    _, hidden_var = theirs.get(layer.batch_state_index)
    assert hidden_var / (1 - 0.99) > 20 * x.var()
    y, _ = jax.vmap(eqx.nn.inference_mode(layer), axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, theirs)
    assert y.std() < 0.3
    _, state = jbn_step(x, decay=0.99, unbiased=False)
    y, _ = jbn.batch_norm(x, jbn.init(1)[0], state, train=False)
    assert abs(y.std() - 1) < 1e-4


def test_equinox_evaluation_before_training():
    layer, theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="ema", inference=True)
    x = 2 * normal(0, (512, 1))
    y, _ = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, theirs)
    assert not y.std() < 100
    y, _ = jbn.batch_norm(x, *jbn.init(1), train=False)
    np.testing.assert_allclose(y, x, rtol=1e-5)


def test_haiku_decay_rounded_in_bfloat16():
    x = jnp.asarray(normal(0, (16, 3)), jnp.bfloat16)
    layer, init = haiku_layer(0.999)
    params, theirs = init(x)
    _, theirs = layer.apply(params, theirs, x, True)
    assert np.isnan(theirs["batch_norm/~/mean_ema"]["average"]).all()
    _, state = jbn_step(x, decay=0.999)
    np.testing.assert_allclose(state.mean, np.float64(x).mean(0), rtol=1e-5, atol=1e-7)


def test_nnx_evaluation_in_bfloat16():
    x = jnp.asarray(100.3 + 0.1 * normal(0, (512, 1)), jnp.bfloat16)
    layer = nnx.BatchNorm(1, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = jnp.asarray([100.3]), jnp.asarray([0.01])
    expected = (np.float64(x) - 100.3) / np.sqrt(0.01 + 1e-5)
    params, state = jbn.init(1)
    y = jbn.normalize_running(x, params, state._replace(mean=jnp.asarray([100.3]), var=jnp.asarray([0.01])))
    assert np.abs(np.float64(layer(x)) - expected).max() > 1
    assert np.abs(np.float64(y) - expected).max() < 0.02


def test_flax_dtypes():
    x = normal(0, (16, 3))
    y, _ = flax_step(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.float32
    assert jbn_step(jnp.asarray(x, jnp.bfloat16))[0].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        running = {"mean": jnp.zeros(3, jnp.float32), "var": jnp.ones(3, jnp.float32)}
        _, after = flax_step(jnp.asarray(x, jnp.float64), running)
        assert after["mean"].dtype == jnp.float64
        assert jbn_step(jnp.asarray(x, jnp.float64))[1].mean.dtype == jnp.float32


def test_keras_multiplies_before_it_subtracts():
    x = normal(1e4, (512, 4))
    layer = keras.layers.BatchNormalization(epsilon=1e-7)
    error = largest_error(layer(x, training=True), x)
    assert 3e-4 < error < 1
    assert jbn_errors(x, epsilon=0.0) < 1e-5


def test_a_bad_batch():
    x = normal(0, (16, 3))
    x[0] = np.nan
    assert np.isnan(flax_step(x)[1]["mean"]).all()
    assert np.isfinite(jbn_step(x)[1].mean).all()


def test_a_bad_batch_in_torch():
    torch = pytest.importorskip("torch")
    x = normal(0, (16, 3))
    x[0] = np.nan
    layer = torch.nn.BatchNorm1d(3)
    layer(torch.from_numpy(x))
    assert layer.running_mean.isnan().all()


def test_rematerialization_moves_statistics_twice_in_torch():
    torch = pytest.importorskip("torch")
    x = normal(1, (16, 3))
    layer = torch.nn.BatchNorm1d(3)
    torch.utils.checkpoint.checkpoint(layer, torch.from_numpy(x).requires_grad_(), use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 2

    def loss(x):
        y, state = jax.checkpoint(jbn_step)(x)
        return y.sum(), state

    _, state = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_allclose(state.weight, 0.1, rtol=1e-6)
