"""The affine map that every normalization ends in, and the activation behind it, with their derivative."""

from collections.abc import Callable
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


def affine(x, weights, coefficients: Affine, axes, activation: Callable | None):
    """y, rounded to the dtype of `x` behind the activation."""
    y = _before_activation(x, weights, coefficients, axes)
    return select(weights, (y if activation is None else activation(y)).astype(x.dtype))


def _before_activation(x, weights, coefficients: Affine, axes):
    _, low, slope, bias = (jnp.expand_dims(value, axes) for value in coefficients)
    return (deviation(x, weights, coefficients.mean, axes) - low) * slope + bias


def affine_tangent(x, weights, coefficients: Affine, tangents: Affine, x_dot, axes, activation: Callable | None):
    """The tangent of `affine`, arranged so that its transpose sums dy and dy * (x - mean) once each."""
    mean, low, slope, _ = coefficients
    constant_dot = tangents.bias - low * tangents.slope - slope * (tangents.mean + tangents.mean_low)
    vectors = (slope, tangents.slope, constant_dot)
    slope, slope_dot, constant_dot = (jnp.expand_dims(vector, axes) for vector in vectors)
    parts = slope * x_dot.astype(slope.dtype), deviation(x, weights, mean, axes) * slope_dot, constant_dot
    if activation is jax.nn.relu:
        y_dot = _relu_tangent(x, weights, coefficients, parts, axes)
    else:
        y_dot = parts[0] + parts[1] + parts[2]
        if activation is not None:
            _, y_dot = jax.jvp(activation, (_before_activation(x, weights, coefficients, axes),), (y_dot,))
    return select(weights, y_dot.astype(x.dtype))


def _relu_tangent(x, weights, coefficients: Affine, parts, axes):
    """The sum of `parts` where y is positive, and else 0.

    By a product, as compilers would rather make a number again than keep it: a choice they keep, as a bit for every
    element. On CPU and GPU each part is masked for itself, by numbers that nothing else is computed from: what has a
    single use is fused with that. The compiler for TPU does so by itself, keeps more where it is told twice, and on
    some chips keeps the product too.
    """

    def step(own):
        _, slope, shift = (jnp.expand_dims(vector, axes) for vector in own)
        return jnp.sign(jnp.maximum(deviation(x, weights, own[0], axes) * slope, -shift) + shift)

    def together(own, *parts):
        return jnp.where(step(own) > 0, parts[0] + parts[1] + parts[2], 0.0)

    def apart(own, *parts):
        first, second, third = (
            step(each) * part for each, part in zip(lax.optimization_barrier((own,) * 3), parts, strict=True)
        )
        return first + second + third

    mean, low, slope, bias = coefficients
    own = lax.stop_gradient((mean, slope, bias - low * slope))
    return lax.platform_dependent(own, *parts, tpu=together, default=apart)


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


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _by_given(axes, activation, x, weights, coefficients):
    return affine(x, weights, coefficients, axes, activation)


normalize_by_given = jax.jit(_by_given, static_argnums=(0, 1))


@_by_given.defjvp
def _by_given_jvp(axes, activation, primals, tangents):
    x, weights, coefficients = primals
    x_dot, _, coefficients_dot = tangents
    tangent = remat(partial(affine_tangent, axes=axes, activation=activation))
    return normalize_by_given(axes, activation, *primals), tangent(x, weights, coefficients, coefficients_dot, x_dot)
