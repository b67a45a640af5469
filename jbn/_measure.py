"""Measure the moments of one batch: one pass over x and one sum over the devices, about a center that is known."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jbn._check import check_batch, statistics_dtype
from jbn._fields import check_center, features_of
from jbn._pool import check_pool
from jbn._types import Moments


def moments(
    x: ArrayLike,
    *,
    center: ArrayLike | None = None,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Measure count, mean and population variance of every feature of a batch.

    With w the weights (1 where none are given) and sums over every axis but the feature axes:

        count = sum(w),  mean = sum(w x) / count,  var = sum(w (x - mean)^2) / count,  squares = sum(w^2)

    With a center c near the mean this is one pass over `x` and, where it is pooled, one message:

        rest = sum(w (x - c)) / count,  mean = c + rest,  var = sum(w (x - c)^2) / count - rest^2

    In float32 the variance is within 1e-4 where the center is within 12 standard deviations of the mean, and never less
    than what rounding can have made of it, 2e-6 (mean - c)^2. Without a center there is a pass, and a message, more: it
    gives the mean, about which the second goes. Then the variance is within 1e-4 for mean/std up to 1e5.

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      center: `[*features]`, or a scalar for all: a value that is known to be near the mean, such as a running mean. Not
        differentiated. It has to be the same on all devices that are pooled: where JAX's types tell that it differs
        (`shard_map` with `check_vma`), its mean over the devices is taken, in one message more.
      feature_axis: the axis or axes that keep their own statistics; all others are reduced. Peers' `axis` is sometimes
        this and sometimes the reduced ones.
      weights: a boolean mask; or numbers of repeats, in an integer dtype; or real numbers that are not negative, in any
        unit in which their squares are float32 numbers (1e-15 to 1e15), of which count**2 / squares is the effective
        number of values. Of the shape of `x`, where each feature has
        missing values of its own, or with the feature axes left out or of size 1; any other axis may be 1 too, and the
        last of them left out. What has weight 0 is never computed with: it may be NaN. A negative or NaN weight counts
        as 0.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool over. Under plain `jit` on sharded arrays
        leave it out: statistics are global there.
      axis_index_groups: lists of indices along `axis_name`, such as `[[0, 1], [2, 3]]`: each is pooled apart from the
        others. In `pmap`, and in `shard_map` with `check_vma=False`; elsewhere pool over one of two axes instead.

    Returns:
      `Moments` in float32 (float64 for float64 `x`), fields of shape `[*features]` in the order of the axes of `x`,
      `count` and `squares` of shape `[]`, or `[*features]` where weights differ between features; `squares` is `count`
      for a mask or repeats. Where `count` is 0, mean and variance are 0 (about a center, the mean is the center).
      Differentiable in `x` and real-valued `weights`.

    Raises:
      TypeError: `x` or `center` is not floating-point.
      ValueError: `feature_axis`, or the shape of `center`, `weights` or `axis_index_groups`, does not fit.
      NameError: `axis_name` is not bound.
      NotImplementedError: JAX has no `axis_index_groups` here.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eqs. 1.5 and 1.7.

    Examples:
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [jnp.nan, jnp.nan]])
      >>> m = jbn.moments(x, weights=jnp.array([True, True, False]))
      >>> m.count.item(), m.mean.tolist(), m.var.tolist()
      (2.0, [2.0, 20.0], [1.0, 100.0])
    """
    x, weights, axes = check_batch(x, feature_axis, weights)
    pool = check_pool(axis_name, axis_index_groups)
    center = check_center(center, features_of(x, axes), pool)
    return settled(_moments(axes, pool, x, weights, center))


# The backward pass of what is wrapped in this keeps its arguments, `x` in its own dtype among them, and the measured
# moments; it makes the rest again. It is around the rules for derivatives: what is in them is transposed.
remat = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("jbn.moments"), prevent_cse=False)


@partial(jax.jit, static_argnums=(0, 1))  # traced once for all batches of one shape
def _moments(axes, pool, x, weights, center) -> Moments:
    return remat(partial(named_moments, axes, pool))(x, weights, center)


def named_moments(axes, pool, x, weights, center) -> Moments:
    """What `measure` gives, by a name for policies of `jax.checkpoint`, with its derivative."""
    measured = checkpoint_name(measure(*lax.stop_gradient((x, weights, center)), axes, pool), "jbn.moments")
    if weights is None and not pool.names:  # a number that is known needs no name
        measured = measured._replace(count=_count(x, None, axes, measured.mean.dtype))
        measured = measured._replace(squares=measured.count)
    return _followed(axes, pool, measured, x.astype(measured.mean.dtype), weights)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _followed(axes, pool, measured: Moments, x, weights) -> Moments:
    """`measured`, with the derivative of measuring `x`, which so need not be measured again."""
    return measured


@partial(_followed.defjvp, symbolic_zeros=True)
def _followed_jvp(axes, pool, primals, tangents):
    measured = _followed(axes, pool, *primals)  # with its own tangents: second derivatives are wrong without them
    (_, x, weights), (_, x_dot, weights_dot) = primals, tangents
    x_dot = jnp.zeros_like(x) if isinstance(x_dot, SymbolicZero) else x_dot
    weights_dot = None if isinstance(weights_dot, SymbolicZero) else weights_dot
    return measured, measure_tangent(x, weights, measured, x_dot, weights_dot, axes, pool)


def measure(x, weights, center, axes, pool) -> Moments:
    """The moments of `x` [...] over `axes` and the devices of the pool, about `center` [*features] or `None`.

    The mean is the sum of `mean`, which is the center, and `mean_low`: see `settled`.
    """
    dtype = statistics_dtype(x.dtype)
    count = _count(x, weights, axes, dtype)
    squares = _count(x, weights * weights, axes, dtype) if _real(weights) else None
    given = center is not None
    if not given:
        first = _weighted_sum(weights, select(weights, x.astype(dtype)), axes)
        count, squares, first = pool.total((count, squares, first))
        center = few_bits(first / nonzero(count), 3)
    first, second, near = _sums(x, weights, center, axes)
    if given:
        count, squares, first, second = pool.total((count, squares, first, second))
    else:
        first, second = pool.total((first, second))
    rest = first / nonzero(count)
    square = second / nonzero(count)  # infinite where that of a value is, and then the variance is, not inf - inf
    var = square - jnp.where(jnp.isinf(square), 0.0, (rest + (center - near)) ** 2)
    least = uncertainty(rest) if given else jnp.zeros_like(var)
    return Moments(count, center, jnp.where(var > least, var, least), rest, count if squares is None else squares)


def _sums(x, weights, center, axes):
    """The sum of x - center, that of (x - near)^2, and `near`."""
    if weights is not None:
        apart = deviation(x, weights, center, axes)
        return _weighted_sum(weights, apart, axes), _weighted_sum(weights, apart * apart, axes), center
    # Each sum in words of its own: XLA's CPU backend takes x - center into a sum where nothing else has a use for it,
    # and writes it to memory otherwise.
    near, minus = few_bits(center, 4), -jnp.expand_dims(center, axes)
    return jnp.sum(x.astype(minus.dtype) + minus, axes), jnp.sum(deviation(x, None, near, axes) ** 2, axes), near


def deviation(x, weights, center, axes):
    """x - center in the dtype of `center` [*features], and 0 where the weight is."""
    center = jnp.expand_dims(center, axes)
    return select(weights, x.astype(center.dtype), center) - center


def uncertainty(rest):
    """What rounding can have made of a variance, measured about a center that is `rest` from the mean."""
    return 16 * jnp.finfo(rest.dtype).eps * rest * rest


def settled(measured: Moments) -> Moments:
    """`measured` with the sum of `mean` and `mean_low` rounded to `mean`, and what is left of it in `mean_low`."""
    rest = few_bits(measured.mean_low, 1)
    mean = measured.mean + rest
    return measured._replace(mean=mean, mean_low=rest - (mean - measured.mean))


def few_bits(value, fewer):
    """`value` without its last bits: the same number wherever it is used.

    Compilers make a cheap value again in each fusion that needs it, rounded in one and part of a multiply-add in
    another; `mean_low` is exact only if all see one number. Optimization barriers are gone when fusions are formed.
    """
    info = jnp.finfo(value.dtype)
    return lax.reduce_precision(value, info.nexp, info.nmant - fewer)


def measure_tangent(x, weights, measured, x_dot, weights_dot, axes, pool) -> Moments:
    """The tangent of `measure`, linear in `x_dot` and `weights_dot`, where `None` for the latter stands for zero.

    The center stays where it is: the mean moves by `mean_low`.
    """
    dtype = statistics_dtype(x.dtype)
    apart = deviation(x, weights, measured.mean, axes) - jnp.expand_dims(measured.mean_low, axes)
    x_dot = select(weights, x_dot.astype(dtype))
    zeroth = squares = jnp.zeros_like(measured.count)
    first = _weighted_sum(weights, x_dot, axes)
    second = _weighted_sum(weights, 2 * apart * x_dot, axes)
    if weights_dot is not None:
        weights_dot = select(weights, weights_dot)
        zeroth += _count(x, weights_dot, axes, dtype)
        squares += _count(x, 2 * weights * weights_dot, axes, dtype)
        first += jnp.sum(weights_dot * apart, axes)
        second += jnp.sum(weights_dot * apart * apart, axes)
    if weights_dot is None:
        zeroth, first, second = pool.total((zeroth, first, second))
    else:
        zeroth, squares, first, second = pool.total((zeroth, squares, first, second))
    divisor = nonzero(measured.count)
    if weights_dot is not None:
        second -= measured.var * zeroth
    rest, var = first / divisor, second / divisor
    return Moments(zeroth, jnp.zeros_like(measured.mean), var, rest, squares)


def select(weights, values, instead: ArrayLike = 0):
    """`values` with `instead` wherever the weight is 0, whatever stands there."""
    return values if weights is None else jnp.where(weights.astype(bool), values, jnp.asarray(instead, values.dtype))


def _weighted_sum(weights, values, axes):
    """sum(weights * values) over `axes`, for `values` that are 0 wherever a mask is."""
    if weights is not None and weights.dtype != jnp.bool_:
        values = weights.astype(values.dtype) * values
    return jnp.sum(values, axes)


def _real(weights) -> bool:
    """Whether weights are in some unit, rather than a mask or the number of times that each value counts."""
    return weights is not None and jnp.issubdtype(weights.dtype, jnp.floating)


def _count(x, weights, axes, dtype):
    """The sum of what `weights` broadcast to: [], or [*features] where they differ between features."""
    repeats = math.prod(x.shape[axis] for axis in axes if weights is None or weights.shape[axis] == 1)
    if weights is None:
        return jnp.asarray(repeats, dtype)
    total = repeats * jnp.sum(weights.astype(dtype), axes)
    return jnp.reshape(total, ()) if set(total.shape) <= {1} else jnp.broadcast_to(total, features_of(x, axes).shape)


def nonzero(count):
    """`count` as a divisor: sums over nothing are 0 and stay so."""
    return jnp.where(count > 0, count, jnp.ones_like(count))
