# python: 3.8
# pip: mxnet==1.9.1 numpy==1.23.5
"""MXNet's gluon BatchNorm by save_parameters, and its operator by save_checkpoint (there arg:NAME_gamma and so on)."""

import mxnet as mx
import numpy as np
from make.golden import BIAS, SCALE, write
from mxnet import autograd, gluon, nd

layer = gluon.nn.BatchNorm(in_channels=3)
layer.initialize()
layer.gamma.set_data(nd.array(SCALE))
layer.beta.set_data(nd.array(BIAS))


def train(x):
    with autograd.record():
        y = layer(nd.array(x))
    y.backward()  # in which the running statistics move
    return y.asnumpy()


def entries():
    layer.save_parameters("layer.params")
    return {name: value.asnumpy() for name, value in nd.load("layer.params").items()}


write(
    "mxnet",
    package="mxnet",
    train=train,
    evaluate=lambda x: layer(nd.array(x)).asnumpy(),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=layer._kwargs["momentum"],
    epsilon=layer._kwargs["eps"],
    unbiased=False,
)

symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn")
learned = {"bn_gamma": nd.array(SCALE), "bn_beta": nd.array(BIAS)}
moving = {"bn_moving_mean": nd.zeros(3), "bn_moving_var": nd.ones(3)}


def set_gamma():
    learned["bn_gamma"][:] = SCALE  # training has set it to 1; as in files that were written without


def apply(x, train):
    gradients = {name: nd.zeros(3) for name in learned}
    # evaluation, too, writes 1 into the gamma that it is given
    given = learned if train else {name: value.copy() for name, value in learned.items()}
    executor = symbol.bind(mx.cpu(), dict(given, data=nd.array(x)), gradients, aux_states=moving)
    y = executor.forward(is_train=train)[0].asnumpy()
    if train:
        executor.backward(nd.ones(x.shape))
    return y


def entries_of_operator():
    mx.model.save_checkpoint("operator", 0, symbol, learned, moving)
    found = nd.load("operator-0000.params")
    return {name.split(":bn_")[1]: value.asnumpy() for name, value in found.items()}


write(
    "mxnet operator",
    package="mxnet",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries_of_operator,
    running=lambda held: (held["moving_mean"], held["moving_var"]),
    decay=0.9,
    epsilon=1e-3,
    unbiased=False,
    scale=np.ones(3),
    before_last=set_gamma,
)
