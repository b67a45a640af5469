"""Measure the moments of one batch: one pass over x and one sum over the devices, about a center that is known."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jbn._core.batch import Batch
from jbn._core.compilers import few_bits, settled, sums, uncertainty
from jbn._types import Moments, nonzero

# The backward pass of what is wrapped in this keeps its arguments, `x` in its own dtype among them, and the measured
# moments; it makes the rest again. It is around the rules for derivatives: what is in them is transposed.
remat = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("jbn.moments"), prevent_cse=False)


@jax.jit  # traced once for all batches of one shape
def moments_of(batch: Batch, center) -> Moments:
    """The moments of a batch about `center` [*features] or, with a pass and a message more, its own mean."""
    return settled(remat(lambda batch, center: named_moments(batch.wide(), center))(batch, center))


def named_moments(batch: Batch, center) -> Moments:
    """What `measure` gives of a wide batch, with its derivative, by a name for policies of `jax.checkpoint`."""
    measured = checkpoint_name(measure(*lax.stop_gradient((batch, center))), "jbn.moments")
    if batch.weights is None and not batch.pool.names:  # a number that is known needs no name
        count = batch.count(None)
        measured = measured._replace(count=count, squares=count)
    return _followed(measured, batch)


@jax.custom_jvp
def _followed(measured: Moments, batch: Batch) -> Moments:
    """`measured`, with the derivative of measuring the batch, which so need not be measured again."""
    return measured


@partial(_followed.defjvp, symbolic_zeros=True)
def _followed_jvp(primals, tangents):
    measured = _followed(*primals)  # with its own tangents: second derivatives are wrong without them
    (_, batch), (_, dots) = primals, tangents
    x_dot = jnp.zeros_like(batch.x) if isinstance(dots.x, SymbolicZero) else dots.x
    weights_dot = None if isinstance(dots.weights, SymbolicZero) else dots.weights
    return measured, measure_tangent(batch, measured, x_dot, weights_dot)


def measure(batch: Batch, center) -> Moments:
    """The moments of `x` [...] over its axes and the devices of the pool, about `center` [*features] or `None`.

    The mean is the sum of `mean`, which is the center, and `mean_low`.
    """
    count = batch.count(batch.weights)
    squares = batch.count(batch.weights * batch.weights) if batch.real else None
    given = center is not None
    if not given:
        first = batch.sum(batch.select(batch.x))
        count, squares, first = batch.pool.total((count, squares, first))
        center = few_bits(first / nonzero(count), 3)
    first, second, near = sums(batch, center)
    if given:
        count, squares, first, second = batch.pool.total((count, squares, first, second))
    else:
        first, second = batch.pool.total((first, second))
    rest = first / nonzero(count)
    square = second / nonzero(count)  # infinite where that of a value is, and then the variance is, not inf - inf
    var = square - jnp.where(jnp.isinf(square), 0.0, (rest + (center - near)) ** 2)
    least = uncertainty(rest) if given else jnp.zeros_like(var)
    return Moments(count, center, jnp.where(var > least, var, least), rest, count if squares is None else squares)


def measure_tangent(batch: Batch, measured: Moments, x_dot, weights_dot) -> Moments:
    """The tangent of `measure`, linear in `x_dot` and `weights_dot`, where `None` for the latter stands for zero.

    The center stays where it is: the mean moves by `mean_low`.
    """
    weights, total = batch.weights, batch.pool.total
    apart = batch.deviation(measured.mean) - batch.along(measured.mean_low)
    x_dot = batch.select(x_dot)
    zeroth = squares = jnp.zeros_like(measured.count)
    first = batch.sum(x_dot)
    second = batch.sum(2 * apart * x_dot)
    divisor = nonzero(measured.count)
    if weights_dot is None:
        zeroth, first, second = total((zeroth, first, second))
    else:
        weights_dot = batch.select(weights_dot)
        zeroth += batch.count(weights_dot)
        squares += batch.count(2 * weights * weights_dot)
        first += jnp.sum(weights_dot * apart, batch.axes)
        second += jnp.sum(weights_dot * apart * apart, batch.axes)
        zeroth, squares, first, second = total((zeroth, squares, first, second))
        second -= measured.var * zeroth
    rest, var = first / divisor, second / divisor
    return Moments(zeroth, jnp.zeros_like(measured.mean), var, rest, squares)
