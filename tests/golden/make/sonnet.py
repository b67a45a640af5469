# python: 3.11
# pip: dm-sonnet==2.0.2 tensorflow-cpu==2.21.0 tf-keras numpy==2.4.6
"""Sonnet's BatchNorm by tf.train.Checkpoint, of [batch, features] and of images, NHWC.

`moving_mean.counter` is for moving_mean/_counter/.ATTRIBUTES/VARIABLE_VALUE in the checkpoint.
"""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import sonnet as snt
import tensorflow as tf
from make.golden import BIAS, SCALE, batches, write


def write_for(name, x, unbiased):
    layer = snt.BatchNorm(create_scale=True, create_offset=True)
    layer(x[0], is_training=False, test_local_stats=True)
    layer.scale.assign(np.broadcast_to(SCALE, layer.scale.shape))
    layer.offset.assign(np.broadcast_to(BIAS, layer.offset.shape))

    def entries():
        reader = tf.train.load_checkpoint(tf.train.Checkpoint(layer=layer).save("checkpoint"))
        found = {}
        for path in reader.get_variable_to_shape_map():
            if path.startswith("layer/"):
                parts = path.split("/.ATTRIBUTES")[0].split("/")[1:]
                found[".".join(part.lstrip("_") for part in parts)] = reader.get_tensor(path)
        return dict(sorted(found.items()))

    write(
        name,
        package="dm-sonnet",
        train=lambda x: layer(x, is_training=True).numpy(),
        evaluate=lambda x: layer(x, is_training=False).numpy(),
        entries=entries,
        running=lambda held: (held["moving_mean.average"], held["moving_variance.average"]),
        decay=0.999,
        epsilon=1e-5,
        unbiased=unbiased,
        start=(0, 0),
        debias=True,
        x=x,
        rtol=3e-5,  # 1 - 0.999^4 is a difference of float32
    )


write_for("sonnet", batches(), unbiased=False)
write_for("sonnet images", batches(1, 1), unbiased=True)
