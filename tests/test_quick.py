"""A little of everything, for after every edit: `make quick`."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn

RANDOM = np.random.default_rng(0)
X, DY = RANDOM.normal(3, 2, (2, 16, 3)).astype(np.float32)
MASK = RANDOM.uniform(size=(16, 1)) < 0.7
PARAMS = jbn.Params(np.float32([0.5, -1, 2]), np.float32([0, 1, -3]))
STATE = jbn.State(np.float32([2, 3, 4]), np.float32([1, 4, 9]), np.float32([1, 1, 0.5]))
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5))  # float32, sums of 16


def step(x, dy, params, state, weights=None, axis_name=None):
    """y, the new state and the gradients of sum(y * dy)."""

    def loss(x, params):
        y, after = jbn.batch_norm(x, params, state, train=True, weights=weights, axis_name=axis_name)
        return jnp.sum(y * dy), (y, after)

    gradients, (y, after) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return y, after, *gradients


@pytest.mark.parametrize("weights", [None, MASK], ids=["whole", "masked"])
def test_values_state_and_gradients(weights):
    x = X if weights is None else np.where(MASK, X, np.float32(np.nan))
    y, after, dx, dparams = jax.jit(step)(x, DY, PARAMS, STATE, weights)
    measured = reference.moments(x, weights)
    expected = reference.normalize(x, *measured[1:], *PARAMS)
    close(y, expected if weights is None else np.where(MASK, expected, 0))
    close(after, jbn.State(*reference.update(STATE, measured)))
    wanted, *others = reference.gradients(x, DY, PARAMS.scale, weights=weights)
    close((dx, dparams), (wanted, jbn.Params(*others)))


def test_forward_mode_and_the_second_derivative():
    """Against plain autodiff of the formula."""

    def ours(x):
        return jnp.sum(jnp.sin(jbn.batch_norm(x, PARAMS, STATE, train=True)[0]))

    def textbook(x):
        return jnp.sum(jnp.sin(reference.textbook(x, *PARAMS, 1e-5)))

    def derivatives(function, x):
        return jax.jvp(jax.grad(function), (x,), (DY,))

    close(*(jax.jit(partial(derivatives, function))(X) for function in (ours, textbook)))


def test_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"), P("data"), P(), P()), "out_specs": (P("data"), P(), P("data"), P())}
    split = jax.shard_map(partial(step, axis_name="data"), mesh=mesh, **specs)
    y, after, dx, dparams = jax.jit(split)(X, DY, PARAMS, STATE)
    measured = reference.moments(X)
    close(y, reference.normalize(X, *measured[1:], *PARAMS))
    close(after, jbn.State(*reference.update(STATE, measured)))
    wanted, *others = reference.gradients(X, DY, PARAMS.scale)
    close((dx, dparams), (wanted, jbn.Params(*others)))


@pytest.mark.skipif(importlib.util.find_spec("flax") is None, reason="Flax is not installed")
def test_a_layer_of_flax():
    from jbn.linen import BatchNorm

    layer = BatchNorm(use_running_average=False)
    y, _ = layer.apply(layer.init(jax.random.key(0), X), X, mutable=["batch_stats"])
    close(y, reference.normalize(X, *reference.moments(X)[1:], 1, 0))


def test_an_error_says_what_arrived():
    with pytest.raises(ValueError, match="decay"):
        jbn.batch_norm(X, PARAMS, STATE, train=True, decay=2)


def test_an_export():
    evaluate = jax.jit(lambda x: jbn.batch_norm(x, PARAMS, STATE, train=False)[0])
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 3"), jnp.float32)
    found = jax.export.deserialize(jax.export.export(evaluate)(shape).serialize()).call(X)
    close(found, reference.normalize(X, STATE.mean, STATE.var, *PARAMS))


def test_a_tiny_training_learns():
    xhat = reference.normalize(X, *reference.moments(X)[1:], 1, 0)
    target = np.float32(np.tanh(xhat) @ [1, -2, 0.5])  # which the network can be

    @jax.jit
    def train(params, state):
        def one(carry, _):
            params, state = carry

            def loss(params):
                y, after = jbn.batch_norm(X, params["norm"], state, train=True)
                return jnp.mean((jnp.tanh(y) @ params["kernel"] - target) ** 2), after

            (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), state), value

        return jax.lax.scan(one, (params, state), length=100)

    norm, state = jbn.init(3)
    (params, state), losses = train({"norm": norm, "kernel": jnp.zeros(3)}, state)
    assert losses[-1] < 0.01 * losses[0]
    y, _ = jbn.batch_norm(X, params["norm"], state, train=False)
    assert jnp.mean((jnp.tanh(y) @ params["kernel"] - target) ** 2) < 0.01 * losses[0]
