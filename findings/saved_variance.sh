#!/usr/bin/env bash
# onnxruntime 1.31.1 and OpenVINO 2026.4.1: the fifth output of a batch norm of opset 9 to 13 in training, which the
# specification calls saved_var, "saved variance", is the variance in OpenVINO and 1 / sqrt(variance + epsilon) in
# onnxruntime.
#
# Guess before: the batch's biased variance in both.
# Seen: at variances 5.59, 1.70 and 1.35 onnxruntime gives 0.423, 0.767 and 0.860, beside the same four outputs: a value
# that looks like a variance, in a place where it is called one. From opset 14 on there is no such output.
#
#   findings/saved_variance.sh [PYTHON]              a Python 3.11 or newer
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnxruntime==1.31.1 openvino==2026.4.1 onnx==1.23.2 numpy
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype("f4")
stored = {"scale": np.ones(3, "f4"), "B": np.zeros(3, "f4"), "mean": np.zeros(3, "f4"), "var": np.ones(3, "f4")}
outputs = ["Y", "running_mean", "running_var", "saved_mean", "saved_var"]
print(onnx.defs.get_schema("BatchNormalization", 9).outputs[4].description)
for opset in (9, 13):
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["X", *stored], outputs)],
        "training",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape if name == "Y" else [3]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    by_onnxruntime = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"X": x})
    by_openvino = openvino.compile_model(openvino.Core().read_model(model.SerializeToString()), "CPU")({"X": x})
    by_openvino = [by_openvino[i] for i in range(5)]
    for name, ours, theirs in zip(outputs[:4], by_onnxruntime, by_openvino):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)
    print(f"opset {opset}: onnxruntime {onnxruntime.__version__} {by_onnxruntime[4]}, openvino {by_openvino[4]}")
    np.testing.assert_allclose(by_openvino[4], x.var(0), rtol=1e-4)
    np.testing.assert_allclose(by_onnxruntime[4], 1 / np.sqrt(x.var(0) + 1e-5), rtol=1e-4)
END
