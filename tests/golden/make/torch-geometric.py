# python: 3.11
# pip: torch-geometric==2.8.1 torch==2.13.0 numpy==2.4.6
"""PyTorch Geometric's BatchNorm, and HeteroBatchNorm for two types of nodes, by torch.save.

HeteroBatchNorm's epsilon is not added to a variance: it is the least that a variance can be.
"""

import numpy as np
import torch
from make.golden import BIAS, SCALE, batches, write
from torch_geometric.nn import BatchNorm, HeteroBatchNorm


def entries_of(layer):
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


layer = BatchNorm(3)
with torch.no_grad():
    layer.module.weight.copy_(torch.from_numpy(SCALE))
    layer.module.bias.copy_(torch.from_numpy(BIAS))
write(
    "torch geometric",
    package="torch-geometric",
    train=lambda x: layer.train()(torch.from_numpy(x)).detach(),
    evaluate=lambda x: layer.eval()(torch.from_numpy(x)).detach(),
    entries=lambda: entries_of(layer),
    running=lambda held: (held["module.running_mean"], held["module.running_var"]),
    decay=1 - layer.module.momentum,
    epsilon=layer.module.eps,
    unbiased=True,
)

x = batches(2)  # [batch, types, features]: as many nodes of each type, in turn
types = torch.arange(2).repeat(len(x[0]))
hetero = HeteroBatchNorm(3, num_types=2)
with torch.no_grad():
    hetero.weight.copy_(torch.from_numpy(np.stack([SCALE, 2 * SCALE])))
    hetero.bias.copy_(torch.from_numpy(np.stack([BIAS, BIAS + 1])))


def apply(x):
    return hetero(torch.from_numpy(x.reshape(-1, 3)), types).detach().reshape(x.shape)


def train(x):
    hetero.train()
    return apply(x)


def evaluate(x):
    hetero.eval()
    return apply(x)


write(
    "torch geometric hetero",
    package="torch-geometric",
    train=train,
    evaluate=evaluate,
    entries=lambda: entries_of(hetero),
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - hetero.momentum,
    epsilon=hetero.eps,
    unbiased=False,
    x=x,
    feature_axis=(-2, -1),
    scale=np.stack([SCALE, 2 * SCALE]),
    bias=np.stack([BIAS, BIAS + 1]),
    denominator=lambda var: np.sqrt(np.maximum(var, hetero.eps)),
)
