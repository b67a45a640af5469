"""What one runs after every edit, `make quick`: a little of everything, each beside something that is not jbn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn

RANDOM = np.random.default_rng(0)
X, DY, TANGENT = RANDOM.normal(2, 3, (3, 16, 4)).astype(np.float32)
MASK = np.arange(16) % 5 > 0
PARAMS = jbn.Params(*RANDOM.uniform(0.5, 2, (2, 4)).astype(np.float32))
STATE = jbn.init(4)[1]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of 16 values of up to 10


def loss(x, params, weights=None, axis_name=None):
    y, state = jbn.batch_norm(x, params, STATE, train=True, weights=weights, axis_name=axis_name)
    return jnp.sum(jnp.sin(y)), (y, state)


def textbook(x, params, weights):
    return jnp.sum(jnp.sin(reference.textbook(x, *params, 1e-5, weights[:, None])))


def test_values_state_and_every_derivative_masked():
    @jax.jit
    def ours(x, params):
        gradient = jax.grad(lambda x, params: loss(x, params, MASK)[0], (0, 1))
        return loss(x, params, MASK)[1], gradient(x, params), jax.jvp(gradient, (x, params), (TANGENT, params))[1]

    @jax.jit
    def wanted(x, params):
        gradient = jax.grad(lambda x, params: textbook(x, params, jnp.float32(MASK)), (0, 1))
        return gradient(x, params), jax.jvp(gradient, (x, params), (TANGENT, params))[1]

    (y, state), *derivatives = ours(np.where(MASK[:, None], X, np.nan), PARAMS)
    count, mean, var = reference.moments(X, MASK)
    exact = np.where(MASK[:, None], reference.normalize(X, mean, var, *PARAMS), 0)
    assert_allclose(y, exact, **CLOSE)
    assert_allclose(state.mean, mean, **CLOSE)
    assert_allclose(state.var, var * count / (count - 1), **CLOSE)
    assert_allclose(state.weight, 0.1, rtol=1e-6)
    jax.tree.map(lambda got, want: assert_allclose(got, want, rtol=1e-4, atol=1e-4), derivatives, [*wanted(X, PARAMS)])


def test_eight_devices():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))

    def local(x, params):
        (_, (y, state)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params, axis_name="i")
        return y, state, gradients

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("i"), P()), out_specs=(P("i"), P(), (P("i"), P())))
    got = jax.jit(split)(X, PARAMS)
    (_, (y, state)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(X, PARAMS)
    jax.tree.map(lambda ours, one: assert_allclose(ours, one, **CLOSE), got, (y, state, gradients))


def test_a_far_and_a_broken_feature():
    x = X + np.float32([0, 300, 0, 0])
    y, state = jbn.batch_norm(x, PARAMS, STATE._replace(mean=jnp.array([0.0, 0, np.nan, 0])), train=True)
    evaluated, _ = jbn.batch_norm(x, PARAMS, state, train=False)
    assert_allclose(evaluated, y, atol=0.2)  # by a variance that is unbiased, 16 / 15
    assert_allclose(state.mean, np.float64(x).mean(0), rtol=1e-5)


def test_an_error():
    with pytest.raises(ValueError, match=r"params.scale has shape \[3\]; expected \[4\]"):
        jbn.batch_norm(X, jbn.init(3)[0], STATE, train=True)


def test_an_export():
    exported = jax.export.export(jax.jit(lambda x: jbn.normalize_running(x, PARAMS, STATE)))(X)
    again = jax.export.deserialize(exported.serialize()).call(X)
    assert_allclose(again, reference.normalize(X, np.zeros(4), np.ones(4), *PARAMS), **CLOSE)


def test_a_layer():
    nn = pytest.importorskip("flax.linen")
    import jbn.linen

    options = {"use_running_average": False, "momentum": 0.9}
    variables = nn.BatchNorm(**options).init(jax.random.key(0), X)
    ours, theirs = (
        of(**options).apply(variables, X, mutable=["batch_stats"]) for of in (jbn.linen.BatchNorm, nn.BatchNorm)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, **CLOSE), ours, theirs)


def test_a_training():
    target = np.sin(X).sum(-1, keepdims=True)

    def step(carry, _):
        params, state = carry

        def loss(params):
            y, after = jbn.batch_norm(X, params["norm"], state, train=True, activation=jnp.tanh)
            return jnp.mean((y @ params["kernel"] - target) ** 2), after

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), state), value

    start = {"norm": PARAMS, "kernel": np.zeros((4, 1), np.float32)}, STATE
    (_, state), values = jax.jit(lambda start: jax.lax.scan(step, start, None, length=50))(start)
    assert values[-1] < 0.8 * values[0]  # least squares of tanh leaves two thirds
    assert_allclose(state.weight, 1 - 0.9**50, rtol=1e-5)
