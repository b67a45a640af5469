#!/usr/bin/env bash
# OpenVINO 2026.4.1 on a CPU computes a float64 batch norm in float32 and gives the result back as float64; onnxruntime 1.31.1
# computes it in float64.
#
# Guess before: float64, or an error that says that it is not there; at worst rounding of 1e-7 of the output.
# Seen: the input is rounded before its mean is taken off: at mean 1e8 and a standard deviation of 1 the output is off by 2.4,
# as much as it is, in an array that says float64.
#
#   findings/openvino_float64.sh [PYTHON]            a Python 3.11 or newer
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnxruntime==1.31.1 openvino==2026.4.1 onnx==1.23.2 numpy
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

x = np.random.default_rng(0).normal(1e8, 1, (64, 3))
stored = {"scale": np.ones(3), "B": np.zeros(3), "mean": np.full(3, 1e8), "var": np.ones(3)}
graph = helper.make_graph(
    [helper.make_node("BatchNormalization", ["X", *stored], ["Y"])],
    "inference",
    [helper.make_tensor_value_info("X", TensorProto.DOUBLE, ["batch", 3])],
    [helper.make_tensor_value_info("Y", TensorProto.DOUBLE, ["batch", 3])],
    [numpy_helper.from_array(value, name) for name, value in stored.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8).SerializeToString()
right = (x - 1e8) / np.sqrt(1 + 1e-5)
(by_onnxruntime,) = onnxruntime.InferenceSession(model).run(None, {"X": x})
by_openvino = openvino.compile_model(openvino.Core().read_model(model), "CPU")({"X": x})[0]
for name, y in ((f"onnxruntime {onnxruntime.__version__}", by_onnxruntime), (f"openvino {openvino.__version__}", by_openvino)):
    print(f"{name}: {y.dtype}, off by {np.abs(y - right).max():.2g}")
assert by_onnxruntime.dtype == by_openvino.dtype == np.float64
assert np.abs(by_onnxruntime - right).max() < 1e-6
assert np.abs(by_openvino - right).max() > 1
END
