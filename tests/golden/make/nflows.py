# python: 3.11
# pip: nflows==0.14 torch==2.13.0 numpy==2.4.6
"""nflows's BatchNorm by torch.save."""

import numpy as np
import torch
from make.golden import BIAS, SCALE, write
from nflows.transforms import BatchNorm

layer = BatchNorm(3)
layer.load_state_dict({"unconstrained_weight": torch.from_numpy(SCALE), "bias": torch.from_numpy(BIAS)}, strict=False)


def apply(x, train):
    layer.train(train)
    return layer(torch.from_numpy(x))[0].detach()


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


write(
    "nflows",
    package="nflows",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
    start=(0, 0),
    scale=np.log1p(np.exp(SCALE.astype(np.float64))) + layer.eps,
    unbiased_output=True,
)
