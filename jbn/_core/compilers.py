"""What compilers make of a sum, a sum of two numbers and a derivative, and the forms that hold whatever they make.

The problem: XLA computes a cheap value again in each loop that needs it, rounded in one and part of a multiply-add in
another; what it computes once, it may write to memory. Optimization barriers are gone by then.

- Rounding. A mean near 1e5 that two loops round differently spoils a variance by 5e-4. So a center has few bits, and a
  mean is the sum of two numbers, `mean` and `mean_low`: first a center and the way from there; then, `settled`, the
  mean in its dtype and what that has lost.
- Sums. The library of sums on a CPU takes x - center into a sum at half its speed, where nothing else has a use for
  it, and wants it written otherwise. So in the forward pass a loop of XLA's own adds up rows for both sums, and the
  library the rest; and in the backward pass each sum has words of its own: 9.25 passes over memory for fourteen.
- Derivatives. On a GPU the derivative of an activation for two sums and dx is written to memory, unless each makes it
  again from x: 13.0 passes a layer rather than 14.1. Compilers for CPU and TPU do worse with that.

All else in jbn is free of it. What was measured is in docs/developers/tried.md.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core.layout import layout_of


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


def sums(batch, center):
    """The sums of x - center and of (x - near)^2 [*features], and `near`, which is `center` but for some bits."""
    axis, rows = rows_of(batch)

    def together(batch, center):
        here = seen(batch.x, batch.along(center), axis, rows)
        apart = batch.select(batch.x.astype(here.dtype), here) - here
        parts = sums_of_rows((batch.weigh(apart), batch.weigh(apart * apart)), axis, rows)
        return *(jnp.sum(part, batch.axes) for part in parts), center

    def each(batch, center):
        if batch.weights is not None:
            apart = batch.deviation(center)
            return batch.sum(apart), batch.sum(apart * apart), center
        near, minus = few_bits(center, 4), -batch.along(center)
        return jnp.sum(batch.x.astype(minus.dtype) + minus, batch.axes), batch.sum(batch.deviation(near) ** 2), near

    if rows == 1:
        return each(batch, center)
    return lax.platform_dependent(batch, center, cpu=together, default=each)


def sums_of_rows(values, axis, rows):
    """Two `values` [...], where so many `rows` along `axis` are added up to one: for XLA on a CPU one loop."""
    cut = [jnp.reshape(value, (*value.shape[:axis], -1, rows, *value.shape[axis + 1 :])) for value in values]
    zeros = [jnp.zeros((), value.dtype) for value in values]
    return lax.optimization_barrier(lax.reduce(cut, zeros, partial(jax.tree.map, jnp.add), (axis + 1,)))


def seen(x, center, axis, rows):
    """`center`, of the rank of `x` [...], in a way that XLA on a CPU does not take what makes x into the loop above.

    It would take in all of it, and what makes that, up to a product or a convolution: of a chain of normalizations
    everything before, once more in each. That is not done where something needs x that is no loop, as the library's
    sums are. So the largest of two rows on each device is looked at, which nothing depends on.
    """
    each = x.shape[axis] // jax.device_count()
    window, strides = ([size if other == axis else 1 for other in range(x.ndim)] for size in (2, each))
    largest = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")
    return jnp.repeat(jnp.where(largest < -jnp.inf, largest, center), each, axis)


def rows_of(batch):
    """An axis that is reduced and not the last, and how many in a row along it, 4 to 16, so that each has as many.

    What is left of it can still be cut over all devices. It is 1 where there are none, or `x` is empty or
    cut explicitly. A size that is a symbol is left: that it can be divided does not say so of what is made of it.
    """
    shape, layout, devices = batch.x.shape, layout_of(batch.x), jax.device_count()
    if 0 in shape or (layout and any(layout.spec)):
        return 0, 1
    for axis in (axis for axis in batch.axes if axis < len(shape) - 1 and isinstance(shape[axis], int)):
        fitting = [rows for rows in range(4, 17) if shape[axis] % (rows * devices) == 0]
        if fitting:
            return axis, fitting[-1]
    return 0, 1


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
