"""Add up numbers across named axes: one call is one collective."""

import math
from typing import NamedTuple

import jax
from jax import lax
from jax.flatten_util import ravel_pytree


class Pool(NamedTuple):
    """The named axes to pool over, all of each or, of a single one, subgroups apart from each other."""

    names: tuple[str, ...] = ()
    subgroups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """How many devices, or lanes of `vmap`, are pooled together."""
        return len(self.subgroups[0]) if self.subgroups else math.prod(lax.axis_size(name) for name in self.names)

    def total(self, tree):
        """The sum of `tree` over all devices of the pool."""
        if not self.names:
            return tree
        mesh = jax.sharding.get_abstract_mesh()
        if set(mesh.axis_names) - set(mesh.manual_axes):  # what is cut over other axes cannot be packed
            return lax.psum(tree, self.names, axis_index_groups=self.subgroups)
        packed, unpack = ravel_pytree(tree)
        return unpack(lax.psum(packed, self.names, axis_index_groups=self.subgroups))

    def agreed(self, array):
        """`array` [...], or its mean where it differs between devices of the pool, as far as JAX's types tell."""
        kind = jax.typeof(array)  # `check_vma`
        differs = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before jax 0.10.2, and since
        differing = tuple(name for name in self.names if name in differs)
        return lax.pmean(array, differing) if differing else array


ALONE = Pool()
