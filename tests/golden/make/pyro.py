# python: 3.11
# pip: pyro-ppl==1.9.2 torch==2.13.0 numpy==2.4.6
"""Pyro's BatchNorm (a transform, of which the inverse normalizes) by torch.save."""

import numpy as np
import torch
from make.golden import BIAS, SCALE, write
from pyro.distributions.transforms import BatchNorm

layer = BatchNorm(3)
layer.load_state_dict({"gamma": torch.from_numpy(SCALE), "beta": torch.from_numpy(BIAS)}, strict=False)


def apply(x, train):
    layer.train(train)
    return layer._inverse(torch.from_numpy(x)).detach()


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


write(
    "pyro",
    package="pyro-ppl",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["moving_mean"], held["moving_variance"]),
    decay=1 - layer.momentum,
    epsilon=layer.epsilon,
    unbiased=True,
    scale=np.maximum(SCALE, 0) + 1e-6,
    unbiased_output=True,
)
