"""The deviation of a batch from its mean, scaled: the one product whose transpose this library writes itself.

JAX would transpose it to sum(dy * (x - mean)). XLA's CPU backend hands such a sum to a library that takes arrays, so it
writes x - mean to memory, already in the forward pass, and keeps it for the backward pass: a second array of the size
of x for every layer. There the sum is taken as sum(dy * x) - mean * sum(dy) instead, which needs x alone, except where
a mean is so far from 0 that the difference would lose digits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def scaled_deviation(x, mean, slope, far):
    """(x - mean) * slope in the dtype of `slope`, for `x` [...], `mean` and `slope` with 1 in place of reduced axes.

    Differentiable to any order. `far` [] says whether a mean is many standard deviations from 0.
    """
    # Under check_vma the operands have to vary over the same mesh axes, as those of a sum are made to.
    zeros = jnp.zeros_like(x, shape=slope.shape, dtype=slope.dtype)
    return _scaled_deviation.bind(x, mean + zeros, slope + zeros, far)


def _exact(x, mean, slope, far):
    del far
    return (x.astype(slope.dtype) - mean) * slope


def _type(x, mean, slope, far):
    return x.update(dtype=slope.dtype, weak_type=False)


def _tangent(primals, tangents):
    x, mean, slope, far = primals
    x_dot, mean_dot, slope_dot, _ = (ad.instantiate_zeros(tangent) for tangent in tangents)
    y_dot = scaled_deviation(x, mean, slope_dot, far) + (x_dot.astype(slope.dtype) - mean_dot) * slope
    return scaled_deviation(x, mean, slope, far), y_dot


def _transpose(dy, x, mean, slope, far):
    axes = tuple(axis for axis, size in enumerate(mean.shape) if size == 1)
    return None, None, _slope_gradient(axes, x, mean, dy, far), None


@partial(jax.jit, static_argnums=0, inline=True)  # as `measure` is
def _slope_gradient(axes, x, mean, dy, far):
    def total(values):
        return jnp.sum(values, axes, keepdims=True)

    def exact(x, mean, dy, far):
        return total(dy * (x.astype(dy.dtype) - mean))

    def guarded(x, mean, dy, far):
        near = total(dy * x.astype(dy.dtype)) - mean * total(dy)
        return lax.cond(far, exact, lambda *_: near, x, mean, dy, far)

    return lax.platform_dependent(x, mean, dy, far, cpu=guarded, default=exact)


def _batch(operands, axes):
    return jax.vmap(_exact, axes)(*operands), 0


_scaled_deviation = Primitive("scaled_deviation")
_scaled_deviation.def_impl(_exact)
_scaled_deviation.def_abstract_eval(_type)
ad.primitive_jvps[_scaled_deviation] = _tangent
ad.primitive_transposes[_scaled_deviation] = _transpose
batching.primitive_batchers[_scaled_deviation] = _batch
mlir.register_lowering(_scaled_deviation, mlir.lower_fun(_exact, multiple_results=False))
