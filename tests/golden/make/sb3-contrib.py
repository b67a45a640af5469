# python: 3.11
# pip: sb3_contrib==2.9.2 torch==2.13.0
"""sb3-contrib's BatchRenorm1d by torch.save: in its first 100,001 steps it is a batch norm."""

import torch
from make.golden import BIAS, SCALE, write, write_renorm
from sb3_contrib.common.torch_layers import BatchRenorm1d


def make(**options):
    layer = BatchRenorm1d(3, **options)
    with torch.no_grad():
        layer.scale.copy_(torch.from_numpy(SCALE))
        layer.bias.copy_(torch.from_numpy(BIAS))
    return layer


layer = make()


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


write(
    "sb3 contrib",
    package="sb3_contrib",
    train=lambda x: layer.train()(torch.from_numpy(x)).detach(),
    evaluate=lambda x: layer.eval()(torch.from_numpy(x)).detach(),
    entries=entries,
    running=lambda held: (held["ra_mean"], held["ra_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
    unbiased_output=True,
)
layer = make(momentum=0.1, warmup_steps=5)


def both(x, training):
    y = layer.train(training)(torch.from_numpy(x)).detach()
    return y, layer.ra_mean, layer.ra_var


settings = {"decay": 0.9, "epsilon": layer.eps, "warmup_steps": 5}
write_renorm("sb3-contrib", "sb3_contrib", {"epsilon 1e-3": (settings, both)})
