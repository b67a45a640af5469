# python: 3.13
# pip: brainstate==0.6.0 numpy==2.5.5
"""brainstate's BatchNorm1d of [batch, length, features]: what its states hold, weight.scale for weight's scale."""

import brainstate
import jax.numpy as jnp
from make.golden import BIAS, SCALE, batches, write

layer = brainstate.nn.BatchNorm1d((2, 3))
layer.weight.value = {"scale": jnp.reshape(SCALE, (1, 3)), "bias": jnp.reshape(BIAS, (1, 3))}


def apply(x, train):
    with brainstate.environ.context(fit=train):
        return layer(x)


def entries():
    return {
        **{f"weight.{name}": value for name, value in layer.weight.value.items()},
        "running_mean": layer.running_mean.value,
        "running_var": layer.running_var.value,
    }


write(
    "brainstate",
    package="brainstate",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=0.99,
    epsilon=1e-5,
    unbiased=False,
    x=batches(2),
)
