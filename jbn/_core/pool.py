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
        differing = tuple(name for name in self.names if name in varying(array))
        return lax.pmean(array, differing) if differing else array


def varying(array) -> frozenset[str]:
    """The axes of `shard_map` along which `array` differs, as far as JAX's types tell: where it checks them."""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before jax 0.10.2, and since


def varying_as(array, other):
    """`array`, as one that differs along all axes that `other` does."""
    names = tuple(sorted(varying(other) - varying(array)))
    return lax.pcast(array, names, to="varying") if names else array


ALONE = Pool()
