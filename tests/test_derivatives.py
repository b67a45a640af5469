"""Every kind of derivative against plain autodiff of the textbook formula in float64, cut by transform."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import jbn

ROWS, FEATURES = 6, 3
MASK = np.array([True, True, False, True, True, True])
WEIGHTS = {"plain": None, "mask": MASK, "real": np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])}


float64 = pytest.mark.usefixtures("_x64")


def arguments(shape=(ROWS, FEATURES), dtype=np.float64, offset=1.0):
    """x, scale, bias and epsilon."""
    rng = np.random.default_rng(0)
    x = offset + rng.standard_normal(shape)
    scale, bias = rng.standard_normal((2, FEATURES))
    return tuple(jnp.asarray(a, dtype) for a in (x, scale, bias, 0.1))


def as_numbers(weights):
    """One for each row, so that one compiled textbook is for all kinds of weights."""
    return np.ones(ROWS) if weights is None else np.float64(weights)


def textbook(x, scale, bias, epsilon, weights):
    return reference.textbook(x, scale, bias, epsilon, weights[:, None])


def textbook_moments(x, weights):
    weights = weights[:, None]
    mean = jnp.sum(weights * x, 0) / jnp.sum(weights)
    return mean, jnp.sum(weights * (x - mean[None]) ** 2, 0) / jnp.sum(weights)


def with_moments(y, mean, var, epsilon):
    """All that comes out, as in the log-determinant of a flow: its moments are differentiable too."""
    return y + jnp.expand_dims(jnp.sin(mean) * jnp.log(var + epsilon), 0)


def by_batch(x, scale, bias, epsilon, weights=None, **options):
    return jbn.normalize_batch(x, jbn.Params(scale, bias), epsilon=epsilon, weights=weights, **options)


def ours(x, scale, bias, epsilon, weights=None):
    return by_batch(x, scale, bias, epsilon, weights)[0]


def measured_and_given(x, scale, bias, epsilon, weights=None):
    """In two calls: the batch's statistics are given by a function of x."""
    measured = jbn.moments(x, weights=weights)
    y = jbn.normalize_running(x, jbn.Params(scale, bias), measured, epsilon=epsilon, weights=weights)
    return y, measured


RULES = {
    "normalize_batch": by_batch,
    "about a center": partial(by_batch, center=3.0),
    "moments, then normalize_running": measured_and_given,
}
FORWARD_OVER_REVERSE = (jax.jacfwd, jax.jacrev)
NESTINGS = list(product((jax.jacfwd, jax.jacrev), repeat=2))


def weigh(y):
    """A scalar of all outputs, with derivatives of any order."""
    return jnp.sum(jnp.cos(3 * jnp.arange(y.size, dtype=y.dtype)) * jnp.ravel(y + jnp.sin(y)))


def orders(f, unravel, nestings=(FORWARD_OVER_REVERSE,)):
    """The gradient of `weigh` of `f`, and its Hessian by each way to nest, as functions of one vector and weights."""

    def run(vector, *weights):
        scalar = lambda vector: weigh(f(*unravel(vector), *weights))  # noqa: E731
        return jax.grad(scalar)(vector), [outer(inner(scalar))(vector) for outer, inner in nestings]

    return jax.jit(run)


def assert_close(actual, expected, rtol=1e-9):
    """float64 arithmetic in two orders: rounding is below 1e-12 here, and second derivatives amplify it."""
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=rtol), actual, expected)


@cache
def textbook_orders():
    def everything(x, scale, bias, epsilon, weights):
        y = textbook(x, scale, bias, epsilon, weights)
        return with_moments(y, *textbook_moments(x, weights), epsilon)

    vector, unravel = ravel_pytree(arguments())
    return orders(everything, unravel), vector, unravel


@float64
@pytest.mark.parametrize(
    ("rule", "weights", "nestings"),
    [
        ("normalize_batch", "plain", NESTINGS),
        ("normalize_batch", "mask", NESTINGS[:2]),
        ("normalize_batch", "real", NESTINGS[2:]),
        *product(list(RULES)[1:], WEIGHTS, [(FORWARD_OVER_REVERSE,)]),
    ],
)
def test_gradient_and_hessian(rule, weights, nestings):
    expected, vector, unravel = textbook_orders()
    weights = WEIGHTS[weights]

    def everything(x, scale, bias, epsilon):
        y, measured = RULES[rule](x, scale, bias, epsilon, weights)
        return with_moments(y, measured.mean + measured.mean_low, measured.var, epsilon)

    gradient, (hessian,) = expected(vector, as_numbers(weights))
    got_gradient, hessians = orders(everything, unravel, nestings)(vector)
    assert_close(got_gradient, gradient)
    for got in hessians:
        assert_close(got, hessian)


@float64
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_textbook_by_finite_differences(kind):
    """Gradient and Hessian that the others are compared with, by central differences of NumPy's batch norm."""
    orders, vector, unravel = textbook_orders()
    weights, start = as_numbers(WEIGHTS[kind])[:, None], np.asarray(vector)

    def scalar(vector):
        x, scale, bias, epsilon = (np.asarray(part) for part in unravel(vector))
        _, mean, var = reference.moments(x, weights)
        y = np.where(weights > 0, reference.normalize(x, mean, var, scale, bias, epsilon), 0)
        y = (y + np.sin(mean) * np.log(var + epsilon)).ravel()
        return np.sum(np.cos(3 * np.arange(y.size)) * (y + np.sin(y)))

    def along(f, direction, step=1e-3):
        """Of fourth order, as its error is of the step."""
        ahead, further = (f(start + n * step * direction) - f(start - n * step * direction) for n in (1, 2))
        return (8 * ahead - further) / (12 * step)

    gradient, (hessian,) = orders(vector, weights[:, 0])
    every = np.eye(start.size)
    assert_allclose(gradient, [along(scalar, each) for each in every], rtol=1e-6, atol=1e-6)
    of_gradient = [along(lambda v: np.asarray(orders(v, weights[:, 0])[0]), each) for each in every]
    assert_allclose(hessian, of_gradient, rtol=1e-5, atol=1e-5)


@float64
@pytest.mark.parametrize("weights", [None, np.arange(64) % 5 > 0], ids=["plain", "mask"])
def test_so_many_rows_that_a_cpu_adds_them_up_in_a_loop_first(weights):
    vector, unravel = ravel_pytree(arguments((64, FEATURES)))
    got, hessians = orders(lambda *parts: by_batch(*parts, weights)[0], unravel, NESTINGS)(vector)
    full = np.ones(64) if weights is None else np.float64(weights)
    expected, (hessian,) = orders(textbook, unravel)(vector, full)
    assert_close(got, expected)
    for each in hessians:
        assert_close(each, hessian, rtol=1e-8)


@float64
def test_third_order():
    vector, unravel = ravel_pytree(arguments())

    def third(f, *weights):
        along = lambda t: weigh(f(*unravel(vector + t * jnp.cos(vector)), *weights))  # noqa: E731
        return jax.jit(jax.grad(jax.grad(jax.grad(along))))(0.0)

    assert_close(third(ours), third(textbook, np.ones(ROWS)), rtol=1e-8)


@float64
def test_weights_are_differentiable_to_second_order():
    vector, unravel = ravel_pytree((*arguments(), jnp.asarray([0.5, 2.0, 0.7, 1.0, 3.0, 0.25])))
    assert_close(*(orders(f, unravel)(vector) for f in (ours, textbook)))


@float64
def test_several_feature_axes_and_params_that_are_none():
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.standard_normal(shape) for shape in ((4, 2, 5, 3), (2, 3), (2, 3)))
    params = [jbn.Params(scale, bias), jbn.Params(None, bias), jbn.Params(scale, None), jbn.Params(None, None)]

    def got(x):
        f = lambda params: weigh(jbn.normalize_batch(x, params, feature_axis=(3, 1))[0])  # noqa: E731
        return [f(each) for each in params]

    def expected(x):
        ones, zeros = np.ones((2, 3)), np.zeros((2, 3))
        filled = [(scale, bias), (ones, bias), (scale, zeros), (ones, zeros)]
        return [weigh(reference.textbook(x, *each, 1e-5, axes=(0, 2))) for each in filled]

    assert_close(*(jax.jit(jax.jacrev(f))(x) for f in (got, expected)))


def by_given(x, scale, bias, epsilon, mean, var, low, weights=None):
    moments = jbn.Moments(jnp.asarray(4.0), mean, var, low)
    return jbn.normalize_running(x, jbn.Params(scale, bias), moments, epsilon=epsilon, weights=weights)


def plain_by_given(x, scale, bias, epsilon, mean, var, low, weights):
    y = (x - (mean + low)[None]) / jnp.sqrt(var + epsilon)[None] * scale[None] + bias[None]
    return jnp.where(weights[:, None] > 0, y, jnp.zeros_like(y))


@float64
def test_normalize_running_by_moments_that_are_given():
    """To any order in all of them, mean and variance too."""
    given = jnp.asarray([0.3, -1.0, 2.0]), jnp.asarray([0.5, 1.0, 4.0]), jnp.asarray([0.01, 0.0, -0.02])
    vector, unravel = ravel_pytree((*arguments(), *given))
    expected = orders(plain_by_given, unravel)
    for weights in WEIGHTS.values():
        assert_close(orders(partial(by_given, weights=weights), unravel)(vector), expected(vector, as_numbers(weights)))
    third = [
        jax.jit(jax.jacfwd(jax.hessian(lambda v, f=f, rest=rest: weigh(f(*unravel(v), *rest)))))(vector)
        for f, rest in ((by_given, ()), (plain_by_given, (np.ones(ROWS),)))
    ]
    assert_close(*third)


@float64
@pytest.mark.parametrize("in_axes", [(0, None, None, None), (2, 1, 1, None), (None, None, None, 0)])
def test_vmap_of_value_and_derivatives(in_axes):
    def stack(array, axis):
        return array if axis is None else np.stack([array, array * 1.5, array + 0.5], axis)

    args = tuple(map(stack, map(np.asarray, arguments()), in_axes))
    got = jax.jit(jax.vmap(value_and_derivatives(ours), in_axes))(*args)
    for row in range(3):
        one = [a if axis is None else np.take(a, row, axis) for a, axis in zip(args, in_axes, strict=True)]
        expected = textbook_value_and_derivatives(*one, np.ones(ROWS))
        assert_close(jax.tree.map(lambda a, row=row: a[row], got), expected)


def value_and_derivatives(f):
    def run(*args):
        loss = lambda *four: weigh(f(*four, *args[4:]))  # noqa: E731
        return f(*args), jax.grad(loss, (0, 1, 2, 3))(*args[:4]), jax.jvp(loss, args[:4], args[:4])

    return run


textbook_value_and_derivatives = jax.jit(value_and_derivatives(textbook))


@float64
def test_vmap_of_masks():
    masks = np.stack([MASK, ~MASK | (np.arange(ROWS) < 2)])
    got = jax.jit(jax.vmap(lambda mask: value_and_derivatives(ours)(*arguments(), mask)))(masks)
    for row, mask in enumerate(masks):
        expected = textbook_value_and_derivatives(*arguments(), as_numbers(mask))
        assert_close(jax.tree.map(lambda a, row=row: a[row], got), expected)


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
        step = lambda carried, part: (jnp.sin(textbook(part + carried, *params, 1e-5, np.ones(ROWS))), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, x[0], x)[0] * x[1])

    gradients, after = jax.jit(jax.grad(got, (0, 1), has_aux=True))(x, jbn.Params(scale, bias))
    assert_close(gradients, jax.jit(jax.grad(expected, (0, 1)))(x, jbn.Params(scale, bias)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_remat_gives_the_same_and_moves_the_state_once():
    x, scale, bias, _ = arguments(dtype=np.float32)
    _, state = jbn.init(FEATURES)

    def loss(x, params, wrap):
        y, after = wrap(partial(jbn.batch_norm, train=True))(x, params, state)
        return jnp.sum(jnp.sin(y)), after

    def both(x, params):
        wraps = lambda f: f, jax.checkpoint
        return [jax.value_and_grad(partial(loss, wrap=wrap), (0, 1), has_aux=True)(x, params) for wrap in wraps]

    plain, again = jax.jit(both)(x, jbn.Params(scale, bias))
    assert_close(plain, again, rtol=1e-6)
    (_, after), _ = again
    # One step of decay 0.9 from no evidence: weight 0.1, where two would give 0.19.
    assert_allclose(after.weight, 0.1, rtol=1e-6)
    assert_allclose(after.mean, np.float64(x).mean(0), rtol=1e-6)


def test_jit_and_eager_agree():
    args = arguments(dtype=np.float32)
    step = jax.value_and_grad(lambda *args: weigh(ours(*args, MASK)), (0, 1, 2, 3))
    # Two orders of float32 arithmetic on values near 1.
    assert_close(step(*args), jax.jit(step)(*args), rtol=2e-5)


def test_centers_and_states_carry_no_gradient():
    """Neither those that come in, nor the new one; a decay has none either."""
    x, scale, bias, _ = arguments(dtype=np.float32)
    params, (_, state) = jbn.Params(scale, bias), jbn.init(FEATURES)

    def total(tree):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))

    def of_center(state):
        return total((jbn.normalize_batch(x, params, center=state.mean), jbn.moments(x, center=state.mean)))

    def of_inputs(x, state, decay):
        after = jbn.batch_norm(x, params, state, train=True, decay=decay)[1]
        return total((after, jbn.update(state, jbn.moments(x), decay=decay)))

    def of_state(state):
        trained, _ = jbn.batch_norm(x, params, state, train=True)
        return jnp.sum(jbn.normalize_running(x, params, state) ** 3 + trained**3)

    def gradients(x, state, decay):
        return jax.grad(of_inputs, (0, 1, 2))(x, state, decay), jax.grad(of_state)(state), jax.grad(of_center)(state)

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(gradients)(x, state, np.float32(0.9))))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_gradients_of_half_precision_x(dtype, tolerance):
    x, scale, bias, _ = arguments((200, FEATURES), dtype=np.float32)
    x = np.asarray(x).astype(dtype)
    dy = np.cos(7 * np.float32(x)).astype(dtype)

    @jax.jit
    def run(x, dy, params):
        y, pullback = jax.vjp(lambda x, params: jbn.normalize_batch(x, params)[0], x, params)
        return y, *pullback(dy)

    y, dx, dparams = run(x, dy, jbn.Params(scale, bias))
    expected = reference.gradients(np.float64(x), np.float64(dy), scale)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    # All sums are float32: what is left is the rounding of dx, once: half an ulp of its own.
    assert_allclose(np.float64(dx), expected[0], rtol=tolerance, atol=1e-5)
    assert_allclose(dparams.scale, expected[1], rtol=1e-5, atol=1e-5)
    assert_allclose(dparams.bias, expected[2], rtol=1e-5, atol=1e-5)


def test_gradients_of_half_precision_params_come_in_their_dtype():
    x, scale, bias, _ = arguments(dtype=np.float32)
    params = jbn.Params(scale.astype(jnp.bfloat16), bias.astype(jnp.bfloat16))
    f = jax.grad(lambda params: jnp.sum(jnp.sin(jbn.normalize_batch(x, params)[0])))
    assert {leaf.dtype for leaf in jax.eval_shape(f, params)} == {jnp.dtype(jnp.bfloat16)}
