"""Checks at the door: every public function resolves its arguments here, private ones trust them."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbn._types import Moments, Params, State


def statistics_dtype(*dtypes) -> jnp.dtype:
    """float64 where one of `dtypes` is, else float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32)


def known(value) -> bool:
    """Whether the numbers of `value` can be looked at here."""
    leaves = jax.tree.leaves(value)
    return all(not isinstance(leaf, Tracer) and getattr(leaf, "is_fully_addressable", True) for leaf in leaves)


def as_array(name, given) -> jax.Array:
    """`given` as an array."""
    if isinstance(given, jax.Array):  # which jnp.asarray would look at under jax_debug_nans
        return given
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError):
        shown = repr(given) if given is None or isinstance(given, str) else f"a {type(given).__name__}"
        kind = f" of {given.dtype}" if isinstance(given, np.ndarray) else ""
        raise TypeError(f"{name} is {shown}{kind}; expected an array of numbers, or lists of equal length.") from None


def as_floating(name, given) -> jax.Array:
    """`given` as an array, in which whole numbers of Python, which have no dtype of their own, are floating-point."""
    array = as_array(name, given)
    python = not hasattr(given, "dtype") or jax.typeof(array).weak_type  # the latter where they went through a jit
    return array.astype(statistics_dtype()) if python and jnp.issubdtype(array.dtype, jnp.integer) else array


def check_features(features) -> tuple[int, ...]:
    """The feature sizes as a tuple."""
    given = features if isinstance(features, tuple | list) else (features,)
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
    return x, None if weights is None else _check_weights(weights, x, axes), axes


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


def check_number(name, value, fits, expected) -> None:
    """`value` is a scalar that `fits`, where that can be known: a traced value is not looked at."""
    try:
        array = as_array(name, value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected {expected}.") from None
    if array.ndim:
        raise ValueError(f"{name} has shape {list(array.shape)}; expected a scalar, {expected}.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} is {value}; expected {expected}.")
    if known(value) and not fits(np.asarray(value)):
        raise ValueError(f"{name} is {value}; expected {expected}.")


def check_decay(decay) -> None:
    """`decay` is in [0, 1]."""
    expected = "a number in [0, 1]: the weight of the old value, which is one minus PyTorch's momentum"
    check_number("decay", decay, lambda value: 0 <= value <= 1, expected)


def check_epsilon(epsilon) -> None:
    """`epsilon` is not negative, and finite."""
    expected = "a number that is not negative, such as 1e-5"
    check_number("epsilon", epsilon, lambda value: 0 <= value < math.inf, expected)


def check_limit(name, value, least, most=math.inf) -> None:
    """`value` is at least `least`, and at most `most`."""
    expected = (
        f"a number of at least {least}, which may be infinite" if most == math.inf else f"a number in [{least}, {most}]"
    )
    check_number(name, value, lambda value: least <= value <= most, expected)


def check_amount(amount, shape) -> None:
    """`amount` is a scalar or of `shape`, in [0, 1] where that can be known."""
    array = as_array("amount", amount)
    if array.shape not in ((), shape):
        raise ValueError(f"amount has shape {list(array.shape)}; expected a scalar or {list(shape)}.")
    if known(amount) and not np.all((np.asarray(amount) >= 0) & (np.asarray(amount) <= 1)):
        raise ValueError(f"amount is {amount}; expected numbers in [0, 1].")


def check_activation(activation, x) -> None:
    """`activation` is `None`, or a function of each element of `x`, where its own error does not say more."""
    if activation is None:
        return
    if not callable(activation):
        raise TypeError(f"activation is {activation!r}; expected a function of each element, such as jax.nn.relu.")
    dtype = statistics_dtype(x.dtype)
    found = jax.eval_shape(activation, jax.ShapeDtypeStruct(x.shape, dtype))
    if not isinstance(found, jax.ShapeDtypeStruct) or (found.shape, found.dtype) != (x.shape, dtype):
        shown = f"{found.dtype}{list(found.shape)}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise TypeError(
            f"activation makes {shown} of {dtype}{list(x.shape)}; expected a function of each element, such as "
            f"jax.nn.relu, which keeps shape and dtype."
        )


def check_train(train) -> None:
    """`train` is a Python bool."""
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"train is {train!r}; expected a Python bool, which is known when the program is compiled: name it in "
            f"jit's static_argnames. To choose at run time, gate the update with jbn.update(..., amount=...), and "
            f"choose between jbn.normalize_batch and jbn.normalize_running with lax.cond or jnp.where."
        )


def check_groups(groups, x, axes) -> int:
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


def check_more_than_one(x, axes, pool, groups=1) -> None:
    """Statistics of a single value would normalize it to 0 whatever it is."""
    kept = [x.shape[axis] for axis in range(x.ndim) if axis not in axes]
    if 0 in kept:
        raise ValueError(
            f"x has shape {list(x.shape)}, in which the feature axes have sizes {kept}: no feature at all."
        )
    count = math.prod(x.shape[axis] for axis in axes) * pool.size()
    if count == groups:
        per = "per feature" if groups == 1 else f"per feature in each of {groups} groups"
        raise ValueError(
            f"x has shape {list(x.shape)}, which is one value {per}: its variance is 0 and training on it would return "
            f"the bias for any x. Give more values per feature, check feature_axis, or normalize with the running "
            f"statistics. In a vmap or pmap over the examples of a batch name its axis, here and there: axis_name."
        )
