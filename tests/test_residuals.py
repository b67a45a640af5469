"""What the backward pass keeps: `x` in its own dtype, vectors, the weights, and nothing else of the size of `x`."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn

SHAPE = (64, 8, 3)
WEIGHTS = {"plain": None, "mask": np.arange(SHAPE[0]) > 5, "real": np.linspace(0, 2, SHAPE[0], dtype=np.float32)}
FUNCTIONS = {
    "normalize_batch": lambda x, params, state, **options: jbn.normalize_batch(x, params, **options)[0],
    "normalize_running": jbn.normalize_running,
    "batch_norm": lambda *args, **options: jbn.batch_norm(*args, train=True, **options),
    "relu": lambda *args, **options: jbn.batch_norm(*args, train=True, activation=jax.nn.relu, **options),
    "silu": lambda *args, **options: jbn.batch_norm(*args, train=True, activation=jax.nn.silu, **options),
    "relu, evaluation": partial(jbn.normalize_running, activation=jax.nn.relu),
}
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


def kept(f, *args):
    """Shape and dtype of all arrays that the backward pass of `f` holds on to, as the compiler sees them."""

    def forward(*args):
        _, pullback, *_ = jax.vjp(f, *args)
        return jax.tree.leaves(pullback)

    return [(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(forward, *args)]


def large(residuals):
    return [(shape, dtype) for shape, dtype in residuals if np.prod(shape) > SHAPE[0]]


def inputs(dtype):
    params, state = jbn.init(SHAPE[-1])
    return np.random.default_rng(0).standard_normal(SHAPE).astype(dtype), params, state


@pytest.mark.parametrize(
    ("function", "weights", "dtype"),
    [
        *product(FUNCTIONS, ["mask"], [jnp.bfloat16]),
        *product(["normalize_batch", "normalize_running", "silu"], ["plain", "real"], [jnp.float16]),
        ("batch_norm", "plain", jnp.float32),
    ],
)
def test_x_and_vectors(function, weights, dtype):
    function, weights = FUNCTIONS[function], WEIGHTS[weights]
    x, params, state = inputs(dtype)
    weights = None if weights is None else weights[:, None]

    def f(x, params):
        y = function(x, params, state, weights=weights)
        return y[0] if isinstance(y, tuple) else y

    residuals = kept(f, x, params)
    assert large(residuals) == [(SHAPE, dtype)]
    small = {shape for shape, _ in residuals if shape != SHAPE}
    of_weights = set() if weights is None else {(SHAPE[0], 1, 1)}
    assert small <= {(), SHAPE[-1:]} | of_weights


@dtypes
def test_the_gradient_of_weights_keeps_no_more(dtype):
    x, params, _ = inputs(dtype)
    weights = jnp.asarray(WEIGHTS["real"][:, None])
    f = lambda x, params, weights: jbn.normalize_batch(x, params, weights=weights)[0]  # noqa: E731
    assert large(kept(f, x, params, weights)) == [(SHAPE, dtype)]


@dtypes
def test_moments(dtype):
    assert large(kept(lambda x: jbn.moments(x)[:3], inputs(dtype)[0])) == [(SHAPE, dtype)]


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [(None, jnp.float32), (WEIGHTS["mask"], jnp.bfloat16), (WEIGHTS["real"], jnp.float16)],
    ids=WEIGHTS,
)
def test_the_derivative_of_moments_that_nothing_uses_costs_nothing(weights, dtype):
    """Neither in what is kept nor in what the compiler makes of it: as if the moments were constants."""
    x, params, _ = inputs(dtype)
    weights = None if weights is None else weights[:, None]

    def loss(x, params, constant):
        y, measured = jbn.normalize_batch(x, params, weights=weights)
        measured = jax.lax.stop_gradient(measured) if constant else measured
        return jnp.sum(y.astype(jnp.float32) ** 3), measured

    kept_by, compiled = [], []
    for constant in (False, True):
        f = partial(loss, constant=constant)
        kept_by.append(sorted(map(str, kept(lambda *args, f=f: f(*args)[0], x, params))))
        program = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(x, params).compile()
        compiled.append((program.cost_analysis()["bytes accessed"], program.memory_analysis().temp_size_in_bytes))
    assert kept_by[0] == kept_by[1]
    assert compiled[0] == compiled[1]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("weights", "dtype"), [(None, jnp.float32), (WEIGHTS["mask"], jnp.bfloat16)], ids=["plain", "mask"]
)
def test_synchronized(check_vma, weights, dtype):
    x, params, state = inputs(dtype)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))

    def local(x, params, state, weights):
        return jbn.batch_norm(x, params, state, train=True, weights=weights, axis_name="i")[0]

    f = jax.shard_map(local, mesh=mesh, in_specs=(P("i"), P(), P(), P("i")), out_specs=P("i"), check_vma=check_vma)
    weights = None if weights is None else weights[:, None]
    assert large(kept(lambda x, params: f(x, params, state, weights), x, params)) == [(SHAPE, dtype)]


@dtypes
def test_scan_keeps_one_array_a_step(dtype):
    x, params, state = inputs(dtype)

    def f(x, params):
        def step(carry, _):
            return jbn.batch_norm(carry[0], params, carry[1], train=True), None

        return jax.lax.scan(step, (x, state), None, length=5)[0][0]

    assert large(kept(f, x, params)) == [((5, *SHAPE), dtype)]


def test_plain_autodiff_keeps_more():
    """The same check can fail: a textbook batch norm on bfloat16 keeps float32 arrays."""
    x, params, _ = inputs(jnp.bfloat16)

    def textbook(x, params):
        return reference.textbook(x.astype(jnp.float32), *params, 1e-5, axes=(0, 1)).astype(x.dtype)

    found = large(kept(textbook, x, params))
    assert len(found) >= 2
    assert jnp.dtype(jnp.float32) in {dtype for _, dtype in found}


def test_checkpointing_the_call_keeps_no_more_than_its_arguments():
    x, params, state = inputs(jnp.bfloat16)
    f = jax.checkpoint(partial(jbn.batch_norm, train=True))
    assert large(kept(lambda x, params: f(x, params, state)[0], x, params)) == [(SHAPE, jnp.bfloat16)]
