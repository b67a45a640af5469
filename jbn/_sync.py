"""Add up per-feature numbers across named axes, packed so that one call is one collective."""

import math
from typing import NamedTuple

import jax
from jax import lax
from jax.flatten_util import ravel_pytree


class Pool(NamedTuple):
    """The named axes to pool over, all of each or, of a single one, subgroups apart from each other."""

    names: tuple[str, ...]
    subgroups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """How many devices, or lanes of `vmap`, are pooled together."""
        return len(self.subgroups[0]) if self.subgroups else math.prod(lax.axis_size(name) for name in self.names)

    def has_neighbours(self) -> bool:
        """Whether other devices run the same program and are pooled apart from these."""
        mesh = jax.sharding.get_abstract_mesh()
        others = set(mesh.manual_axes) - set(self.names)
        return self.subgroups is not None or any(mesh.shape[name] > 1 for name in others)


def total(tree, pool: Pool):
    """The sum of `tree` over all devices of the pool."""
    if not pool.names:
        return tree
    packed, unpack = ravel_pytree(tree)
    return unpack(lax.psum(packed, pool.names, axis_index_groups=pool.subgroups))
