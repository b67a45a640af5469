# python: 3.11
# pip: mindspore==2.10.0 numpy==1.26.4
"""MindSpore's BatchNorm1d by save_checkpoint. Alone it has `mean` and `variance`: here it is in a network."""

import mindspore
from make.golden import BIAS, SCALE, write
from mindspore import Tensor, nn

layer = nn.BatchNorm1d(3)
network = nn.SequentialCell(layer)
layer.gamma.set_data(Tensor(SCALE))
layer.beta.set_data(Tensor(BIAS))


def apply(x, train):
    network.set_train(train)
    return network(Tensor(x)).asnumpy()


def entries():
    mindspore.save_checkpoint(network, "layer.ckpt")
    found = mindspore.load_checkpoint("layer.ckpt")
    return {name.split("0.", 1)[1]: value.asnumpy() for name, value in found.items()}


write(
    "mindspore",
    package="mindspore",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["moving_mean"], held["moving_variance"]),
    decay=0.9,
    epsilon=layer.eps,
    unbiased=True,
)
