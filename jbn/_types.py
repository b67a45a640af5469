"""The three values that flow through batch normalization."""

from typing import NamedTuple, TypeVar, cast

import jax
import jax.export
import jax.numpy as jnp


class Params(NamedTuple):
    """What the optimizer learns: y = scale * xhat + bias.

    Attributes:
      scale: [*features]; `None` stands for 1.
      bias: [*features]; `None` stands for 0.
    """

    scale: jax.Array | None
    bias: jax.Array | None


class State(NamedTuple):
    """Running statistics, carried by the training loop and never differentiated.

    The fields can be read as they stand: nothing has to be debiased before use. Every feature stands for itself, so
    `tree.map` slices, joins and shards states along their features. Where a function is given `State(mean, var)`, a
    number or a list, each stands for an array and the weight for 1; to slice, scan or shard a state, make it of arrays.

    Attributes:
      mean: [*features], float32 or float64.
      var: [*features], float32 or float64.
      weight: [*features], in [0, 1], the share of the averages that is data: 1 - decay^steps after so many steps, so
        that early averages need no correction. 0 is no evidence at all: a fresh state, whose mean 0 and variance 1 the
        first batch replaces, or a feature whose last batch was too far away to be known (see `batch_norm`). 1 is full
        evidence. A feature with a value that is not finite, or a variance below 0, has none, whatever its weight.
    """

    mean: jax.Array
    var: jax.Array
    weight: jax.Array | float = 1.0


class Moments(NamedTuple):
    """Count, mean and population variance of one measurement.

    `mean_low` is what rounding took from `mean`: `mean + mean_low` is the mean to twice the precision. Without it,
    variances merged from parts of N values with mean/std = 1e5 would be off by about 0.005 / sqrt(N).

    `count**2 / squares` is the effective number of values (Kish 1965, "Survey Sampling", section 11.2), the same in
    every unit of the weights: the count itself where weights are a mask, or whole numbers in an integer dtype.

    Attributes:
      count: [], the number of values per feature, or the sum of their weights; [*features] where weights differ between
        features.
      mean: [*features].
      var: [*features], divided by count.
      mean_low: [*features].
      squares: as count: the sum of the squared weights where those are real numbers; `None` stands for count.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: jax.Array
    var: jax.Array
    mean_low: jax.Array | float = 0.0
    squares: jax.Array = None  # pyright: ignore[reportAssignmentType]


for _kind in (Params, State, Moments):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"jbn.{_kind.__name__}")


def statistics_dtype(*dtypes) -> jnp.dtype:
    """float64 where one of `dtypes` is, else float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32)


def nonzero(count):
    """`count` as a divisor: sums over nothing are 0 and stay so."""
    return jnp.where(count > 0, count, jnp.ones_like(count))


Carried = TypeVar("Carried", bound=State | Moments)  # what a layer hands on from one step to the next


def usable(carried: State | Moments) -> jax.Array:
    """Which features are finite, with a variance that is not below 0: what else there is is no evidence."""
    found = carried.var >= 0
    for field in carried:
        found &= jnp.isfinite(field)
    return found


def sound(carried: Carried) -> Carried:
    """`carried`, in which a feature that is not usable is as at the start."""
    start = {"var": 1.0} if isinstance(carried, State) else {}
    fit = usable(carried)

    def healed(name, field):
        return jnp.where(fit, field, jnp.full_like(field, start.get(name, 0.0)))

    return cast(Carried, type(carried)(**{name: healed(name, field) for name, field in carried._asdict().items()}))


def is_state(value) -> bool:
    """Whether `value` is a `State`, as the leaves of a tree of states are."""
    return isinstance(value, State)
