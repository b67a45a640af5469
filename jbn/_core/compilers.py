"""What compilers make of a sum, a sum of two numbers and a derivative, and the forms that hold whatever they make.

The problem: XLA computes a cheap value again in each loop that needs it, rounded in one and part of a multiply-add in
another; what it computes once, it may write to memory. Optimization barriers are gone by then.

- Rounding. A mean near 1e5 that two loops round differently spoils a variance by 5e-4. So a center has few bits, and a
  mean is the sum of two numbers, `mean` and `mean_low`: first a center and the way from there; then, `settled`, the
  mean in its dtype and what that has lost.
- Sums. On a CPU x - center takes part in a sum where nothing else has a use for it, and is written to memory otherwise.
  So each sum has words of its own: ten passes over memory, forward and backward, rather than fourteen.
- Derivatives. On a GPU the derivative of an activation for two sums and dx is written to memory, unless each makes it
  again from x: 13.0 passes a layer rather than 14.1. Compilers for CPU and TPU do worse with that.

All else in jbn is free of it. What was measured is in docs/developers/tried.md.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def few_bits(value, fewer):
    """`value` without its last bits: the same number wherever it is used."""
    info = jnp.finfo(value.dtype)
    return lax.reduce_precision(value, info.nexp, info.nmant - fewer)


def settled(measured):
    """`Moments` with the sum of `mean` and `mean_low` rounded to `mean`, and what is left of it in `mean_low`."""
    rest = few_bits(measured.mean_low, 1)
    mean = measured.mean + rest
    return measured._replace(mean=mean, mean_low=rest - (mean - measured.mean))


def uncertainty(rest):
    """What rounding can have made of a variance, measured about a center that is `rest` from the mean."""
    return 16 * jnp.finfo(rest.dtype).eps * rest * rest


def sums(x, center, axes):
    """The sum of x - center, that of (x - near)^2, and `near`: `center` [*features] but for some bits."""
    near, minus = few_bits(center, 4), -jnp.expand_dims(center, axes)
    square = (x.astype(minus.dtype) - jnp.expand_dims(near, axes)) ** 2
    return jnp.sum(x.astype(minus.dtype) + minus, axes), jnp.sum(square, axes), near


def again(value, other):
    """`value` in words of its own, for one more sum; `other` is of its shape, and not known when compiling."""
    return value + 0 * other


def activation_tangent(activation: Callable, before: Callable, mean, parts):
    """The tangent of `activation` at y = before(mean) along the sum of three `parts`.

    On GPUs each part goes through it by itself, from numbers that nothing else is computed from: so each of the two
    sums and dx makes the derivative again from `x` in its own pass. For the same reason relu is a product there: a
    choice would be kept, as a bit for every element.
    """

    def together(first, second, third):
        return slope(activation, before(mean)) * (first + second + third)

    def apart(*parts):
        first, second, third = map(through, lax.optimization_barrier((mean,) * 3), parts)
        return first + second + third

    def through(mean, part):
        y = before(mean)
        if activation is jax.nn.relu:
            return lax.stop_gradient(jnp.sign(jnp.maximum(y, 0))) * part
        return slope(activation, y) * part

    return lax.platform_dependent(*parts, cuda=apart, rocm=apart, default=together)


def slope(activation: Callable, y):
    """The derivative of `activation` at each element of `y`."""
    zero, one = jnp.zeros((), y.dtype), jnp.ones((), y.dtype)  # which differ along no axis of devices, whatever y does
    return jax.jvp(lambda shift: activation(y + shift), (zero,), (one,))[1]
