"""What `jbn.equinox.BatchNorm` promises beyond test_layers.py: evaluation, files, states of Equinox, errors."""

import io
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import BATCHES, LAYERS, TARGETS, over_batch
from numpy.testing import assert_allclose, assert_array_equal
from test_layers import by_hand, same

import jbn
from jbn.equinox import BatchNorm

EQUINOX = LAYERS[2]
START = jbn.State(np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32))


def evaluated(params, x, states):
    """Two times a linear map, a normalization by `states` and relu, in float64."""
    x = np.float64(x)
    for (kernel, bias, scale, shift), state in zip(params, states, strict=True):
        x = (x @ np.float64(kernel) + bias - state.mean) / np.sqrt(np.float64(state.var) + 1e-5) * scale + shift
        x = np.maximum(x, 0)
    return x


def test_evaluation_is_exact_from_the_first_step_where_that_of_equinox_is_not():
    """After one step Equinox divides the variance 1 it starts from by 0.1 too: it evaluates with var + 9."""
    errors = []
    for own in (False, True):
        model = EQUINOX.network(own=own)
        statistics, _ = by_hand(EQUINOX.params(model), BATCHES[0])
        model = EQUINOX.train(model, [0])
        exact = evaluated(EQUINOX.params(model), BATCHES[1], [jbn.State(*each, 1) for each in statistics])
        errors.append(abs(EQUINOX.evaluate(model, BATCHES[1]) - exact).max())
    print(errors)
    assert errors[0] < 1e-4
    assert errors[1] > 0.5


def test_what_was_never_measured_is_evaluated_by_mean_0_and_variance_1():
    model = EQUINOX.network()
    y = EQUINOX.evaluate(model, BATCHES[0])
    assert_allclose(y, evaluated(EQUINOX.params(model), BATCHES[0], [START] * 2), atol=1e-5)


def test_inference_mode_and_the_argument():
    network, state = model = EQUINOX.train(EQUINOX.network(), range(3))
    assert_allclose(
        EQUINOX.evaluate(model, BATCHES[5]),
        evaluated(EQUINOX.params(model), BATCHES[5], EQUINOX.states(model).values()),
        atol=1e-5,
    )
    vmap = partial(jax.vmap, in_axes=(0, None), out_axes=(0, None))
    in_training, inference, x = network[1], eqx.nn.inference_mode(network[1]), BATCHES[5][:, :3]
    by_argument, same_state = vmap(partial(in_training, inference=True))(x, state)  # no axis name is needed
    assert_array_equal(by_argument, vmap(inference)(x, state)[0])
    assert eqx.tree_equal(same_state, state)
    trained, _ = vmap(partial(inference, inference=False), axis_name="batch")(x, state)
    assert_array_equal(trained, over_batch(eqx.nn.inference_mode(inference, value=False), state, x)[0])


def test_serialisation_round_trip():
    model = tuple(EQUINOX.train(EQUINOX.network(), range(3)))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    read = eqx.tree_deserialise_leaves(file, EQUINOX.network())
    assert eqx.tree_equal(read, model)
    assert not eqx.tree_equal(read, EQUINOX.network())


def test_merge_states_takes_the_state_of_equinox():
    network, state = EQUINOX.network()
    one, other = (over_batch(network, state, x)[1] for x in BATCHES[:2])
    merged = EQUINOX.states((network, jbn.merge_states(one, other)))
    for name, each in merged.items():
        first, second = (EQUINOX.states((network, state))[name] for state in (one, other))
        mean = (np.float64(first.mean) + second.mean) / 2  # as much evidence in both
        between = (first.mean - mean) ** 2 + (second.mean - mean) ** 2
        same((each.mean, each.var), (mean, (first.var + second.var + between) / 2), 1e-5)


def test_a_state_of_equinox_carries_over():
    """Mean and variance debiased, and as evidence how far the debiasing had come: training goes on alike."""
    theirs = EQUINOX.train(EQUINOX.network(own=True), range(3))
    network, state = EQUINOX.network()
    for at, norm in ((1, "norm_a"), (4, "norm_b")):
        given = jax.tree.map(lambda field: jnp.asarray(field, jnp.float32), EQUINOX.states(theirs)[norm])
        state = state.set(network[at].state_index, given)
        affine = lambda network, at=at: (network[at].weight, network[at].bias)  # noqa: E731
        network = eqx.tree_at(affine, network, affine(theirs[0]))
        network = eqx.tree_at(lambda network, at=at: network[at - 1], network, theirs[0][at - 1])
    (ours, loss), (theirs, their_loss) = (
        EQUINOX.step(model, BATCHES[3], TARGETS[3]) for model in ((network, state), theirs)
    )
    same((loss, EQUINOX.states(ours)), (their_loss, EQUINOX.states(theirs)), 1e-4)


def test_params_have_the_dtype_that_is_asked_for_or_are_none():
    for dtype in (None, jnp.bfloat16, jnp.float16):
        layer, _ = eqx.nn.make_with_state(BatchNorm)(3, "batch", dtype=dtype)
        assert layer.weight.dtype == layer.bias.dtype == (dtype or jnp.float32)
    layer, _ = eqx.nn.make_with_state(BatchNorm)(3, "batch", channelwise_affine=False)
    assert layer.weight is None and layer.bias is None
    same(EQUINOX.first(BATCHES[0], channelwise_affine=False), EQUINOX.first(BATCHES[0]), 1e-6)


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
