# python: 3.11
# pip: keras==3.15.1 jax==0.10.2 numpy==2.4.6
"""Keras's BatchNormalization on JAX. Its files hold positions (vars/0 ...); these are the names of its variables."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
from make.golden import BIAS, SCALE, write

layer = keras.layers.BatchNormalization()
layer.build((None, 3))
layer.gamma.assign(SCALE)
layer.beta.assign(BIAS)


write(
    "keras",
    package="keras",
    train=lambda x: layer(x, training=True),
    evaluate=lambda x: layer(x, training=False),
    entries=lambda: {variable.name: variable.numpy() for variable in layer.weights},
    running=lambda held: (held["moving_mean"], held["moving_variance"]),
    decay=layer.momentum,
    epsilon=layer.epsilon,
    unbiased=False,
)
