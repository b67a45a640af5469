# python: 3.10
# pip: nnabla==1.39.0 numpy==1.26.4
"""NNabla's batch_normalization by save_parameters to .h5. In the file its names are under the layer's, here bn/."""

import h5py
import nnabla as nn
import numpy as np
from make.golden import BIAS, SCALE, batches, write
from nnabla import parametric_functions as pf

x = np.moveaxis(batches(2, 1), -1, 2)
initial = {"gamma": SCALE.reshape(1, 3, 1, 1), "beta": BIAS.reshape(1, 3, 1, 1)}


def apply(x, train):
    with nn.auto_forward():
        return pf.batch_normalization(nn.Variable.from_numpy_array(x), batch_stat=train, param_init=initial).d


def entries():
    nn.save_parameters("layer.h5")
    with h5py.File("layer.h5") as file:
        return {name: value[()] for name, value in file["bn"].items()}


write(
    "nnabla",
    package="nnabla",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=0.9,
    epsilon=1e-5,
    unbiased=True,
    x=x,
    feature_axis=-3,
)
