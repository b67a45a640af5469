"""Carry per-feature numbers across named axes, packed so that one call is one collective."""

import jax
from jax import lax
from jax.flatten_util import ravel_pytree


def stages(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The names in the order of pooling: axes of `vmap` one by one, then all mesh axes at once."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mesh = tuple(name for name in names if name in manual)
    return [(name,) for name in names if name not in mesh] + ([mesh] if mesh else [])


def gather(tree, names: tuple[str, ...]):
    """`tree` of every device along one stage of `names`: each leaf [...] becomes [devices, ...]."""
    packed, unpack = ravel_pytree(tree)
    if names[0] in jax.sharding.get_abstract_mesh().manual_axes:
        # The plain form counts as different on each device, so check_vma would refuse to return what is made of it as
        # replicated; vmap knows only the plain form.
        rows = lax.all_gather(packed, names, to="invarying")
    else:
        rows = lax.all_gather(packed, names)
    return jax.vmap(unpack)(rows)


def total(tree, names: tuple[str, ...]):
    """The sum of `tree` over all devices along `names`."""
    if not names:
        return tree
    packed, unpack = ravel_pytree(tree)
    return unpack(lax.psum(packed, names))
