# python: 3.11
# pip: torch==2.13.0 numpy==2.4.6
"""PyTorch's BatchNorm1d by torch.save."""

import torch
from make.golden import BIAS, SCALE, write

layer = torch.nn.BatchNorm1d(3)
layer.load_state_dict({"weight": torch.from_numpy(SCALE), "bias": torch.from_numpy(BIAS)}, strict=False)


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


write(
    "torch",
    package="torch",
    train=lambda x: layer.train()(torch.from_numpy(x)).detach(),
    evaluate=lambda x: layer.eval()(torch.from_numpy(x)).detach(),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
)
