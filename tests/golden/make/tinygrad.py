# python: 3.11
# pip: tinygrad==0.14.0 numpy==2.4.6
"""tinygrad's BatchNorm by nn.state.get_state_dict, which is what safe_save writes."""

import os

os.environ.setdefault("DEV", "PYTHON")  # its own interpreter: no compiler is needed

from make.golden import BIAS, SCALE, write
from tinygrad import Tensor, nn
from tinygrad.helpers import Context

layer = nn.BatchNorm(3)
layer.weight.assign(Tensor(SCALE)).realize()
layer.bias.assign(Tensor(BIAS)).realize()


def apply(x, train):
    with Context(TRAINING=int(train)):
        return layer(Tensor(x)).numpy()


write(
    "tinygrad",
    package="tinygrad",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=lambda: {name: value.numpy() for name, value in nn.state.get_state_dict(layer).items()},
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
)
