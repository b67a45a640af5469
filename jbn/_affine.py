"""The affine map that every normalization ends in, with its derivative."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._measure import deviation, remat, select
from jbn._types import Moments, Params


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
    """The tangent of `affine`, arranged so that its transpose sums dy and dy * (x - mean) once each."""
    mean, low, slope, _ = coefficients
    constant_dot = tangents.bias - low * tangents.slope - slope * (tangents.mean + tangents.mean_low)
    vectors = (slope, tangents.slope, constant_dot)
    slope, slope_dot, constant_dot = (jnp.expand_dims(vector, axes) for vector in vectors)
    y_dot = slope * x_dot.astype(slope.dtype) + deviation(x, weights, mean, axes) * slope_dot + constant_dot
    return select(weights, y_dot.astype(x.dtype))


def standardize(measured: Moments, params: Params, epsilon) -> Affine:
    """The map that normalizes by `measured` and applies `params`."""
    slope = reciprocal_root(measured.var + epsilon)
    bias = jnp.zeros_like(slope) if params.bias is None else params.bias.astype(slope.dtype)
    slope = slope if params.scale is None else slope * params.scale.astype(slope.dtype)
    return Affine(measured.mean, measured.mean_low, slope, bias)


@jax.custom_jvp
def reciprocal_root(var):
    """1 / sqrt(var); 0, with a derivative of 0, where that is infinite: a constant feature without epsilon."""
    return lax.rsqrt(jnp.where(var == 0, jnp.inf, var))


@reciprocal_root.defjvp
def _reciprocal_root_jvp(primals, tangents):
    root = reciprocal_root(*primals)
    return root, -0.5 * root**3 * tangents[0]


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
