"""Checks at the door: every public function resolves its arguments here, private ones trust them."""

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from jbn._layout import layout_of, lie
from jbn._pool import Pool
from jbn._types import Params


def statistics_dtype(*dtypes) -> jnp.dtype:
    """float64 where one of `dtypes` is, else float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32)


def check_features(features) -> tuple[int, ...]:
    """The feature sizes as a tuple."""
    given = features if isinstance(features, tuple) else (features,)
    try:
        shape = tuple(operator.index(size) for size in given)
    except TypeError:
        raise TypeError(
            f"features is {features!r}; give an int, or a tuple of ints for several feature axes."
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(f"features is {features!r}; every feature axis needs a size of at least 1.")
    return shape


def check_batch(x, feature_axis, weights) -> tuple[jax.Array, jax.Array | None, tuple[int, ...]]:
    """`x` and `weights` as arrays of equal rank, and the axes to reduce."""
    if isinstance(x, tuple):
        raise TypeError(f"x is a {type(x).__name__}; expected an array. jbn.batch_norm returns the pair (y, state).")
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)  # which would look at a NaN under jax_debug_nans
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x is {x.dtype}{list(x.shape)}; batch normalization needs floating-point input: cast x first.")
    axes = _reduced_axes(x, feature_axis)
    return x, None if weights is None else _check_weights(weights, x, axes), axes


def _reduced_axes(x, feature_axis) -> tuple[int, ...]:
    given = feature_axis if isinstance(feature_axis, tuple) else (feature_axis,)
    try:
        positions = {operator.index(axis) + (x.ndim if axis < 0 else 0) for axis in given}
    except TypeError:
        raise TypeError(f"feature_axis is {feature_axis!r}; give an int or a tuple of ints.") from None
    if not given or len(positions) < len(given) or min(positions) < 0 or max(positions) >= x.ndim:
        raise ValueError(
            f"feature_axis is {feature_axis!r} and x has shape {list(x.shape)}; name at least one axis of x, each once."
        )
    return tuple(axis for axis in range(x.ndim) if axis not in positions)


def _check_weights(weights, x, axes) -> jax.Array:
    given = weights = jnp.asarray(weights)
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
    weights = weights.astype(statistics_dtype(x.dtype))
    return jnp.where(weights > 0, weights, jnp.zeros_like(weights))


class Features(NamedTuple):
    """What a value for each feature looks like."""

    shape: tuple[int, ...]
    dtype: jnp.dtype  # of statistics
    layout: NamedSharding | None


def features_of(x, axes=()) -> Features:
    """The features of `x` [...], where `axes` are reduced."""
    shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    return Features(shape, statistics_dtype(x.dtype), layout_of(x, axes))


def check_fields(name, value, kind, features: Features | None = None):
    """`value`, a `kind` (`Params`, `State` or `Moments`), as arrays with a value for each feature; a scalar is for all.

    Without `features` they are those of its own fields.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a jbn.{kind.__name__}. Is the order right?")
    arrays = {field: _check_field(f"{name}.{field}", given, kind) for field, given in value._asdict().items()}
    if features is None:
        features = features_of(max((array for array in arrays.values() if array is not None), key=jnp.ndim))
    for field, array in arrays.items():
        if array is None or (field == "count" and array.ndim == 0):
            continue
        if array.shape not in ((), features.shape):
            raise ValueError(
                f"{name}.{field} has shape {list(array.shape)}; expected {list(features.shape)}. Check feature_axis, "
                f"and the features given to jbn.init."
            )
        arrays[field] = lie(jnp.broadcast_to(array, features.shape), features.layout)
    return kind(**arrays)


def _check_field(name, given, kind) -> jax.Array | None:
    if given is None and kind is Params:
        return None
    if given is None:
        raise TypeError(f"{name} is None; expected an array. Only scale and bias may be left out.")
    array = jnp.asarray(float(given) if isinstance(given, int) else given)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if name.endswith(".count"):
            return array.astype(statistics_dtype())
        raise TypeError(f"{name} is {array.dtype}; expected a floating-point type.")
    if kind is not Params and array.dtype.itemsize < 4:
        raise TypeError(
            f"{name} is {array.dtype}, which cannot hold a running average: a step is less than its last digit. Leave "
            f"jbn.State and jbn.Moments out where you cast a tree to {array.dtype}; x and jbn.Params may be narrow."
        )
    return array


def check_center(center, features: Features, pool) -> jax.Array | None:
    """`center` with a value for each feature, the same on all devices of the pool as far as JAX's types tell."""
    if center is None:
        return None
    array = jnp.asarray(float(center) if isinstance(center, int) else center)
    if array.shape not in ((), features.shape):
        raise ValueError(
            f"center has shape {list(array.shape)}; expected {list(features.shape)}, a value for each feature."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"center is {array.dtype}; expected a floating-point type.")
    array = lie(jnp.broadcast_to(array.astype(features.dtype), features.shape), features.layout)
    differing = tuple(name for name in pool.names if name in _varying(array))
    return lax.stop_gradient(lax.pmean(array, differing) if differing else array)


def check_fraction(name, value) -> None:
    """`value` lies in [0, 1], where that can be known: a traced value is not looked at."""
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} has shape {list(jnp.shape(value))}; expected a scalar.")
    if not isinstance(value, Tracer) and not 0 <= np.asarray(value) <= 1:
        hint = " decay is the weight of the old value: one minus PyTorch's momentum." if name == "decay" else ""
        raise ValueError(f"{name} is {value}; expected a number in [0, 1].{hint}")


def check_amount(amount, shape) -> None:
    """`amount` is a scalar or of `shape`, in [0, 1] where that can be known."""
    if jnp.shape(amount) not in ((), shape):
        raise ValueError(f"amount has shape {list(jnp.shape(amount))}; expected a scalar or {list(shape)}.")
    if not isinstance(amount, Tracer) and not np.all((np.asarray(amount) >= 0) & (np.asarray(amount) <= 1)):
        raise ValueError(f"amount is {amount}; expected numbers in [0, 1].")


def check_limit(name, value, least) -> None:
    """`value` is a scalar of at least `least`, where that can be known."""
    if jnp.ndim(value) != 0 or (not isinstance(value, Tracer) and not np.asarray(value) >= least):
        raise ValueError(f"{name} is {value}; expected a number of at least {least}, which may be infinite.")


def check_epsilon(epsilon) -> None:
    """`epsilon` is a scalar and not negative, where that can be known."""
    if jnp.ndim(epsilon) != 0 or (not isinstance(epsilon, Tracer) and not 0 <= np.asarray(epsilon) < math.inf):
        raise ValueError(f"epsilon is {epsilon}; expected a number that is not negative, such as 1e-5.")


def check_train(train) -> None:
    """`train` is a Python bool."""
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"train is {train!r}; expected a Python bool, which is known when the program is compiled: name it in "
            f"jit's static_argnames. To choose at run time, gate the update with jbn.update(..., amount=...), and "
            f"choose between jbn.normalize_batch and jbn.normalize_running with lax.cond or jnp.where."
        )


def check_pool(axis_name, axis_index_groups=None) -> Pool:
    """The axes to pool over, each bound here."""
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
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
    size = jax.lax.axis_size(names[0])
    if len({len(subgroup) for subgroup in subgroups}) != 1 or sorted(sum(subgroups, ())) != list(range(size)):
        raise ValueError(
            f"axis_index_groups is {given!r} and the axis {names[0]!r} has size {size}; expected lists of equal length "
            f"that hold every index from 0 to {size - 1} once."
        )
    try:
        jax.lax.psum(jax.lax.axis_index(names[0]), names, axis_index_groups=subgroups)
    except NotImplementedError:
        raise NotImplementedError(
            f"JAX knows axis_index_groups in pmap and in shard_map with check_vma=False, not here. Instead cut the "
            f"axis {names[0]!r} in two, as a mesh of {len(subgroups)} x {len(subgroups[0])} devices or a vmap of a "
            f"vmap, and give the name of the inner one as axis_name."
        ) from None
    return subgroups


def _varying(array) -> frozenset[str]:
    """The manual mesh axes along which `array` may differ, as far as JAX's types tell (`check_vma`)."""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before jax 0.10.2, and since


def check_groups(groups, x, axes) -> None:
    """`groups` cuts axis 0, which must be reduced, into equal parts."""
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups is {groups!r}; expected an int of at least 1.")
    if groups > 1 and 0 not in axes:
        raise ValueError(f"groups is {groups}, and axis 0 of x {list(x.shape)} is a feature axis; it cannot be cut.")
    if groups > 1 and x.shape[0] % groups:
        raise ValueError(
            f"groups is {groups} and axis 0 of x has size {x.shape[0]}; expected a divisor of {x.shape[0]}."
        )


def check_more_than_one(x, axes, pool, groups=1) -> None:
    """Statistics of a single value would normalize it to 0 whatever it is."""
    count = math.prod(x.shape[axis] for axis in axes) * pool.size()
    if count == groups:
        per = "per feature" if groups == 1 else f"per feature in each of {groups} groups"
        raise ValueError(
            f"x has shape {list(x.shape)}, which is one value {per}: its variance is 0 and training on it would return "
            f"the bias for any x. Give more values per feature, or normalize with the running statistics."
        )
