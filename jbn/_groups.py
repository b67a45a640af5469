"""Virtual batches: cut a batch into groups, treat each as a batch of its own, and pool what was measured."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jbn._layout import automatically, layout_of
from jbn._merge import combine
from jbn._types import Moments


def in_groups(rule: Callable, axes, groups: int, interleaved: bool, x, weights, *operands) -> tuple[jax.Array, Moments]:
    """`rule(x, weights, *operands)`, which gives y and moments over `axes`, for every group of axis 0 on its own.

    Groups are contiguous parts; with `interleaved` row i belongs to group i mod groups. The moments are those of all.
    """
    axis = 1 if interleaved else 0

    def cut(values):
        each = len(values) // groups
        return jnp.reshape(values, ((each, groups) if interleaved else (groups, each)) + values.shape[1:])

    def run(x, weights, *operands):
        shared = weights is None or len(weights) != len(x)  # one weight for all rows
        each = jax.vmap(rule, (axis, None if shared else axis, *[None] * len(operands)), (axis, 0))
        y, measured = each(cut(x), weights if shared else cut(weights), *operands)
        return jnp.reshape(y, x.shape), combine(measured)

    return automatically(run, layout_of(x), layout_of(x, axes))(x, weights, *operands)
