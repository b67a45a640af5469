# python: 3.8
# pip: mxnet==1.9.1 numpy==1.23.5
"""MXNet's operator with fix_gamma=False by save_checkpoint."""

import mxnet as mx
from make.golden import BIAS, SCALE, write
from mxnet import nd

symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", fix_gamma=False)
learned = {"bn_gamma": nd.array(SCALE), "bn_beta": nd.array(BIAS)}
moving = {"bn_moving_mean": nd.zeros(3), "bn_moving_var": nd.ones(3)}


def apply(x, train):
    gradients = {name: nd.zeros(3) for name in learned}
    executor = symbol.bind(mx.cpu(), dict(learned, data=nd.array(x)), gradients, aux_states=moving)
    y = executor.forward(is_train=train)[0].asnumpy()
    if train:
        executor.backward(nd.ones(x.shape))  # in which the running statistics move
    return y


def entries():
    mx.model.save_checkpoint("operator", 0, symbol, learned, moving)
    found = nd.load("operator-0000.params")
    return {name.split(":bn_")[1]: value.asnumpy() for name, value in found.items()}


write(
    "mxnet operator free",
    package="mxnet",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["moving_mean"], held["moving_var"]),
    decay=0.9,
    epsilon=1e-3,
    unbiased=False,
)
