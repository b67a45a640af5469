"""Batch renormalization step by step with Keras, which averages the deviation where jbn averages the variance."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
import numpy as np

import jbn

EPSILON, R_MAX, D_MAX = 1e-3, 1.5, 0.5


def test_every_step_is_that_of_keras():
    clipping = {"rmax": R_MAX, "rmin": 1 / R_MAX, "dmax": D_MAX}
    layer = keras.layers.BatchNormalization(
        epsilon=EPSILON, momentum=0.8, renorm=True, renorm_momentum=0.8, renorm_clipping=clipping
    )
    random = np.random.default_rng(0)
    layer.build((None, 4))
    layer.gamma.assign(np.linspace(0.5, 2, 4))
    layer.beta.assign(np.linspace(-1, 1, 4))
    params = jbn.Params(layer.gamma.value, layer.beta.value)
    for step in range(6):
        x = jnp.asarray((1 + step) * (1 + random.standard_normal((32, 4))), jnp.float32)
        running = jbn.State(layer.renorm_mean.value, layer.renorm_stddev.value**2 - EPSILON, jnp.ones(()))
        y, after = jbn.batch_renorm(
            x, params, running, train=True, r_max=R_MAX, d_max=D_MAX, decay=0.8, epsilon=EPSILON, unbiased=False
        )
        # float32, outputs up to 10
        np.testing.assert_allclose(y, layer(x, training=True), atol=1e-5)
        np.testing.assert_allclose(after.mean, layer.renorm_mean.value, rtol=1e-5, atol=1e-6)
