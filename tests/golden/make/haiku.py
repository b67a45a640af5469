# python: 3.11
# pip: dm-haiku==0.0.17 jax==0.10.2 numpy==2.4.6
"""Haiku's BatchNorm with its ResNet's decay: params and state, `mean_ema.average` for average of ~/mean_ema."""

import haiku as hk
import jax.numpy as jnp
import numpy as np
from make.golden import BIAS, SCALE, write

DECAY = 0.9
network = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, DECAY)(x, train))
network = hk.without_apply_rng(network)
_, state = network.init(None, np.ones((2, 3), np.float32), True)
held = {
    "params": {"batch_norm": {"scale": jnp.asarray(SCALE)[None], "offset": jnp.asarray(BIAS)[None]}},
    "state": state,
}


def train(x):
    y, held["state"] = network.apply(held["params"], held["state"], x, True)
    return y


def entries():
    found = dict(held["params"]["batch_norm"])
    for path, fields in held["state"].items():
        part = path.rpartition("/")[2]
        found.update({f"{part}.{name}": value for name, value in fields.items()})
    return found


write(
    "haiku",
    package="dm-haiku",
    train=train,
    evaluate=lambda x: network.apply(held["params"], held["state"], x, False)[0],
    entries=entries,
    running=lambda held: (held["mean_ema.average"], held["var_ema.average"]),
    decay=DECAY,
    epsilon=1e-5,
    unbiased=False,
    start=(0, 0),
    debias=True,
)
