#!/usr/bin/env bash
# onnxruntime 1.31.1, OpenVINO 2026.4.1 and TensorFlow 2.21.0: an empty batch in a training graph's batch norm.
# onnxruntime's and TensorFlow's running statistics are NaN from then on, OpenVINO takes it as a batch of zeros
# without a variance.
#
# Guess before: an error, or running statistics that stay: there is nothing to average in.
# Seen: of a running mean of 300 and a variance of 4 onnxruntime makes NaN and NaN; OpenVINO 270 and 3.6, which nobody
# will see; TensorFlow's fused operator NaN and NaN, also with a share of the new of 0.01.
#
#   findings/empty_batch.sh [PYTHON]                 a Python 3.11
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    onnxruntime==1.31.1 openvino==2026.4.1 onnx==1.23.2 tensorflow-cpu==2.21.0
cd "$folder"
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - << 'END'
import numpy as np
import onnxruntime
import openvino
import tensorflow as tf
from onnx import TensorProto, helper, numpy_helper

stored = {
    "scale": np.ones(3, "f4"),
    "B": np.zeros(3, "f4"),
    "mean": np.full(3, 300, "f4"),
    "var": np.full(3, 4, "f4"),
}
outputs = ["Y", "running_mean", "running_var"]
graph = helper.make_graph(
    [helper.make_node("BatchNormalization", ["X", *stored], outputs, training_mode=1)],
    "training",
    [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 3])],
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    [numpy_helper.from_array(value, name) for name, value in stored.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8).SerializeToString()
empty = np.zeros((0, 3), "f4")
_, *by_onnxruntime = onnxruntime.InferenceSession(model).run(None, {"X": empty})
found = openvino.compile_model(openvino.Core().read_model(model), "CPU")({"X": empty})
by_openvino = [found[1], found[2]]
fused = tf.raw_ops.FusedBatchNormV3(
    x=empty.reshape(0, 1, 1, 3),
    scale=stored["scale"],
    offset=stored["B"],
    mean=stored["mean"],
    variance=stored["var"],
    exponential_avg_factor=0.01,
    is_training=True,
)
by_tensorflow = [fused.batch_mean.numpy(), fused.batch_variance.numpy()]
print(f"onnxruntime {onnxruntime.__version__}: {by_onnxruntime}")
print(f"openvino {openvino.__version__}: {by_openvino}")
print(f"tensorflow {tf.__version__}: {by_tensorflow}")
assert np.isnan(by_onnxruntime).all() and np.isnan(by_tensorflow).all()
np.testing.assert_allclose(by_openvino, [[270] * 3, [3.6] * 3], rtol=1e-6)
END
