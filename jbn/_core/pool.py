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
        if not self.names:
            return tree
        return lax.psum(jax.tree.map(self._evenly, tree), self.names, axis_index_groups=self.subgroups)

    def _evenly(self, array):
        """`array` [...], which by its type differs along all axes of the pool or none: psum takes no other."""
        same = tuple(name for name in self.names if name not in differing(array))
        return lax.pcast(array, same, to="varying") if 0 < len(same) < len(self.names) else array

    def agreed(self, array):
        """`array` [...], or its mean where it differs between devices of the pool, as far as JAX's types tell."""
        apart = tuple(name for name in self.names if name in differing(array))
        return lax.pmean(array, apart) if apart else array


def differing(array):
    """The axes of the mesh along which `array` differs, as far as JAX's types tell: `check_vma`."""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before jax 0.10.2, and since


ALONE = Pool()
