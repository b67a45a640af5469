# python: 3.11
# pip: onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"""ONNX's BatchNormalization, without and with training_mode=1, in onnxruntime."""

import numpy as np
import onnx
import onnxruntime
from make.golden import BIAS, SCALE, write
from onnx import TensorProto, helper, numpy_helper

held = {"scale": SCALE, "B": BIAS, "mean": np.zeros(3, "f4"), "var": np.ones(3, "f4")}


def save(train):
    outputs = ["Y", "running_mean", "running_var"] if train else ["Y"]
    node = helper.make_node("BatchNormalization", ["X", *held], outputs, training_mode=int(train))
    graph = helper.make_graph(
        [node],
        "batch norm",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=10)
    onnx.save(model, "layer.onnx")


def run(x, train):
    save(train)
    session = onnxruntime.InferenceSession("layer.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"X": x})


def train(x):
    y, held["mean"], held["var"] = run(x, True)
    return y


def entries():
    save(False)
    return {each.name: numpy_helper.to_array(each) for each in onnx.load("layer.onnx").graph.initializer}


attributes = onnx.defs.get_schema("BatchNormalization", 15).attributes
write(
    "onnx",
    package="onnxruntime",
    train=train,
    evaluate=lambda x: run(x, False)[0],
    entries=entries,
    running=lambda held: (held["mean"], held["var"]),
    decay=round(attributes["momentum"].default_value.f, 6),
    epsilon=round(attributes["epsilon"].default_value.f, 9),
    unbiased=False,
)
