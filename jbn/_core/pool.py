"""Add up numbers across named axes. XLA makes one collective of one call."""

import math
from typing import NamedTuple

import jax
from jax import lax


class Pool(NamedTuple):
    """The named axes to pool over, all of each or, of a single one, subgroups apart from each other."""

    names: tuple[str, ...] = ()
    subgroups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """How many devices, or lanes of `vmap`, are pooled together."""
        return len(self.subgroups[0]) if self.subgroups else math.prod(lax.axis_size(name) for name in self.names)

    def total(self, tree):
        """The sum of `tree` over all devices of the pool."""
        return lax.psum(tree, self.names, axis_index_groups=self.subgroups) if self.names else tree

    def agreed(self, array):
        """`array` [...], or its mean where it differs between devices of the pool, as far as JAX's types tell."""
        kind = jax.typeof(array)  # `check_vma`
        differs = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before jax 0.10.2, and since
        differing = tuple(name for name in self.names if name in differs)
        return lax.pmean(array, differing) if differing else array


ALONE = Pool()
