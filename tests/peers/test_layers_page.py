"""docs/layers.md: its code runs as it stands, does what the text says, and is that of the frameworks' own layers.

Ten steps agree to 1e-5: float32 sums of 32 values near 1 to 10 in another order, and what ten steps make of that.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import haiku as hk
import jax
import jax.numpy as jnp
import keras
import layers
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's get_weights
TOLERANCE = {"Haiku": 1e-4}  # whose variance is E[x^2] - E[x]^2; of the others 1e-5
every = pytest.mark.parametrize("heading", list(layers.STEPS))
PADDED = np.random.default_rng(1).normal(3, 2, (4, 5, 3)).astype(np.float32)
MASK = np.random.default_rng(2).uniform(size=(4, 5)) < 0.6
KEPT = PADDED.astype(np.float64)[MASK]


def run(heading):
    """What all code of a section defines, one block after the other."""
    found = {}
    for block in (*layers.sections()[""], *layers.sections()[heading]):
        exec(block, found)
    return found


def first_kernel(heading, found):
    """Kernel and bias of the linear map before the normalization."""
    if heading in ("Flax nnx", "Equinox", "Keras"):
        model = found["model"]
        if heading == "Equinox":
            return np.asarray(model[0].weight).T, model[0].bias
        layer = model.first if heading == "Flax nnx" else model.layers[0]
        return (layer.kernel[...], layer.bias[...]) if heading == "Flax nnx" else (layer.kernel, layer.bias)
    layer = found["params"]["Dense_0" if heading == "Flax linen" else "linear"]
    return layer["kernel"] if "kernel" in layer else layer["w"], layer["bias" if "bias" in layer else "b"]


def running(heading, found):
    """The running mean and variance of the network."""
    if heading == "Flax linen":
        return found["state"]["BatchNorm_0"]["mean"], found["state"]["BatchNorm_0"]["var"]
    if heading == "Flax nnx":
        return found["model"].norm.mean[...], found["model"].norm.var[...]
    if heading == "Equinox":
        return found["state"].get(found["model"][1].state_index)[:2]
    if heading == "Haiku":
        return found["state"]["batch_norm"]["state"][:2]
    return found["model"].layers[1].moving_mean, found["model"].layers[1].moving_variance


@every
def test_the_section_runs_and_recalibrates_to_the_statistics_of_all_batches(heading):
    found = run(heading)
    kernel, bias = (np.asarray(value, np.float64) for value in first_kernel(heading, found))
    h = found["batches"].reshape(-1, 4).astype(np.float64) @ kernel + bias
    mean, var = (np.asarray(value) for value in running(heading, found))
    assert_allclose(mean, h.mean(0), rtol=1e-5, atol=1e-5)
    # divided by count, not count - 1, which is 3e-3 away
    assert_allclose(var, h.var(0), rtol=1e-5)
    assert np.isfinite(np.asarray(found["y"])).all()


def test_the_layers_with_renormalization_are_made_as_the_page_says():
    found = run("Batch renormalization")
    x = found["batches"][0]
    assert found["short"].init(jax.random.key(0), x)["batch_stats"]["steps"] == 0
    assert found["sooner"](x).shape == x.shape and int(found["sooner"].steps[...]) == 1
    layer, state = found["paper"]
    y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    assert y.shape == x.shape and int(state.get(layer.steps_index)) == 1


@every
def test_ten_steps_are_those_of_the_frameworks_own_layer(heading):
    found = layers.differences(heading)
    print(found)
    if heading == "Equinox":
        assert found.evaluation > 0.05  # its own is not exact: see test_equinox_layer
        found = found._replace(evaluation=0)
    assert max(found) < TOLERANCE.get(heading, 1e-5)


@every
def test_one_word_changes_or_a_dozen_lines_are_added(heading):
    before, after = (layers.lines(heading, own=own) for own in (True, False))
    if layers.IMPORTS[heading][1]:
        theirs, ours = (line.split() for line in layers.IMPORTS[heading])
        assert sum(one != other for one, other in zip(theirs, ours, strict=True)) == 1
        assert before == after
        return
    (layer,) = (block for block in layers.sections()[heading] if "class BatchNorm" in block)
    body = layer[layer.index("class") :]
    assert sum(bool(line.strip()) for line in body.splitlines()) < 15


@every
def test_the_table_of_the_page(heading):
    """Differences of rounding vary between machines: by their size."""
    (row,) = (line for line in layers.PAGE.read_text().splitlines() if line.startswith(f"| {heading} |"))
    *numbers, before, after = row.strip("| ").split(" | ")[1:]
    assert [int(before), int(after)] == [layers.lines(heading, own=own) for own in (True, False)]
    assert len(numbers) == len(layers.Step._fields)
    for name, number in zip(layers.Step._fields, numbers, strict=True):
        assert float(number) < TOLERANCE.get(heading, 1e-5) or (heading == "Equinox" and name == "evaluation")


def expected_where_kept():
    """What one step of each layer gives at the positions that are kept, with epsilon 1e-5."""
    return (KEPT - KEPT.mean(0)) / np.sqrt(KEPT.var(0) + 1e-5)


def haiku_layer(**options):
    batch_norm = run("Haiku")["BatchNorm"]
    arguments = {"create_scale": True, "create_offset": True, "decay_rate": 0.9} | options
    forward = lambda x, train, mask=None: batch_norm(**arguments, name="norm")(x, train, mask)  # noqa: E731
    return hk.without_apply_rng(hk.transform_with_state(forward))


def test_haiku_leaves_out_what_is_masked_and_keeps_dtype_and_statistics():
    layer = haiku_layer()
    params, state = layer.init(None, PADDED, True)
    x = np.where(MASK[..., None], PADDED, np.nan)
    y, after = layer.apply(params, state, x, True, MASK)
    assert_array_equal(np.asarray(y)[~MASK], 0)
    assert_allclose(np.asarray(y)[MASK], expected_where_kept(), atol=1e-5)
    assert_allclose(after["norm"]["state"].mean, KEPT.mean(0), rtol=1e-5)
    y, narrow = layer.apply(params, state, jnp.bfloat16(PADDED), True)
    assert (y.dtype, narrow["norm"]["state"].mean.dtype) == (jnp.bfloat16, jnp.float32)
    _, spoiled = layer.apply(params, after, x, True)
    assert all(map(np.array_equal, spoiled["norm"]["state"], after["norm"]["state"]))


def test_haiku_without_scale_or_offset_and_pooled_over_an_axis():
    layer = haiku_layer(create_scale=False, create_offset=False, cross_replica_axis="lane")
    params, state = layer.init(None, PADDED, False)
    assert not params
    y, after = jax.vmap(lambda x: layer.apply({}, state, x, True), axis_name="lane", out_axes=(0, None))(PADDED)
    x = PADDED.astype(np.float64)
    assert_allclose(y, (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5), atol=1e-5)
    assert_allclose(after["norm"]["state"].var, x.var((0, 1)), rtol=1e-5)


def test_haiku_state_carries_over():
    """Three steps of Haiku's layer and a fourth of either: the same output and the same averages."""
    rng, layer = np.random.default_rng(0), haiku_layer()
    peer = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.9, name="norm")(x, train))
    )
    params, theirs = peer.init(None, PADDED, True)
    params = jax.tree.map(lambda value: value + rng.normal(size=value.shape).astype(np.float32), params)
    for step in range(3):
        _, theirs = peer.apply(params, theirs, PADDED + step, True)
    ours = run("Haiku")["of_haiku"]({**theirs, "other": {"count": 1}}, 0.9)
    assert ours.pop("other") == {"count": 1}
    assert list(ours) == ["norm"]
    (y, ours), (their_y, theirs) = (
        of.apply(params, state, PADDED, True) for of, state in ((layer, ours), (peer, theirs))
    )
    # Haiku's variance is E[x^2] - E[x]^2, which loses digits where the mean is not 0.
    assert_allclose(y, their_y, atol=1e-4)
    assert_allclose(ours["norm"]["state"].mean, theirs["norm/~/mean_ema"]["average"].ravel(), rtol=1e-5)
    assert_allclose(ours["norm"]["state"].var, theirs["norm/~/var_ema"]["average"].ravel(), rtol=1e-4)


@pytest.fixture(scope="module")
def keras_layer():
    return run("Keras")["BatchNorm"]


def test_keras_leaves_out_what_is_masked_and_keeps_dtype_and_statistics(keras_layer):
    layer = keras_layer(momentum=0.0, epsilon=1e-5)
    x = np.where(MASK[..., None], PADDED, np.nan)
    y = layer(x, training=True, mask=MASK)
    assert_array_equal(np.asarray(y)[~MASK], 0)
    assert_allclose(np.asarray(y)[MASK], expected_where_kept(), atol=1e-5)
    assert_allclose(layer.moving_mean, KEPT.mean(0), rtol=1e-5)
    before = layer.get_weights()
    layer(x, training=True)
    assert all(map(np.array_equal, before, layer.get_weights()))
    narrow = keras_layer(dtype="mixed_bfloat16")
    assert narrow(PADDED, training=True).dtype == jnp.bfloat16
    assert {each.dtype for each in narrow.weights} == {"float32"}


def test_keras_masks_arrive_from_the_layers_before(keras_layer):
    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    model = keras.Sequential([keras.Input((4,)), embedding, keras_layer(epsilon=1e-5)])
    tokens = np.array([[1, 2, 0, 0], [3, 4, 1, 0]])
    y, kept = np.asarray(model(tokens, training=True)), tokens > 0
    x = np.asarray(embedding.embeddings, np.float64)[tokens][kept]
    assert_array_equal(y[~kept], 0)
    assert_allclose(y[kept], (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=1e-3, atol=1e-4)  # values of some 0.03


def test_keras_weights_carry_over_both_ways(keras_layer):
    ours, theirs = keras_layer(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for layer in (ours, theirs):
        layer.build(PADDED.shape)
    assert [each.name for each in ours.weights] == [each.name for each in theirs.weights]
    given = [np.array(values, np.float32) for values in ([1, 2, 3], [0, 1, -1], [1, 0, 4], [4, 1, 2])]
    theirs.set_weights(given)
    ours.set_weights(theirs.get_weights())
    for train in (False, True, False):
        # Keras computes x * inv + (bias - mean * inv), which loses digits where the mean is not 0.
        assert_allclose(ours(PADDED, training=train), theirs(PADDED, training=train), atol=1e-4)
    theirs.set_weights(ours.get_weights())
    assert_allclose(ours(PADDED), theirs(PADDED), atol=1e-4)


def test_keras_frozen_and_saved(keras_layer, tmp_path):
    found = run("Keras")
    model, layer = found["model"], found["model"].layers[1]
    layer.trainable = False
    before = layer.get_weights()
    layer(np.ones((2, 5, 8), np.float32), training=True)
    assert all(map(np.array_equal, before, layer.get_weights()))
    model.save(tmp_path / "model.keras")
    read = keras.models.load_model(tmp_path / "model.keras", custom_objects={"BatchNorm": found["BatchNorm"]})
    assert read.layers[1].options["decay"] == 0.9
    assert_array_equal(read(found["batches"][0]), model(found["batches"][0]))
