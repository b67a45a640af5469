"""Write the files of one library, and print what its network makes of ones: python make.py torch (paddle, mxnet, onnx).

Each with that package, in an environment of its own: torch==2.13.0; paddlepaddle==3.3.1; mxnet==1.9.1 and
numpy==1.23.5 (Python 3.8); onnx==1.22.0 and onnxruntime==1.31.1. A linear layer, or a convolution, and a batch norm.
"""

import sys

import numpy as np

BATCHES = [np.random.default_rng(step).normal(1, 2, (8, 4)).astype("f4") for step in range(3)]
ONES = np.ones((1, 4), "f4")


def of_torch():
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    for x in BATCHES:
        net(torch.from_numpy(x))
    torch.save(net.state_dict(), "model.pt")
    return net.eval()(torch.from_numpy(ONES)).detach().numpy()


def of_paddle():
    import paddle

    net = paddle.nn.Sequential(paddle.nn.Linear(4, 3), paddle.nn.BatchNorm1D(3))
    for x in BATCHES:
        net(paddle.to_tensor(x))
    paddle.save(net.state_dict(), "model.pdparams")
    net.eval()
    return net(paddle.to_tensor(ONES)).numpy()


def of_mxnet():
    import mxnet as mx

    net = mx.gluon.nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(mx.gluon.nn.Dense(3), mx.gluon.nn.BatchNorm())
    net.initialize()
    net.hybridize()
    for x in BATCHES:
        with mx.autograd.record():
            y = net(mx.nd.array(x))
        y.backward()
    mx.nd.waitall()
    net.export("model")
    return net(mx.nd.array(ONES)).asnumpy()


def of_onnx():
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    held = {"onnx::Conv_11": random.normal(size=(3, 4, 1, 1))}
    held.update({name: random.uniform(0.1, 2, 3) for name in ("stem.gamma", "onnx::beta_12", "13", "14")})
    _, *norm = held
    nodes = [
        helper.make_node("Conv", ["x", "onnx::Conv_11"], ["c"], name="/stem/conv"),
        helper.make_node("BatchNormalization", ["c", *norm], ["y"], name="/stem/bn", epsilon=1e-3),
    ]
    kinds = [("x", TensorProto.FLOAT, ["batch", 4, 1, 1])], [("y", TensorProto.FLOAT, None)]
    inputs, outputs = ([helper.make_tensor_value_info(*each) for each in kind] for kind in kinds)
    arrays = [numpy_helper.from_array(np.float32(value), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=10), "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = "folded.onnx"
    session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": ONES.reshape(1, 4, 1, 1)})[0].ravel()


if __name__ == "__main__":
    print(globals()[f"of_{sys.argv[1]}"]().tolist())
