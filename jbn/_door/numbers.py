"""Numbers and policies at the door, each as it is used below, or an error."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jbn._types import statistics_dtype


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


def check_number(name, value, fits, expected) -> None:
    """`value` is a scalar that `fits`, where that can be known: a traced value is not looked at."""
    try:
        array = np.asarray(value) if isinstance(value, float | int) else as_array(name, value)  # without a device
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


def check_epsilon(epsilon, dtype) -> ArrayLike:
    """`epsilon` in that dtype: not negative, and finite."""
    expected = "a number that is not negative, such as 1e-5"
    check_number("epsilon", epsilon, lambda value: 0 <= value < math.inf, expected)
    return np.asarray(epsilon, dtype) if isinstance(epsilon, float | int) else jnp.asarray(epsilon, dtype)


def check_limit(name, value, least, most=math.inf) -> None:
    """`value` is at least `least`, and at most `most`."""
    expected = (
        f"a number of at least {least}, which may be infinite" if most == math.inf else f"a number in [{least}, {most}]"
    )
    check_number(name, value, lambda value: least <= value <= most, expected)


def check_amount(amount, shape) -> jax.Array:
    """`amount` as an array, a scalar or of `shape`, in [0, 1] where that can be known."""
    array = as_array("amount", amount)
    if array.shape not in ((), shape):
        raise ValueError(f"amount has shape {list(array.shape)}; expected a scalar or {list(shape)}.")
    if known(amount) and not np.all((np.asarray(amount) >= 0) & (np.asarray(amount) <= 1)):
        raise ValueError(f"amount is {amount}; expected numbers in [0, 1].")
    return array


def check_train(train) -> None:
    """`train` is a Python bool."""
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"train is {train!r}; expected a Python bool, which is known when the program is compiled: name it in "
            f"jit's static_argnames. To choose at run time, gate the update with jbn.update(..., amount=...), and "
            f"choose between jbn.normalize_batch and jbn.normalize_running with lax.cond or jnp.where."
        )
