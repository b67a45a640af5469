"""Every kind of derivative against plain autodiff of the textbook formula in float64, cut by transform."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from numpy.testing import assert_allclose

import jbn

ROWS, FEATURES = 6, 3
# What is compared here are formulas in float64: leaving out the compiler's optimizations saves a third of the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MASK = np.array([True, True, False, True, True, True])
WEIGHTS = {"plain": None, "mask": MASK, "real": np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])}


float64 = pytest.mark.usefixtures("_x64")
weighted = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


def arguments(shape=(ROWS, FEATURES), dtype=np.float64, offset=1.0):
    """x, scale, bias and epsilon."""
    rng = np.random.default_rng(0)
    x = offset + rng.standard_normal(shape)
    scale, bias = rng.standard_normal((2, FEATURES))
    return tuple(jnp.asarray(a, dtype) for a in (x, scale, bias, 0.1))


def ours(x, scale, bias, epsilon, weights=None):
    return jbn.normalize_batch(x, jbn.Params(scale, bias), epsilon=epsilon, weights=weights)[0]


def textbook(x, scale, bias, epsilon, weights=None):
    return reference.textbook(x, scale, bias, epsilon, None if weights is None else jnp.asarray(weights)[:, None])


def flatten(normalize, weights=None):
    """`normalize` as a function of one vector that holds x, scale, bias and epsilon, and that vector."""
    vector, unravel = ravel_pytree(arguments())
    return lambda vector: normalize(*unravel(vector), weights), vector


def weigh(y):
    """A scalar of all outputs, with derivatives of any order."""
    return jnp.sum(jnp.cos(3 * jnp.arange(y.size, dtype=y.dtype)) * jnp.ravel(y + jnp.sin(y)))


def assert_close(actual, expected, rtol=1e-9):
    """float64 arithmetic in two orders: rounding is below 1e-12 here, and second derivatives amplify it."""
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=rtol), actual, expected)


@float64
@weighted
def test_grad(weights):
    x, scale, *_ = arguments()
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    got, expected = (
        jit(lambda *args, f=f: jax.vjp(partial(f, weights=weights), *args)[1](jnp.asarray(dy)))(*arguments())
        for f in (ours, textbook)
    )
    assert_close(got, expected)
    assert_close(got[:3], reference.gradients(x, dy, scale, 0.1, weights))


@float64
@weighted
def test_jvp(weights):
    args = arguments()
    got, expected = (
        jit(lambda *args, f=f: jax.jvp(partial(f, weights=weights), args, jax.tree.map(jnp.cos, args)))(*args)
        for f in (ours, textbook)
    )
    assert_close(got, expected)


@float64
@weighted
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
def test_jacobian(transform, weights):
    got, expected = (jit(transform(f))(vector) for f, vector in (flatten(ours, weights), flatten(textbook, weights)))
    assert_close(got, expected)


@float64
@weighted
def test_hessian_in_every_nesting(weights):
    plain, vector = flatten(textbook, weights)
    expected = jit(jax.hessian(lambda vector: weigh(plain(vector))))(vector)
    rule, _ = flatten(ours, weights)
    for outer, inner in product((jax.jacfwd, jax.jacrev), repeat=2):
        assert_close(jit(outer(inner(lambda vector: weigh(rule(vector)))))(vector), expected)


@float64
def test_third_order():
    def third(f, vector):
        along = lambda t: weigh(f(vector + t * jnp.cos(vector)))  # noqa: E731
        return jit(jax.grad(jax.grad(jax.grad(along))))(0.0)

    assert_close(third(*flatten(ours)), third(*flatten(textbook)), rtol=1e-8)


@float64
def test_weights_are_differentiable_to_second_order():
    vector, unravel = ravel_pytree((*arguments(), jnp.asarray([0.5, 2.0, 0.7, 1.0, 3.0, 0.25])))
    for transform in (jax.grad, jax.hessian):
        got, expected = (jit(transform(lambda v, f=f: weigh(f(*unravel(v)))))(vector) for f in (ours, textbook))
        assert_close(got, expected)


@float64
@pytest.mark.parametrize("weights", [None, WEIGHTS["real"]], ids=["plain", "real"])
def test_finite_differences(weights):
    check_grads(
        jax.jit(partial(ours, weights=weights)), arguments(), order=2, modes=["fwd", "rev"], rtol=1e-4, atol=1e-4
    )


@float64
def test_finite_differences_of_moments():
    weights = jnp.asarray([0.5, 2.0, 0.7, 1.0, 3.0, 0.25])
    f = jax.jit(lambda x, weights: jbn.moments(x, weights=weights)[:3])
    check_grads(f, (arguments()[0], weights), order=2, modes=["fwd", "rev"], rtol=1e-4, atol=1e-4)


@float64
@weighted
def test_moments_are_differentiable(weights):
    def ours(x):
        _, mean, var, *_ = jbn.moments(x, weights=weights)
        return jnp.sum(jnp.sin(mean) * var)

    def plain(x):
        w = jnp.ones((ROWS, 1)) if weights is None else jnp.asarray(weights, x.dtype)[:, None]
        mean = jnp.sum(w * x, 0) / jnp.sum(w)
        var = jnp.sum(w * (x - mean[None]) ** 2, 0) / jnp.sum(w)
        return jnp.sum(jnp.sin(mean) * var)

    x = arguments()[0]
    for transform in (jax.grad, jax.hessian):
        assert_close(jit(transform(ours))(x), jit(transform(plain))(x))


@float64
def test_several_feature_axes():
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(rng.standard_normal(shape)) for shape in ((4, 2, 5, 3), (2, 3), (2, 3)))
    got = lambda *a: jbn.normalize_batch(a[0], jbn.Params(*a[1:]), feature_axis=(3, 1))[0]  # noqa: E731
    expected = lambda *a: reference.textbook(*a, 1e-5, axes=(0, 2))  # noqa: E731
    dy = jnp.asarray(rng.standard_normal(x.shape))
    assert_close(jax.vjp(got, x, scale, bias)[1](dy), jax.vjp(expected, x, scale, bias)[1](dy))


@float64
@pytest.mark.parametrize("params", [jbn.Params(None, None), jbn.Params(None, 1.0), jbn.Params(2.0, None)])
def test_params_that_are_none(params):
    params = jax.tree.map(lambda value: jnp.full(FEATURES, value), params)
    x, *_, epsilon = arguments()
    filled = jnp.ones(FEATURES) if params.scale is None else params.scale
    bias = jnp.zeros(FEATURES) if params.bias is None else params.bias
    got = jax.grad(lambda x: jnp.sum(jnp.sin(jbn.normalize_batch(x, params, epsilon=epsilon)[0])))(x)
    assert_close(got, jax.grad(lambda x: jnp.sum(jnp.sin(textbook(x, filled, bias, epsilon))))(x))


@float64
@weighted
def test_normalize_running(weights):
    rng = np.random.default_rng(3)
    state = jbn.State(jnp.asarray(rng.standard_normal(FEATURES)), jnp.asarray([0.5, 1.0, 4.0]), jnp.asarray(1.0))

    def got(x, scale, bias, epsilon):
        return jbn.normalize_running(x, jbn.Params(scale, bias), state, epsilon=epsilon, weights=weights)

    def expected(x, scale, bias, epsilon):
        y = (x - state.mean[None]) / jnp.sqrt(state.var + epsilon)[None] * scale[None] + bias[None]
        return y if weights is None else jnp.where(weights[:, None] > 0, y, 0.0)

    vector, unravel = ravel_pytree(arguments())
    for transform in (jax.grad, jax.hessian):
        assert_close(*(jit(transform(lambda v, f=f: weigh(f(*unravel(v)))))(vector) for f in (got, expected)))
    assert_close(*(jit(jax.jacfwd(lambda v, f=f: f(*unravel(v))))(vector) for f in (got, expected)))


def by_given(x, scale, bias, epsilon, mean, var, low):
    moments = jbn.Moments(jnp.asarray(4.0), mean, var, low)
    return jbn.normalize_running(x, jbn.Params(scale, bias), moments, epsilon=epsilon)


def plain_by_given(x, scale, bias, epsilon, mean, var, low):
    return (x - (mean + low)[None]) / jnp.sqrt(var + epsilon)[None] * scale[None] + bias[None]


@float64
def test_normalize_running_by_moments_that_are_given():
    """To any order in all of them, mean and variance too."""
    given = jnp.asarray([0.3, -1.0, 2.0]), jnp.asarray([0.5, 1.0, 4.0]), jnp.asarray([0.01, 0.0, -0.02])
    vector, unravel = ravel_pytree((*arguments(), *given))
    both = [lambda v, f=f: f(*unravel(v)) for f in (by_given, plain_by_given)]
    for transform in (jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.hessian(f))):
        assert_close(*(jit(transform(lambda v, f=f: weigh(f(v))))(vector) for f in both))
    check_grads(jax.jit(both[0]), (vector,), order=2, modes=["fwd", "rev"], rtol=1e-4, atol=1e-4)


@float64
@weighted
def test_normalize_running_by_the_moments_of_the_batch_is_normalize_batch(weights):
    """With all its derivatives: the batch's statistics are given by a function of x."""

    def twice(x, scale, bias, epsilon):
        measured = jbn.moments(x, weights=weights)
        return jbn.normalize_running(x, jbn.Params(scale, bias), measured, epsilon=epsilon, weights=weights)

    once = partial(ours, weights=weights)
    vector, unravel = ravel_pytree(arguments())
    for transform in (jax.grad, jax.hessian):
        assert_close(*(jit(transform(lambda v, f=f: weigh(f(*unravel(v)))))(vector) for f in (twice, once)))


@float64
def test_a_state_that_is_given_is_constant():
    x, *_ = arguments()
    _, state = jbn.init(FEATURES, dtype=x.dtype)
    gradients = jax.grad(lambda state: jnp.sum(jbn.normalize_running(x, jbn.Params(None, None), state) ** 3))(state)
    assert not any(np.any(field) for field in gradients)


@float64
@pytest.mark.parametrize(
    "in_axes", [(0, None, None, None), (None, 0, 0, None), (1, 0, None, 0), (None, None, None, 0), (2, 1, 1, None)]
)
def test_vmap_of_value_and_derivatives(in_axes):
    def stack(array, axis):
        return array if axis is None else jnp.stack([array, array * 1.5, array + 0.5], axis)

    def everything(f):
        loss = lambda *args: weigh(f(*args))  # noqa: E731
        return lambda *args: (f(*args), jax.grad(loss, (0, 1, 2, 3))(*args), jax.jvp(loss, args, args))

    args = tuple(map(stack, arguments(), in_axes))
    got = jit(jax.vmap(everything(ours), in_axes))(*args)
    one = jit(everything(textbook))
    rows = [
        [a if axis is None else jnp.take(a, row, axis) for a, axis in zip(args, in_axes, strict=True)]
        for row in range(3)
    ]
    assert_close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *(one(*row) for row in rows)))


@float64
def test_vmap_of_masks():
    masks = jnp.asarray(np.stack([MASK, ~MASK | (np.arange(ROWS) < 2)]))
    x, scale, bias, _ = arguments()
    rest = (scale, bias, 0.1)
    got = jit(jax.vmap(lambda mask: jax.grad(lambda x: weigh(ours(x, *rest, mask)))(x)))(masks)
    for row, mask in zip(got, masks, strict=True):
        assert_close(row, jit(jax.grad(lambda x, mask=mask: weigh(textbook(x, *rest, mask))))(x))


@float64
def test_scan_that_carries_the_state():
    x, scale, bias, _ = arguments((4, ROWS, FEATURES))
    _, state = jbn.init(FEATURES, dtype=jnp.float64)

    def got(x, params):
        def step(carry, part):
            carried, state = carry
            y, state = jbn.batch_norm(part + carried, params, state, train=True)
            return (jnp.sin(y), state), None

        (y, after), _ = jax.lax.scan(step, (x[0], state), x)
        return jnp.sum(y * x[1]), after

    def expected(x, params):
        carried = x[0]
        for part in x:
            carried = jnp.sin(textbook(part + carried, *params, 1e-5))
        return jnp.sum(carried * x[1])

    gradients, after = jit(jax.grad(got, (0, 1), has_aux=True))(x, jbn.Params(scale, bias))
    assert_close(gradients, jit(jax.grad(expected, (0, 1)))(x, jbn.Params(scale, bias)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_remat_gives_the_same_and_moves_the_state_once():
    x, scale, bias, _ = arguments(dtype=np.float32)
    _, state = jbn.init(FEATURES)

    def loss(x, params, wrap):
        y, after = wrap(partial(jbn.batch_norm, train=True))(x, params, state)
        return jnp.sum(jnp.sin(y)), after

    both = [
        jax.jit(jax.value_and_grad(partial(loss, wrap=wrap), (0, 1), has_aux=True))(x, jbn.Params(scale, bias))
        for wrap in (lambda f: f, jax.checkpoint)
    ]
    assert_close(*both, rtol=1e-6)
    (_, after), _ = both[1]
    # One step of decay 0.9 from no evidence: weight 0.1, where two would give 0.19.
    assert_allclose(after.weight, 0.1, rtol=1e-6)
    assert_allclose(after.mean, np.float64(x).mean(0), rtol=1e-6)


@pytest.mark.parametrize("weights", [None, MASK], ids=["plain", "mask"])
def test_jit_and_eager_agree(weights):
    args = arguments(dtype=np.float32)
    step = jax.value_and_grad(lambda *args: weigh(ours(*args, weights)), (0, 1, 2, 3))
    # Two orders of float32 arithmetic on values near 1.
    assert_close(step(*args), jax.jit(step)(*args), rtol=2e-5)


@float64
@weighted
def test_returned_moments_are_differentiable(weights):
    """As in the log-determinant of a flow, where they were silently constant."""

    def got(x, scale, bias, epsilon):
        y, measured = jbn.normalize_batch(x, jbn.Params(scale, bias), epsilon=epsilon, weights=weights)
        return y + jnp.expand_dims(jnp.sin(measured.mean + measured.mean_low) * jnp.log(measured.var + epsilon), 0)

    def plain(x, scale, bias, epsilon):
        w = jnp.ones((ROWS, 1)) if weights is None else jnp.asarray(weights, x.dtype)[:, None]
        mean = jnp.sum(w * x, 0) / jnp.sum(w)
        var = jnp.sum(w * (x - mean[None]) ** 2, 0) / jnp.sum(w)
        return textbook(x, scale, bias, epsilon, weights) + jnp.expand_dims(jnp.sin(mean) * jnp.log(var + epsilon), 0)

    vector, unravel = ravel_pytree(arguments())
    for transform in (jax.grad, jax.hessian):
        assert_close(*(jit(transform(lambda v, f=f: weigh(f(*unravel(v)))))(vector) for f in (got, plain)))


@float64
@weighted
@pytest.mark.parametrize("center", [1.0, 3.0])
def test_derivatives_do_not_see_the_center(weights, center):
    def about(center, x, scale, bias, epsilon):
        params, options = jbn.Params(scale, bias), {"epsilon": epsilon, "weights": weights}
        y, measured = jbn.normalize_batch(x, params, center=center, **options)
        return y + jnp.expand_dims(measured.mean * measured.var, 0)

    vector, unravel = ravel_pytree(arguments())
    for transform in (jax.grad, jax.hessian):
        found = (jit(transform(lambda v, c=c: weigh(about(c, *unravel(v)))))(vector) for c in (center, None))
        assert_close(*found)
    assert jax.grad(lambda c: weigh(about(c, *arguments())))(center) == 0


def test_the_new_state_carries_no_gradient():
    x, scale, bias, _ = arguments(dtype=np.float32)
    _, state = jbn.init(FEATURES)

    def through_batch_norm(x, state, decay):
        _, after = jbn.batch_norm(x, jbn.Params(scale, bias), state, train=True, decay=decay)
        return sum(jnp.sum(field) for field in after)

    def through_update(x, state, decay):
        return sum(jnp.sum(field) for field in jbn.update(state, jbn.moments(x), decay=decay))

    for loss in (through_batch_norm, through_update):
        gradients = jax.grad(loss, (0, 1, 2))(x, state, jnp.asarray(0.9))
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_the_state_is_constant_in_evaluation():
    x, scale, bias, _ = arguments(dtype=np.float32)
    _, state = jbn.init(FEATURES)
    loss = lambda state: jnp.sum(jbn.normalize_running(x, jbn.Params(scale, bias), state))  # noqa: E731
    assert not any(leaf.any() for leaf in jax.grad(loss)(state))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_gradients_of_half_precision_x(dtype, tolerance):
    x, scale, bias, _ = arguments((200, FEATURES), dtype=np.float32)
    x, dy = x.astype(dtype), jnp.cos(7 * x).astype(dtype)
    y, pullback = jax.vjp(lambda x, params: jbn.normalize_batch(x, params)[0], x, jbn.Params(scale, bias))
    dx, dparams = pullback(dy)
    expected = reference.gradients(np.float64(x), np.float64(dy), scale)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    # All sums are float32: what is left is the rounding of dx, once: half an ulp of its own.
    assert_allclose(np.float64(dx), expected[0], rtol=tolerance, atol=1e-5)
    assert_allclose(dparams.scale, expected[1], rtol=1e-5, atol=1e-5)
    assert_allclose(dparams.bias, expected[2], rtol=1e-5, atol=1e-5)


def test_gradients_of_half_precision_params_come_in_their_dtype():
    x, scale, bias, _ = arguments(dtype=np.float32)
    params = jbn.Params(scale.astype(jnp.bfloat16), bias.astype(jnp.bfloat16))
    gradients = jax.grad(lambda params: jnp.sum(jnp.sin(jbn.normalize_batch(x, params)[0])))(params)
    assert (gradients.scale.dtype, gradients.bias.dtype) == (jnp.bfloat16, jnp.bfloat16)
