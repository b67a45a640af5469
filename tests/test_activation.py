"""An activation inside of batch norm is one behind it, in value and in every derivative, for less memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ways
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from test_derivatives import MASK, WEIGHTS, arguments, as_numbers, assert_close, float64, textbook, weigh
from test_straight import lowered_for
from ways import PARAMS, SHAPE, STATE

import jbn

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu}
X, DY = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)


def by_batch(x, params, **options):
    return jbn.normalize_batch(x, params, **options)[0]


def by_running(x, params, **options):
    return jbn.normalize_running(x, params, jax.tree.map(lambda field: field.astype(x.dtype), STATE), **options)


def by_batch_norm(x, params, train=True, **options):
    return jbn.batch_norm(x, params, STATE, train=train, **options)[0]


FUNCTIONS = {
    "normalize_batch": by_batch,
    "in groups": partial(by_batch, groups=2),
    "about a center": partial(by_batch, center=1.0),
    "normalize_running": by_running,
    "batch_norm": by_batch_norm,
    "batch_norm, evaluation": partial(by_batch_norm, train=False),
    "batch_renorm": lambda x, params, **options: jbn.batch_renorm(x, params, STATE, train=True, **options)[0],
}


def behind(f, activation, weights=None):
    """`f` with the activation behind it, as one writes it without the argument."""

    def composed(x, params, **options):
        y = activation(f(x, params, weights=weights, **options))
        return y if weights is None else jnp.where(jnp.asarray(weights)[..., None].astype(bool), y, jnp.zeros_like(y))

    return composed


def derivatives(f, x, params):
    """Forward, reverse, and one over the other: each of the second order too."""

    def loss(x, params):
        return weigh(f(x, params))

    along = jax.tree.map(jnp.cos, (x, params))
    gradient = jax.grad(loss, (0, 1))
    return (
        jax.jvp(f, (x, params), along),
        gradient(x, params),
        jax.jvp(gradient, (x, params), along),
        jax.grad(lambda *args: jax.jvp(loss, args, along)[1], (0, 1))(x, params),
        jax.grad(lambda *args: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(*args), along)))))(x, params),
    )


def plain(activation, x, params, weights):
    """The textbook's batch norm, and then the activation, of what has a weight."""
    y = activation(textbook(x, *params, 1e-5, weights))
    return jnp.where(weights[:, None] > 0, y, jnp.zeros_like(y))


@cache
def textbook_derivatives(activation):
    """Compiled once for all weights."""
    return jax.jit(lambda x, params, weights: derivatives(partial(plain, activation, weights=weights), x, params))


def assert_same_derivatives(function, activation, weights, compiled=jax.jit):
    x, scale, bias, _ = arguments()
    operands = x, jbn.Params(scale, bias)
    inside = partial(FUNCTIONS[function], activation=activation, weights=weights)
    got = compiled(partial(derivatives, inside))(*operands)
    if function in ("normalize_batch", "about a center"):
        wanted = textbook_derivatives(activation)(*operands, as_numbers(weights))
    else:
        wanted = jax.jit(partial(derivatives, behind(FUNCTIONS[function], activation, weights)))(*operands)
    assert_close(got, wanted)


@float64
@pytest.mark.parametrize(
    ("function", "activation", "weights"),
    [
        ("normalize_batch", "relu", "mask"),
        ("normalize_batch", "silu", "plain"),
        ("normalize_batch", "silu", "real"),
        ("normalize_running", "silu", "mask"),
        ("in groups", "relu", "real"),
        ("batch_renorm", "silu", "plain"),
    ],
)
def test_value_and_every_derivative(function, activation, weights):
    """Of those functions that the others call."""
    assert_same_derivatives(function, ACTIVATIONS[activation], WEIGHTS[weights])


@float64
@pytest.mark.parametrize(("activation", "weights"), [("relu", "plain"), ("silu", "mask")])
def test_every_derivative_as_lowered_for_gpus(activation, weights):
    def compiled(f):
        return lambda *operands: lowered_for("cuda", f, *operands)(*operands)

    assert_same_derivatives("about a center", ACTIVATIONS[activation], WEIGHTS[weights], compiled)


def test_every_function_has_it():
    """In evaluation and about a center too: values, as the derivatives are those of the functions above."""

    def both(x):
        inside = {name: f(x, PARAMS, activation=jax.nn.silu) for name, f in FUNCTIONS.items()}
        return inside, {name: behind(f, jax.nn.silu)(x, PARAMS) for name, f in FUNCTIONS.items()}

    assert_close(*jax.jit(both)(X), rtol=1e-5)


@pytest.mark.parametrize(
    ("platform", "masked", "dtype"),
    [
        ("cpu", True, jnp.float32),
        ("cpu", False, jnp.bfloat16),
        ("tpu", False, jnp.float16),
        ("cuda", False, jnp.float32),
        ("cuda", True, jnp.bfloat16),
        ("cuda", True, jnp.float16),
    ],
)
def test_relu_as_lowered_for_every_platform(platform, masked, dtype):
    """The same numbers as behind it, in every dtype, where the output is not 0 to rounding."""
    x, mask, dy = ways.batch(dtype=dtype, masked=masked)
    mask = None if mask is None else mask[..., 0]

    def both(x, dy):
        found = []
        for f in (partial(by_batch, activation=jax.nn.relu, weights=mask), behind(by_batch, jax.nn.relu, mask)):
            y, pullback = jax.vjp(f, x, PARAMS)
            found.append((y, *pullback(dy)))
        return found

    inside, composed = lowered_for(platform, both, jnp.asarray(x), jnp.asarray(dy))(x, dy)
    assert_array_equal(inside[0], composed[0])
    tolerance = 1e-5 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    for got, wanted in zip(*map(jax.tree.leaves, (inside[1:], composed[1:])), strict=True):
        assert_allclose(np.float64(got), np.float64(wanted), rtol=tolerance, atol=tolerance)


def test_on_gpus_each_of_the_sums_and_dx_masks_for_itself():
    """By products, as benchmarks/communication.py shows that XLA for H100 needs it; elsewhere by one choice."""

    def backward(x, dy):
        return jax.vjp(partial(by_batch, activation=jax.nn.relu), x, PARAMS)[1](dy)

    for platform in ("cpu", "tpu", "cuda", "rocm"):
        unchecked = [jax.export.DisabledSafetyCheck.platform()]
        exported = jax.export.export(jax.jit(backward), platforms=(platform,), disabled_checks=unchecked)(X, DY)
        text = exported.mlir_module()
        masks, barriers = (text.count(f"stablehlo.{name} ") for name in ("sign", "optimization_barrier"))
        assert masks == (3 if platform in ("cuda", "rocm") else 0), platform
        assert platform == "cpu" or barriers == (masks > 0)  # a CPU has some of its own, behind rows that it adds up


@pytest.mark.parametrize(
    ("way", "activation"),
    [
        ("vmap", "silu"),
        ("shard_map", "square"),
        ("shard_map unchecked", "relu"),
        ("vmap of shard_map", "relu"),
        ("automatic, features", "silu"),
        ("explicit, features", "relu"),
        ("explicit, partly manual", "silu"),
        ("vmap of explicit, rows", "relu"),
    ],
)
def test_the_split_batch_is_the_whole(way, activation):
    """Masked, so that shards differ, against the float64 reference with its dy multiplied by the derivative at y."""
    inside = (ACTIVATIONS | {"square": jnp.square})[activation]
    x, mask, dy = batch = ways.batch(masked=True)
    ((y, *_),) = ways.expected([batch], ways.PARAMS, STATE)
    sigmoid = 1 / (1 + np.exp(-y))
    value, slope = {
        "relu": (np.maximum(y, 0), y > 0),
        "silu": (y * sigmoid, sigmoid * (1 + y * (1 - sigmoid))),
        "square": (y * y, 2 * y),
    }[activation]
    ((_, *rest),) = ways.expected([(x, mask, slope * dy)], ways.PARAMS, STATE)
    got = ways.runner(way, partial(jbn.batch_norm, activation=inside))(*batch, ways.PARAMS, STATE)
    assert not ways.too_far(ways.differences(got, (value, *rest)))


def test_a_unit_that_is_off_has_no_gradient():
    """As relu has none at 0: a scale of 0, as at the start of a residual branch, and a bias that is not positive."""
    params = jbn.Params(np.zeros(3, np.float32), np.float32([0, -1, 1]))
    loss = lambda x, params: jnp.sum(by_batch(x, params, activation=jax.nn.relu))  # noqa: E731
    gradients = jax.jit(jax.grad(loss, (0, 1)))(X, params)
    assert_array_equal(gradients[1].bias, [0, 0, SHAPE[0] * SHAPE[1]])
    assert not np.any(gradients[0])


def test_what_is_masked_is_never_computed_with():
    x = jnp.where(MASK[:, None], arguments(dtype=np.float32)[0], jnp.nan)
    for activation in (jax.nn.relu, jax.nn.sigmoid):  # which is not 0 at 0
        f = partial(by_batch, activation=activation, weights=MASK)
        with jax.debug_nans(True):
            y, pullback = jax.vjp(f, x, PARAMS)
            dx, dparams = pullback(jnp.ones_like(y))
        y, dx = np.asarray(y), np.asarray(dx)
        assert not np.any(y[~MASK]) and not np.any(dx[~MASK])
        assert all(np.isfinite(leaf).all() for leaf in (y, dx, *dparams))


def test_a_feature_that_is_broken_leaves_the_others():
    broken = X.copy()
    broken[3, 1, 0] = np.nan
    f = jax.jit(lambda x: jax.vjp(partial(by_batch, activation=jax.nn.relu), x, PARAMS)[1](DY))
    got, wanted = jax.device_get((f(broken), f(X)))
    assert_allclose(got[0][..., 1:], wanted[0][..., 1:], rtol=1e-5, atol=1e-5)
    assert_allclose(got[1].bias[1:], wanted[1].bias[1:], rtol=1e-5)


def segment(x, params, state, activation=jax.nn.relu):
    """What lies between two arrays that are kept."""
    y, after = jbn.batch_norm(x, params, state, train=True, axis_name="i", activation=activation)
    return jnp.sum(jnp.sin(y)), after


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_policy_that_keeps_the_moments_measures_once(check_vma):
    """Forward one message and backward one: with nothing kept, the forward one is sent again."""
    names = jax.checkpoint_policies.save_only_these_names

    def program(wrap):
        def local(x, params, state):
            (_, after), gradients = jax.value_and_grad(wrap(segment), (0, 1), has_aux=True)(x, params, state)
            return after, gradients[0], gradients[1] if check_vma else jax.lax.psum(gradients[1], "i")

        specs = {"in_specs": (P("i"), P(), P()), "out_specs": (P(), P("i"), P())}
        return jax.shard_map(local, mesh=ways.mesh(i=8), check_vma=check_vma, **specs)

    def messages(f):
        text = str(jax.make_jaxpr(f)(X, PARAMS, STATE))
        return sum(text.count(f"= {name}[") for name in ("psum", "psum_invariant", "psum2"))

    plain = program(lambda f: f)
    kept = program(partial(jax.checkpoint, policy=names("jbn.moments")))
    again = program(partial(jax.checkpoint, policy=names()))
    assert messages(kept) == messages(plain) == messages(again) - 3  # the count and two sums, which XLA sends as one
    assert_close(*jax.jit(lambda *args: (kept(*args), plain(*args)))(X, PARAMS, STATE), rtol=1e-5)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS.values()])
def test_a_policy_that_keeps_the_moments_keeps_x_and_them(activation):
    def loss(x, params):
        y, _ = jbn.batch_norm(x, params, STATE, train=True, activation=activation)
        return jnp.sum(y**2)  # whose derivative wants y, which is made again

    policy = jax.checkpoint_policies.save_only_these_names("jbn.moments")
    wrapped = jax.checkpoint(loss, policy=policy)
    kept = jax.eval_shape(lambda *args: jax.tree.leaves(jax.vjp(wrapped, *args)[1]), X, PARAMS)
    assert sum(leaf.shape == SHAPE for leaf in kept) == 1
    assert {leaf.shape for leaf in kept} <= {SHAPE, SHAPE[-1:], ()}


def test_recalibration_goes_through_it():
    """The second layer is measured behind the activation of the first."""
    x, kernel = X[..., 0, :].repeat(2, 0), np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)

    def network(inside):
        def apply(params, states, x):
            first, second = states
            y, first = jbn.batch_norm(x, params, first, train=True, activation=jax.nn.relu if inside else None)
            y = y if inside else jax.nn.relu(y)
            y, second = jbn.batch_norm(y @ kernel, params, second, train=True)
            return y, (first, second)

        return jbn.recalibrate(apply, PARAMS, (STATE, STATE), [x[:16], x[16:] - 1])

    assert_close(network(True), network(False), rtol=1e-5)


@pytest.mark.parametrize("function", [*FUNCTIONS])
def test_what_is_no_function_of_elements(function):
    for wrong in ("relu", 1.0, np.ones(3)):
        with pytest.raises(
            TypeError, match=r"activation is .*; expected a function of each element, such as jax.nn.relu"
        ):
            FUNCTIONS[function](X, PARAMS, activation=wrong)
    for wrong in (jnp.sum, lambda y: (y, y), lambda y: y > 0, lambda y: None):
        with pytest.raises(TypeError, match=r"activation makes .* of float32\[32, 2, 3\]; expected a function of each"):
            FUNCTIONS[function](X, PARAMS, activation=wrong)
