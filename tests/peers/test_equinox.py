"""Parity with Equinox's mode "ema"; that with its mode "batch" is in test_layers.py."""

import equinox as eqx
import jax
import jax.numpy as jnp
import parity
from numpy.testing import assert_allclose

import jbn


def make(mode):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(parity.FEATURES, "batch", momentum=0.9, mode=mode)
    weights = jnp.asarray(parity.SCALE), jnp.asarray(parity.BIAS)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, weights), state


@eqx.filter_jit
def apply(layer, state, x):
    return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def test_ema_mode_is_the_running_statistics_moved_first():
    """The first batch replaces the state and the plain moving average goes on; outputs use what has moved."""
    layer, theirs = make("ema")
    params, ours = jbn.Params(layer.weight, layer.bias), jbn.init(parity.FEATURES)[1]
    for step, (x, _) in enumerate(parity.batches(parity.SHAPES[1])):
        y, theirs = apply(layer, theirs, x)
        ours = jbn.update(ours, jbn.moments(x, feature_axis=1), decay=0.9 if step else 0.0, unbiased=False)
        for got, expected in zip(ours[:2], theirs.get(layer.ema_state_index), strict=True):
            assert_allclose(got, expected, rtol=1e-5)
        assert_allclose(jbn.normalize_running(x, params, ours, feature_axis=1), y, rtol=1e-4, atol=1e-5)
        evaluation, _ = apply(eqx.nn.inference_mode(layer), theirs, x)
        assert_allclose(jbn.normalize_running(x, params, ours, feature_axis=1), evaluation, rtol=1e-4, atol=1e-5)
