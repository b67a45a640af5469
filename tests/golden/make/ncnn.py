# python: 3.11
# pip: ncnn==1.0.20261020 numpy==2.4.6
"""ncnn's BatchNorm, which only evaluates: its .bin is slope, mean, variance and bias, of averages by NumPy."""

from pathlib import Path

import ncnn
import numpy as np
from make.golden import BIAS, SCALE, write

DECAY = 0.9
held = {"slope": SCALE, "mean": np.zeros(3, "f4"), "var": np.ones(3, "f4"), "bias": BIAS}
Path("layer.param").write_text("7767517\n2 2\nInput x 0 1 x\nBatchNorm bn 1 1 x y 0=3\n")


def train(x):
    held["mean"] = DECAY * held["mean"] + np.float32(1 - DECAY) * x.mean(0)
    held["var"] = DECAY * held["var"] + np.float32(1 - DECAY) * x.var(0)


def entries():
    Path("layer.bin").write_bytes(b"".join(np.float32(value).tobytes() for value in held.values()))
    return dict(zip(held, np.fromfile("layer.bin", "f4").reshape(4, 3), strict=True))


def evaluate(x):
    net = ncnn.Net()
    assert net.load_param("layer.param") == net.load_model("layer.bin") == 0
    rows = []
    for row in x:
        with net.create_extractor() as extractor:
            given = ncnn.Mat(row).clone()
            extractor.input("x", given)
            rows.append(np.array(extractor.extract("y")[1]))
    return np.stack(rows)


write(
    "ncnn",
    package="ncnn",
    train=train,
    evaluate=evaluate,
    frozen=evaluate,
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=DECAY,
    epsilon=0.0,
    unbiased=False,
)
