"""Add up per-feature numbers across named axes: one call is one collective."""

import math
import operator
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

    def total(self, tree):
        """The sum of `tree` over all devices of the pool."""
        if not self.names:
            return tree
        mesh = jax.sharding.get_abstract_mesh()
        if set(mesh.axis_names) - set(mesh.manual_axes):  # what is cut over other axes cannot be packed
            return lax.psum(tree, self.names, axis_index_groups=self.subgroups)
        packed, unpack = ravel_pytree(tree)
        return unpack(lax.psum(packed, self.names, axis_index_groups=self.subgroups))


def check_pool(axis_name, axis_index_groups=None) -> Pool:
    """The axes to pool over, each bound here."""
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for name in names:
        try:
            lax.axis_size(name)
        except (NameError, TypeError, ValueError):
            if not isinstance(name, str):
                raise TypeError(
                    f"axis_name is {axis_name!r}; expected the name of an axis, or a list of names."
                ) from None
            raise NameError(
                f"axis_name is {axis_name!r}, and no axis {name!r} is bound here. Call inside a vmap or pmap with "
                f"that axis_name, or inside a shard_map over a mesh with an axis of that name; under plain jit "
                f"statistics are global already and axis_name stays None."
            ) from None
    return Pool(names, None if axis_index_groups is None else _check_index_groups(axis_index_groups, names))


def _check_index_groups(given, names) -> tuple[tuple[int, ...], ...]:
    try:
        subgroups = tuple(tuple(operator.index(index) for index in subgroup) for subgroup in given)
    except TypeError:
        raise TypeError(f"axis_index_groups is {given!r}; give lists of indices, such as [[0, 1], [2, 3]].") from None
    if len(names) != 1:
        raise ValueError(f"axis_index_groups needs one axis_name to cut, and was given {names!r}.")
    size = lax.axis_size(names[0])
    if len({len(subgroup) for subgroup in subgroups}) != 1 or sorted(sum(subgroups, ())) != list(range(size)):
        raise ValueError(
            f"axis_index_groups is {given!r} and the axis {names[0]!r} has size {size}; expected lists of equal length "
            f"that hold every index from 0 to {size - 1} once."
        )
    try:
        lax.psum(lax.axis_index(names[0]), names, axis_index_groups=subgroups)
    except NotImplementedError:
        raise NotImplementedError(
            f"JAX knows axis_index_groups in pmap and in shard_map with check_vma=False, not here. Instead cut the "
            f"axis {names[0]!r} in two, as a mesh of {len(subgroups)} x {len(subgroups[0])} devices or a vmap of a "
            f"vmap, and give the name of the inner one as axis_name."
        ) from None
    return subgroups


def varying(array) -> frozenset[str]:
    """The manual mesh axes along which `array` may differ, as far as JAX's types tell (`check_vma`)."""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before jax 0.10.2, and since
