# python: 3.11
# pip: tensorflow-cpu==2.21.0 numpy==2.4.6
"""TensorFlow's fused operator, as tf.keras 2 and the files of its time use it; the names are its arguments'."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from make.golden import BIAS, SCALE, batches, write

DECAY, EPSILON = 0.99, 1e-3
held = {"scale": SCALE, "offset": BIAS, "mean": np.zeros(3, "f4"), "variance": np.ones(3, "f4")}


def apply(x, train):
    factor = 1 - DECAY if train else 1
    found = tf.raw_ops.FusedBatchNormV3(
        x=x, **held, epsilon=EPSILON, exponential_avg_factor=factor, is_training=train, data_format="NHWC"
    )
    if train:
        held.update(mean=found.batch_mean.numpy(), variance=found.batch_variance.numpy())
    return found.y.numpy()


write(
    "tensorflow",
    package="tensorflow-cpu",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=lambda: held,
    running=lambda held: (held["mean"], held["variance"]),
    decay=DECAY,
    epsilon=EPSILON,
    unbiased=True,
    x=batches(2, 1),
)
