"""docs/files.md: .keras, .weights.h5 and .h5, which Keras writes here; .onnx of tests/golden/files, where onnx is.

For .onnx in an environment of its own: `pip install . onnx pytest`, and then `python -m pytest` of this file.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_files import FILES, run

X = np.random.default_rng(0).normal(1, 2, (8, 4)).astype("f4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras = pytest.importorskip("keras", reason="the environment of onnx")
    folder, inputs = tmp_path_factory.mktemp("keras"), keras.Input((4,))
    first = keras.layers.BatchNormalization(name="first")(inputs)
    second = keras.layers.BatchNormalization(scale=False, epsilon=0.1, name="second")(keras.layers.Dense(3)(first))
    third = keras.layers.BatchNormalization(center=False, scale=False, name="third")(second)
    model = keras.Model(inputs, [first, third])
    model(X, training=True)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.save(folder / "model.h5")
    return folder, model(X)[0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras as it saves
def test_keras(model, monkeypatch):
    folder, expected = model
    found = run(".keras and .weights.h5", folder, monkeypatch)
    first, second, third = found["layers"].values()
    assert [params.scale is None for params, _ in (first, second, third)] == [False, True, True]
    assert [params.bias is None for params, _ in (first, second, third)] == [False, False, True]
    assert found["settings"]["second"]["epsilon"] == 0.1
    assert_allclose(jbn.normalize_running(X, *first, epsilon=1e-3), expected, rtol=1e-5, atol=1e-5)

    settings = {name: {"scale": name == "first", "center": name != "third"} for name in ("first", "second", "third")}
    alone = found["read_weights"]("model.weights.h5", settings)
    assert alone.keys() == found["entries"].keys()
    for name, array in alone.items():
        assert_array_equal(array, found["entries"][name])
    settings["first"]["scale"] = False
    with pytest.raises(ValueError, match="longer"):
        found["read_weights"]("model.weights.h5", settings)

    by_name = run(".h5", folder, monkeypatch)["layers"]
    assert list(by_name) == ["first/first", "second/second", "third/third"]
    for ours, theirs in zip(by_name.values(), (first, second, third), strict=True):
        for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
            assert (a is None) == (b is None)
            assert a is None or a.tolist() == b.tolist()


def test_onnx(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="an environment of its own: see above")
    found = run(".onnx", FILES, monkeypatch)
    ((params, state),) = found["layers"].values()
    assert found["epsilons"]["/stem/bn"] == pytest.approx(1e-3) and not found["folded"]
    import onnx
    from onnx import numpy_helper

    graph = onnx.load("model.onnx").graph
    (kernel,) = (numpy_helper.to_array(each) for each in graph.initializer if each.name == "onnx::Conv_11")
    ours = jbn.normalize_running(np.ones((1, 4), "f4") @ kernel[..., 0, 0].T, params, state, epsilon=1e-3)
    assert_allclose(ours[0], [0.640695333480835, 1.9040226936340332, -2.3565173149108887], rtol=1e-5)

    moved = {"/stem/bn": (params._replace(bias=params.bias + 1), state._replace(mean=2 * state.mean))}
    found["write_onnx"]("model.onnx", moved, tmp_path / "moved.onnx")
    entries, _, _ = found["read_onnx"](tmp_path / "moved.onnx")
    assert_allclose(entries["/stem/bn.B"], params.bias + 1)
    assert_allclose(entries["/stem/bn.mean"], 2 * state.mean)
    assert_allclose(entries["/stem/bn.var"], state.var)

    entries, _, operations = found["read_onnx"]("folded.onnx")
    assert not entries and operations == {"Conv": 1}
    (conv,) = onnx.load("folded.onnx").graph.node
    assert len(conv.input) == 3 and conv.input[2].startswith("ConvBnFusion_BN_B_")
