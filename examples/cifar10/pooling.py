"""The largest of every window, with a gradient that a compiler can fuse."""

from functools import partial, reduce

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """[batch, height, width, channels] to [batch, height // size, width // size, channels].

    What is left of the image at the right and below goes nowhere. The largest values of a window share its gradient.
    """
    return _max_pool(x, size)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x, size):
    return reduce(jnp.maximum, _of_windows(x, size))


def _of_windows(x, size):
    """For each place in a window, its values in all windows."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    windows = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
    return [windows[:, :, row, :, column] for row in range(size) for column in range(size)]


def _forward(x, size):
    largest = _max_pool(x, size)
    return largest, (x, largest)


def _backward(size, kept, dy):
    x, largest = kept
    batch, height, width, channels = x.shape

    def spread(values):  # to all values of their window, 0 outside of windows
        rows, columns = values.shape[1:3]
        shape = (batch, rows, size, columns, size, channels)
        over = jnp.broadcast_to(values[:, :, None, :, None], shape).reshape(
            batch, rows * size, columns * size, channels
        )
        return jnp.pad(over, ((0, 0), (0, height - rows * size), (0, width - columns * size), (0, 0)))

    # not <, rather than >=, so that a NaN stays one
    sharing = sum((~(each < largest)).astype(dy.dtype) for each in _of_windows(x, size))
    return (jnp.where(~(x < spread(largest)), spread(dy / sharing), 0),)


_max_pool.defvjp(_forward, _backward)
