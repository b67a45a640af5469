"""A batch at the door: what is given as one, and as how to read it, becomes a `Batch`, or an error."""

import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core.batch import Batch
from jbn._core.pool import Pool
from jbn._door.numbers import as_array, as_floating
from jbn._types import Moments, Params, State, statistics_dtype


def check_batch(x, feature_axis, weights, axis_name=None, axis_index_groups=None, groups=1, interleaved=False) -> Batch:
    """A `Batch` of arguments as `jbn.batch_norm` has them."""
    if isinstance(x, Params | State | Moments):
        raise TypeError(f"x is a {type(x).__name__}; expected an array. Is the order right?")
    if isinstance(x, tuple):
        raise TypeError(
            f"x is a {type(x).__name__}; expected an array. jbn.batch_norm returns the pair (y, state), and a batch of "
            f"several arrays has to be taken apart."
        )
    x = as_floating("x", x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"x is {x.dtype}{list(x.shape)}; batch normalization is of real numbers. Give the real and the imaginary "
            f"part as features of their own, such as jnp.concatenate([x.real, x.imag], axis=-1) with twice as many "
            f"features: a cast to a real type would drop the imaginary part."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x is {x.dtype}{list(x.shape)}; batch normalization needs floating-point input: cast x first.")
    axes = reduced_axes("x", x, "feature_axis", feature_axis)
    weights = None if weights is None else _check_weights(weights, x, axes)
    pool, groups = check_pool(axis_name, axis_index_groups), _check_groups(groups, x, axes)
    return Batch(x, weights, axes, pool, groups, bool(interleaved))


def reduced_axes(name, x, option, kept) -> tuple[int, ...]:
    """The axes of `x`, whose name that is, other than those `kept`, which is the value of that option."""
    given = kept if isinstance(kept, tuple | list) else (kept,)
    try:
        positions = {operator.index(axis) + (x.ndim if axis < 0 else 0) for axis in given}
    except TypeError:
        raise TypeError(f"{option} is {kept!r}; give an int or a tuple of ints.") from None
    if not given or len(positions) < len(given) or min(positions) < 0 or max(positions) >= x.ndim:
        raise ValueError(
            f"{option} is {kept!r} and {name} has shape {list(x.shape)}; name at least one axis of {name}, each once."
        )
    return tuple(axis for axis in range(x.ndim) if axis not in positions)


def _check_weights(weights, x, axes) -> jax.Array:
    given = weights = as_array("weights", weights)
    if min(1, len(axes)) <= weights.ndim <= len(axes) and weights.ndim < x.ndim:
        leading = axes[: weights.ndim]
        weights = jnp.expand_dims(weights, [axis for axis in range(x.ndim) if axis not in leading])
    if weights.ndim != x.ndim or any(size not in (1, full) for size, full in zip(weights.shape, x.shape, strict=True)):
        reduced = [x.shape[axis] for axis in axes]
        raise ValueError(
            f"weights has shape {list(given.shape)} and x has shape {list(x.shape)}; expected {list(x.shape)} for "
            f"values that differ between features, or {reduced} without the feature axes, of which the last may be "
            f"left out. Any size may also be 1."
        )
    if weights.dtype == jnp.bool_:
        return weights
    if not (jnp.issubdtype(weights.dtype, jnp.floating) or jnp.issubdtype(weights.dtype, jnp.integer)):
        raise TypeError(f"weights is {weights.dtype}; give a boolean mask or real, non-negative weights.")
    if jnp.issubdtype(weights.dtype, jnp.floating):
        weights = weights.astype(statistics_dtype(x.dtype))
    return jnp.where(weights > 0, weights, jnp.zeros_like(weights))


def check_pool(axis_name, axis_index_groups) -> Pool:
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


def check_activation(activation, batch: Batch) -> None:
    """`activation` is `None`, or a function of each element of x, where its own error does not say more."""
    if activation is None:
        return
    if not callable(activation):
        raise TypeError(f"activation is {activation!r}; expected a function of each element, such as jax.nn.relu.")
    shape, dtype = batch.x.shape, batch.features.dtype
    found = jax.eval_shape(activation, jax.ShapeDtypeStruct(shape, dtype))
    if not isinstance(found, jax.ShapeDtypeStruct) or (found.shape, found.dtype) != (shape, dtype):
        shown = f"{found.dtype}{list(found.shape)}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise TypeError(
            f"activation makes {shown} of {dtype}{list(shape)}; expected a function of each element, such as "
            f"jax.nn.relu, which keeps shape and dtype."
        )


def _check_groups(groups, x, axes) -> int:
    """`groups`, into which axis 0, which must be reduced, is cut in equal parts."""
    try:
        count = 0 if isinstance(groups, bool) else operator.index(groups)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"groups is {groups!r}; expected an int of at least 1.")
    if count > 1 and 0 not in axes:
        raise ValueError(f"groups is {groups}, and axis 0 of x {list(x.shape)} is a feature axis; it cannot be cut.")
    if count > 1 and x.shape[0] % count:
        symbolic = not isinstance(x.shape[0], int)
        hint = f" A size that is not known yet can say that it is, as export.symbolic_shape('{groups}*rows')."
        raise ValueError(
            f"groups is {groups} and axis 0 of x has size {x.shape[0]}; expected a divisor of {x.shape[0]}."
            f"{hint if symbolic else ''}"
        )
    return count


def check_more_than_one(batch: Batch) -> None:
    """Statistics of a single value would normalize it to 0 whatever it is."""
    x, groups, kept = batch.x, batch.groups, list(batch.features.shape)
    if 0 in kept:
        raise ValueError(
            f"x has shape {list(x.shape)}, in which the feature axes have sizes {kept}: no feature at all."
        )
    count = math.prod(x.shape[axis] for axis in batch.axes) * batch.pool.size()
    if count == groups:
        per = "per feature" if groups == 1 else f"per feature in each of {groups} groups"
        raise ValueError(
            f"x has shape {list(x.shape)}, which is one value {per}: its variance is 0 and training on it would return "
            f"the bias for any x. Give more values per feature, check feature_axis, or normalize with the running "
            f"statistics. In a vmap or pmap over the examples of a batch name its axis, here and there: axis_name."
        )
