# python: 3.11
# pip: mlx[cpu]==0.32.4 numpy==2.4.6
"""MLX's BatchNorm by save_weights to .safetensors."""

import mlx.core as mx
import numpy as np
from make.golden import BIAS, SCALE, write
from mlx import nn

layer = nn.BatchNorm(3)
layer.weight, layer.bias = mx.array(SCALE), mx.array(BIAS)


def entries():
    layer.save_weights("layer.safetensors")
    return {name: np.array(value) for name, value in mx.load("layer.safetensors").items()}


write(
    "mlx",
    package="mlx",
    train=lambda x: layer.train()(mx.array(x)),
    evaluate=lambda x: layer.eval()(mx.array(x)),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=True,
)
