# python: 3.11
# pip: sbx-rl==0.28.0 jax==0.10.2 flax==0.12.8 torch==2.13.0
"""sbx's BatchRenorm by flax.serialization: in its first 100,000 steps it is a batch norm."""

import jax
import jax.numpy as jnp
from flax import serialization
from make.golden import BIAS, SCALE, write, write_renorm
from sbx.common.jax_layers import BatchRenorm


def trained(layer, held):
    def train(x):
        y, after = layer.apply(held, x, use_running_average=False, mutable=["batch_stats"])
        held.update(after)
        return y

    return train


def start(layer):
    held = layer.init(jax.random.key(0), jnp.zeros((8, 3)), use_running_average=False)
    return held | {"params": {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}}


layer = BatchRenorm()
held = start(layer)


def entries():
    restored = serialization.msgpack_restore(serialization.to_bytes(held))
    return {**restored["params"], **restored["batch_stats"]}


write(
    "sbx",
    package="sbx-rl",
    train=trained(layer, held),
    evaluate=lambda x: layer.apply(held, x, use_running_average=True),
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=layer.momentum,
    epsilon=layer.epsilon,
    unbiased=False,
)


def run(epsilon):
    layer = BatchRenorm(momentum=0.9, epsilon=epsilon, warmup_steps=5)
    held = start(layer)
    train = trained(layer, held)

    def both(x, training):
        y = train(x) if training else layer.apply(held, x, use_running_average=True)
        return y, held["batch_stats"]["mean"], held["batch_stats"]["var"]

    return {"decay": 0.9, "epsilon": epsilon, "warmup_steps": 5}, both


write_renorm("sbx", "sbx-rl", {"epsilon 0": run(0.0), "epsilon 1e-3": run(1e-3)})
