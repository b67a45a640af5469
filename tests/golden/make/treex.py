# python: 3.10
# pip: treex==0.6.12 jax==0.4.13 jaxlib==0.4.13 flax==0.5.3 numpy==1.24.4 scipy==1.10.1 optax==0.1.7 chex==0.1.7
"""treex's BatchNorm: the leaves of its tree, by the names of its attributes."""

import importlib

import jax
import jax._src.numpy.lax_numpy as lax_numpy
import jax.numpy as jnp
from make.golden import BIAS, SCALE, write

lax_numpy.ndarray = jax.Array  # treex's metrics import it from there: it was gone before the first jaxlib of today
treex = importlib.import_module("treex")

layer = treex.BatchNorm().init(key=0, inputs=jnp.ones((2, 3)))
layer.scale, layer.bias = jnp.asarray(SCALE), jnp.asarray(BIAS)


def entries():
    return {name: getattr(layer, name) for name in ("scale", "bias", "mean", "var", "momentum")}


write(
    "treex",
    package="treex",
    train=lambda x: layer(jnp.asarray(x), use_running_average=False),
    evaluate=lambda x: layer(jnp.asarray(x), use_running_average=True),
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=0.99,
    epsilon=layer.epsilon,
    unbiased=False,
)
