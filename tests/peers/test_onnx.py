"""docs/inference.md as ONNX: what the page says, run by onnxruntime; and a convolution, folded and as it is.

In an environment of its own: `pip install . jax2onnx onnxruntime optax flatbuffers pytest` and then
`python -m pytest tests/peers/test_onnx.py`.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jbn

APART = "jax2onnx 0.17 needs an orbax-checkpoint before 0.11.37, the example one of today"
jax2onnx, onnxruntime = (pytest.importorskip(name, reason=APART) for name in ("jax2onnx", "onnxruntime"))
PAGE = (Path(__file__).parents[2] / "docs/inference.md").read_text()
# jax2onnx and what it stands on warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page():
    found = {}
    for code in re.findall(r"```py\w*\n(.*?)```", PAGE, re.DOTALL):
        exec(code, found)
    expected = found["network"](found["params"], found["state"], found["x"])
    np.testing.assert_allclose(found["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folded", [True, False])
def test_a_convolution(folded):
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 3, 4, 6)).astype(np.float32)
    params = jbn.Params(*random.normal(size=(2, 6)).astype(np.float32))
    state = jbn.State(random.normal(size=6).astype(np.float32), random.uniform(0.1, 2, 6).astype(np.float32))
    new, bias = jbn.fold_into(kernel, None, params, state)

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def apart(x):
        return jax.nn.relu(jbn.normalize_running(convolve(x, kernel), params, state))

    def together(x):
        return jax.nn.relu(convolve(x, new) + bias)

    model = jax2onnx.to_onnx(together if folded else apart, inputs=[("batch", 8, 8, 4)])
    operations = {node.op_type for node in model.graph.node}
    assert ("Sqrt" in operations or "Reciprocal" in operations) != folded
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for rows in (1, 3):
        x = random.normal(size=(rows, 8, 8, 4)).astype(np.float32)
        (y,) = session.run(None, {session.get_inputs()[0].name: x})
        np.testing.assert_allclose(y, apart(jnp.asarray(x)), rtol=1e-4, atol=1e-4)
