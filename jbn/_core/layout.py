"""Meshes of explicit axes, where JAX wants all operands of a sum to lie alike: values per feature follow the batch."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def layout_of(x, axes=()) -> NamedSharding | None:
    """How `x` [...] without `axes` lies on a mesh of explicit axes; `None` elsewhere."""
    layout = jax.typeof(x).sharding
    if AxisType.Explicit not in layout.mesh.axis_types:
        return None
    parts = (part for axis, part in enumerate(layout.spec) if axis not in axes)
    return NamedSharding(layout.mesh, PartitionSpec(*parts))


def lie(array, layout: NamedSharding | None):
    """`array` laid out like that, and as it is where that is whole on every device, as it is itself.

    There a `reshard` is not needed, and has no transpose under a `vmap` over an axis of the mesh.
    """
    if layout is None or not any((*layout.spec, *jax.typeof(array).sharding.spec)):
        return array
    return jax.sharding.reshard(array, layout)


def everywhere(layout: NamedSharding) -> NamedSharding:
    """What is the same on all devices of that mesh."""
    return NamedSharding(layout.mesh, PartitionSpec())


def automatically(f: Callable, *layouts: NamedSharding | None) -> Callable:
    """`f` with the layout of what is in between left to the compiler, and its results laid out like that."""
    cut = any(part for layout in layouts if layout is not None for part in layout.spec)
    return jax.sharding.auto_axes(f, out_sharding=layouts) if cut else f
