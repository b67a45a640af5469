"""Measure the moments of a batch, and merge moments that were measured apart."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jbn import _sync
from jbn._check import check_batch, check_fields, check_pool, feature_shape, statistics_dtype
from jbn._types import Moments


def moments(
    x: ArrayLike,
    *,
    feature_axis: int | tuple[int, ...] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Measure count, mean and population variance of every feature of a batch.

    With w the weights (1 where none are given) and sums over every axis but the feature axes:

        count = sum(w),  mean = sum(w x) / count,  var = sum(w (x - mean)^2) / count

    In float32 with mean/std up to 1e5 the variance is within 1e-4 of the exact one. One pass sums x and x^2; where a
    mean is so far from 0 that their difference would lose digits, a second pass goes about the mean, with a correction
    for its rounding (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eqs. 1.5 and 1.7).

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      feature_axis: the axis or axes that keep their own statistics; all others are reduced. Peers' `axis` is sometimes
        this and sometimes the reduced ones.
      weights: non-negative sample weights or a boolean mask, of the shape of `x` with the feature axes left out or of
        size 1; any other axis may be 1 too. What has weight 0 is never read: it may be NaN. A negative or NaN weight
        counts as 0.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool over. Under plain `jit` on sharded arrays
        leave it out: statistics are global there.
      axis_index_groups: lists of indices along `axis_name`, such as `[[0, 1], [2, 3]]`: each is pooled apart from the
        others. In `pmap`, and in `shard_map` with `check_vma=False`; elsewhere pool over one of two axes instead.

    Returns:
      `Moments` in float32 (float64 for float64 `x`), fields of shape `[*features]` in the order of the axes of `x`,
      `count` of shape `[]`. If `count` is 0, mean and variance are 0. Differentiable in `x` and real-valued `weights`.

    Raises:
      TypeError: `x` is not floating-point.
      ValueError: `feature_axis`, the shape of `weights` or `axis_index_groups` does not fit.
      NameError: `axis_name` is not bound.
      NotImplementedError: JAX has no `axis_index_groups` here.

    Example:
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [jnp.nan, jnp.nan]])
      >>> m = jbn.moments(x, weights=jnp.array([True, True, False]))
      >>> m.count.item(), m.mean.tolist(), m.var.tolist()
      (2.0, [2.0, 20.0], [1.0, 100.0])
    """
    x, weights, axes = check_batch(x, feature_axis, weights)
    return _moments(axes, check_pool(axis_name, axis_index_groups), x, weights)


def merge(*moments: Moments) -> Moments:
    """Pool moments that were measured apart, as if all had been measured at once.

        count = sum(count_i),  mean = sum(count_i mean_i) / count
        var = sum(count_i (var_i + (mean_i - mean)^2)) / count          within plus between

    Associative and commutative up to rounding. A part with count 0 contributes nothing, whatever its other fields hold.
    Exact in the sense of `moments`: `mean_low` carries what rounding took from the means.

    Args:
      *moments: one or more `Moments` of the same features.

    Returns:
      `Moments` of all of them, in the widest dtype among them. Differentiable.

    Raises:
      TypeError: no argument, or one that is not a `Moments`.
      ValueError: the shapes differ.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Example:
      >>> a, b = jnp.array([[1.0], [2.0]]), jnp.array([[6.0]])
      >>> m = jbn.merge(jbn.moments(a), jbn.moments(b))
      >>> m.count.item(), m.mean.item(), round(m.var.item(), 4)
      (3.0, 3.0, 4.6667)
    """
    if not moments:
        raise TypeError("merge was given nothing; pass one or more jbn.Moments, such as merge(*parts) for a list.")
    check_fields("moments[0]", moments[0], Moments)
    shape = jnp.shape(moments[0].mean)
    for index, part in enumerate(moments):
        check_fields(f"moments[{index}]", part, Moments, shape)
    dtype = statistics_dtype(*(jnp.asarray(part.var).dtype for part in moments))

    def column(field, shape):
        return jnp.stack([jnp.broadcast_to(jnp.asarray(getattr(part, field), dtype), shape) for part in moments])

    return combine(Moments(column("count", ()), *(column(field, shape) for field in Moments._fields[1:])))


def combine(parts: Moments) -> Moments:
    """Pool `parts`, whose fields have one more axis in front."""
    count = jnp.sum(parts.count, 0)
    column = (-1,) + (1,) * (parts.mean.ndim - 1)
    present = jnp.reshape(parts.count > 0, column)
    share = jnp.reshape(parts.count / _nonzero(count), column)
    mean, low, var = (
        jnp.where(present, field, jnp.zeros_like(field)) for field in (parts.mean, parts.mean_low, parts.var)
    )
    center = _fixed(jnp.sum(share * mean, 0), 3)
    apart = mean - jnp.expand_dims(center, 0) + low
    rest = jnp.sum(share * apart, 0)
    between = (apart - jnp.expand_dims(rest, 0)) ** 2
    return _as_moments(count, center, rest, jnp.sum(share * (var + between), 0))


def _as_moments(count, center, rest, var) -> Moments:
    """`Moments` with the mean `center + rest`, where `rest` is small beside `center`."""
    rest = _fixed(rest, 1)
    mean = center + rest
    return Moments(count, mean, var, rest - (mean - center))


def _fixed(value, bits):
    """`value` without its last `bits`: the same number wherever it is used.

    Compilers make a cheap value again in each fusion that needs it, rounded in one and part of a multiply-add in
    another; `mean_low` is exact only if all see one number. Optimization barriers are gone when fusions are formed.
    """
    info = jnp.finfo(value.dtype)
    return lax.reduce_precision(value, info.nexp, info.nmant - bits)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moments(axes, pool, x, weights) -> Moments:
    return measure(x, weights, axes, pool)


@partial(_moments.defjvp, symbolic_zeros=True)
def _moments_jvp(axes, pool, primals, tangents):
    measured = _moments(axes, pool, *primals)
    tangent = remat(partial(measure_tangent, axes=axes, pool=pool))
    return measured, tangent(*primals, measured, *materialize(primals, tangents))


# A tangent function under this keeps its arguments for the backward pass and makes the rest again.
remat = partial(jax.checkpoint, prevent_cse=False)


def materialize(primals, tangents) -> tuple:
    """Tangents of (x, weights, ...) with arrays for symbolic zeros, but `None` for weights, where that saves work."""

    def array(primal, tangent):
        return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent

    x_dot, weights_dot, *rest_dot = tangents
    x_dot, *rest_dot = jax.tree.map(array, (primals[0], *primals[2:]), (x_dot, *rest_dot))
    return x_dot, None if isinstance(weights_dot, SymbolicZero) else weights_dot, *rest_dot


@partial(jax.jit, static_argnums=(2, 3), inline=True)  # or the condition is compiled at each call outside of jit
def measure(x, weights, axes, pool) -> Moments:
    """The moments of `x` [...] over `axes` and the devices of the pool."""
    dtype = statistics_dtype(x.dtype)
    count = jnp.asarray(_repeats(x, weights, axes), dtype)
    if weights is not None:
        count *= jnp.sum(weights.astype(dtype))

    def about(center, count, x, weights):
        # Cast in here: a branch that is handed the wider array would have it written to memory.
        apart = select(weights, x.astype(dtype) - jnp.expand_dims(center, axes))
        return _about(center, count, _weighted_sum(weights, apart, axes), _weighted_sum(weights, apart * apart, axes))

    def again(measured, x, weights):
        return about(_fixed(measured.mean, 3), measured.count, x, weights)

    @custom_vmap
    def settle(measured, x, weights):
        return lax.cond(cancelled(measured), again, lambda measured, *_: measured, measured, x, weights)

    @settle.def_vmap
    def _(_, mapped, *operands):
        # A condition of each lane's own would take both branches; this one is right for all.
        settled = jax.vmap(again, jax.tree.map(lambda axis: 0 if axis else None, tuple(mapped)))(*operands)
        return settled, jax.tree.map(lambda _: True, settled)

    measured = settle(about(jnp.zeros(feature_shape(x, axes), dtype), count, x, weights), x, weights)
    return _across(measured, pool) if pool.names else measured


def _across(part: Moments, pool) -> Moments:
    """The moments of all devices of the pool, where `part` is one device's share.

    One sum about 0; where that loses digits, one more about the mean. Pools beside each other always take both: where
    one went round again and another did not, some hardware would wait for ever.
    """
    always_twice = pool.has_neighbours()

    def unfinished(carry):
        rounds, measured = carry
        return rounds < 2 if always_twice else (rounds == 0) | (rounds == 1) & cancelled(measured)

    def about(center):
        apart = part.mean - center + part.mean_low
        sums = part.count, part.count * apart, part.count * (part.var + apart * apart)
        return _about(center, *_sync.total(sums, pool))

    def again(carry):
        rounds, measured = carry
        return rounds + 1, about(_fixed(measured.mean, 3))

    # Never computed: zeros that vary over the same mesh axes as the result, which check_vma wants of a loop's start.
    nothing = jax.tree.map(jnp.zeros_like, about(jnp.zeros(part.mean.shape, part.mean.dtype)))
    return lax.while_loop(unfinished, again, (0, nothing))[1]


def _about(center, count, first, second) -> Moments:
    """`Moments` from the sums of (x - center) and (x - center)^2."""
    rest = first / _nonzero(count)
    var = second / _nonzero(count) - rest * rest
    return _as_moments(count, center, rest, jnp.maximum(var, jnp.zeros_like(var)))


def cancelled(measured: Moments):
    """Whether a variance from sums about 0 may have lost digits: a mean of 4 standard deviations costs 4 bits."""
    return ~jnp.all((measured.mean * measured.mean <= 16 * measured.var) & jnp.isfinite(measured.var))


def measure_tangent(x, weights, measured, x_dot, weights_dot, axes, pool) -> Moments:
    """The tangent of `measure`, linear in `x_dot` and `weights_dot`, where `None` for the latter stands for zero."""
    dtype = statistics_dtype(x.dtype)
    apart = x.astype(dtype) - jnp.expand_dims(measured.mean, axes) - jnp.expand_dims(measured.mean_low, axes)
    apart, x_dot = select(weights, apart), select(weights, x_dot.astype(dtype))
    zeroth = jnp.zeros_like(measured.count)
    first = _weighted_sum(weights, x_dot, axes)
    second = _weighted_sum(weights, 2 * apart * x_dot, axes)
    if weights_dot is not None:
        weights_dot = select(weights, weights_dot)
        zeroth += _repeats(x, weights, axes) * jnp.sum(weights_dot)
        first += jnp.sum(weights_dot * apart, axes)
        second += jnp.sum(weights_dot * apart * apart, axes)
    zeroth, first, second = _sync.total((zeroth, first, second), pool)
    divisor = _nonzero(measured.count)
    mean, var = first / divisor, (second - measured.var * zeroth) / divisor
    return Moments(zeroth, mean, var, jnp.zeros_like(measured.mean_low))


def select(weights, values):
    """`values` with 0 wherever the weight is 0, whatever stands there."""
    return values if weights is None else jnp.where(weights.astype(bool), values, jnp.zeros_like(values))


def _weighted_sum(weights, values, axes):
    """sum(weights * values) over `axes`, for `values` that are 0 wherever a mask is."""
    return jnp.sum(values if weights is None or weights.dtype == jnp.bool_ else weights * values, axes)


def _repeats(x, weights, axes) -> int:
    """How many values per feature each entry of `weights` stands for."""
    return math.prod(x.shape[axis] for axis in axes if weights is None or weights.shape[axis] == 1)


def _nonzero(count):
    """`count` as a divisor: sums over nothing are 0 and stay so."""
    return jnp.where(count > 0, count, jnp.ones_like(count))
