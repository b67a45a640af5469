"""Virtual batches: cut a batch into groups, treat each as a batch of its own, and pool what was measured."""

import jax
import jax.numpy as jnp

from jbn._moments import combine
from jbn._types import Moments


def in_groups(rule, groups: int, interleaved: bool, x, weights, *operands) -> tuple[jax.Array, Moments]:
    """`rule(x, weights, *operands)`, which gives y and moments, for every group of axis 0 on its own.

    Groups are contiguous parts; with `interleaved` row i belongs to group i mod groups. The moments are those of all.
    """
    axis = 1 if interleaved else 0

    def cut(values):
        each = len(values) // groups
        return jnp.reshape(values, ((each, groups) if interleaved else (groups, each)) + values.shape[1:])

    shared = weights is None or len(weights) != len(x)  # one weight for all rows
    in_axes = (axis, None if shared else axis, *[None] * len(operands))
    run = jax.vmap(rule, in_axes, (axis, 0))
    y, measured = run(cut(x), weights if shared else cut(weights), *operands)
    return jnp.reshape(y, x.shape), combine(measured)
