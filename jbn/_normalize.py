"""Normalize a batch by given statistics: its own, with their derivative, or the running ones."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._check import (
    check_batch,
    check_center,
    check_epsilon,
    check_fields,
    check_groups,
    check_more_than_one,
    check_pool,
    features_of,
)
from jbn._groups import in_groups
from jbn._measure import deviation, materialize, measure, measure_tangent, remat, select, settled
from jbn._types import Measuring, Moments, Params, State


def normalize_batch(
    x: ArrayLike,
    params: Params,
    *,
    center: ArrayLike | None = None,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | tuple[int, ...] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int = 1,
    interleaved: bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalize `x` by its own statistics.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    with mean and population variance as `moments` measures them. With xhat = (x - mean) / sqrt(var + epsilon) and means
    over the pooled batch, the derivative is

        dx = scale / sqrt(var + epsilon) * (dy - mean(dy) - xhat * mean(dy * xhat)),
        dscale = sum(dy * xhat),  dbias = sum(dy)

    in reverse and forward mode and to any order. The backward pass keeps `x` in its own dtype and per-feature vectors.

    Args:
      x: [...], float16, bfloat16, float32 or float64; reduced in float32 or wider.
      params: `Params` with fields of shape `[*features]`.
      center: a value for each feature that is known to be near its mean, such as a running mean: one pass over `x` and
        one message to measure it, rather than two; see `moments`.
      epsilon: added to the variance; may be traced. A feature that is constant gives the bias even where this is 0.
      feature_axis, weights, axis_name, axis_index_groups: as in `moments`. Where the weight is 0, the output and its
        gradient are 0.
      groups: cut axis 0 into so many equal groups and normalize each by its own statistics, pooled over `axis_name`
        ("ghost" batch normalization, Hoffer, Hubara & Soudry 2017, algorithm 1). The moments are those of all groups.
      interleaved: row i belongs to group i mod `groups`, rather than the groups being contiguous.

    Returns:
      `y` with the shape and dtype of `x`, and the `Moments` it was normalized by, which are differentiable too.

    Raises:
      TypeError: `x` is not floating-point, or `params` is not a `Params`.
      ValueError: a shape does not fit, `epsilon` is negative, `groups` does not divide axis 0, or there is a single
        value per feature in all, or in each group.
      NameError, NotImplementedError: as in `moments`.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1 and section 3.

    Example:
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
    check_groups(groups, x, axes)
    check_more_than_one(x, axes, pool, groups)
    operands = x, weights, center, params, jnp.asarray(epsilon, features.dtype)
    rule = partial(normalize_by_batch, axes, pool, standardize)
    y, measured = rule(*operands) if groups == 1 else in_groups(rule, axes, groups, interleaved, *operands)
    return y, settled(measured)


def normalize_running(
    x: ArrayLike,
    params: Params,
    state: State | Measuring,
    *,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | tuple[int, ...] = -1,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Normalize `x` by running statistics, as in evaluation. Nothing is communicated.

        y = scale * (x - state.mean) / sqrt(state.var + epsilon) + bias

    A state without evidence (weight 0) has mean 0 and variance 1. The state is constant in differentiation.

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      params: `Params` with fields of shape `[*features]`.
      state: `State` with fields of shape `[*features]`.
      epsilon, feature_axis: as in `normalize_batch`.
      weights: as in `moments`; all they do here is to blank: where the weight is 0, the output and its gradient are 0.

    Returns:
      `y` with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not floating-point, or `params` or `state` is something else.
      ValueError: a shape does not fit, or `epsilon` is negative.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 2.

    Example:
      >>> params, state = jbn.init(1)
      >>> state = state._replace(mean=jnp.array([2.0]), var=jnp.array([4.0]))
      >>> jbn.normalize_running(jnp.array([[4.0]]), params, state).round(3).tolist()
      [[1.0]]
    """
    if isinstance(state, Measuring):
        state = state.state
    x, weights, axes = check_batch(x, feature_axis, weights)
    features = features_of(x, axes)
    params = check_fields("params", params, Params, features)
    state = check_fields("state", state, State, features)
    check_epsilon(epsilon)
    mean, var = (lax.stop_gradient(field).astype(features.dtype) for field in (state.mean, state.var))
    running = Moments(jnp.ones(()), mean, var, jnp.zeros_like(mean))
    return normalize_by_given(axes, x, weights, standardize(running, params, jnp.asarray(epsilon, features.dtype)))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _by_batch(axes, pool, coefficients, x, weights, center, *operands):
    """Measure `x` [...] and apply the affine map of `coefficients(measured, *operands)`; `y` and what was measured."""
    measured = measure(x, weights, center, axes, pool)
    return affine(x, weights, coefficients(measured, *operands), axes), measured


normalize_by_batch = jax.jit(_by_batch, static_argnums=(0, 1, 2))  # traced once for all layers of one shape


@partial(_by_batch.defjvp, symbolic_zeros=True)
def _by_batch_jvp(axes, pool, coefficients, primals, tangents):
    def tangent(primals, measured, tangents):
        x, weights, _, *operands = primals
        x_dot, weights_dot, _, *operands_dot = tangents
        x_dot = x_dot.astype(measured.mean.dtype)  # once, so that the gradient of a narrower x is rounded once
        # The statistics bring their own tangents: second derivatives are wrong without them.
        measured_dot = measure_tangent(x, weights, measured, x_dot, weights_dot, axes, pool)
        affine, affine_dot = jax.jvp(coefficients, (measured, *operands), (measured_dot, *operands_dot))
        # For the sum of dy (x - mean), in words of its own: see `measure`.
        affine = affine._replace(mean=affine.mean + 0 * affine.mean_low)
        return affine_tangent(x, weights, affine, affine_dot, x_dot, axes), measured_dot

    y, measured = normalize_by_batch(axes, pool, coefficients, *primals)
    return (y, measured), remat(tangent)(primals, measured, materialize(primals, tangents))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_given(axes, x, weights, coefficients):
    return affine(x, weights, coefficients, axes)


normalize_by_given = jax.jit(_by_given, static_argnums=0)


@_by_given.defjvp
def _by_given_jvp(axes, primals, tangents):
    x, weights, coefficients = primals
    x_dot, _, coefficients_dot = tangents
    tangent = remat(partial(affine_tangent, axes=axes))
    return normalize_by_given(axes, *primals), tangent(x, weights, coefficients, coefficients_dot, x_dot)


class Affine(NamedTuple):
    """y = (x - mean - mean_low) * slope + bias: differences first, or a large mean would cost all digits."""

    mean: jax.Array  # [*features], as all
    mean_low: jax.Array | float
    slope: jax.Array
    bias: jax.Array


def affine(x, weights, coefficients: Affine, axes):
    """y in the dtype of `x`."""
    _, low, slope, bias = (jnp.expand_dims(value, axes) for value in coefficients)
    y = (deviation(x, weights, coefficients.mean, axes) - low) * slope + bias
    return select(weights, y.astype(x.dtype))


def affine_tangent(x, weights, coefficients: Affine, tangents: Affine, x_dot, axes):
    """The tangent of `affine`; its transpose makes the sums of the backward pass."""
    mean, low, slope, _ = coefficients
    vectors = slope, tangents.mean + tangents.mean_low, tangents.slope, tangents.bias - low * tangents.slope
    slope, mean_dot, slope_dot, bias_dot = (jnp.expand_dims(vector, axes) for vector in vectors)

    def together(slope, x_dot, mean_dot, bias_dot):
        return slope * x_dot + (bias_dot - slope * mean_dot)

    def apart(slope, x_dot, mean_dot, bias_dot):
        return slope * (x_dot - mean_dot) + bias_dot

    # One sum of dy. On a GPU one more, of slope * dy, makes XLA take that of dy * (x - mean) into the kernel that masks
    # dy by a relu: 7 passes over memory for 8 (`benchmarks/communication.py`, "six layers").
    choices = {"cuda": apart, "rocm": apart, "default": together}
    moved = lax.platform_dependent(slope, x_dot.astype(slope.dtype), mean_dot, bias_dot, **choices)
    return select(weights, (moved + deviation(x, weights, mean, axes) * slope_dot).astype(x.dtype))


def standardize(measured: Moments, params: Params, epsilon) -> Affine:
    """The map that normalizes by `measured` and applies `params`."""
    slope = reciprocal_root(measured.var + epsilon)
    bias = jnp.zeros_like(slope) if params.bias is None else params.bias.astype(slope.dtype)
    slope = slope if params.scale is None else slope * params.scale.astype(slope.dtype)
    return Affine(measured.mean, measured.mean_low, slope, bias)


@jax.custom_jvp
def reciprocal_root(var):
    """1 / sqrt(var); 0, with a derivative of 0, where that is infinite: a constant feature without epsilon."""
    return lax.rsqrt(jnp.where(var > 0, var, jnp.inf))


@reciprocal_root.defjvp
def _reciprocal_root_jvp(primals, tangents):
    root = reciprocal_root(*primals)
    return root, -0.5 * root**3 * tangents[0]
