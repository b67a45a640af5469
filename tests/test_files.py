"""docs/files.md: what reads the files of other libraries, on those of tests/golden/files and one written here.

tests/peers/test_keras_files.py has what needs h5py or onnx.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

import jbn
from jbn import convert, presets

ROOT = Path(__file__).parents[1]
FILES = ROOT / "tests/golden/files"
ONES = np.ones((1, 4), "f4")


def run(section, folder, monkeypatch):
    """What the code of a section leaves, in a folder with the files that it names."""
    monkeypatch.chdir(folder)
    first, *sections = re.split(r"\n## ", (ROOT / "docs/files.md").read_text())
    (text,) = (text for text in sections if text.startswith(section + "\n"))
    found = {}
    for code in re.findall(r"```python\n(.*?)```", first + text, re.DOTALL):
        exec(code, found)
    return found


def evaluated(found, kernel, library):
    """Of a dense layer 0 and a batch norm; `kernel` [inputs, outputs]."""
    (layer,) = found["layers"].values()
    x = ONES @ kernel + found["bias"]
    return jbn.normalize_running(x, *layer, epsilon=presets.of(library)["epsilon"])


def close(ours, theirs):
    assert_allclose(np.ravel(ours), theirs, rtol=1e-5, atol=1e-6)


def test_torch(monkeypatch):
    found = run(".pt, .pth", FILES, monkeypatch)
    held = found["read_torch"]("model.pt")
    assert held["1.num_batches_tracked"] == 3 and list(found["layers"]) == ["1"]
    assert found["unused"] == ("0.weight", "0.bias")
    close(
        evaluated(found | {"bias": held["0.bias"]}, held["0.weight"].T, "torch"),
        [-0.12953731417655945, 0.6751616597175598, -0.40682896971702576],
    )


def test_paddle(monkeypatch):
    found = run(".pdparams", FILES, monkeypatch)
    held = found["read_paddle"]("model.pdparams")
    close(
        evaluated(found | {"bias": held["0.bias"]}, held["0.weight"], "paddle"),
        [0.7675573229789734, 0.7790522575378418, 1.2374755144119263],
    )


def test_mxnet(monkeypatch):
    found = run(".params", FILES, monkeypatch)
    held = found["read_mxnet"]("model-0000.params")
    assert list(found["layers"]) == ["net_batchnorm0"]
    assert found["settings"]["net_batchnorm0_fwd"]["fix_gamma"] == "False"
    close(
        evaluated(found | {"bias": held["arg:net_dense0_bias"]}, held["arg:net_dense0_weight"].T, "mxnet"),
        [0.08722083270549774, 0.11166977882385254, 0.0050605894066393375],
    )


def test_safetensors(tmp_path, monkeypatch):
    """Written by the page of the format; float32, and bfloat16 1.5, which is 0x3FC0."""
    header = {"__metadata__": {"format": "pt"}}
    header["bn.running_mean"] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header["bn.running_var"] = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    header["bn.weight"] = {"dtype": "BF16", "shape": [2], "data_offsets": [16, 20]}
    text = json.dumps(header).encode()
    numbers = np.float32([1, 2, 3, 4]).tobytes() + bytes([0xC0, 0x3F] * 2)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    (params, state), *_ = run(".safetensors", tmp_path, monkeypatch)["layers"].values()
    assert params.scale.dtype == "bfloat16" and params.scale.tolist() == [1.5, 1.5]
    assert state.mean.tolist() == [1, 2] and state.var.tolist() == [3, 4]


def test_trees(tmp_path, monkeypatch):
    flat = run("Trees of JAX", tmp_path, monkeypatch)["flat"]
    params, state = jbn.init(2)
    learned, running = convert.to_flax(params, state)
    variables = {"params": {"a": {"bn": learned}, "head": {"kernel": ONES}}, "batch_stats": {"a": {"bn": running}}}
    layers, unused = convert.find(flat(variables), "flax")
    assert list(layers) == ["a/bn"] and unused == ("params/head/kernel",)
    assert set(flat([{"bn": learned}])) == {"0/bn/scale", "0/bn/bias"}
    learned, mean, var = convert.to_haiku(params, state, decay=0.9)
    state = {"net/~/bn/~/mean_ema": mean, "net/~/bn/~/var_ema": var}
    layers, unused = convert.find(flat({"net/~/bn": learned}, state), "haiku", decay=0.9)
    assert list(layers) == ["net/~/bn"] and not unused


class Harm:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file ran')",)


def test_what_a_pickle_would_run_is_not_run(tmp_path, monkeypatch):
    read_torch = run(".pt, .pth", FILES, monkeypatch)["read_torch"]
    read_paddle = run(".pdparams", FILES, monkeypatch)["read_paddle"]
    harm = pickle.dumps({"bn.weight": Harm()})
    (tmp_path / "model.pdparams").write_bytes(harm)
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", harm)
    with pytest.raises(SystemExit, match="the file ran"):
        pickle.loads(harm)
    for read, name in ((read_paddle, "model.pdparams"), (read_torch, "model.pt")):
        with pytest.raises(KeyError, match=r"builtins\.exec"):
            read(tmp_path / name)


def test_a_tensor_that_says_it_is_larger_than_its_numbers(monkeypatch):
    """Else what lies behind them in memory would be read."""
    tensor = run(".pt, .pth", FILES, monkeypatch)["tensor"]
    assert tensor(np.arange(6.0), 0, (3, 2), (1, 3)).tolist() == [[0, 3], [1, 4], [2, 5]]
    for offset, size, stride in ((0, (7,), (1,)), (1, (6,), (1,)), (0, (2,), (6,)), (4, (2,), (-5,)), (-1, (1,), (1,))):
        with pytest.raises(ValueError, match="larger than its numbers"):
            tensor(np.arange(6.0), offset, size, stride)
