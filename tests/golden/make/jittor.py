# python: 3.10
# pip: jittor==1.3.11.0 numpy==1.26.4
"""Jittor's BatchNorm by jittor.save. It compiles itself when it is imported, with g++ and Python's headers."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JITTOR_HOME", str(Path.cwd()))
os.environ.setdefault("python_config_path", f"{sys.base_prefix}/bin/python3.10-config")
os.environ.setdefault("nvcc_path", "")  # no CUDA
os.environ.setdefault("use_mkl", "0")  # which it would download

import jittor
from make.golden import BIAS, SCALE, write

layer = jittor.nn.BatchNorm(3)
layer.load_parameters({"weight": SCALE, "bias": BIAS})


def apply(x, train):
    layer.train() if train else layer.eval()
    return layer(jittor.array(x)).numpy()


def entries():
    jittor.save(layer.state_dict(), "layer.pkl")
    return {name: jittor.array(value).numpy() for name, value in jittor.load("layer.pkl").items()}


write(
    "jittor",
    package="jittor",
    train=lambda x: apply(x, True),
    evaluate=lambda x: apply(x, False),
    entries=entries,
    running=lambda held: (held["running_mean"], held["running_var"]),
    decay=1 - layer.momentum,
    epsilon=layer.eps,
    unbiased=False,
)
