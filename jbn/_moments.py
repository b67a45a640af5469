"""Measure a batch, and pool what was measured apart."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn._core.batch import features_of
from jbn._core.measure import moments_of
from jbn._core.merge import merged
from jbn._door.batch import check_batch
from jbn._door.fields import check_center, check_fields
from jbn._types import Moments


def moments(
    x: ArrayLike,
    *,
    center: ArrayLike | None = None,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Measure count, mean and population variance of every feature of a batch.

    With w the weights (1 where none are given) and sums over every axis but the feature axes:

        count = sum(w),  mean = sum(w x) / count,  var = sum(w (x - mean)^2) / count,  squares = sum(w^2)

    With a center c near the mean this is one pass over `x` and, where it is pooled, one message:

        rest = sum(w (x - c)) / count,  mean = c + rest,  var = sum(w (x - c)^2) / count - rest^2

    In float32 the variance is within 1e-4 where the center is within 12 standard deviations of the mean, and never less
    than what rounding can have made of it, 2e-6 (mean - c)^2. Without a center there is a pass, and a message, more: it
    gives the mean, about which the second goes. Then the variance is within 1e-4 for mean/std up to 1e5.

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      center: `[*features]`, or a scalar for all: a value that is known to be near the mean, such as a running mean. Not
        differentiated. It has to be the same on all devices that are pooled: where JAX's types tell that it differs
        (`shard_map` with `check_vma`), its mean over the devices is taken, in one message more.
      feature_axis: the axis or axes that keep their own statistics; all others are reduced. Peers' `axis` is sometimes
        this and sometimes the reduced ones.
      weights: a boolean mask; or numbers of repeats, in an integer dtype; or real numbers that are not negative, in any
        unit in which their squares are float32 numbers (1e-15 to 1e15), of which count**2 / squares is the effective
        number of values. Of the shape of `x`, where each feature has
        missing values of its own, or with the feature axes left out or of size 1; any other axis may be 1 too, and the
        last of them left out. What has weight 0 is never computed with: it may be NaN. A negative or NaN weight counts
        as 0.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool over. Under plain `jit` on sharded arrays
        leave it out: statistics are global there.
      axis_index_groups: lists of indices along `axis_name`, such as `[[0, 1], [2, 3]]`: each is pooled apart from the
        others. In `pmap`, and in `shard_map` with `check_vma=False`; elsewhere pool over one of two axes instead.

    Returns:
      `Moments` in float32 (float64 for float64 `x`), fields of shape `[*features]` in the order of the axes of `x`,
      `count` and `squares` of shape `[]`, or `[*features]` where weights differ between features; `squares` is `count`
      for a mask or repeats. Where `count` is 0, mean and variance are 0 (about a center, the mean is the center).
      Differentiable in `x` and real-valued `weights`.

    Raises:
      TypeError: `x` or `center` is not floating-point.
      ValueError: `feature_axis`, or the shape of `center`, `weights` or `axis_index_groups`, does not fit.
      NameError: `axis_name` is not bound.
      NotImplementedError: JAX has no `axis_index_groups` here.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eqs. 1.5 and 1.7.

    Examples:
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [jnp.nan, jnp.nan]])
      >>> m = jbn.moments(x, weights=jnp.array([True, True, False]))
      >>> m.count.item(), m.mean.tolist(), m.var.tolist()
      (2.0, [2.0, 20.0], [1.0, 100.0])
    """
    batch = check_batch(x, feature_axis, weights, axis_name, axis_index_groups)
    return moments_of(batch, check_center(center, batch))


def merge(*moments: Moments) -> Moments:
    """Pool moments that were measured apart, as if all had been measured at once.

        count = sum(count_i),  mean = sum(count_i mean_i) / count
        var = sum(count_i (var_i + (mean_i - mean)^2)) / count          within plus between
        squares = sum(squares_i)

    Associative and commutative up to rounding. A part with count 0 contributes nothing, whatever its other fields hold.
    Exact in the sense of `moments`: `mean_low` carries what rounding took from the means.

    Args:
      *moments: one or more `Moments` of the same features.

    Returns:
      `Moments` of all of them, in the widest dtype among them; `count` is `[*features]` where that of a part is.
      Differentiable.

    Raises:
      TypeError: no argument, or one that is not a `Moments`.
      ValueError: the shapes differ.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Examples:
      >>> a, b = jnp.array([[1.0], [2.0]]), jnp.array([[6.0]])
      >>> m = jbn.merge(jbn.moments(a), jbn.moments(b))
      >>> m.count.item(), m.mean.item(), round(m.var.item(), 4)
      (3.0, 3.0, 4.6667)
    """
    if not moments:
        raise TypeError("merge was given nothing; pass one or more jbn.Moments, such as merge(*parts) for a list.")
    parts = [check_fields(f"moments[{i}]", part, Moments) for i, part in enumerate(moments)]
    features = features_of(max((part.mean for part in parts), key=jnp.ndim))
    return merged(*(check_fields(f"moments[{i}]", part, Moments, features) for i, part in enumerate(parts)))
