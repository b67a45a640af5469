"""Checks at the door of values for each feature: params, states, moments and centers, as arrays that fit the batch."""

from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr

from jbn._core.batch import Batch, Features, features_of
from jbn._core.held import Held, held_by
from jbn._core.layout import lie
from jbn._door.numbers import as_floating, known
from jbn._types import Moments, Params, State, is_state, statistics_dtype

Kind = TypeVar("Kind", bound=Params | State | Moments)


def check_fields(name, value, kind: type[Kind], features: Features | None = None, *, stay: bool = False) -> Kind:
    """`value`, a `kind` (`Params`, `State` or `Moments`), as arrays with a value for each feature; a scalar is for all.

    Without `features` they are those of its own fields. On an explicit mesh they lie as these do, or `stay`.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_named(value)}; expected a jbn.{kind.__name__}. {_way_to(kind, name, value)}")
    given = value._asdict()
    if isinstance(value, Moments) and value.squares is None:
        given["squares"] = value.count
    arrays = {field: _check_field(f"{name}.{field}", of_field, kind) for field, of_field in given.items()}
    widest = features_of(
        max((array for array in arrays.values() if array is not None), key=jnp.ndim, default=np.zeros(()))
    )
    features = widest if features is None else features
    layout = widest.layout if stay and widest.shape == features.shape else features.layout
    for field, array in arrays.items():
        if array is None or (field in ("count", "squares") and array.ndim == 0):
            continue
        if array.shape not in ((), features.shape):
            raise ValueError(f"{name}.{field} has shape {list(array.shape)}; {_expected(array.shape, features)}")
        arrays[field] = lie(jnp.broadcast_to(array, features.shape), layout)
    return kind(**cast(dict[str, Any], arrays))


def check_carried(state, features: Features | None = None) -> State | Moments | Held:
    """`state`, or the `Moments` in its place, or what it holds while a network is measured; it lies as it did."""
    if held := held_by(state):
        of = {field: getattr(held, field) for field in ("seen", "moments", "running")}
        return held._replace(**{field: check_fields("state", part, type(part), features) for field, part in of.items()})
    kind = Moments if isinstance(state, Moments) else State
    return check_fields("state", state, kind, features, stay=True)


def check_given(state, features: Features) -> State | Moments:
    """The statistics that evaluation by `state` normalizes by."""
    carried = check_carried(state, features)
    return (carried.given or carried.seen) if isinstance(carried, Held) else carried


def check_states(name, states):
    """`states` with arrays in every `State`, of which there is one at least."""
    if not any(map(is_state, jax.tree.leaves(states, is_leaf=is_state))):
        raise TypeError(f"{name} is {_named(states)} without a jbn.State in it; is the order right?")

    def checked(path, leaf):
        return leaf if held_by(leaf) or not is_state(leaf) else check_fields(f"{name}{keystr(path)}", leaf, State)

    return jax.tree_util.tree_map_with_path(checked, states, is_leaf=is_state)


def _named(value) -> str:
    if isinstance(value, dict):
        return f"a dict ({', '.join(map(repr, list(value)[:5]))})" if value else "a dict"
    return f"a {type(value).__name__}"


def _way_to(kind, name, value) -> str:
    """What may have led to `value` in the place of a `kind`, and what to do."""
    own = f"jbn.{kind.__name__}"
    if isinstance(value, dict) and value and set(value) <= set(kind._fields):
        return f"A checkpoint read without a template gives dicts: make it with {own}(**{name})."
    if isinstance(value, dict) and value:
        return "A network has one for each normalization: pass that of this one."
    if isinstance(value, tuple | list) and [type(each) for each in value] == [Params, State]:
        return "jbn.init gives the pair (params, state): take it apart."
    if isinstance(value, tuple | list) and value and all(isinstance(each, kind) for each in value):
        if name == "moments[0]":
            return "Pass them one by one, as in merge(*moments)."
        return "A network has one for each normalization: pass that of this one."
    if isinstance(value, State) and name.startswith("moments["):
        return "States are merged by jbn.merge_states."
    if isinstance(value, tuple | list) and not hasattr(value, "_fields") and 2 <= len(value) <= len(kind._fields):
        return f"If it holds {', '.join(kind._fields[: len(value)])}, make it with {own}(*{name})."
    if isinstance(value, Moments) and kind is State:
        return "Moments accumulate in training; jbn.update(state, moments, decay=0.0) makes a state of them."
    return "Is the order right?"


def _expected(shape, features: Features) -> str:
    """What was expected in the place of `shape`, and what may have led to it."""
    wanted = f"expected {list(features.shape)}"
    if features.source != features.shape:
        wanted += f", the features of {features.name} {list(features.source)}"
    if shape[1:] == features.shape:
        return f"{wanted}. Is it stacked, as for a scan or a vmap over {shape[0]} of them? Pass one at a time."
    fitting = [axis for axis, size in enumerate(features.source) if shape == (size,)]
    if fitting and features.source != features.shape:
        axis, name, option = fitting[0], features.name, features.option
        return f"{wanted}. Axis {axis} of {name} has that size: with {option}={axis} it would fit."
    return f"{wanted}. Check {features.option}, and the features given to jbn.init."


def _check_field(name, given, kind) -> jax.Array | None:
    if given is None and kind is Params:
        return None
    if given is None:
        raise TypeError(f"{name} is None; expected an array. Only scale and bias may be left out.")
    array = as_floating(name, given)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if not name.endswith((".count", ".squares")) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} is {array.dtype}; expected a floating-point type.{_about(name)}")
        array = array.astype(statistics_dtype())
    if kind is not Params and array.dtype.itemsize < 4:
        raise TypeError(
            f"{name} is {array.dtype}, which cannot hold a running average: a step is less than its last digit. Leave "
            f"jbn.State and jbn.Moments out where you cast a tree to {array.dtype}; x and jbn.Params may be narrow."
        )
    if kind is State and name.endswith(".weight") and known(given):
        values = np.asarray(given)
        if values.size and not (np.min(values) >= 0 and np.max(values) <= 1 + 1e-4):  # some rounding is no fault
            found = f"values from {np.min(values)} to {np.max(values)}"
            raise ValueError(f"{name} has {found}; expected evidence in [0, 1].{_about(name)}")
    return array


def _about(name) -> str:
    if not name.endswith(".weight"):
        return ""
    return (
        " It is 1 where the running statistics are those of many batches, and 0 where they are of none; PyTorch's "
        "num_batches_tracked counts batches: leave it out, as in jbn.State(running_mean, running_var)."
    )


def check_center(center, batch: Batch) -> jax.Array | None:
    """`center` with a value for each feature, the same on all devices of the pool as far as JAX's types tell."""
    if center is None:
        return None
    array, features = as_floating("center", center), batch.features
    if array.shape not in ((), features.shape):
        raise ValueError(
            f"center has shape {list(array.shape)}; expected {list(features.shape)}, a value for each feature of x "
            f"{list(features.source)}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"center is {array.dtype}; expected a floating-point type.")
    array = jnp.where(jnp.isfinite(array), array, jnp.zeros_like(array)).astype(features.dtype)
    return lax.stop_gradient(batch.pool.agreed(lie(jnp.broadcast_to(array, features.shape), features.layout)))
