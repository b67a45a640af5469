# python: 3.11
# pip: e3nn-jax==0.21.0 flax==0.12.8 jax==0.10.2 numpy==2.4.6
"""e3nn-jax's BatchNorm (flax) of three scalars; epsilon is blended with the variance, not added."""

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from flax import serialization
from make.golden import BIAS, SCALE, write

layer = e3nn.flax.BatchNorm()
held = {
    "params": {"weights": jnp.asarray(SCALE), "biases": jnp.asarray(BIAS)},
    "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
}


def train(x):
    y, after = layer.apply(
        held, e3nn.IrrepsArray("3x0e", jnp.asarray(x)), use_running_average=False, mutable="batch_stats"
    )
    held.update(after)
    return y.array


def evaluate(x):
    y, _ = layer.apply(held, e3nn.IrrepsArray("3x0e", jnp.asarray(x)), use_running_average=True, mutable="batch_stats")
    return y.array  # what it makes of the statistics in evaluation, where it moves them too, is dropped


def entries():
    restored = serialization.msgpack_restore(serialization.to_bytes(held))
    return {**restored["params"], **restored["batch_stats"]}


write(
    "e3nn",
    package="e3nn-jax",
    train=train,
    evaluate=evaluate,
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=False,
    denominator=lambda var: np.sqrt((1 - layer.eps) * var + layer.eps),
)
