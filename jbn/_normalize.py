"""Normalize a batch by given statistics: its own, with their derivative, or the running ones."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._affine import affine, normalize_by_given, standardize
from jbn._check import (
    check_activation,
    check_batch,
    check_epsilon,
    check_groups,
    check_more_than_one,
    statistics_dtype,
)
from jbn._fields import check_center, check_fields, features_of
from jbn._layout import automatically, everywhere, layout_of
from jbn._measure import named_moments, remat, select, settled
from jbn._measuring import held_by
from jbn._merge import combine
from jbn._pool import check_pool
from jbn._types import Moments, Params, State


def normalize_batch(
    x: ArrayLike,
    params: Params,
    *,
    center: ArrayLike | None = None,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int = 1,
    interleaved: bool = False,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize `x` by its own statistics.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias)

    with mean and population variance as `moments` measures them. With xhat = (x - mean) / sqrt(var + epsilon) and means
    over the pooled batch, and dy behind the activation, the derivative is

        dx = scale / sqrt(var + epsilon) * (dy - mean(dy) - xhat * mean(dy * xhat)),
        dscale = sum(dy * xhat),  dbias = sum(dy)

    in reverse and forward mode and to any order. The backward pass keeps `x` in its own dtype and per-feature vectors,
    of which the measured ones have the `checkpoint_name` "jbn.moments": a policy of `jax.checkpoint` that saves them
    has normalization and activation made again from `x`, and nothing measured or communicated again.

    Args:
      x: [...], float16, bfloat16, float32 or float64; reduced in float32 or wider.
      params: `Params` with fields of shape `[*features]`.
      center: a value for each feature that is known to be near its mean, such as a running mean: one pass over `x` and
        one message to measure it, rather than two; see `moments`. Where it was too far away `batch_norm` starts the
        running statistics anew; `update`, which does not know of it, takes the variance as it is.
      epsilon: added to the variance; may be traced. A feature that is constant gives the bias even where this is 0.
      feature_axis: the axis or axes that keep their own statistics; all others are reduced.
      weights: as in `moments`. Where the weight is 0, the output and its gradient are 0.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool over; see `moments`.
      axis_index_groups: pool only within these subgroups of `axis_name`; see `moments`.
      groups: cut axis 0 into so many equal groups and normalize each by its own statistics, pooled over `axis_name`
        ("ghost" batch normalization, Hoffer, Hubara & Soudry 2017, algorithm 1). The moments are those of all groups.
      interleaved: row i belongs to group i mod `groups`, rather than the groups being contiguous.
      activation: a function of each element, such as `jax.nn.relu`, that `y` goes through before it is rounded to the
        dtype of `x`. Its derivative is made again from `x`: the backward pass keeps nothing for it, and on a GPU writes
        nothing to memory for it either. (There relu's multiplies: where y is 0, an infinite dy gives NaN.) A function
        of nothing else, and the same object in every call: for another one all is compiled anew.

    Returns:
      `y` with the shape and dtype of `x`, and the `Moments` it was normalized by, which are differentiable too.

    Raises:
      TypeError: `x` is not floating-point, `params` is not a `Params`, or `activation` is no function of elements.
      ValueError: a shape does not fit, `epsilon` is negative, `groups` does not divide axis 0, or there is a single
        value per feature in all, or in each group.
      NameError, NotImplementedError: as in `moments`.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1 and section 3.

    Examples:
      >>> params, _ = jbn.init(1)
      >>> y, moments = jbn.normalize_batch(jnp.array([[1.0], [3.0]]), params)
      >>> y.round(3).tolist(), moments.mean.tolist(), moments.var.tolist()
      ([[-1.0], [1.0]], [2.0], [1.0])
    """
    x, weights, axes = check_batch(x, feature_axis, weights)
    pool, features = check_pool(axis_name, axis_index_groups), features_of(x, axes)
    params = check_fields("params", params, Params, features)
    center = check_center(center, features, pool)
    check_epsilon(epsilon)
    check_activation(activation, x)
    groups = check_groups(groups, x, axes)
    check_more_than_one(x, axes, pool, groups)
    operands = x, weights, center, params, jnp.asarray(epsilon, features.dtype)
    if groups == 1:
        y, measured = normalize_by_batch(axes, pool, standardize, activation, *operands)
    else:
        y, measured = _in_groups(axes, pool, groups, interleaved, activation, *operands)
    return y, settled(measured)


def normalize_running(
    x: ArrayLike,
    params: Params,
    state: State | Moments,
    *,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Normalize `x` by given statistics, as in evaluation by the running ones. Nothing is communicated.

        y = activation(scale * (x - state.mean) / sqrt(state.var + epsilon) + bias)

    The state is used as it stands, whatever its evidence: a fresh one has mean 0 and variance 1, and a feature whose
    last batch was far away (see `batch_norm`) what that batch was normalized by. A state is constant in
    differentiation; `Moments` in its place, such as those of another batch, are differentiable in mean and variance, to
    any order; without
    an activation:

        dmean = -sum(dy * scale) / sqrt(var + epsilon),  dvar = -sum(dy * (y - bias)) / (2 (var + epsilon))

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      params: `Params` with fields of shape `[*features]`.
      state: `State` or `Moments` with fields of shape `[*features]`.
      epsilon: added to the variance; may be traced.
      feature_axis: the axis or axes that keep their own statistics.
      weights: as in `moments`; all they do here is to blank: where the weight is 0, the output and its gradient are 0.
      activation: a function of each element behind the normalization; see `normalize_batch`.

    Returns:
      `y` with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not floating-point, `params` or `state` is something else, or `activation` is no function of
        elements.
      ValueError: a shape does not fit, or `epsilon` is negative.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 2.

    Examples:
      >>> params, state = jbn.init(1)
      >>> state = state._replace(mean=jnp.array([2.0]), var=jnp.array([4.0]))
      >>> jbn.normalize_running(jnp.array([[4.0]]), params, state).round(3).tolist()
      [[1.0]]
    """
    if held := held_by(state):
        state = held.given or State(state.mean, state.var)
    x, weights, axes = check_batch(x, feature_axis, weights)
    features = features_of(x, axes)
    params = check_fields("params", params, Params, features)
    check_epsilon(epsilon)
    check_activation(activation, x)
    if isinstance(state, Moments):
        given = check_fields("state", state, Moments, features)
    else:
        mean, var, _ = lax.stop_gradient(check_fields("state", state, State, features))
        given = Moments(jnp.ones(()), mean, var, jnp.zeros_like(mean))
    given = jax.tree.map(lambda field: field.astype(features.dtype), given)
    coefficients = standardize(given, params, jnp.asarray(epsilon, features.dtype))
    return normalize_by_given(axes, activation, x, weights, coefficients)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # traced once for all layers of one shape
def normalize_by_batch(axes, pool, coefficients: Callable, activation: Callable | None, x, weights, center, *operands):
    """`y` by the affine map of `coefficients(measured, *operands)`, and what was measured of `x` [...]."""

    def run(x, weights, center, *operands):
        wide = x.astype(statistics_dtype(x.dtype))  # once, so that the gradient of a narrower x is rounded once
        measured = named_moments(axes, pool, wide, weights, center)
        return affine(axes, activation, wide, weights, coefficients(measured, *operands)).astype(x.dtype), measured

    return remat(run)(x, weights, center, *operands)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _in_groups(
    axes, pool, groups: int, interleaved: bool, activation, x, weights, *operands
) -> tuple[jax.Array, Moments]:
    """`normalize_by_batch` for every group of axis 0 on its own.

    Groups are contiguous parts; with `interleaved` row i belongs to group i mod groups. The moments are those of all.
    """
    rule = partial(normalize_by_batch, axes, pool, standardize, activation)
    axis = 1 if interleaved else 0

    def cut(values):
        each = values.shape[0] // groups
        return jnp.reshape(values, ((each, groups) if interleaved else (groups, each)) + values.shape[1:])

    def run(x, weights, *operands):
        shared = weights is None or weights.shape[0] == 1  # one weight for all rows
        each = jax.vmap(rule, (axis, None if shared else axis, *[None] * len(operands)), (axis, 0))
        # What is cut is kept for the backward pass: JAX would find a masked NaN in there, where it is told to look.
        y, measured = each(cut(select(weights, x)), weights if shared else cut(weights), *operands)
        return jnp.reshape(y, x.shape), *combine(measured)

    count = features = layout_of(x, axes)
    if features and (weights is None or all(weights.shape[axis] == 1 for axis in range(x.ndim) if axis not in axes)):
        count = everywhere(features)
    y, *fields = automatically(run, layout_of(x), count, *[features] * 3, count)(x, weights, *operands)
    return y, Moments(*fields)
