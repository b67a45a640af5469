# python: 3.10
# pip: MegEngine==1.13.0 numpy==1.23.5
"""MegEngine's BatchNorm2d by megengine.save."""

import megengine
import numpy as np
from make.golden import BIAS, SCALE, batches, write

layer = megengine.module.BatchNorm2d(3)
layer.weight._reset(SCALE.reshape(1, 3, 1, 1))
layer.bias._reset(BIAS.reshape(1, 3, 1, 1))


def train(x):
    layer.train()
    return layer(megengine.Tensor(x)).numpy()


def evaluate(x):
    layer.eval()
    return layer(megengine.Tensor(x)).numpy()


def entries():
    megengine.save(layer.state_dict(), "layer.mge")
    return megengine.load("layer.mge")


write(
    "megengine",
    package="MegEngine",
    train=train,
    evaluate=evaluate,
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
    x=np.moveaxis(batches(2, 1), -1, 2),
    feature_axis=-3,
)
