"""Pool moments that were measured apart."""

import jax.numpy as jnp

from jbn._check import check_fields, features_of, statistics_dtype
from jbn._measure import few_bits, nonzero, settled
from jbn._types import Moments


def merge(*moments: Moments) -> Moments:
    """Pool moments that were measured apart, as if all had been measured at once.

        count = sum(count_i),  mean = sum(count_i mean_i) / count
        var = sum(count_i (var_i + (mean_i - mean)^2)) / count          within plus between

    Associative and commutative up to rounding. A part with count 0 contributes nothing, whatever its other fields hold.
    Exact in the sense of `moments`: `mean_low` carries what rounding took from the means.

    Args:
      *moments: one or more `Moments` of the same features.

    Returns:
      `Moments` of all of them, in the widest dtype among them; `count` is `[*features]` where that of a part is.
      Differentiable.

    Raises:
      TypeError: no argument, or one that is not a `Moments`.
      ValueError: the shapes differ.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Example:
      >>> a, b = jnp.array([[1.0], [2.0]]), jnp.array([[6.0]])
      >>> m = jbn.merge(jbn.moments(a), jbn.moments(b))
      >>> m.count.item(), m.mean.item(), round(m.var.item(), 4)
      (3.0, 3.0, 4.6667)
    """
    if not moments:
        raise TypeError("merge was given nothing; pass one or more jbn.Moments, such as merge(*parts) for a list.")
    parts = [check_fields(f"moments[{i}]", part, Moments) for i, part in enumerate(moments)]
    features = features_of(max((part.mean for part in parts), key=jnp.ndim))
    parts = [check_fields(f"moments[{i}]", part, Moments, features) for i, part in enumerate(parts)]
    dtype = statistics_dtype(*(part.var.dtype for part in parts))
    counts = jnp.broadcast_shapes(*(part.count.shape for part in parts))

    def column(field, shape):
        return jnp.stack([jnp.broadcast_to(getattr(part, field).astype(dtype), shape) for part in parts])

    fields = (column(field, features.shape) for field in Moments._fields[1:])
    return combine(Moments(column("count", counts), *fields))


def combine(parts: Moments) -> Moments:
    """Pool `parts`, whose fields have one more axis in front."""
    count = jnp.sum(parts.count, 0)
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
    return settled(Moments(count, center, jnp.sum(share * (var + between), 0), rest))
