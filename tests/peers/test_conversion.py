"""Conversion from and to the libraries themselves, PyTorch apart; tests/test_convert.py has what needs none of them."""

import inspect
import os
import re
from functools import partial
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import conversion
import equinox as eqx
import flax.linen as nn
import golden
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import convert, presets

FEATURES, BATCHES = golden.FEATURES, golden.batches()
X = BATCHES[-1]
sources = pytest.mark.parametrize("name", golden.SOURCES)
# float32 outputs up to 10 of sums of 8 values; Haiku's variance is E[x^2] - E[x]^2
close = partial(assert_allclose, rtol=1e-5, atol=1e-5)
affine = pytest.mark.parametrize(("scale", "bias"), [(True, True), (True, False), (False, True), (False, False)])


def make(name):
    if name == "torch":
        pytest.importorskip("torch")
    return golden.SOURCES[name]()


@sources
def test_the_files_are_what_the_libraries_give(name):
    made, stored = make(name), conversion.load(name)
    assert made.keys() == stored.keys()
    for key, value in stored.items():
        assert made[key].dtype == value.dtype
        assert_allclose(made[key], value, rtol=1e-5, atol=1e-5, err_msg=key)  # of another processor


SIGNATURES = {
    "linen": (nn.BatchNorm, presets.FLAX, "momentum", "epsilon"),
    "nnx": (nnx.BatchNorm.__init__, presets.FLAX, "momentum", "epsilon"),
    "keras": (keras.layers.BatchNormalization, presets.KERAS, "momentum", "epsilon"),
    "haiku": (hk.BatchNorm, presets.HAIKU, "decay_rate", "eps"),
    "equinox": (eqx.nn.BatchNorm, presets.FLAX, "momentum", "eps"),
}


@pytest.mark.parametrize(("layer", "preset", "decay", "epsilon"), SIGNATURES.values(), ids=SIGNATURES)
def test_presets_are_the_defaults(layer, preset, decay, epsilon):
    defaults = {name: each.default for name, each in inspect.signature(layer).parameters.items()}
    assert defaults[epsilon] == preset["epsilon"]
    if layer is hk.BatchNorm:
        assert defaults[decay] is inspect.Parameter.empty
        assert hk.testing.transform_and_run(lambda: hk.nets.ResNet18(10).initial_batchnorm.mean_ema.decay)() == 0.9
        assert preset["decay"] == 0.9
    else:
        assert defaults[decay] == preset["decay"]


@pytest.mark.parametrize("name", ["torch", "flax", "keras", "haiku"])
def test_training_from_the_start_with_a_preset_is_that_of_the_library(name):
    made, (_, preset, start) = make(name), conversion.SOURCES[name]
    params, state = jbn.init(FEATURES, debias=start == "none")
    params = jbn.Params(jnp.asarray(golden.SCALE), jnp.asarray(golden.BIAS))
    for x in BATCHES:
        y, state = jbn.batch_norm(x, params, state, train=True, **preset)
    evaluation, _ = jbn.batch_norm(X, params, state, train=False, **preset)
    for ours, theirs in (
        (y, "output"),
        (state.mean, "running_mean"),
        (state.var, "running_var"),
        (evaluation, "evaluation_after"),
    ):
        close(ours, made[theirs])


def fields_of(params, scale, bias):
    """Neither more nor less than what the layer has."""
    assert (params.scale is not None, params.bias is not None) == (scale, bias)


@affine
def test_linen_and_back(scale, bias):
    layer = nn.BatchNorm(use_running_average=None, use_scale=scale, use_bias=bias)
    variables = layer.init(jax.random.key(0), X, use_running_average=True)
    for x in BATCHES[:-1]:
        _, after = layer.apply(variables, x, use_running_average=False, mutable="batch_stats")
        variables = variables | after
    params, state = convert.from_flax(variables.get("params"), variables["batch_stats"])
    fields_of(params, scale, bias)
    close(jbn.normalize_running(X, params, state), layer.apply(variables, X, use_running_average=True))
    learned, running = convert.to_flax(params, state)
    expected = variables.get("params", {}), variables["batch_stats"]
    assert jax.tree.map(jnp.shape, (learned, running)) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(assert_array_equal, (learned, running), expected)
    y, after = layer.apply(
        {"params": learned, "batch_stats": running}, X, use_running_average=False, mutable="batch_stats"
    )
    ours, state = jbn.batch_norm(X, params, state, train=True, **presets.FLAX)
    close(ours, y)
    close(state.var, after["batch_stats"]["var"])


@affine
def test_nnx_and_back(scale, bias):
    make = partial(nnx.BatchNorm, FEATURES, use_scale=scale, use_bias=bias, rngs=nnx.Rngs(0))
    layer, other = make(), make()
    for x in BATCHES[:-1]:
        layer(x, use_running_average=False)
    params, state = convert.from_flax(nnx.state(layer, nnx.Param), nnx.state(layer, nnx.BatchStat))
    fields_of(params, scale, bias)
    expected = jax.tree.map(np.array, (params, state))
    learned, running = convert.to_flax(params, state)
    nnx.update(other, {**learned, **running})
    assert_array_equal(other(X, use_running_average=True), layer(X, use_running_average=True))
    close(jbn.normalize_running(X, params, state), layer(X, use_running_average=True))
    y, (ours, after) = other(X, use_running_average=False), jbn.batch_norm(X, params, state, train=True, **presets.FLAX)
    close(ours, y)
    close(after.mean, other.mean[...])
    close(after.var, other.var[...])
    jax.tree.map(assert_array_equal, (params, state), expected)


@affine
def test_keras_and_back(scale, bias):
    make = partial(keras.layers.BatchNormalization, scale=scale, center=bias)
    layer, other = make(), make()
    for each in (layer, other):
        each.build((None, FEATURES))
    for x in BATCHES[:-1]:
        layer(x, training=True)
    params, state = convert.from_keras(reversed(layer.weights))
    by_name = convert.from_keras({variable.path: np.asarray(variable) for variable in layer.weights})
    jax.tree.map(assert_array_equal, by_name, (params, state))
    fields_of(params, scale, bias)
    expected = jax.tree.map(np.array, (params, state))
    close(jbn.normalize_running(X, params, state, epsilon=1e-3), layer(X, training=False))
    weights = convert.to_keras(params, state)
    other.set_weights([weights[variable.name] for variable in other.weights])
    assert_array_equal(other(X, training=False), layer(X, training=False))
    y, (ours, after) = other(X, training=True), jbn.batch_norm(X, params, state, train=True, **presets.KERAS)
    close(ours, y)
    close(after.mean, other.moving_mean)
    close(after.var, other.moving_variance)
    jax.tree.map(assert_array_equal, (params, state), expected)


def test_networks():
    """As the table of docs/convert.md and docs/files.md give them."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="a"), keras.layers.Dense(2)])
    found = convert.find({each.path: each for each in model.weights}, "keras")
    assert [name.rpartition("/")[2] for name in found.layers] == ["a"] and len(found.unused) == 2

    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    found = convert.find({jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}, "flax")
    assert list(found.layers) == ["layers/1"] and len(found.unused) == 2


def test_keras_weights_without_names():
    layer = keras.layers.BatchNormalization()
    layer.build((None, FEATURES))
    with pytest.raises(TypeError, match="ndarray without a name"):
        convert.from_keras([np.asarray(variable) for variable in layer.weights])  # as of get_weights()


def haiku_network(scale, bias, decay=0.9):
    make = hk.transform_with_state(lambda x, train: hk.BatchNorm(scale, bias, decay)(x, train))
    return hk.without_apply_rng(make)


@affine
@pytest.mark.parametrize("shape", [(FEATURES,), (1, 1, FEATURES)])
def test_haiku_and_back(scale, bias, shape):
    network = haiku_network(scale, bias)
    data = [x.reshape(-1, *shape) for x in BATCHES]
    params, state = network.init(None, data[0], True)
    for x in data[:-1]:
        _, state = network.apply(params, state, x, True)
    parts = [state[f"batch_norm/~/{name}_ema"] for name in ("mean", "var")]
    ours = convert.from_haiku(params.get("batch_norm"), *parts, decay=0.9)
    fields_of(ours[0], scale, bias)
    assert_allclose(ours[1].weight, 1 - 0.9**4, rtol=1e-6)
    close(jbn.normalize_running(data[-1], *ours), network.apply(params, state, data[-1], False)[0])
    learned, *emas = convert.to_haiku(*ours, decay=0.9, shape=(1,) * len(shape) + (FEATURES,))
    back = {f"batch_norm/~/{name}_ema": ema for name, ema in zip(("mean", "var"), emas, strict=True)}
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, dict(state))
    back_params = {"batch_norm": learned} if learned else {}
    y, after = network.apply(back_params, back, data[-1], True)
    y_ours, state_ours = jbn.batch_norm(data[-1], *ours, train=True, **presets.HAIKU)
    y_theirs, after_theirs = network.apply(params, state, data[-1], True)
    jax.tree.map(close, (y, after), (y_theirs, after_theirs))
    close(y_ours, y)
    for name in ("mean", "var"):
        close(getattr(state_ours, name), np.ravel(after[f"batch_norm/~/{name}_ema"]["average"]))


def test_a_fresh_haiku_layer_evaluates_by_the_batch_it_was_initialized_with():
    network = haiku_network(False, False)
    params, state = network.init(None, np.ones_like(X), True)
    off, _ = network.apply(params, state, X, False)
    close(off, (X - 1) / np.sqrt(1e-5), atol=1e-2)
    ours = convert.from_haiku(None, *(state[f"batch_norm/~/{name}_ema"] for name in ("mean", "var")), decay=0.9)
    close(jbn.normalize_running(X, *ours), X)
    _, *emas = convert.to_haiku(*ours, decay=0.9)
    back = {f"batch_norm/~/{name}_ema": ema for name, ema in zip(("mean", "var"), emas, strict=True)}
    close(network.apply(params, back, X, False)[0], X)
    jax.tree.map(close, network.apply(params, back, X, True), network.apply(params, state, X, True))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", ["ema", "batch"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_equinox(affine, mode, steps):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        FEATURES, "batch", momentum=0.9, mode=mode, channelwise_affine=affine
    )
    for x in BATCHES[:steps]:
        _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    params, ours = convert.from_equinox(layer, state)
    fields_of(params, affine, affine)
    if not steps:
        jax.tree.map(assert_array_equal, ours, jbn.init(FEATURES)[1])
        return
    preset = presets.FLAX | {"decay": 0.9}
    mean, var = conversion.exact(BATCHES[:steps], preset, {"ema": "first", "batch": "none"}[mode])
    close(ours.mean, mean)
    close(ours.var, var)
    assert_allclose(ours.weight, 1 if mode == "ema" else 1 - 0.9**steps, rtol=1e-6)


def test_the_table_of_the_page_is_of_these_files():
    """Same columns and rows, and Equinox's evaluation is the only difference that is not rounding."""
    page = (Path(__file__).parents[2] / "docs/convert.md").read_text()
    assert " | ".join(field.replace("_", " ") for field in conversion.Differences._fields) in page
    for name in conversion.SOURCES:
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", page, re.MULTILINE)
        written, found = [float(value) for value in row.split(" | ")], conversion.compare(name)
        assert [value > 1e-3 for value in written] == [value > 1e-3 for value in found]
