"""The rows of other libraries against what those made, tests/golden/libraries, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import libraries
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jbn
from jbn import convert, presets
from jbn._libraries.rows import LIBRARIES, row

# float32 outputs up to 10 of sums of 8 and 16 values, relative to 1 + their size. Sonnet divides by 1 - 0.999^5, which
# float32 knows to 1.2e-5.
CLOSE = 1e-5
GOLDEN = [name for name in LIBRARIES if libraries.path_of(name).exists()]
golden = pytest.mark.parametrize("name", GOLDEN)
every = pytest.mark.parametrize("name", LIBRARIES)


@golden
def test_evaluation_next_step_and_entries_are_those_of_the_library(name):
    found, library = libraries.compare(name), LIBRARIES[name]
    print(found)
    assert found.evaluation < CLOSE or library.evaluation
    assert found.output < CLOSE or library.training
    assert found.entries < CLOSE
    assert found.back < CLOSE


@golden
def test_what_a_row_gives_as_a_reason_is_the_reason(name):
    """With that taken into account the numbers are the library's."""
    made, library = libraries.load(name), LIBRARIES[name]
    if not (library.evaluation or library.training):
        return
    params, state = libraries.converted(name, made.entries, made.settings)
    options = {"epsilon": library.epsilon, "feature_axis": np.ravel(made.settings["feature_axis"]).tolist()}
    x, settings = made.x[-1], {"decay": library.decay, "unbiased": library.unbiased}
    measured = jbn.moments(x, feature_axis=options["feature_axis"])
    by_batch = jbn.State(measured.mean, measured.var)
    if name == "torch geometric hetero":
        options["epsilon"] = 0.0
    elif name == "equinox batch":
        left = library.decay ** int(made.entries["counter"])
        state = state._replace(var=state.var + left / (1 - left))
    elif name == "equinox ema":
        by_batch = jbn.update(state, measured, **settings)
    else:
        by_batch = by_batch._replace(var=measured.var * measured.count / (measured.count - 1))
    without = libraries.compare(name)
    evaluation = libraries.apart(jbn.normalize_running(x, params, state, **options), made.evaluated)
    output = libraries.apart(jbn.normalize_running(x, params, by_batch, **options), made.trained)
    assert max(evaluation, output) < CLOSE
    assert not library.evaluation or evaluation < without.evaluation / 10
    assert not library.training or output < without.output / 10


@golden
def test_version_and_settings_are_those_of_the_file(name):
    settings, library = libraries.load(name).settings, LIBRARIES[name]
    assert settings["library"] == name
    assert settings["package"].partition("==")[2].partition("+")[0] == library.version
    assert settings["epsilon"] == library.epsilon
    made = libraries.load(name)
    mean = next(key for key in made.entries if key.replace("/", ".").endswith(library.names[2].replace("/", ".")))
    assert (made.entries[mean] == made.after[mean]).all() != bool(library.momentum)
    assert settings["decay"] == pytest.approx(library.decay if library.momentum else 0.9)


@every
def test_each_row_was_run_or_says_why_not(name):
    library = LIBRARIES[name]
    assert (name in GOLDEN) != bool(library.read)
    assert library.surprise


def test_each_file_has_a_row_and_is_small():
    files = sorted(libraries.GOLDEN.glob("*.npz"))
    assert files == sorted(map(libraries.path_of, GOLDEN))
    assert all(file.stat().st_size < 5000 for file in files)
    page = (libraries.GOLDEN.parent / "README.md").read_text()
    assert {*re.findall(r"^\| ([\w-]+) \| \S+ [\d.]+ \|", page, re.MULTILINE)} == {file.stem for file in files}


@golden
def test_a_network_of_flat_names(name):
    """Two layers under names of their own, between what is no batch norm."""
    library, made = LIBRARIES[name], libraries.load(name)
    decay = {"decay": made.settings["decay"]} if library.evidence in ("average", "hidden") else {}
    network = {"head.kernel": np.ones((3, 2), "f4")}
    for layer in ("block.0", "stem"):
        network |= {f"{layer}.{key}": value for key, value in made.entries.items()}
    network |= {f"norm.{key}": np.ones(3, "f4") for key in library.names[:2]}
    if library.nameless:
        with pytest.raises(ValueError, match="no names in its files"):
            convert.find(network, name, **decay)
        return
    expected = libraries.converted(name, made.entries, made.settings)
    for separator in "./":
        given = {key.replace(".", separator): value for key, value in network.items()}
        found = convert.find(given, name, **decay)
        assert list(found.layers) == [f"block{separator}0", "stem"]
        assert found.unused == tuple(key for key in given if key.startswith(("head", "norm")))
        for layer in found.layers.values():
            jax.tree.map(assert_array_equal, layer, expected)


NAMES = {
    "of a file of MXNet": ("mxnet", {"arg:bn0_gamma", "arg:bn0_beta", "aux:bn0_running_mean", "aux:bn0_running_var"}),
    "of Flax's collections": ("flax", {"params/bn0/scale", "batch_stats/bn0/mean", "batch_stats/bn0/var"}),
    "of TensorFlow 1": ("tensorflow keras", {"bn0/moving_mean:0", "bn0/moving_variance:0", "bn0/beta:0"}),
    "of a checkpoint of TensorFlow 2": (
        "tensorflow keras",
        {f"bn0/{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in ("gamma", "beta", "moving_mean", "moving_variance")},
    ),
}


@pytest.mark.parametrize(("library", "names"), NAMES.values(), ids=NAMES)
def test_names(library, names):
    found = convert.find(dict.fromkeys(names, np.ones(2, "f4")), library)
    assert list(found.layers) == ["bn0"] and not found.unused


def test_a_network_without_batch_norm():
    """A mean and a variance may be those by which images are normalized."""
    images = {"images.mean": np.zeros(3, "f4"), "images.var": np.ones(3, "f4"), "head.kernel": np.ones((3, 2), "f4")}
    assert convert.find(images, "torch") == ({}, tuple(images))


def test_names_of_haiku():
    entries = libraries.load("haiku").entries
    names = {f"net/~/bn/{'~/' * (key.count('.'))}{key.replace('.', '/')}": value for key, value in entries.items()}
    assert "net/~/bn/~/mean_ema/average" in names and "net/~/bn/scale" in names
    found = convert.find(names, "haiku", decay=0.9)
    assert list(found.layers) == ["net/~/bn"] and not found.unused


@every
def test_presets(name):
    preset = presets.of(name)
    assert set(preset) == {"decay", "epsilon", "unbiased"}
    jbn.batch_norm(jnp.arange(6.0).reshape(3, 2), *jbn.init(2), train=True, **preset)


def test_the_presets_by_name_are_those_of_the_rows():
    for name in ("torch", "flax", "keras", "haiku"):
        assert getattr(presets, name.upper()) == presets.of(name)


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_params_keep_their_dtype(name, dtype):
    with jax.enable_x64(True):
        library = LIBRARIES[name]
        params, state = jbn.init((2, 3) if "types" in library.shape else 3)
        params = jbn.Params(params.scale.astype(dtype), params.bias.astype(dtype))
        counted = {"decay": 0.9} if library.evidence in ("average", "hidden") else {}
        entries = convert.to_library(params, state, name, **counted)
        assert all(type(entry) is np.ndarray for entry in entries.values())
        narrow = {key: entries[key].astype(jnp.dtype(dtype)) for key in library.names[:2]}
        params, state = convert.from_library(entries | narrow, name, **counted)
        assert params.bias.dtype == dtype and state.mean.dtype == state.weight.dtype == "float32"
        assert params.scale is None if library.scale == "fixed" else params.scale.dtype == dtype


def test_scales_that_are_stored_otherwise_come_back():
    params, state = jbn.Params(jnp.array([1e-3, 1.0, 50.0]), None), jbn.init(3)[1]
    for name in ("nflows", "pyro", "e3nn"):
        entries = convert.to_library(params, state, name, epsilon=1e-4)
        back, _ = convert.from_library(entries, name, epsilon=1e-4)
        np.testing.assert_allclose(back.scale, params.scale, rtol=1e-6)
        ones = convert.from_library(convert.to_library(params._replace(scale=None), state, name), name)[0]
        np.testing.assert_allclose(ones.scale, 1, rtol=1e-6)
    wide = convert.to_library(params._replace(scale=None), state, "mxnet operator")
    assert wide["gamma"].tolist() == [1, 1, 1]


def test_epsilon_that_is_blended_is_that_of_the_layer():
    x, entries = np.float32([[0.01], [0.03]]), {"mean": np.zeros(1, "f4"), "var": np.full(1, 4e-4, "f4")}
    params, state = convert.from_library(entries, "e3nn", epsilon=0.01)
    ours = jbn.normalize_running(x, params, state, epsilon=0.01 / 0.99)
    np.testing.assert_allclose(ours, x / np.sqrt(0.99 * 4e-4 + 0.01), rtol=1e-6)


def test_without_the_start_at_zero():
    """nflows: 0.5 * 0 + 0.5 * 3, twice."""
    entries = {"running_mean": np.float32([2.25]), "running_var": np.float32([3.0])}
    _, state = convert.from_library(entries, "nflows", steps=2, decay=0.5)
    assert [float(field[0]) for field in state] == [3, 4, 0.75]
    _, state = convert.from_library(dict.fromkeys(entries, np.zeros(1, "f4")), "nflows", steps=0, decay=0.5)
    assert [float(field[0]) for field in state] == [0, 1, 0]


PADDLE = {"_mean": np.zeros(2, "f4"), "_variance": np.ones(2, "f4")}
FIRST = {"mean": np.zeros(2, "f4"), "var": np.ones(2, "f4"), "first_time": np.array(False)}
COUNTED = {"mean": np.zeros(2, "f4"), "var": np.ones(2, "f4"), "counter": np.array(3)}


def no_data():  # of a tensor on PyTorch's meta device
    raise NotImplementedError("no data")


REFUSED = {
    "no such library": (
        lambda: convert.from_library(PADDLE, "padle"),
        r"library is 'padle'; expected one of 'torch', .*Is it 'paddle'",
    ),
    "by its title": (lambda: presets.of("PyTorch"), r"library is 'PyTorch'.*Is it 'torch'"),
    "the other way round": (lambda: convert.find("torch", {}), r"library is a dict; expected a name such as 'torch'"),
    "by a word of its title": (lambda: presets.of("nnx"), r"library is 'nnx'; .*Is it 'flax'\?$"),
    "names of another": (
        lambda: convert.from_library({"mean": np.zeros(2, "f4"), "var": np.ones(2, "f4")}, "paddle"),
        r"expected _mean, _variance and, .*weight, bias \(missing: _mean, _variance; unknown: mean, var\)\. "
        r"PaddlePaddle writes weight, bias, _mean, _variance\. .*The names fit 'flax', .*jbn\.convert\.find",
    ),
    "names of its sibling": (
        lambda: convert.from_library(
            {f"bn.{key}": np.ones(2, "f4") for key in LIBRARIES["mxnet"].names}, "mxnet operator"
        ),
        r"unknown: bn\.running_mean, bn\.running_var\).*'mxnet operator free'\. The names fit 'mxnet', 'objax'\. ",
    ),
    "no names": (
        lambda: convert.from_library([1], "paddle"),
        r"a list; expected a mapping.*PaddlePaddle writes weight, ",
    ),
    "of two layers": (
        lambda: convert.from_library({f"{at}.{key}": value for at in "ab" for key, value in PADDLE.items()}, "paddle"),
        r"several entries named _mean: 'a\._mean', 'b\._mean'\. .*jbn\.convert\.find",
    ),
    "a file": (lambda: convert.find(Path("model.pdparams"), "paddle"), r"entries is a \w+Path; .*docs/files\.md"),
    "a network of another": (
        lambda: convert.find({f"bn.{key}": np.ones(2, "f4") for key in LIBRARIES["paddle"].names}, "torch"),
        r"no layer with running_mean and running_var, which PyTorch writes\. The names fit 'paddle'\.$",
    ),
    "names that are none": (
        lambda: convert.find({("params", "bn", "scale"): np.ones(2, "f4")}, "flax"),
        r"names such as \('params', 'bn', 'scale'\); expected strings, .*sep='/'",
    ),
    "without data": (
        lambda: convert.find({f"bn.{key}": Tensor(value, detach=no_data) for key, value in PADDLE.items()}, "paddle"),
        r"'bn': entries\['_mean'\] is a Tensor; expected an array\. no data",
    ),
    "shape": (
        lambda: convert.from_library({key: value[None, :, None, None] for key, value in PADDLE.items()}, "paddle"),
        r"_mean has shape \[1, 2, 1, 1\]; expected \[C\], as PaddlePaddle writes it",
    ),
    "variance below 0": (
        lambda: convert.from_library(PADDLE | {"_variance": np.float32([1, -1])}, "paddle"),
        r"_variance has 1 of 2 values such as -1\.0; expected finite variances, none below 0",
    ),
    "momentum of the new value": (
        lambda: convert.from_library(libraries.load("mlx").entries, "mlx", steps=3, decay=0.1),
        r"decay is 0\.1; .*MLX's default momentum, 0\.1, is the weight of the new one: decay=0\.9",
    ),
    "one minus the momentum": (
        lambda: convert.from_library(PADDLE, "paddle", steps=3, decay=0.1),
        r"decay is 0\.1; .*PaddlePaddle's default momentum, 0\.9, is the weight of the old one: decay=0\.9",
    ),
    "counted": (
        lambda: convert.from_library(COUNTED, "equinox batch", steps=3, decay=0.9),
        r"steps is 3; Equinox, mode batch holds counter: leave it out",
    ),
    "without a decay": (
        lambda: convert.from_library(COUNTED, "equinox batch"),
        r"decay is None; expected the decay of the layer.*Its default is 0\.99",
    ),
    "nested": (
        lambda: convert.find({"params": {"bn": FIRST}}, "flax"),
        r"entries has mappings in 'params'; .*flax\.traverse_util\.flatten_dict",
    ),
    "a layer of a network": (
        lambda: convert.find({"a.b.running_mean": np.zeros(2, "f4"), "a.b.running_var": np.zeros(3, "f4")}, "mlx"),
        r"'a\.b': the shapes differ: running_mean \[2\], running_var \[3\]",
    ),
    "twice": (
        lambda: convert.from_library(PADDLE | {"_mean:0": np.zeros(2, "f4")}, "paddle"),
        r"expected _mean, .*\(unknown: _mean:0\)",
    ),
    "a scale that is fixed": (
        lambda: convert.to_library(jbn.Params(jnp.full(2, 3.0), None), jbn.init(2)[1], "mxnet operator"),
        r"params\.scale has values such as 3; MXNet operator takes it as 1, whatever is stored",
    ),
    "a scale below 0": (
        lambda: convert.to_library(jbn.Params(jnp.full(2, -3.0), None), jbn.init(2)[1], "nflows"),
        r"params\.scale has values such as -3; expected more than 1e-05: nflows stores it as softplus",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        call()


class Tensor:
    """As those of PyTorch and its kin, without what some of them have not."""

    def __init__(self, array, **methods):
        self.array, self.dtype = array, array.dtype
        vars(self).update(methods)


def test_tensors_are_taken():
    array = np.float32([1.0, 2.0])
    detached = Tensor(array, numpy=lambda: array)  # MegEngine's, without cpu
    on_device = Tensor(array, cpu=lambda: detached)  # PyTorch's and PaddlePaddle's
    mxnet = Tensor(array, asnumpy=lambda: array, detach=None)  # and MindSpore's
    for given in (mxnet, Tensor(array, detach=lambda: detached), Tensor(array, detach=lambda: on_device)):
        _, state = convert.from_library({"running_mean": given, "running_var": given}, "megengine")
        assert state.var.tolist() == [1, 2]


def test_no_library_is_imported():
    code = "import sys, jbn.convert, jbn.presets; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'jax'" in found
    for package in ("torch", "paddle", "mxnet", "onnx", "tensorflow", "chainer", "safetensors", "h5py"):
        assert f"'{package}'" not in found


def test_a_row_by_name_has_another_epsilon():
    assert row("torch").epsilon == 1e-5 and row("torch", 1e-3).epsilon == 1e-3
