"""Move running statistics towards a measurement."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from jbn._check import check_fields, check_fraction, statistics_dtype
from jbn._moments import merge
from jbn._types import Carried, Measuring, Moments, State


def update(
    state: Carried,
    moments: Moments,
    *,
    decay: float | jax.Array = 0.9,
    amount: float | jax.Array = 1.0,
    unbiased: bool = True,
) -> Carried:
    """Move running statistics towards a measurement.

        g = 1 - amount * (1 - decay)
        weight' = g * weight + (1 - g)
        state' = state + (1 - g) / weight' * (measured - state)         for mean and for var

    From `weight` 0 this is the exactly debiased moving average at every step, and the first measurement replaces the
    state whole; from `weight` 1 it is the plain moving average. A state stays finite: a measurement with count 0,
    or with any value that is not finite, leaves it as it was, bit for bit. So does `amount` 0.

    `Moments` in the place of the state accumulate where a state decays: `merge`, under the same protection. They start
    as `empty_moments(state)`, and one `update` of the state by them is that of all they were given.

    Args:
      state: `State` with fields of shape `[*features]`, or `Moments`.
      moments: what was measured, of the same shape.
      decay: weight of the old value, in [0, 1]; may be traced. The `momentum` of Flax and Keras; one minus PyTorch's.
      amount: how much of a step to take, in [0, 1]; may be traced or boolean, and so gates the update at run time. Of
        `Moments` it multiplies the count.
      unbiased: feed var * count / max(count - 1, 1) into the running variance (the 2015 paper, PyTorch) rather than var
        (Flax, Haiku, Keras). Weights count as numbers of samples here: with weights of another scale, such as
        probabilities, pass `False`.

    Returns:
      The new `State` or `Moments`, in the shapes and dtypes of the old. It carries no gradient.

    Raises:
      TypeError: `state` or `moments` is something else.
      ValueError: the shapes differ, or `decay` or `amount` is outside [0, 1].

    Source: Ioffe & Szegedy 2015, section 3.1; debiased as in Kingma & Ba 2015, "Adam", section 3.

    Example:
      >>> _, state = jbn.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> state = jbn.update(state, jbn.moments(x), decay=0.9)
      >>> state.mean.tolist(), state.var.tolist(), round(float(state.weight), 3)
      ([2.0], [2.0], 0.1)
    """
    if isinstance(state, Measuring):
        total = update(state.moments, moments, amount=amount)
        return cast(Carried, dataclasses.replace(state, moments=total))
    check_carried(state)
    check_fields("moments", moments, Moments, jnp.shape(state.mean))
    check_fraction("decay", decay)
    check_fraction("amount", amount)
    # A state that was cast to bfloat16 would not move at decay 0.999 if its own dtype were computed in.
    dtype = statistics_dtype(jnp.asarray(state.mean).dtype)
    count, mean, var = (jnp.asarray(field, dtype) for field in moments[:3])
    amount = jnp.asarray(amount).astype(dtype)
    if isinstance(state, Moments):
        fresh, new = amount, merge(state, moments._replace(count=amount * count))
    else:
        if unbiased:
            var = var * (count / jnp.maximum(count - 1, 1))
        fresh = amount * (1 - jnp.asarray(decay).astype(dtype))
        new = _decayed(jax.tree.map(lambda field: jnp.asarray(field, dtype), state), mean, var, fresh)
    valid = (count > 0) & (fresh > 0)
    for value in (count, *new):
        valid &= jnp.all(jnp.isfinite(value))
    moved = jax.tree.map(lambda to, still: jnp.where(valid, to.astype(still.dtype), still), new, state)
    return cast(Carried, lax.stop_gradient(moved))


def _decayed(old: State, mean, var, fresh) -> State:
    weight = (1 - fresh) * old.weight + fresh
    share = jnp.where(weight > 0, fresh / jnp.where(weight > 0, weight, 1), 0)
    # The weighted mean rather than the increment: at share 1 it is the measurement itself, to the last bit.
    return State((1 - share) * old.mean + share * mean, (1 - share) * old.var + share * var, weight)


def check_carried(state, shape=None) -> None:
    """`state` is a `State`, or what accumulates in its place, with fields of `shape` where one is given."""
    state = state.moments if isinstance(state, Measuring) else state
    check_fields("state", state, Moments if isinstance(state, Moments) else State, shape)
