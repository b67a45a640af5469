"""The convolution of the networks, with rules of its own on CPUs, where XLA's are slow.

In float32 XLA's weight gradient is a convolution of x and dy with their axes exchanged. It fuses the exchange with
whatever made x, so that every layer is computed once more from all the layers of its stage, element by element, in an
order that no cache likes. Here a conditional stands around the exchange: fusions do not reach through one.

In bfloat16 a CPU multiplies matrices at twice its rate in float32, and convolves at the rate in float32. So a few
images at a time, as many as a cache holds, become a matrix of their windows, and the convolution one product.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
TILE = 2**21  # bytes of windows that are made at once: what the two cores of a CPU have in caches of their own


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`x` [batch, height, width, inputs] with `kernel` [height, width, inputs, outputs], zero-padded as in "SAME"."""
    # Under shard_map x differs between devices and the kernel does not: after this sum both do, as the rule needs.
    return _convolve(x, kernel + jnp.zeros_like(x, shape=kernel.shape, dtype=kernel.dtype), stride)


def plain(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """The same with JAX's own derivative."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=DIMENSIONS)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, stride):
    default = partial(plain, stride=stride)
    if not _by_tiles(x, kernel, stride):
        return default(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_tiles_forward, default=default)


def _forward(x, kernel, stride):
    return _convolve(x, kernel, stride), (x, kernel)


def _backward(stride, kept, dy):
    def on_cpu(x, kernel, dy):
        if _by_tiles(x, kernel, stride):
            turned = kernel[::-1, ::-1].swapaxes(2, 3)
            return _tiles_forward(dy, turned), _tiles_weight_gradient(x, kernel, dy)
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


def _by_tiles(x, kernel, stride):
    """Whether the windows around the pixels are the same forward and backward, in the dtype that gains by it."""
    odd = all(size % 2 for size in kernel.shape[:2])
    return x.dtype == jnp.bfloat16 and stride == 1 and odd


def _tiles(x, kernel):
    """How many tiles, of as many images each, the windows of `x` [batch, ...] are made in."""
    batch, (height, width) = len(x), kernel.shape[:2]
    bytes_of_image = x[0].size * x.dtype.itemsize * height * width
    most = max(1, min(batch, TILE // bytes_of_image))
    return batch // next(images for images in range(most, 0, -1) if batch % images == 0)


def _split(x, tiles):
    return x.reshape(tiles, -1, *x.shape[1:])


def _windows(x, kernel):
    """For every weight of a filter, the pixels [batch, height, width, inputs] that it meets."""
    height, width = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
    rows, columns = x.shape[1:3]
    return [padded[:, top : top + rows, left : left + columns] for top in range(height) for left in range(width)]


def _tiles_forward(x, kernel):
    weights = kernel.reshape(-1, kernel.shape[3])

    def one(x):
        return jnp.concatenate(_windows(x, kernel), -1) @ weights

    return lax.map(one, _split(x, _tiles(x, kernel))).reshape(*x.shape[:3], -1)


def _tiles_weight_gradient(x, kernel, dy):
    tiles = _tiles(x, kernel)

    def one(total, tile):
        x, dy = tile
        # [weights, pixels] with the pixels last, as the product wants it
        windows = jnp.concatenate([window.transpose(3, 0, 1, 2) for window in _windows(x, kernel)])
        product = lax.dot_general(windows, dy, (((1, 2, 3), (0, 1, 2)), ((), ())), preferred_element_type=jnp.float32)
        return total + product, None

    # from the kernel: under shard_map the sum differs between devices, as it does
    none = jnp.zeros_like(kernel, dtype=jnp.float32).reshape(-1, kernel.shape[3])
    total, _ = lax.scan(one, none, (_split(x, tiles), _split(dy, tiles)))
    return total.reshape(kernel.shape).astype(kernel.dtype)
