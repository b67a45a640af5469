"""Move running statistics towards a measurement."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._check import as_array, check_amount, check_decay
from jbn._fields import check_fields, features_of
from jbn._measure import nonzero, uncertainty
from jbn._measuring import Held, held_by, holding
from jbn._merge import merge
from jbn._types import Carried, Moments, State, sound

ROUNDING = 1e-4  # of sums of weights: so near to 1 the effective number of values is 1


def update(
    state: Carried,
    moments: Moments,
    *,
    decay: float | jax.Array = 0.9,
    amount: ArrayLike = 1.0,
    unbiased: bool = True,
) -> Carried:
    """Move running statistics towards a measurement.

        g = 1 - amount * (1 - decay)
        weight' = g * weight + (1 - g)
        state' = state + (1 - g) / weight' * (measured - state)         for mean and for var

    From `weight` 0 this is the exactly debiased moving average at every step, and the first measurement replaces the
    state whole; from `weight` 1 it is the plain moving average. Each feature is for itself. It stays finite: a
    measurement of no value, of a single one, which says nothing of a variance, or with a value that is not finite
    leaves it as it was, bit for bit. So does `amount` 0.

    `Moments` in the place of the state accumulate where a state decays: `merge`, under the same protection. They start
    as `empty_moments(state)`, and one `update` of the state by them is that of all they were given.

    Args:
      state: `State` with fields of shape `[*features]`, or `Moments`.
      moments: what was measured, of the same shape.
      decay: weight of the old value, in [0, 1]; may be traced. The `momentum` of Flax and Keras; one minus PyTorch's.
      amount: how much of a step to take, in [0, 1], a scalar or `[*features]`; may be traced or boolean, and so gates
        the update at run time. Of `Moments` it multiplies the count.
      unbiased: feed var * n / (n - 1) into the running variance (the 2015 paper, PyTorch) rather than var (Flax, Haiku,
        Keras), with n the effective number of values: `count`, or count**2 / squares where weights are real numbers.

    Returns:
      The new `State` or `Moments`, in the shapes and dtypes of the old; the `count` of `Moments` is `[*features]`. It
      carries no gradient.

    Raises:
      TypeError: `state` or `moments` is something else.
      ValueError: the shapes differ, or `decay` or `amount` is outside [0, 1].

    Source: Ioffe & Szegedy 2015, section 3.1; debiased as in Kingma & Ba 2015, "Adam", section 3.

    Examples:
      >>> _, state = jbn.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> state = jbn.update(state, jbn.moments(x), decay=0.9)
      >>> state.mean.tolist(), state.var.tolist(), state.weight.round(3).tolist()
      ([2.0], [2.0], [0.10000000149011612])
    """
    check_decay(decay)
    return advance(state, moments, decay=decay, amount=amount, unbiased=unbiased)


def advance(
    state: Carried,
    moments: Moments,
    *,
    decay: float | jax.Array = 0.9,
    amount: ArrayLike = 1.0,
    unbiased: bool = True,
    centered: bool = False,
) -> Carried:
    """`update`, where `centered` says that the moments were measured about the running mean."""
    if held := held_by(state):
        held = _called(held, moments, amount)
        found = advance(State(state.mean, state.var), held.moments, decay=0.0, unbiased=unbiased)
        return cast(Carried, holding(found, held))
    kind = Moments if isinstance(state, Moments) else State
    old = check_fields("state", state, kind)
    if not old.mean.ndim:  # one number for all features
        old = check_fields("state", state, kind, features_of(check_fields("moments", moments, Moments).mean))
    features = features_of(old.mean)
    moments = check_fields("moments", moments, Moments, features)
    check_amount(amount, features.shape)
    if isinstance(old, Moments):  # each feature is protected by itself, and so has a count of its own
        counts = (jnp.broadcast_to(value, features.shape) for value in (old.count, old.squares))
        old = old._replace(**dict(zip(("count", "squares"), counts, strict=True)))
    return cast(Carried, _advance(old, moments, decay, as_array("amount", amount), unbiased, centered))


def _called(held: Held, moments: Moments, amount) -> Held:
    """`held` and what one call more has measured."""
    moments = check_fields("moments", moments, Moments)
    total, calls, error = advance(held.moments, moments, amount=amount), held.calls + 1, held.error
    if held.epsilon is not None:
        measured = _in(error.dtype, moments)
        own, running = (1 / jnp.sqrt(var + held.epsilon) for var in (measured.var, held.running.var))
        apart = (measured.mean - held.running.mean) * running
        squared = jnp.where(measured.var > 0, measured.var * (own - running) ** 2, 0) + apart**2
        error += jnp.where(total.count > held.moments.count, (total.count - held.moments.count) * squared, 0)
    return Held(total, calls, error, held.running, held.epsilon)


@partial(jax.jit, static_argnames=("unbiased", "centered"))
def _advance(old, moments, decay, amount, unbiased, centered):
    dtype = old.mean.dtype
    measured = _in(dtype, moments)
    amount = amount.astype(dtype)
    known = sound(old)
    if isinstance(known, Moments):
        part = measured._replace(count=amount * measured.count, squares=amount**2 * measured.squares)
        new, valid = merge(known, part), (measured.count > 0) & (amount > 0)
    else:
        fresh = amount * (1 - jnp.asarray(decay).astype(dtype))
        several = 1 - _reciprocal_number(measured)
        enough = several > ROUNDING
        var = measured.var / jnp.where(enough, several, jnp.ones_like(several)) if unbiased else measured.var
        new = _decayed(known, measured._replace(var=var), fresh)
        if centered:
            doubt, far = _doubt(known, moments)
            excess = moments.var / jnp.where(far, doubt, jnp.ones_like(doubt)) - 1.001  # at the floor 0 for certain
            certain = 1e-3 * jnp.maximum(excess, 0)
            anew = State(measured.mean, var, fresh * certain.astype(dtype))
            new = jax.tree.map(lambda without, other: jnp.where(far, without, other), anew, new)
        valid = (measured.count > 0) & enough & (fresh > 0) & jnp.isfinite(measured.count)
    for value in new:
        valid &= jnp.isfinite(value)
    moved = jax.tree.map(lambda to, still: jnp.where(valid, to.astype(still.dtype), still), new, old)
    return lax.stop_gradient(moved)


def _in(dtype, moments: Moments) -> Moments:
    """`moments` in `dtype`, with what a narrower mean loses in `mean_low`."""
    mean = moments.mean.astype(dtype)
    low = moments.mean - mean.astype(moments.mean.dtype) + moments.mean_low
    return jax.tree.map(lambda field: field.astype(dtype), moments._replace(mean=mean, mean_low=low))


def _reciprocal_number(measured: Moments):
    """1 / n, with n the effective number of values, count**2 / squares."""
    count = nonzero(measured.count)
    return measured.squares / count / count  # in this order: neither the square of a large count nor of a small one


def _decayed(old: State, measured: Moments, fresh) -> State:
    weight = (1 - fresh) * old.weight + fresh
    share = jnp.where(weight > 0, fresh / jnp.where(weight > 0, weight, 1), 0)
    # The weighted mean rather than the increment: at share 1 it is the measurement itself, to the last bit.
    return State((1 - share) * old.mean + share * measured.mean, (1 - share) * old.var + share * measured.var, weight)


def _doubt(old: State, measured: Moments):
    """What rounding can have made of the variance, measured about the running mean, and whether that is too far away.

    Too far: more than 1e-3 of the variance, some 23 standard deviations, may be rounding. Then the batch is all that is
    known of the feature, and counts by how certain its variance is. Not so where the doubt is within the rounding of x
    itself, nor where it is small beside a running variance that has evidence: such a batch, in which the feature is
    constant, say, is averaged as any other.
    """
    mean, var = measured.mean, measured.var
    doubt, rounding = uncertainty(mean - old.mean.astype(mean.dtype)), (jnp.finfo(mean.dtype).eps * mean) ** 2
    little = doubt <= 1e-4 * old.var.astype(var.dtype)
    return doubt, ~(doubt <= jnp.maximum(1e-3 * var, rounding)) & ((old.weight <= 0) | ~little)
