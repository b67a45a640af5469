"""Normalize a batch by given statistics: its own, with their derivative, or the running ones."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._check import (
    check_batch,
    check_epsilon,
    check_fields,
    check_groups,
    check_more_than_one,
    check_pool,
    feature_shape,
    statistics_dtype,
)
from jbn._deviation import scaled_deviation
from jbn._groups import in_groups
from jbn._moments import cancelled, materialize, measure, measure_tangent, remat, select
from jbn._types import Measuring, Moments, Params, State


def normalize_batch(
    x: ArrayLike,
    params: Params,
    *,
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
      epsilon: added to the variance; may be traced. A feature that is constant gives the bias even where this is 0.
      feature_axis, weights, axis_name, axis_index_groups: as in `moments`. Where the weight is 0, the output and its
        gradient are 0.
      groups: cut axis 0 into so many equal groups and normalize each by its own statistics, pooled over `axis_name`
        ("ghost" batch normalization, Hoffer, Hubara & Soudry 2017, algorithm 1). The moments are those of all groups.
      interleaved: row i belongs to group i mod `groups`, rather than the groups being contiguous.

    Returns:
      `y` with the shape and dtype of `x`, and the `Moments` it was normalized by, which carry no gradient.

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
    pool = check_pool(axis_name, axis_index_groups)
    check_fields("params", params, Params, feature_shape(x, axes))
    check_epsilon(epsilon)
    check_groups(groups, x, axes)
    check_more_than_one(x, axes, pool, groups)
    operands = x, weights, params, jnp.asarray(epsilon, statistics_dtype(x.dtype))
    rule = partial(normalize_by_batch, axes, pool, standardize)
    y, moments = rule(*operands) if groups == 1 else in_groups(rule, groups, interleaved, *operands)
    return y, lax.stop_gradient(moments)


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
    shape = feature_shape(x, axes)
    check_fields("params", params, Params, shape)
    check_fields("state", state, State, shape)
    check_epsilon(epsilon)
    dtype = statistics_dtype(x.dtype)
    mean, var = (lax.stop_gradient(field).astype(dtype) for field in (state.mean, state.var))
    running = Moments(state.weight, mean, var, jnp.zeros_like(mean))
    return _affine(axes, x, weights, *standardize(running, params, jnp.asarray(epsilon, dtype)))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def normalize_by_batch(axes, pool, coefficients, x, weights, *operands):
    """Measure `x` [...] and apply the affine map of `coefficients(measured, *operands)`; `y` and what was measured."""
    measured = measure(x, weights, axes, pool)
    mean, slope, bias = coefficients(measured, *operands)
    return affine(x, weights, mean, slope, bias, axes), measured


@partial(normalize_by_batch.defjvp, symbolic_zeros=True)
def _normalize_by_batch_jvp(axes, pool, coefficients, primals, tangents):
    def tangent(primals, measured, tangents):
        x, weights, *operands = primals
        x_dot, weights_dot, *operands_dot = tangents
        x_dot = x_dot.astype(measured.mean.dtype)  # once, so that the gradient of a narrower x is rounded once
        # The statistics bring their own tangents: second derivatives are wrong without them.
        measured_dot = measure_tangent(x, weights, measured, x_dot, weights_dot, axes, pool)
        pair = jax.jvp(coefficients, (measured, *operands), (measured_dot, *operands_dot))
        return affine_tangent(x, weights, pair, x_dot, axes, cancelled(measured)), measured_dot

    y, measured = normalize_by_batch(axes, pool, coefficients, *primals)
    return (y, measured), remat(tangent)(primals, measured, materialize(primals, tangents))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _affine(axes, x, weights, mean, slope, bias):
    return affine(x, weights, mean, slope, bias, axes)


@_affine.defjvp
def _affine_jvp(axes, primals, tangents):
    x, weights, *coefficients = primals
    x_dot, _, *coefficients_dot = tangents
    tangent = remat(partial(affine_tangent, axes=axes))
    return _affine(axes, *primals), tangent(x, weights, (coefficients, coefficients_dot), x_dot)


def affine(x, weights, mean, slope, bias, axes):
    """(x - mean) * slope + bias in the dtype of `x`; the difference first, or a large mean would cost all digits."""
    mean, slope, bias = (jnp.expand_dims(value, axes) for value in (mean, slope, bias))
    return select(weights, ((x.astype(mean.dtype) - mean) * slope + bias).astype(x.dtype))


def affine_tangent(x, weights, pair, x_dot, axes, far=None):
    """The tangent of `affine` for a pair of its coefficients and their tangents.

    Arranged so that its transpose sums dy and dy * (x - mean) once each. `far` [] says whether a mean is many standard
    deviations of `x` from 0, where that is known.
    """
    (mean, slope, _), (mean_dot, slope_dot, bias_dot) = pair
    constant_dot = bias_dot - slope * mean_dot
    mean, slope, slope_dot, constant_dot = (jnp.expand_dims(v, axes) for v in (mean, slope, slope_dot, constant_dot))
    if weights is None and far is not None:
        stretch = scaled_deviation(x, mean, slope_dot, far)
    else:  # a masked NaN times dy = 0 must not reach slope's gradient
        stretch = select(weights, x.astype(mean.dtype) - mean) * slope_dot
    y_dot = slope * x_dot.astype(mean.dtype) + stretch + constant_dot
    return select(weights, y_dot.astype(x.dtype))


def standardize(measured: Moments, params: Params, epsilon):
    """Mean, slope and bias of the affine map that normalizes by `measured` and applies `params`."""
    var = measured.var + epsilon
    dead = var <= 0  # only where epsilon is 0: any finite slope gives the bias there, and finite gradients
    slope = jnp.where(dead, jnp.zeros_like(var), lax.rsqrt(jnp.where(dead, jnp.ones_like(var), var)))
    if params.scale is not None:
        slope = slope * params.scale.astype(var.dtype)
    bias = -measured.mean_low * slope
    if params.bias is not None:
        bias = bias + params.bias.astype(var.dtype)
    return measured.mean, slope, bias
