"""An ensemble by `vmap` over an explicit mesh axis: gradients by params, shared or stacked, as without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ways
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn

X = np.random.default_rng(0).normal(3, 2, (4, 16, 3)).astype(np.float32)
MASK = np.arange(16) % 5 > 0
PARAMS, FRESH = jbn.init(3)
STATE = jbn.State(*np.float32([[2, 2, 2], [3, 3, 3], [1, 1, 1]]))


def folded(params, x):
    slope, shift = jbn.fold(params, STATE)
    return x * slope[None] + shift[None]


FUNCTIONS = {
    "training": lambda params, x: jbn.batch_norm(x, params, FRESH, train=True)[0],
    "masked": lambda params, x: jbn.batch_norm(x, params, FRESH, train=True, weights=MASK)[0],
    "tanh": lambda params, x: jbn.batch_norm(x, params, FRESH, train=True, activation=jnp.tanh)[0],
    "renorm": lambda params, x: jbn.batch_renorm(x, params, STATE, train=True)[0],
    "groups": lambda params, x: jbn.batch_norm(x, params, FRESH, train=True, groups=2)[0],
    "no center": lambda params, x: jbn.normalize_batch(x, params)[0],
    "evaluation": lambda params, x: jbn.batch_norm(x, params, STATE, train=False)[0],
    "fold": folded,
}


def gradients(name, axis):
    return jax.jit(jax.vmap(jax.grad(lambda params, x: jnp.sum(FUNCTIONS[name](params, x) ** 3), (0, 1)), (axis, 0)))


@pytest.mark.parametrize("rows", [None, "rows"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name, rows):
    mesh = ways.mesh(AxisType.Explicit, members=4, rows=2)
    wanted = gradients(name, None)(PARAMS, X)
    stacked = jax.device_put(jax.tree.map(lambda a: jnp.stack([a] * 4), PARAMS), NamedSharding(mesh, P("members")))
    members = jax.device_put(X, NamedSharding(mesh, P("members", rows)))
    with jax.set_mesh(mesh):
        results = [gradients(name, 0)(stacked, members)]
        if (name, rows) != ("groups", "rows"):  # where JAX has no transpose for what is shared
            results.append(gradients(name, None)(PARAMS, members))
    for got in results:
        jax.tree.map(lambda a, b: assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-4), got, wanted)
