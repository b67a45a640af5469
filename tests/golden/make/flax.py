# python: 3.13
# pip: flax==0.12.12 numpy==2.5.5
"""Flax's BatchNorm (linen) by flax.serialization."""

import jax.numpy as jnp
from flax import linen, serialization
from make.golden import BIAS, SCALE, write

layer = linen.BatchNorm()
held = {
    "params": {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)},
    "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
}


def train(x):
    y, after = layer.apply(held, x, use_running_average=False, mutable="batch_stats")
    held.update(after)
    return y


def entries():
    restored = serialization.msgpack_restore(serialization.to_bytes(held))
    return {**restored["params"], **restored["batch_stats"]}


write(
    "flax",
    package="flax",
    train=train,
    evaluate=lambda x: layer.apply(held, x, use_running_average=True),
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=layer.momentum,
    epsilon=layer.epsilon,
    unbiased=False,
)
