"""Conversion from and to PyTorch itself, of layers and of the network on the page."""

import copy
import inspect
import re
from functools import partial
from pathlib import Path

import conversion
import golden
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import convert, presets

torch, torch_resnet = (pytest.importorskip(name) for name in ("torch", "torch_resnet"))

FEATURES, BATCHES = golden.FEATURES, golden.batches()
X = BATCHES[-1]
# float32 outputs up to 10 of sums of 8 values
close = partial(assert_allclose, rtol=1e-5, atol=1e-5)


def test_the_preset_is_the_defaults():
    defaults = {name: each.default for name, each in inspect.signature(torch.nn.BatchNorm2d).parameters.items()}
    assert defaults["eps"] == presets.TORCH["epsilon"]
    assert 1 - defaults["momentum"] == presets.TORCH["decay"]


def steps_of_torch(layer):
    for x in BATCHES[:-1]:
        layer.train()(torch.from_numpy(x))
    return layer


def assert_goes_on_alike(layer, params, state, decay=0.9):
    """Evaluation, and the next step of the layer, which moves on by it."""
    x = torch.from_numpy(X)
    close(jbn.normalize_running(X, params, state), layer.eval()(x).detach())
    y, state = jbn.batch_norm(X, params, state, train=True, **(presets.TORCH | {"decay": decay}))
    close(y, layer.train()(x).detach())
    close(state.mean, layer.running_mean)
    close(state.var, layer.running_var)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm])
def test_torch_and_back(affine, kind):
    layer = kind(FEATURES, affine=affine)
    if kind is torch.nn.BatchNorm1d:
        steps_of_torch(layer)
    params, state = convert.from_torch(layer.state_dict())
    assert (params.scale is not None, params.bias is not None) == (affine, affine)
    back = convert.to_torch(params, state, steps=layer.num_batches_tracked)
    other = torch.nn.BatchNorm1d(FEATURES, affine=affine)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()}, strict=True)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert_goes_on_alike(other, params, state)


def test_torch_without_its_initial_values():
    layer = steps_of_torch(torch.nn.BatchNorm1d(FEATURES))
    entries = layer.state_dict()
    _, state = convert.from_torch(entries, steps=entries["num_batches_tracked"], decay=0.9)
    mean, var = conversion.exact(BATCHES[:-1], presets.TORCH, "none")
    close(state.mean, mean)
    close(state.var, var)
    assert_allclose(state.weight, 1 - 0.9**4, rtol=1e-6)


def test_torch_tensors_that_need_a_gradient_are_copied():
    layer = steps_of_torch(torch.nn.BatchNorm1d(FEATURES))
    params, state = convert.from_torch(dict(layer.named_parameters()) | dict(layer.named_buffers()))
    expected = jax.tree.map(np.array, (params, state))
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.fill_(77)
    jax.tree.map(assert_array_equal, (params, state), expected)
    back = {name: torch.from_numpy(array) for name, array in convert.to_torch(params, state).items()}
    for value in back.values():
        value.fill_(77)
    jax.tree.map(assert_array_equal, (params, state), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_dtypes(dtype):
    layer = torch.nn.BatchNorm1d(FEATURES).to(dtype)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.running_mean)
    with jax.enable_x64(True):
        params, state = convert.from_torch(layer.state_dict())
        assert params.scale.dtype == str(dtype).removeprefix("torch.")
        assert state.mean.dtype == ("float64" if dtype == torch.float64 else "float32")
        assert_array_equal(params.scale.astype("float64"), layer.weight.detach().double())
        assert_array_equal(state.mean.astype("float64"), layer.running_mean.double())
        back = convert.to_torch(params, state)
    other = torch.nn.BatchNorm1d(FEATURES).to(dtype)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()})
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_torch_momentum_none_is_full_evidence():
    """Nothing is left of the start, and the count goes back in `steps`."""
    layer = steps_of_torch(torch.nn.BatchNorm1d(FEATURES, momentum=None))
    params, state = convert.from_torch(layer.state_dict())
    assert_array_equal(state.weight, 1)
    close(state.mean, np.mean([x.mean(0) for x in BATCHES[:-1]], 0))
    other = torch.nn.BatchNorm1d(FEATURES, momentum=None)
    back = convert.to_torch(params, state, steps=4)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()})
    assert_goes_on_alike(other, params, state, decay=4 / 5)


def test_torch_without_running_statistics():
    layer = torch.nn.BatchNorm1d(FEATURES, track_running_stats=False)
    with pytest.raises(ValueError, match=r"entries has weight, bias; expected .*track_running_stats=False"):
        convert.from_torch(layer.state_dict())
    assert convert.find_torch(layer.state_dict()) == ({}, ("weight", "bias"))


def test_torch_network():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ModuleDict(
            {"deep": torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.BatchNorm1d(5, affine=False))}
        ),
        torch.nn.LayerNorm(7),
        torch.nn.BatchNorm1d(3, track_running_stats=False),
        torch.nn.BatchNorm3d(6),
    )
    layers, unused = convert.find_torch(network.state_dict())
    assert {name: len(state.mean) for name, (_, state) in layers.items()} == {"1": 4, "2.deep.1": 5, "5": 6}
    assert layers["2.deep.1"][0] == (None, None)
    others = ("0", "2.deep.0", "3", "4")
    assert unused == tuple(f"{name}.{field}" for name in others for field in ("weight", "bias"))


@pytest.fixture(scope="module")
def original():
    return torch_resnet.trained()


@pytest.fixture(scope="module")
def page(original):
    """What the page on conversion defines; its `model` is loaded with the state after a step."""
    code = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/convert.md").read_text(), re.DOTALL)
    found = {"model": copy.deepcopy(original)}
    for snippet in code:
        exec(snippet, found)
    return found


def test_the_page_converts_every_array_of_resnet18(page, original):
    names = original.state_dict().keys()
    assert len(names) == 122
    assert len(page["layers"]) == 20
    assert len(page["unused"]) == 22
    assert page["back"].keys() == names


def test_the_page_trains_and_goes_back_as_the_network_itself(page, original):
    network, images = copy.deepcopy(original).train(), torch.from_numpy(page["images"].transpose(0, 3, 1, 2).copy())
    expected = network(images).detach()
    before = original.state_dict()
    for prefix in page["layers"]:
        for field, name in (("mean", "running_mean"), ("var", "running_var")):
            theirs = network.state_dict()[f"{prefix}.{name}"]
            assert_allclose(getattr(page["state"][prefix], field), theirs, rtol=1e-4, atol=1e-5)
            assert not np.allclose(theirs, before[f"{prefix}.{name}"], rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        assert_allclose(page["model"](images), network.eval()(images), rtol=1e-3, atol=1e-3)  # loaded after the step
    layers = convert.find_torch(before).layers
    state = {name: each for name, (_, each) in layers.items()}
    logits, _ = page["resnet18"](page["norms"], page["kernels"], state, page["images"], train=True)
    # twenty normalizations by a batch, the last of them of 16 values
    assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
