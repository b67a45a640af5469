# python: 3.8
# pip: chainer==7.8.1 numpy==1.23.5
"""Chainer's BatchNormalization by serializers.save_npz."""

import chainer
import numpy as np
from make.golden import BIAS, SCALE, write

layer = chainer.links.BatchNormalization(3)
layer.gamma.array[:] = SCALE
layer.beta.array[:] = BIAS


def apply(x, train):
    with chainer.using_config("train", train):
        return layer(x).array


def entries():
    chainer.serializers.save_npz("layer.npz", layer)
    with np.load("layer.npz") as file:
        return dict(sorted(file.items()))  # the order in the file is another each time


write(
    "chainer",
    package="chainer",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["avg_mean"], held["avg_var"]),
    decay=layer.decay,
    epsilon=layer.eps,
    unbiased=True,
)
