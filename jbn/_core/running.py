"""Move running statistics towards a measurement, and what a far batch does to a running mean."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._core.compilers import uncertainty
from jbn._core.held import Held, holding
from jbn._core.layout import layout_of, lie
from jbn._core.merge import merged
from jbn._types import Moments, State, nonzero, sound, statistics_dtype

ROUNDING = 1e-4  # of sums of weights: so near to 1 the effective number of values is 1


def empty(state: State) -> Moments:
    """Nothing measured yet, of the features of `state`."""
    zeros = jnp.zeros_like(state.mean, statistics_dtype(state.mean.dtype))
    return Moments(zeros, zeros, zeros, zeros, zeros)


def advance(
    carried: State | Moments | Held,
    measured: Moments,
    *,
    decay: float | jax.Array = 0.9,
    amount: ArrayLike = 1.0,
    unbiased: bool = True,
    centered: bool = False,
) -> Any:
    """A `State` decays, `Moments` accumulate; `centered` says that what was measured was about the running mean."""
    if isinstance(carried, Held):
        held = _called(carried, measured, amount)
        return holding(held._replace(seen=advance(held.seen, held.moments, decay=0.0, unbiased=unbiased)))
    layout = layout_of(carried.mean) or layout_of(measured.mean)  # a state of `init` is on no mesh yet
    carried, measured = jax.tree.map(lambda field: lie(field, layout) if field.ndim else field, (carried, measured))
    return _advance(carried, measured, decay, amount, unbiased, centered)


def _called(held: Held, measured: Moments, amount) -> Held:
    """`held` and what one call more has measured."""
    total, calls, error = advance(held.moments, measured, amount=amount), held.calls + 1, held.error
    if held.epsilon is not None:
        measured = _in(error.dtype, measured)
        own, running = (1 / jnp.sqrt(var + held.epsilon) for var in (measured.var, held.running.var))
        apart = (measured.mean - held.running.mean) * running
        squared = jnp.where(measured.var > 0, measured.var * (own - running) ** 2, 0) + apart**2
        error += jnp.where(total.count > held.moments.count, (total.count - held.moments.count) * squared, 0)
    return held._replace(moments=total, calls=calls, error=error)


@partial(jax.jit, static_argnames=("unbiased", "centered"))
def _advance(old, moments, decay, amount, unbiased, centered):
    dtype = old.mean.dtype
    if isinstance(old, Moments):  # each feature is protected by itself, and so has a count of its own
        counts = (jnp.broadcast_to(value, old.mean.shape) for value in (old.count, old.squares))
        old = old._replace(**dict(zip(("count", "squares"), counts, strict=True)))
    measured, known = _in(dtype, moments), sound(old)
    amount = jnp.asarray(amount).astype(dtype)
    if isinstance(known, Moments):
        part = measured._replace(count=amount * measured.count, squares=amount**2 * measured.squares)
        new, valid = merged(known, part), (measured.count > 0) & (amount > 0)
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
