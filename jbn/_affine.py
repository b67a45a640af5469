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


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def affine(axes, activation: Callable | None, x, weights, coefficients: Affine):
    """y of `x` in the dtype of statistics, which the activation is computed in too."""
    y = _before_activation(x, weights, coefficients, axes)
    return select(weights, y if activation is None else activation(y))


@affine.defjvp
def _affine_jvp(axes, activation, primals, tangents):
    """Arranged so that the transpose sums dy and dy * (x - mean) once each."""
    (x, weights, coefficients), (x_dot, _, coefficients_dot) = primals, tangents
    return affine(axes, activation, *primals), _tangent(
        x, weights, coefficients, coefficients_dot, x_dot, axes, activation
    )


def _before_activation(x, weights, coefficients: Affine, axes):
    _, low, slope, bias = (jnp.expand_dims(value, axes) for value in coefficients)
    return (deviation(x, weights, coefficients.mean, axes) - low) * slope + bias


def _tangent(x, weights, coefficients: Affine, tangents: Affine, x_dot, axes, activation: Callable | None):
    mean, low, slope, _ = coefficients
    constant_dot = tangents.bias - low * tangents.slope - slope * (tangents.mean + tangents.mean_low)
    vectors = (slope, tangents.slope, constant_dot)
    slope, slope_dot, constant_dot = (jnp.expand_dims(vector, axes) for vector in vectors)
    if weights is None:  # for the sum of dy * (x - mean), in words of its own as in `measure`
        mean = mean + 0 * low
    parts = slope * x_dot, deviation(x, weights, mean, axes) * slope_dot, constant_dot
    if activation is None:
        y_dot = parts[0] + parts[1] + parts[2]
    else:
        y_dot = _activation_tangent(x, weights, coefficients, parts, axes, activation)
    return select(weights, y_dot)


def _activation_tangent(x, weights, coefficients: Affine, parts, axes, activation: Callable):
    """The tangent of the activation along the sum of `parts`.

    On GPUs each part goes through it by itself, from numbers that nothing else is computed from: so each of the two
    sums and dx makes the derivative again from `x` in its own pass, where one for all would be written to memory. For
    the same reason relu is a product there: a choice would be kept, as a bit for every element. Compilers for CPU and
    TPU do worse with that.
    """

    def together(first, second, third):
        return _slope(activation, _before_activation(x, weights, coefficients, axes)) * (first + second + third)

    def apart(*parts):
        first, second, third = map(along, lax.optimization_barrier((mean,) * 3), parts)
        return first + second + third

    def along(mean, part):
        y = deviation(x, weights, mean, axes) * jnp.expand_dims(slope, axes) + jnp.expand_dims(bias - low * slope, axes)
        if activation is jax.nn.relu:
            return lax.stop_gradient(jnp.sign(jnp.maximum(y, 0))) * part
        return _slope(activation, y) * part

    mean, low, slope, bias = coefficients
    return lax.platform_dependent(*parts, cuda=apart, rocm=apart, default=together)


def _slope(activation: Callable, y):
    """The derivative of `activation` at each element of `y`."""
    zero, one = jnp.zeros((), y.dtype), jnp.ones((), y.dtype)  # which differ along no axis of devices, whatever y does
    return jax.jvp(lambda shift: activation(y + shift), (zero,), (one,))[1]


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


@partial(jax.jit, static_argnums=(0, 1))
def normalize_by_given(axes, activation: Callable | None, x, weights, coefficients: Affine):
    """`affine` in the dtype of `x`."""

    def run(x, weights, coefficients):
        y = affine(axes, activation, x.astype(coefficients.mean.dtype), weights, coefficients)
        return y.astype(x.dtype)

    return remat(run)(x, weights, coefficients)
