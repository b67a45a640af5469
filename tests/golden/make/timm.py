# python: 3.11
# pip: timm==1.0.31 torch==2.13.0 torchvision==0.28.0 numpy==2.4.6
"""timm's BatchNormAct2d, without an activation, by torch.save."""

import numpy as np
import torch
from make.golden import BIAS, SCALE, batches, write
from timm.layers import BatchNormAct2d

layer = BatchNormAct2d(3, apply_act=False)
layer.load_state_dict({"weight": torch.from_numpy(SCALE), "bias": torch.from_numpy(BIAS)}, strict=False)


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


write(
    "timm",
    package="timm",
    train=lambda x: layer.train()(torch.from_numpy(x)).detach(),
    evaluate=lambda x: layer.eval()(torch.from_numpy(x)).detach(),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
    x=np.moveaxis(batches(2, 1), -1, 2),
    feature_axis=-3,
)
