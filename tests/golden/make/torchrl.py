# python: 3.11
# pip: torchrl==0.14.1 torch==2.13.0
"""torchrl's BatchRenorm1d by torch.save: in its first 10,000 steps it is a batch norm."""

import torch
from make.golden import BIAS, SCALE, write, write_renorm
from torchrl.modules import BatchRenorm1d


def make(**options):
    layer = BatchRenorm1d(3, **options)
    layer.load_state_dict({"weight": torch.from_numpy(SCALE), "bias": torch.from_numpy(BIAS)}, strict=False)
    return layer


def apply(layer, x, train):
    return layer.train(train)(torch.from_numpy(x)).detach()


layer = make()


def entries():
    torch.save(layer.state_dict(), "layer.pt")
    return torch.load("layer.pt", weights_only=True)


write(
    "torchrl",
    package="torchrl",
    train=lambda x: apply(layer, x, True),
    evaluate=lambda x: apply(layer, x, False),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
)


def run(**options):
    layer = make(momentum=0.1, **options)

    def both(x, train):
        return apply(layer, x, train), layer.running_mean.clone(), layer.running_var.clone()

    return {"decay": 0.9, "epsilon": layer.eps, **options}, both


runs = {"late": run(warmup_steps=12), "early": run(warmup_steps=5), "smooth": run(warmup_steps=20, smooth=True)}
write_renorm("torchrl", "torchrl", runs)
