"""Add up per-feature numbers across named axes, packed so that one call is one collective."""

import math
from typing import NamedTuple

from jax import lax
from jax.flatten_util import ravel_pytree


class Pool(NamedTuple):
    """The named axes to pool over, all of each or, of a single one, subgroups apart from each other."""

    names: tuple[str, ...]
    subgroups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """How many devices, or lanes of `vmap`, are pooled together."""
        return len(self.subgroups[0]) if self.subgroups else math.prod(lax.axis_size(name) for name in self.names)


def total(tree, pool: Pool):
    """The sum of `tree` over all devices of the pool."""
    if not pool.names:
        return tree
    packed, unpack = ravel_pytree(tree)
    return unpack(lax.psum(packed, pool.names, axis_index_groups=pool.subgroups))
