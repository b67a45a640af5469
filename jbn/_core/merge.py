"""Pool moments that were measured apart."""

import jax.numpy as jnp

from jbn._core.compilers import few_bits, settled
from jbn._core.layout import layout_of, lie
from jbn._types import Moments, nonzero, statistics_dtype


def merged(*parts: Moments) -> Moments:
    """`combine` of parts with a value for each feature, in the widest dtype among them."""
    dtype = statistics_dtype(*(part.var.dtype for part in parts))
    counts = jnp.broadcast_shapes(*(part.count.shape for part in parts))

    layout = layout_of(parts[0].mean)

    def column(field, shape):
        each = (jnp.broadcast_to(getattr(part, field).astype(dtype), shape) for part in parts)
        return jnp.stack([lie(array, layout) if shape else array for array in each])

    mean, var, low = (column(field, parts[0].mean.shape) for field in ("mean", "var", "mean_low"))
    return combine(Moments(column("count", counts), mean, var, low, column("squares", counts)))


def combine(parts: Moments) -> Moments:
    """Pool `parts`, whose fields have one more axis in front."""
    count = jnp.sum(parts.count, 0)
    squares = jnp.sum(jnp.where(parts.count > 0, parts.squares, jnp.zeros_like(parts.squares)), 0)
    column = parts.count.shape + (1,) * (parts.mean.ndim - parts.count.ndim)
    present = jnp.reshape(parts.count > 0, column)
    share = jnp.reshape(parts.count / jnp.expand_dims(nonzero(count), 0), column)
    mean, low, var = (
        jnp.where(present, field, jnp.zeros_like(field)) for field in (parts.mean, parts.mean_low, parts.var)
    )
    center = few_bits(jnp.sum(share * mean, 0), 3)
    apart = mean - jnp.expand_dims(center, 0) + low
    rest = jnp.sum(share * apart, 0)
    between = (apart - jnp.expand_dims(rest, 0)) ** 2
    return settled(Moments(count, center, jnp.sum(share * (var + between), 0), rest, squares))
