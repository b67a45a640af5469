# python: 3.11
# pip: torchvision==0.28.0 torch==2.13.0 numpy==2.4.6
"""torchvision's FrozenBatchNorm2d by torch.save, with the entries of a BatchNorm2d that was trained: it never moves."""

import numpy as np
import torch
from make.golden import BIAS, SCALE, batches, write
from torchvision.ops import FrozenBatchNorm2d

x = np.moveaxis(batches(2, 1), -1, 2)
source, layer = torch.nn.BatchNorm2d(3), FrozenBatchNorm2d(3)
source.load_state_dict({"weight": torch.from_numpy(SCALE), "bias": torch.from_numpy(BIAS)}, strict=False)


def freeze():
    layer.load_state_dict(source.state_dict())


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


def apply(x):
    return layer(torch.from_numpy(x))


write(
    "torchvision frozen",
    package="torchvision",
    train=lambda x: source(torch.from_numpy(x)).detach(),
    before_last=freeze,
    evaluate=apply,
    frozen=apply,
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - source.momentum,
    epsilon=layer.eps,
    unbiased=True,
    x=x,
    feature_axis=-3,
)
