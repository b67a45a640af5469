# python: 3.11
# pip: paddlepaddle==3.3.1 numpy==2.4.6
"""PaddlePaddle's BatchNorm1D by paddle.save."""

import paddle
from make.golden import BIAS, SCALE, write

layer = paddle.nn.BatchNorm1D(3)
layer.weight.set_value(SCALE)
layer.bias.set_value(BIAS)


def train(x):
    layer.train()
    return layer(paddle.to_tensor(x)).numpy()


def evaluate(x):
    layer.eval()
    return layer(paddle.to_tensor(x)).numpy()


def entries():
    paddle.save(layer.state_dict(), "layer.pdparams")
    return {name: value.numpy() for name, value in paddle.load("layer.pdparams").items()}


write(
    "paddle",
    package="paddlepaddle",
    train=train,
    evaluate=evaluate,
    entries=entries,
    running=lambda held: (held["_mean"], held["_variance"]),
    decay=layer._momentum,
    epsilon=layer._epsilon,
    unbiased=False,
)
