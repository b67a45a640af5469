# python: 3.11
# pip: objax==1.8.0 six==1.17.0 jax==0.4.30 jaxlib==0.4.30 numpy==1.26.4
"""Objax's BatchNorm2D by objax.io. Its file holds positions and a list of paths, of which these names are the ends."""

import jax.numpy as jnp
import numpy as np
import objax
from make.golden import BIAS, SCALE, batches, write

layer = objax.nn.BatchNorm2D(3)
layer.gamma.assign(jnp.asarray(SCALE).reshape(1, 3, 1, 1))
layer.beta.assign(jnp.asarray(BIAS).reshape(1, 3, 1, 1))


def entries():
    objax.io.save_var_collection("layer.npz", layer.vars())
    with np.load("layer.npz") as file:
        return {path.rpartition(".")[2]: file[str(i)] for i, path in enumerate(file["names"])}


write(
    "objax",
    package="objax",
    train=lambda x: layer(jnp.asarray(x), training=True),
    evaluate=lambda x: layer(jnp.asarray(x), training=False),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=layer.momentum,
    epsilon=layer.eps,
    unbiased=False,
    x=np.moveaxis(batches(2, 1), -1, 2),
    feature_axis=-3,
)
