"""The convolution of the network, with a rule of its own on CPUs, where XLA's derivative of it is slow.

XLA's weight gradient is a convolution of x and dy with their axes exchanged. It fuses the exchange with whatever made
x, so that every layer is computed once more from all the layers of its stage, element by element, in an order that no
cache likes. Here a conditional stands around the exchange: fusions do not reach through one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# For `jax.jit(compiler_options=)` on CPUs: leave convolutions to XLA's own library, which is faster for these shapes
# than the one that it hands them to by default; reductions stay with the latter.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
NARROW = 16  # outputs; where there are no more, two neighbours are computed as one with twice as many


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`x` [batch, height, width, inputs] with `kernel` [height, width, inputs, outputs], zero-padded as in "SAME"."""
    # Under shard_map x differs between devices and the kernel does not: after this sum both do, as the rule needs.
    return _convolve(x, kernel + jnp.zeros_like(x, shape=kernel.shape, dtype=kernel.dtype), stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, stride):
    on_cpu, default = (partial(function, stride=stride) for function in (_on_cpu, _plain))
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=default)


def _forward(x, kernel, stride):
    return _convolve(x, kernel, stride), (x, kernel)


def _backward(stride, kept, dy):
    def on_cpu(x, kernel, dy):
        return _input_gradient(x, kernel, dy, stride), _weight_gradient(x, kernel, dy, stride)

    def default(x, kernel, dy):
        return jax.vjp(partial(_plain, stride=stride), x, kernel)[1](dy)

    return lax.platform_dependent(*kept, dy, cpu=on_cpu, default=default)


_convolve.defvjp(_forward, _backward)


def _plain(x, kernel, stride):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=DIMENSIONS)


def _on_cpu(x, kernel, stride):
    outputs = kernel.shape[3]
    if outputs > NARROW or stride != 1 or x.shape[2] % 2:
        return _plain(x, kernel, stride)
    # The left of two neighbours sees all but the last column of a kernel that is wider by one, the right all but the
    # first: [.., width / 2, 2 * outputs] lies in memory as [.., width, outputs] does.
    left, right = (jnp.pad(kernel, ((0, 0), columns, (0, 0), (0, 0))) for columns in ((0, 1), (1, 0)))
    both = jnp.concatenate([left, right], -1)
    pairs = lax.conv_general_dilated(x, both, (1, 2), _padding(x, kernel, 1), dimension_numbers=DIMENSIONS)
    return pairs.reshape(*x.shape[:3], outputs)


def _input_gradient(x, kernel, dy, stride):
    if stride == 1 and all(size % 2 for size in kernel.shape[:2]):
        return _on_cpu(dy, kernel[::-1, ::-1].swapaxes(2, 3), 1)
    return jax.vjp(lambda x: _plain(x, kernel, stride), x)[1](dy)[0]


def _weight_gradient(x, kernel, dy, stride):
    def exchange(x):  # [inputs, height, width, batch]
        return x.transpose(3, 1, 2, 0)

    always = dy.ravel()[0] * 0 != 1  # for NaN too, and the compiler cannot know
    images = lax.cond(always, exchange, lambda x: jnp.zeros_like(exchange(x)), x)
    # dy slides over x as a kernel with holes, as far as there are weights.
    sizes = zip(_padding(x, kernel, stride), x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strict=True)
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


def _padding(x, kernel, stride):
    return lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
