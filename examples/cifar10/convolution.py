"""The convolution of the network, with a rule of its own on CPUs, where XLA's derivative of it is slow.

XLA's weight gradient is a convolution of x and dy with their axes exchanged. It fuses the exchange with whatever made
x, so that every layer is computed once more from all the layers of its stage, element by element, in an order that no
cache likes. Here a conditional stands around the exchange: fusions do not reach through one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`x` [batch, height, width, inputs] with `kernel` [height, width, inputs, outputs], zero-padded as in "SAME"."""
    # Under shard_map x differs between devices and the kernel does not: after this sum both do, as the rule needs.
    return _convolve(x, kernel + jnp.zeros_like(x, shape=kernel.shape, dtype=kernel.dtype), stride)


def plain(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The same with JAX's own derivative."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=DIMENSIONS)


_convolve = jax.custom_vjp(plain, nondiff_argnums=(2,))


def _forward(x, kernel, stride):
    return _convolve(x, kernel, stride), (x, kernel)


def _backward(stride, kept, dy):
    def on_cpu(x, kernel, dy):
        return jax.vjp(lambda x: plain(x, kernel, stride), x)[1](dy)[0], _weight_gradient(x, kernel, dy, stride)

    def default(x, kernel, dy):
        return jax.vjp(partial(plain, stride=stride), x, kernel)[1](dy)

    return lax.platform_dependent(*kept, dy, cpu=on_cpu, default=default)


_convolve.defvjp(_forward, _backward)


def _weight_gradient(x, kernel, dy, stride):
    def exchange(x):  # [inputs, height, width, batch]
        return x.transpose(3, 1, 2, 0)

    always = dy.ravel()[0] * 0 != 1  # for NaN too, and the compiler cannot know
    images = lax.cond(always, exchange, lambda x: jnp.zeros_like(exchange(x)), x)
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    # dy slides over x as a kernel with holes, as far as there are weights.
    sizes = zip(padding, x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strict=True)
    padding = [(low, weights + (reach - 1) * stride - size - low) for (low, _), size, reach, weights in sizes]
    gradient = lax.conv_general_dilated(
        images,
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=DIMENSIONS,
    )
    return gradient.transpose(1, 2, 0, 3)
