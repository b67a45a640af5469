"""`jbn.equinox.BatchNorm` in a network of Equinox, beside its own layer and float64 NumPy.

Tolerances: both sides are float32 sums of some 40 values near 1 to 10, 1e-6 of the largest; ten steps of training and
the two layers carry that on, to 1e-5 or so.
"""

import io
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn.equinox import BatchNorm

MOMENTUM, EPSILON = 0.9, 1e-5
ROWS, IN, HIDDEN, OUT = 16, 3, 5, 2
IN_MODE = {mode: partial(eqx.nn.BatchNorm, mode=mode) for mode in ("batch", "ema")}
FAR = np.random.default_rng(0).normal(3, 2, (10, ROWS, IN)).astype(np.float32)
TARGETS = np.sin(FAR[..., :OUT])


def make(layer, axis_name="batch", **options):
    """Two normalizations, each after a linear map: where one is off, so is what the next is measured from."""

    def network(key):
        first, second = jax.random.split(key)
        norm = partial(layer, axis_name=axis_name, momentum=MOMENTUM, **options)
        layers = [eqx.nn.Linear(IN, HIDDEN, key=first), norm(HIDDEN), eqx.nn.Lambda(jnp.tanh)]
        return eqx.nn.Sequential([*layers, eqx.nn.Linear(HIDDEN, OUT, key=second), norm(OUT)])

    return eqx.nn.make_with_state(network)(jax.random.key(0))


def over_batch(model, state, x, axis_name="batch"):
    return jax.vmap(model, axis_name=axis_name, in_axes=(0, None), out_axes=(0, None))(x, state)


apply = eqx.filter_jit(over_batch)


@eqx.filter_jit
@partial(eqx.filter_value_and_grad, has_aux=True)
def gradient(model, state, x, target):
    y, state = over_batch(model, state, x)
    return jnp.mean((y - target) ** 2), (y, state)


def train(layer, steps=10):
    """(y, gradients, model, state) of every step of gradient descent."""
    model, state = make(layer)
    for x, target in zip(FAR[:steps], TARGETS, strict=False):
        (_, (y, state)), gradients = gradient(model, state, x, target)
        model = eqx.apply_updates(model, jax.tree.map(lambda each: -0.1 * each, gradients))
        yield y, gradients, model, state


def by_hand(model, x, statistics):
    """The network in float64; `statistics(number, h)` gives mean and variance for the input h of normalization 0 or 1.

    Returns the output and the inputs of both normalizations.
    """
    h, inputs = np.asarray(x, np.float64), []
    for number in (0, 1):
        linear, norm = model[3 * number], model[3 * number + 1]
        h = h @ np.asarray(linear.weight, np.float64).T + np.asarray(linear.bias, np.float64)
        mean, var = (np.asarray(value, np.float64) for value in statistics(number, h))
        inputs.append(h)
        h = np.asarray(norm.weight) * (h - mean) / np.sqrt(var + EPSILON) + np.asarray(norm.bias)
        h = h if number else np.tanh(h)
    return h, inputs


def measured(_, h):
    return h.mean(0), h.var(0)


def states_of(model, state):
    return [state.get(model[number].state_index) for number in (1, 4)]


def is_state(value):
    return isinstance(value, jbn.State)


def close(got, expected, tolerance=1e-4):
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def test_an_activation_inside():
    """As one behind it, in training and in inference."""

    def one(inside, x, inference):
        layer, state = eqx.nn.make_with_state(BatchNorm)(IN, "batch", activation=jax.nn.relu if inside else None)

        def loss(x):
            y, after = over_batch(eqx.nn.inference_mode(layer, inference), state, x)
            y = y if inside else jax.nn.relu(y)
            return jnp.sum(jnp.sin(y)), (y, after.get(layer.state_index))

        return jax.value_and_grad(loss, has_aux=True)(x)

    for inference in (False, True):
        close(one(True, FAR[0], inference), one(False, FAR[0], inference), 1e-5)


def test_unbiased():
    x = np.random.default_rng(0).normal(1, 2, (16, IN)).astype(np.float32)
    layer, state = eqx.nn.make_with_state(BatchNorm)(IN, "batch", unbiased=True)
    _, after = over_batch(layer, state, x)
    assert_allclose(after.get(layer.state_index).var, np.float64(x).var(0, ddof=1), rtol=1e-5)


def test_ten_steps_are_those_of_equinox_and_its_hidden_averages_debiased():
    for step, (ours, theirs) in enumerate(zip(train(BatchNorm), train(IN_MODE["batch"]), strict=True), 1):
        (y, gradients, model, state), (their_y, their_gradients, their_model, their_state) = ours, theirs
        assert_allclose(y, their_y, atol=1e-4)
        leaves, their_leaves = jax.tree.leaves(gradients), jax.tree.leaves(their_gradients)
        assert len(leaves) == 8
        close(leaves, their_leaves)
        start = MOMENTUM**step  # the share of the initial mean 0 and variance 1 in what Equinox keeps
        for norm, each in zip((1, 4), states_of(model, state), strict=True):
            hidden_mean, hidden_var = their_state.get(their_model[norm].batch_state_index)
            assert_allclose(each.mean, hidden_mean / (1 - start), rtol=1e-4, atol=1e-5)
            assert_allclose(each.var, (hidden_var - start) / (1 - start), rtol=1e-4)
            assert_allclose(each.weight, 1 - start, rtol=1e-5)


def test_evaluation_is_exact_from_the_first_step_where_that_of_equinox_is_not():
    """After one step Equinox divides the variance 1 it starts from by 0.1 too: it evaluates with var + 9."""
    errors = {}
    for name, layer in {"jbn": BatchNorm, "equinox": IN_MODE["batch"]}.items():
        *_, model, state = next(train(layer, 1))
        before, _ = make(layer)
        expected_statistics = by_hand(before, FAR[0], measured)[1]
        got, _ = apply(eqx.nn.inference_mode(model), state, FAR[1])
        expected, _ = by_hand(model, FAR[1], lambda number, _, of=expected_statistics: measured(None, of[number]))
        errors[name] = np.abs(got - expected).max()
    print(errors)
    assert errors["jbn"] < 1e-4
    assert errors["equinox"] > 0.5


def test_ema_mode_agrees_in_the_first_step_and_evaluates_what_was_never_measured_before_it():
    (y, gradients, model, state), (their_y, their_gradients, their_model, their_state) = (
        next(train(layer, 1)) for layer in (BatchNorm, IN_MODE["ema"])
    )
    assert_allclose(y, their_y, atol=1e-4)
    close(jax.tree.leaves(gradients)[-4:], jax.tree.leaves(their_gradients)[-4:])
    for norm, each in zip((1, 4), states_of(model, state), strict=True):
        close(list(each[:2]), list(their_state.get(their_model[norm].ema_state_index)))
    fresh, state = make(BatchNorm)
    got, _ = apply(eqx.nn.inference_mode(fresh), state, FAR[0])
    expected, _ = by_hand(fresh, FAR[0], lambda number, h: (np.zeros(h.shape[1]), np.ones(h.shape[1])))
    assert_allclose(got, expected, atol=1e-5)


def test_inference_mode_and_the_argument():
    *_, model, state = list(train(BatchNorm, 3))[-1]
    expected, _ = by_hand(model, FAR[5], lambda number, _: states_of(model, state)[number][:2])
    got, same = apply(eqx.nn.inference_mode(model), state, FAR[5])
    assert_allclose(got, expected, atol=1e-5)
    assert eqx.tree_equal(same, state)
    alone = jax.vmap(eqx.nn.inference_mode(model), in_axes=(0, None), out_axes=(0, None))  # no axis name is needed
    assert_allclose(alone(FAR[5], state)[0], expected, atol=1e-5)
    (norm, x), back = (model[1], jnp.asarray(FAR[0] @ np.ones((IN, HIDDEN), np.float32))), eqx.nn.inference_mode
    by_argument = jax.vmap(partial(norm, inference=True), in_axes=(0, None), out_axes=(0, None))(x, state)[0]
    assert_array_equal(by_argument, jax.vmap(back(norm), in_axes=(0, None), out_axes=(0, None))(x, state)[0])
    trained = jax.vmap(partial(back(norm), inference=False), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    assert_array_equal(trained(x, state)[0], over_batch(back(back(norm), value=False), state, x)[0])


def test_serialisation_round_trip():
    *_, model, state = list(train(BatchNorm, 3))[-1]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (model, state))
    file.seek(0)
    read, read_state = eqx.tree_deserialise_leaves(file, make(BatchNorm))
    assert eqx.tree_equal((read, read_state), (model, state))
    assert not eqx.tree_equal((read, read_state), make(BatchNorm))


@pytest.mark.parametrize("checkpoint", ["equinox", "jax"])
def test_remat(checkpoint):
    model, state = make(BatchNorm)
    checkpointed = {
        "equinox": eqx.filter_checkpoint(over_batch),
        "jax": lambda model, state, x: jax.checkpoint(partial(over_batch, model))(state, x),
    }[checkpoint]

    @eqx.filter_jit
    @partial(eqx.filter_value_and_grad, has_aux=True)
    def with_remat(model, state, x, target):
        y, state = checkpointed(model, state, x)
        return jnp.mean((y - target) ** 2), (y, state)

    arguments = model, state, FAR[0], TARGETS[0]
    assert "remat" in str(eqx.filter_make_jaxpr(with_remat)(*arguments)[0])
    (_, (y, new)), gradients = with_remat(*arguments)
    (_, (expected_y, expected)), expected_gradients = gradient(*arguments)
    close((y, new, gradients), (expected_y, expected, expected_gradients), 1e-5)


def test_scan_over_layers():
    """Three blocks in one stack, beside the three of them one after the other."""

    def block(key):
        return eqx.nn.Sequential([eqx.nn.Linear(IN, IN, key=key), BatchNorm(IN, "batch", momentum=MOMENTUM)])

    keys = jax.random.split(jax.random.key(0), 3)
    stack, states = eqx.filter_vmap(eqx.nn.make_with_state(block))(keys)
    arrays, static = eqx.partition(stack, eqx.is_array)

    def through(x, layer):
        x, state = eqx.combine(layer[0], static)(x, layer[1])
        return jnp.tanh(x), state

    def scanned(arrays, states, x):
        return over_batch(lambda x, states: jax.lax.scan(through, x, (arrays, states)), states, x)

    y, new = jax.jit(scanned)(arrays, states, FAR[0])
    exact = jbn.recalibrate(scanned, arrays, states, FAR[:2])
    (new,), (exact,) = (jax.tree.leaves(each, is_leaf=is_state) for each in (new, exact))
    x, h = FAR[0], FAR[:2].reshape(-1, IN).astype(np.float64)
    for number, key in enumerate(keys):
        model, state = eqx.nn.make_with_state(block)(key)
        x, state = apply(model, state, x)
        x = jnp.tanh(x)
        close(jax.tree.map(lambda field, row=number: field[row], new), state.get(model[1].state_index), 1e-5)
        h = h @ np.asarray(model[0].weight, np.float64).T + np.asarray(model[0].bias, np.float64)
        close([exact.mean[number], exact.var[number]], [h.mean(0), h.var(0)], 1e-5)
        h = np.tanh((h - h.mean(0)) / np.sqrt(h.var(0) + EPSILON))
    assert_allclose(y, x, atol=1e-5)


@pytest.mark.parametrize("split", ["shard_map", "pmap"])
def test_examples_on_eight_devices(split):
    """Two axis names: the devices, and on each a vmap over its two examples."""
    model, state = make(BatchNorm, ("device", "batch"))
    (single, single_state) = make(BatchNorm)
    expected_y, expected = apply(single, single_state, FAR[0])
    if split == "shard_map":
        mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
        rows, all_rows = PartitionSpec("device"), PartitionSpec()
        specs = {"in_specs": (all_rows, rows), "out_specs": (rows, all_rows)}
        # JAX has no collective over an axis of vmap with check_vma
        on_devices = jax.shard_map(partial(over_batch, model), mesh=mesh, check_vma=False, **specs)
        y, new = jax.jit(on_devices)(state, FAR[0])
    else:
        on_devices = jax.pmap(partial(over_batch, model), "device", in_axes=(None, 0), out_axes=(0, None))
        y, new = on_devices(state, FAR[0].reshape(8, -1, IN))
    assert_allclose(y.reshape(ROWS, OUT), expected_y, atol=1e-5)
    close(states_of(model, new), states_of(single, expected), 1e-5)


def recalibration(model):
    """What `jbn.recalibrate` takes: an Equinox model holds functions, which are no arguments of `jit`."""
    arrays, static = eqx.partition(model, eqx.is_array)
    return lambda arrays, state, x: over_batch(eqx.combine(arrays, static), state, x), arrays


def test_recalibrate_takes_the_state_of_equinox():
    *_, model, state = list(train(BatchNorm, 3))[-1]
    before = [np.array(field) for field in jax.tree.leaves(state)]
    exact = jbn.recalibrate(*recalibration(model), state, FAR)
    _, inputs = by_hand(model, FAR.reshape(-1, IN), measured)
    for each, h in zip(states_of(model, exact), inputs, strict=True):
        assert_allclose(each.mean, h.mean(0), rtol=1e-5, atol=1e-5)
        assert_allclose(each.var, h.var(0), rtol=1e-5)
        assert_array_equal(each.weight, 1)
    got, _ = apply(eqx.nn.inference_mode(model), exact, FAR[0])  # what comes back is a state to go on with
    expected, _ = by_hand(model, FAR[0], lambda number, _: measured(None, inputs[number]))
    assert_allclose(got, expected, atol=1e-5)
    gradient(model, exact, FAR[0], TARGETS[0])
    assert all(map(np.array_equal, before, jax.tree.leaves(state)))  # and the old one can be used still


def test_drift_and_merge_states_take_the_state_of_equinox():
    *_, model, state = next(train(BatchNorm, 1))
    drifts = jbn.drift(*recalibration(model), state, FAR[:1])
    _, inputs = by_hand(model, FAR[0], measured)
    for found, each, h in zip(
        jax.tree.leaves(drifts, is_leaf=lambda value: isinstance(value, jbn.Drift)),
        states_of(model, state),
        inputs,
        strict=True,
    ):
        mean, var = np.asarray(each.mean, np.float64), np.asarray(each.var, np.float64)
        close(found.shift, (h.mean(0) - mean) / np.sqrt(var + EPSILON))
        close(found.ratio, np.sqrt((h.var(0) + EPSILON) / (var + EPSILON)))
    _, other = apply(model, make(BatchNorm)[1], FAR[1])
    merged = states_of(model, jbn.merge_states(state, other))
    for each, one, two in zip(merged, states_of(model, state), states_of(model, other), strict=True):
        mean = (np.float64(one.mean) + two.mean) / 2  # as much evidence in both
        close(each.mean, mean, 1e-5)
        close(each.var, (one.var + two.var + (one.mean - mean) ** 2 + (two.mean - mean) ** 2) / 2, 1e-5)


def test_a_state_of_equinox_carries_over():
    """Mean and variance debiased, and as evidence how far the debiasing had come: training goes on alike."""
    *_, their_model, their_state = list(train(IN_MODE["batch"], 3))[-1]
    model, state = make(BatchNorm)
    for number in (0, 3):
        model = eqx.tree_at(lambda model, at=number: model[at], model, their_model[number])
    for number in (1, 4):
        theirs, ours = their_model[number], model[number]
        weight = jnp.full(ours.input_size, 1 - MOMENTUM ** their_state.get(theirs.batch_counter), jnp.float32)
        mean, var = their_state.get(theirs.batch_state_index)
        state = state.set(ours.state_index, jbn.State(mean / weight, (var - 1 + weight) / weight, weight))
        fields = lambda model, at=number: (model[at].weight, model[at].bias)  # noqa: E731
        model = eqx.tree_at(fields, model, (theirs.weight, theirs.bias))
    (_, (y, state)), _ = gradient(model, state, FAR[3], TARGETS[3])
    (_, (their_y, their_state)), _ = gradient(their_model, their_state, FAR[3], TARGETS[3])
    assert_allclose(y, their_y, atol=1e-4)
    for number, each in zip((1, 4), states_of(model, state), strict=True):
        mean, var = their_state.get(their_model[number].batch_state_index)
        start = MOMENTUM**4
        close(list(each[:2]), [mean / (1 - start), (var - start) / (1 - start)])


def alone(features, x, *, dtype=None, affine=True, **call):
    """One layer trained on `x` [examples, features, ...]; the layer, `y` and its state."""
    make_layer = eqx.nn.make_with_state(BatchNorm)
    layer, state = make_layer(features, "batch", EPSILON, affine, MOMENTUM, dtype=dtype)
    if affine:
        given = jnp.arange(1.0, features + 1, dtype=dtype), -jnp.arange(0.0, features, dtype=dtype)
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, given)
    by_example = {name: jnp.asarray(value) for name, value in call.items()}

    def one(x, state, by_example):
        return layer(x, state, **by_example)

    vmapped = jax.vmap(one, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    y, state = jax.jit(vmapped)(jnp.asarray(x), state, by_example)
    return layer, y, state.get(layer.state_index)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(8, 1), (8, 3), (2, 3, 5), (4, 3, 2, 5), (1, 1, 4)])
def test_shapes(shape, affine):
    x, features = np.random.default_rng(0).normal(3, 2, shape), shape[1]
    layer, y, state = alone(features, x.astype(np.float32), affine=affine)
    assert (layer.weight is None) == (layer.bias is None) == (not affine)
    axes, column = (0, *range(2, len(shape))), (features, *[1] * (len(shape) - 2))
    mean, var = x.mean(axes), x.var(axes)
    expected = (x - mean.reshape(column)) / np.sqrt(var.reshape(column) + EPSILON)
    if affine:
        expected = expected * np.arange(1, features + 1).reshape(column) - np.arange(features).reshape(column)
    assert_allclose(y, expected, atol=1e-5)
    close(list(state), [mean, var, np.full(features, 0.1)], 1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_narrow_x_keeps_its_dtype_and_statistics_are_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (8, 3, 5)), jnp.bfloat16)
    layer, y, state = alone(3, x, dtype=dtype)
    assert y.dtype == jnp.bfloat16
    assert layer.weight.dtype == layer.bias.dtype == (dtype or jnp.float32)
    assert {field.dtype for field in state} == {jnp.dtype(jnp.float32)}
    wide = np.asarray(x, np.float64)
    close([state.mean, state.var], [wide.mean((0, 2)), wide.var((0, 2))], 1e-5)


def test_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(3, 2, (8, 3))
        layer, y, state = alone(3, x)
        assert {each.dtype for each in (layer.weight, layer.bias, y, *state)} == {jnp.dtype(jnp.float64)}
        assert_allclose(state.var, x.var(0), rtol=1e-12)


def test_weights_leave_out_positions_and_examples():
    rng = np.random.default_rng(0)
    for shape in ((8, 3, 5), (8, 3)):
        x, mask = rng.normal(3, 2, shape).astype(np.float32), rng.uniform(size=(8, *shape[2:])) < 0.6
        everywhere = np.broadcast_to(mask[:, None], shape)
        _, y, state = alone(3, np.where(everywhere, x, np.nan), weights=mask)
        kept = np.moveaxis(x.astype(np.float64), 1, -1)[mask]
        close([state.mean, state.var], [kept.mean(0), kept.var(0)], 1e-5)
        assert_array_equal(np.where(everywhere, 0, y), 0)
        expected = (kept - kept.mean(0)) / np.sqrt(kept.var(0) + EPSILON) * np.arange(1, 4) - np.arange(3)
        assert_allclose(np.moveaxis(np.asarray(y), 1, -1)[mask], expected, atol=1e-5)


def test_a_batch_that_is_not_finite_leaves_the_state():
    x = np.random.default_rng(0).normal(3, 2, (ROWS, HIDDEN)).astype(np.float32)
    layer, state = eqx.nn.make_with_state(BatchNorm)(HIDDEN, "batch")
    _, state = apply(layer, state, x)
    before = [np.array(field) for field in state.get(layer.state_index)]
    x[0, 1] = np.nan
    _, state = apply(layer, state, x)
    for was, field in zip(before, state.get(layer.state_index), strict=True):
        assert field[1] == was[1]
    theirs, their_state = eqx.nn.make_with_state(IN_MODE["batch"])(HIDDEN, "batch")
    _, their_state = apply(theirs, their_state, x)
    assert np.isnan(their_state.get(theirs.batch_state_index)[0][1])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "mode is 'ema'; expected 'batch'", {"mode": "ema"}),
        (ValueError, r"momentum is 1.5; expected a number in \[0, 1\]", {"momentum": 1.5}),
        (ValueError, "features is 0", {"input_size": 0}),
        (TypeError, "dtype is int32", {"dtype": jnp.int32}),
    ],
)
def test_errors(error, message, options):
    with pytest.raises(error, match=message):
        BatchNorm(**({"input_size": 3, "axis_name": "batch"} | options))


def test_without_the_axis_of_a_vmap():
    layer, state = eqx.nn.make_with_state(BatchNorm)(3, "batch")
    with pytest.raises(NameError, match="no axis 'batch' is bound"):
        layer(jnp.ones((3, 4)), state)
