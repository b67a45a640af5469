"""Run a map and its norm, as they are and folded, in onnxruntime, OpenVINO and TFLite: the same numbers?

In an environment of its own:
    pip install . onnx==1.23.2 onnxruntime==1.31.1 openvino==2026.4.1 tensorflow-cpu==2.21.0 ai-edge-litert==2.3.0
    python benchmarks/served.py

Each is built from arrays, without an exporter, and compared with float64 in NumPy. It exits with 1 where a server's
output in float32 is off by more than 1e-5 of the largest.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper, numpy_helper

import jbn

INPUTS, FEATURES = 4, 6
RANDOM = np.random.default_rng(0)


def normal(*shape, mean=0.0, std=1.0):
    return RANDOM.normal(mean, std, shape).astype(np.float32)


class Network:
    """A map [outputs, inputs] or, of images [batch, channels, height, width], a 3 by 3 convolution; a norm; a relu."""

    def __init__(self, name, image=False, bias=False, apart=True):
        self.name = name
        self.image = image
        self.apart = apart  # the bias is a node of its own, as exporters write it, and not an input of Gemm
        self.kernel = normal(*((FEATURES, INPUTS, 3, 3) if image else (FEATURES, INPUTS)))
        self.bias = normal(FEATURES) if bias else None
        self.params = jbn.Params(normal(FEATURES, mean=1, std=0.3), normal(FEATURES))
        self.x = normal(*((8, INPUTS, 10, 10) if image else (64, INPUTS)), mean=2, std=3)
        mapped = self.mapped(np.float64)
        axes = (0, 2, 3) if image else 0
        self.state = jbn.State(*(np.float32(value) for value in (mapped.mean(axes), mapped.var(axes))))

    def mapped(self, dtype):
        x, kernel = self.x.astype(dtype), self.kernel.astype(dtype)
        if self.image:
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
            y = np.einsum("bchwij,ocij->bohw", windows, kernel)
        else:
            y = x @ kernel.T
        return y + self.wide(0 if self.bias is None else self.bias.astype(dtype))

    def wide(self, value):
        return np.reshape(value, (-1, 1, 1)) if self.image else value

    def right(self):
        mean, var, scale, bias = (np.asarray(value, np.float64) for value in (*self.state[:2], *self.params))
        y = (self.mapped(np.float64) - self.wide(mean)) / self.wide(np.sqrt(var + 1e-5))
        return np.maximum(y * self.wide(scale) + self.wide(bias), 0)

    def folded(self):
        kernel, bias = jbn.fold_into(self.kernel, self.bias, self.params, self.state, output_axis=0)
        return np.asarray(kernel), np.asarray(bias)

    def onnx(self, folded):
        kernel, bias = self.folded() if folded else (self.kernel, self.bias)
        held = {"kernel": kernel if self.image or not self.apart else kernel.T.copy()}
        if bias is not None:
            held["bias"] = bias
        nodes = []
        if self.image:
            nodes.append(helper.make_node("Conv", ["x", *held], ["map"]))
        elif self.apart:
            nodes.append(helper.make_node("MatMul", ["x", "kernel"], ["product"]))
            if bias is not None:
                nodes.append(helper.make_node("Add", ["product", "bias"], ["map"]))
            else:
                nodes[0].output[0] = "map"
        else:
            nodes.append(helper.make_node("Gemm", ["x", *held], ["map"], transB=1))
        if not folded:
            norm = dict(zip(("scale", "B", "mean", "var"), (*self.params, *self.state[:2]), strict=True))
            held |= {name: np.asarray(value) for name, value in norm.items()}
            nodes.append(helper.make_node("BatchNormalization", ["map", *norm], ["norm"]))
        nodes.append(helper.make_node("Relu", ["map" if folded else "norm"], ["y"]))
        graph = helper.make_graph(
            nodes,
            self.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, self.right().shape)],
            [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in held.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    def tflite(self, folded):
        kernel, bias = self.folded() if folded else (self.kernel, self.bias)
        mean, var, scale, offset = (np.asarray(value, np.float32) for value in (*self.state[:2], *self.params))

        @tf.function(input_signature=[tf.TensorSpec(self.tensorflow_x().shape, tf.float32)])
        def network(x):
            y = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), 1, "VALID") if self.image else tf.matmul(x, kernel.T)
            if bias is not None:
                y = tf.nn.bias_add(y, bias)
            if not folded:
                y = tf.nn.batch_normalization(y, mean, var, offset, scale, 1e-5)
            return tf.nn.relu(y)

        converter = tf.lite.TFLiteConverter.from_concrete_functions([network.get_concrete_function()], tf.Module())
        return converter.convert()

    def tensorflow_x(self):
        return self.x.transpose(0, 2, 3, 1) if self.image else self.x


def by_onnxruntime(network, folded, folder):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(network.onnx(folded), options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]
    return session.run(None, {"x": network.x})[0], run


def by_openvino(network, folded, _):
    core = openvino.Core()
    model = core.read_model(network.onnx(folded))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops()]
    return compiled(network.x)[0], [name for name in run if name not in ("Input", "Output", "Const", "Reorder")]


def by_tflite(network, folded, _):
    interpreter = Interpreter(model_content=network.tflite(folded))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], network.tensorflow_x())
    run = [operation["op_name"] for operation in interpreter._get_ops_details()]
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return (y.transpose(0, 3, 1, 2) if network.image else y), [name for name in run if name != "DELEGATE"]


SERVERS = {"onnxruntime": by_onnxruntime, "openvino": by_openvino, "ai-edge-litert": by_tflite}
NETWORKS = [
    Network("dense"),
    Network("dense, a bias added", bias=True),
    Network("dense, a bias inside (Gemm)", bias=True, apart=False),
    Network("convolution", image=True),
    Network("convolution, a bias", image=True, bias=True),
]


def alone(x, mean, var, dtype, name="alone"):
    """A norm of the input itself, with all else of `dtype`: the graph, and the right result."""
    held = {"scale": np.ones(3), "B": np.zeros(3), "mean": mean, "var": var}
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *held], ["y"])],
        name,
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, x.shape)],
        [numpy_helper.from_array(np.asarray(value, dtype), name) for name, value in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), (x.astype(np.float64) - mean) / np.sqrt(var + 1e-5)


def precision(folder):
    """What is saved, and what is computed in: of input far from 0."""
    core = openvino.Core()
    x = normal(64, 3, mean=1013, std=0.5)
    model, right = alone(x, x.mean(0), x.var(0), np.float32)
    for compress in (True, False):
        openvino.save_model(core.read_model(model), folder / "raw.xml", compress_to_fp16=compress)
        compiled = core.compile_model(folder / "raw.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        print(f"openvino, saved with compress_to_fp16={compress}: off by {np.abs(compiled(x)[0] - right).max():.2g}")
    far = RANDOM.normal(1e8, 1, (64, 3)), 1e8, 1.0, np.float64
    half = normal(64, 3, mean=3, std=2).astype(np.float16), 3.0, 4.0, np.float32
    for what, (x, mean, var, dtype) in (("float64 at mean 1e8", far), ("float16 with float32", half)):
        model, right = alone(x, np.full(3, mean), np.full(3, var), dtype)
        (y,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        print(f"onnxruntime, {what}: off by {np.abs(y - right).max():.2g}")
        try:
            y = core.compile_model(core.read_model(model), "CPU")(x)[0]
            print(f"openvino, {what}: {y.dtype}, off by {np.abs(y - right).max():.2g}")
        except RuntimeError as error:
            print(f"openvino, {what}: {str(error).strip().splitlines()[-1]}")


def main():
    bad = False
    print("| map | server | form | off by, of the largest | runs |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for network in NETWORKS:
            right = network.right()
            for server, serve in SERVERS.items():
                for folded in (False, True):
                    y, run = serve(network, folded, Path(folder))
                    off = np.abs(y - right).max() / np.abs(right).max()
                    bad |= not off <= 1e-5
                    form = "folded" if folded else "as it is"
                    print(f"| {network.name} | {server} | {form} | {off:.0e} | {', '.join(run)} |")
        print("\nVersions:", ", ".join(f"{name} {version(name)}" for name in SERVERS))
        precision(Path(folder))
    sys.exit(bad)


if __name__ == "__main__":
    main()
