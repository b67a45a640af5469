"""Parity with Keras on JAX: decay = momentum, the biased variance runs, the state starts with full weight."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import parity
import pytest

MASK = np.random.default_rng(1).uniform(size=(4, 5, 6)) < 0.7


def keras_steps(data, mask=None, **options):
    layer = keras.layers.BatchNormalization(**options)
    layer.build(data[0][0].shape)
    assert [variable.name for variable in layer.trainable_variables] == ["gamma", "beta"]
    params = [jnp.asarray(parity.SCALE), jnp.asarray(parity.BIAS)]
    running = [variable.value for variable in layer.non_trainable_variables]

    @jax.jit
    def step(x, dy, params, running):
        def train(x, params):
            return layer.stateless_call(params, running, x, training=True, mask=mask)

        y, pullback, after = jax.vjp(train, x, params, has_aux=True)
        return y, pullback(dy), after, layer.stateless_call(params, after, x, training=False)[0]

    for x, dy in data:
        y, (dx, dparams), running, evaluation = step(x, dy, params, running)
        yield parity.Step(*map(np.asarray, (y, dx, *dparams, *running[:2], evaluation)))


@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize(("momentum", "epsilon"), [(0.99, 1e-3), (0.9, 1e-5)])
def test_training_and_evaluation(feature_axis, momentum, epsilon):
    data = parity.batches(parity.SHAPES[feature_axis])
    theirs = list(keras_steps(data, axis=feature_axis, momentum=momentum, epsilon=epsilon))
    ours = parity.jbn_steps(
        data, debias=False, unbiased=False, epsilon=epsilon, decay=momentum, feature_axis=feature_axis
    )
    # Keras computes x * inv + (bias - mean * inv), which loses digits where the mean is not 0.
    parity.assert_parity(theirs, ours, 1e-4)


def test_masked():
    """Keras normalizes masked positions too: they are compared after blanking."""
    data = [(x, dy * MASK[..., None]) for x, dy in parity.batches(parity.SHAPES[-1])]
    theirs = [
        step._replace(
            output=np.where(MASK[..., None], step.output, 0), evaluation=np.where(MASK[..., None], step.evaluation, 0)
        )
        for step in keras_steps(data, MASK, momentum=0.9)
    ]
    ours = parity.jbn_steps(data, debias=False, unbiased=False, epsilon=1e-3, decay=0.9, weights=MASK)
    parity.assert_parity(theirs, ours, 1e-4)
