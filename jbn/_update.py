"""Move running statistics towards a measurement."""

import jax
from jax.typing import ArrayLike

from jbn._core.batch import features_of
from jbn._core.running import advance
from jbn._door.fields import check_carried, check_fields
from jbn._door.numbers import check_amount, check_decay
from jbn._types import Carried, Moments


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
    carried = check_carried(state)
    if not carried.mean.ndim:  # one number for all features
        carried = check_carried(state, features_of(check_fields("moments", moments, Moments).mean))
    features = features_of(carried.mean)
    moments, amount = check_fields("moments", moments, Moments, features), check_amount(amount, features.shape)
    return advance(carried, moments, decay=decay, amount=amount, unbiased=unbiased)
