"""One state of several that went apart."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbn._core.batch import features_of
from jbn._core.held import held_by
from jbn._core.merge import combine
from jbn._door.fields import check_fields, check_states
from jbn._door.numbers import as_array, known
from jbn._types import Moments, State, is_state, sound, statistics_dtype

States = TypeVar("States")


def merge_states(*states: States, shares: ArrayLike | None = None) -> States:
    """One state of several: of runs or hosts that went apart, of a target network and the one it follows.

    With shares p_i that sum to 1, for each feature:

        weight = sum(p_i weight_i),  q_i = p_i weight_i / weight
        mean = sum(q_i mean_i),  var = sum(q_i (var_i + (mean_i - mean)^2))          within plus between

    So a state counts by its evidence, and one without any (weight 0) adds nothing. Where none has any of a feature, the
    mean and variance of the first stay. What lies between the means counts as variance: also the way that is left
    between a target and the network it follows.

    Args:
      *states: one or more `State`, or pytrees of them in one structure; what else is in there is that of the first.
      shares: `[len(states)]`, not negative, in any unit, such as the number of batches behind each; may be traced.
        Equal ones if not given. `merge_states(target, online, shares=[1 - tau, tau])` is a soft update.

    Returns:
      A `State`, or the pytree of them, in the dtypes of the first. It carries no gradient.

    Raises:
      TypeError: no argument, or there is no `State` in one.
      ValueError: shapes or structures differ, there is not one share for each, or they are negative or all 0.

    Source: Chan, Golub & LeVeque 1979, as `merge`.

    Examples:
      >>> run = jbn.State(jnp.array([1.0]), jnp.array([2.0]), jnp.array([1.0]))
      >>> other = jbn.State(jnp.array([4.0]), jnp.array([2.0]), jnp.array([0.5]))
      >>> _, fresh = jbn.init(1)
      >>> merged = jbn.merge_states(run, other, fresh)
      >>> merged.mean.tolist(), merged.var.tolist(), merged.weight.tolist()
      ([2.0], [4.0], [0.5])
    """
    if not states:
        raise TypeError("merge_states was given nothing; pass one or more, such as merge_states(*runs) for a list.")
    first = states[0]
    if len(states) == 1 and isinstance(first, list | tuple) and first and all(map(is_state, first)):
        raise TypeError(f"merge_states was given one {type(first).__name__} of states: pass merge_states(*runs).")
    for index, each in enumerate(states):
        if isinstance(each, int | float | jax.Array | np.ndarray):
            raise TypeError(f"states[{index}] is {each}; expected a State. Shares go by name: shares=[...].")
        check_states(f"states[{index}]", each)
        if jax.tree.structure(each, is_leaf=is_state) != jax.tree.structure(first, is_leaf=is_state):
            raise ValueError(
                f"states[{index}] ({type(each).__name__}) is in another structure than states[0] "
                f"({type(first).__name__})."
            )
    shares = _check_shares(np.ones(len(states), np.float32) if shares is None else shares, len(states))
    # The sum of large ones is infinite. By a power of two: of two divisions a compiler may make one, by their product.
    shares = jnp.ldexp(shares, -jnp.frexp(jnp.max(shares))[1])
    shares /= jnp.sum(shares)

    def merged(path, *each):
        return _merged(jax.tree_util.keystr(path), shares, each) if is_state(each[0]) else each[0]

    return jax.tree_util.tree_map_with_path(merged, *states, is_leaf=is_state)


def _check_shares(given, count) -> jax.Array:
    shares = as_array("shares", given)
    fits = shares.shape == (count,) and not jnp.issubdtype(shares.dtype, jnp.complexfloating)
    if fits and known(given):
        numbers = np.asarray(given, np.float64)
        fits = np.min(numbers) >= 0 and 0 < np.sum(numbers) < np.inf
    if not fits:
        raise ValueError(f"shares is {given}; expected {count} real numbers, not negative and not all 0.")
    return shares.astype(statistics_dtype(shares.dtype))


def _merged(path, shares, states) -> State:
    if any(map(held_by, states)):
        raise TypeError(f"states[0]{path} is a State that is being measured: merge it outside of what is measured.")
    features = features_of(max((jnp.asarray(state.mean) for state in states), key=jnp.ndim))
    states = tuple(check_fields(f"states[{i}]{path}", state, State, features) for i, state in enumerate(states))
    dtype = statistics_dtype(*(leaf.dtype for leaf in jax.tree.leaves(states)))
    mean, var, weight = (jnp.stack([field.astype(dtype) for field in fields]) for fields in zip(*states, strict=True))
    usable = sound(State(mean, var, weight))
    evidence = jnp.reshape(shares.astype(dtype), (-1, *[1] * len(features.shape))) * usable.weight
    merged = combine(Moments(evidence, usable.mean, usable.var, jnp.zeros_like(mean), evidence))
    some = merged.count > 0
    new = State(jnp.where(some, merged.mean, mean[0]), jnp.where(some, merged.var, var[0]), merged.count)
    return lax.stop_gradient(jax.tree.map(lambda to, like: to.astype(like.dtype), new, states[0]))
