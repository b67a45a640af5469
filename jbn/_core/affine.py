"""The affine map that every normalization ends in, and the activation behind it, with their derivative."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._core.batch import Batch
from jbn._core.compilers import activation_tangent, again
from jbn._types import Moments, Params


class Affine(NamedTuple):
    """y = (x - mean - mean_low) * slope + bias: differences first, or a large mean would cost all digits."""

    mean: jax.Array  # [*features], as all
    mean_low: jax.Array | float
    slope: jax.Array
    bias: jax.Array


class Standardize(NamedTuple):
    """The map that normalizes by what was measured and applies `params`."""

    params: Params
    epsilon: ArrayLike

    def __call__(self, measured: Moments) -> Affine:
        slope = reciprocal_root(measured.var + self.epsilon)
        scale, bias = self.params
        bias = jnp.zeros_like(slope) if bias is None else bias.astype(slope.dtype)
        slope = slope if scale is None else slope * scale.astype(slope.dtype)
        return Affine(measured.mean, measured.mean_low, slope, bias)


Rule = Callable[[Moments], Affine]  # from what was measured: what variants of batch normalization differ in


@jax.custom_jvp
def reciprocal_root(var):
    """1 / sqrt(var); 0, with a derivative of 0, where that is infinite: a constant feature without epsilon."""
    return lax.rsqrt(jnp.where(var == 0, jnp.inf, var))


@reciprocal_root.defjvp
def _reciprocal_root_jvp(primals, tangents):
    root = reciprocal_root(*primals)
    return root, -0.5 * root**3 * tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def affine(activation: Callable | None, batch: Batch, coefficients: Affine):
    """y of `x` in the dtype of statistics, which the activation is computed in too."""
    y = _before_activation(batch, *coefficients)
    return batch.select(y if activation is None else activation(y))


def _before_activation(batch: Batch, mean, low, slope, bias):
    return (batch.deviation(mean) - batch.along(low)) * batch.along(slope) + batch.along(bias)


@affine.defjvp
def _affine_jvp(activation, primals, tangents):
    """Arranged so that the transpose sums dy and dy * (x - mean) once each."""
    (batch, coefficients), (dots, coefficients_dot) = primals, tangents
    mean, low, slope, bias = coefficients
    mean_dot, low_dot, slope_dot, bias_dot = coefficients_dot
    constant_dot = bias_dot - low * slope_dot - slope * (mean_dot + low_dot)
    slope_along, slope_dot, constant_dot = map(batch.along, (slope, slope_dot, constant_dot))
    apart = batch.deviation(again(mean, low) if batch.weights is None else mean)
    parts = slope_along * dots.x, apart * slope_dot, constant_dot
    if activation is None:
        y_dot = parts[0] + parts[1] + parts[2]
    else:

        def before(mean):
            return batch.deviation(mean) * batch.along(slope) + batch.along(bias - low * slope)

        y_dot = activation_tangent(activation, before, mean, parts)
    return affine(activation, *primals), batch.select(y_dot)
