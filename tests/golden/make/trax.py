# python: 3.8
# pip: --no-deps trax==1.4.1 jax==0.4.13 jaxlib==0.4.13 ml-dtypes==0.2.0 opt-einsum==3.4.0 scipy==1.10.1 numpy==1.23.5
# pip: gin-config==0.5.0 absl-py==2.3.1 importlib-metadata==8.5.0 zipp==3.20.2
"""Trax's BatchNorm on JAX: its weights (beta, gamma) and its state (mean, var, n_batches).

Nothing installs all that trax wants any more. What its layers do not use is left out: TensorFlow, its data sets, and
the parts of trax that read or train.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
from make.golden import BIAS, SCALE, write

folder = Path(importlib.util.find_spec("trax").origin).parent
for name, inner in (("trax", folder), ("trax.layers", folder / "layers")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(inner)]
for name in ("tensorflow", "tensorflow_datasets", "trax.fastmath.tf"):
    sys.modules[name] = mock.MagicMock(TensorShape=(), DType=())  # of which nothing is an instance
normalization = importlib.import_module("trax.layers.normalization")
shapes = importlib.import_module("trax.shapes")

layers = {mode: normalization.BatchNorm(axis=(0,), mode=mode) for mode in ("train", "eval")}
signature = shapes.ShapeDtype((8, 3), np.float32)
for layer in layers.values():
    layer.init(signature)
layers["train"].weights = jnp.asarray(BIAS), jnp.asarray(SCALE)


def evaluate(x):
    layers["eval"].weights, layers["eval"].state = layers["train"].weights, layers["train"].state
    return layers["eval"](jnp.asarray(x))


def entries():
    learned = {f"weights.{i}": value for i, value in enumerate(layers["train"].weights)}
    return {**learned, **{f"state.{i}": value for i, value in enumerate(layers["train"].state)}}


write(
    "trax",
    package="trax",
    train=lambda x: layers["train"](jnp.asarray(x)),
    evaluate=evaluate,
    entries=entries,
    running=lambda held: (held["state.0"], held["state.1"]),
    decay=0.999,
    epsilon=1e-5,
    unbiased=False,
)
