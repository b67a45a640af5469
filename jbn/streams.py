"""A normalizer of streams: observations and rewards of reinforcement learning, features of a table that comes in parts.

    stream = jbn.streams.init(features)
    stream = jbn.streams.observe(stream, x)                  # x [..., features], as often as there is something new
    y = jbn.streams.normalize(stream, x, clip=10.0)

A `Stream` is a value: a pytree to carry in a scan, to save, to replicate over devices. See docs/streams.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jbn._core.measure import moments_of
from jbn._core.running import empty
from jbn._door.batch import check_batch
from jbn._door.fields import check_fields
from jbn._door.numbers import check_limit
from jbn._moments import merge
from jbn._normalize import normalize_running
from jbn._start import init as init_state
from jbn._types import Moments, Params, nonzero
from jbn._update import update

FEW = 2**14  # values of which a float32 average still moves by each new one


class Stream(NamedTuple):
    """What has been seen of a stream.

    The latest values are kept apart until there are some 16,000 of them: a single one is nothing to an average of
    billions in float32, and so many together are.

    Attributes:
      total: `Moments` with fields `[*features]`.
      recent: `Moments` with fields `[*features]`, of the values that are not in `total` yet.
    """

    total: Moments
    recent: Moments

    @property
    def moments(self) -> Moments:
        """Of all: count, mean, population variance."""
        return merge(self.total, self.recent)


jax.export.register_namedtuple_serialization(Stream, serialized_name="jbn.streams.Stream")


def init(features: int | Sequence[int], *, dtype: DTypeLike = jnp.float32) -> Stream:
    """A stream of which nothing has been seen.

    Args:
      features: as in `jbn.init`.
      dtype: float64 for statistics in float64, else they are float32.

    Examples:
      >>> import jbn.streams
      >>> jbn.streams.init(3).moments.count.tolist()
      [0.0, 0.0, 0.0]
    """
    nothing = empty(init_state(features, dtype=dtype)[1])
    return Stream(nothing, nothing)


def observe(
    stream: Stream,
    x: ArrayLike,
    *,
    horizon: float | jax.Array = jnp.inf,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Stream:
    """Take in what is new of a stream.

        count' = min(count, horizon - n) + n
        mean' = mean + n / count' * (mean_x - mean),  and var' within plus between, as in `jbn.merge`

    for each feature, with n the number of its values in `x`. A value that is not finite is not seen: the others of its
    row are. The variance is within 1e-4 for mean/std up to 1e5, after any number of calls up to 2e11 values of each
    feature, in float32.

    Args:
      stream: as made by `init`.
      x: [...], float16, bfloat16, float32 or float64, such as [environments, features] or [steps, environments,
        features].
      horizon: how many values of a feature the statistics are of: where there are more, the older ones fade, each value
        by exp(-1 / horizon) or so. They fade where values join those before, some 16,000 at a time, or horizon / 16. By
        default nothing fades, and the order of the values does not matter. May be traced.
      feature_axis: the axis or axes that keep their own statistics.
      weights: as in `jbn.moments`, such as a mask [environments] of those whose episode has not ended.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool over: the stream is then the same on all.
      axis_index_groups: pool only within these subgroups of `axis_name`.

    Returns:
      The new `Stream`. It carries no gradient.

    Raises:
      TypeError, ValueError, NameError, NotImplementedError: as in `jbn.moments`; `horizon` is below 1.

    Source: Chan, Golub & LeVeque 1979, as `jbn.merge`.

    Examples:
      >>> import jbn.streams
      >>> stream = jbn.streams.init(2)
      >>> for x in ([[1.0, 5.0], [3.0, jnp.nan]], [[5.0, 7.0]]):
      ...     stream = jbn.streams.observe(stream, jnp.array(x))
      >>> stream.moments.count.tolist(), stream.moments.mean.tolist()
      ([3.0, 2.0], [3.0, 6.0])
    """
    check_limit("horizon", horizon, 1)
    batch = check_batch(x, feature_axis, weights, axis_name, axis_index_groups)
    finite = jnp.isfinite(batch.x)
    seen = finite if batch.weights is None else jnp.where(finite, batch.weights, jnp.zeros_like(batch.weights))
    old = Stream(
        *(check_fields(f"stream.{name}", part, Moments, batch.features) for name, part in stream._asdict().items())
    )
    recent = update(old.recent, moments_of(replace(batch, weights=seen), None))
    full = recent.count >= jnp.minimum(FEW, horizon / 16)
    count = jnp.minimum(old.total.count, jnp.maximum(horizon - recent.count, 0))
    kept = count / nonzero(old.total.count)  # 1 where nothing fades
    faded = old.total._replace(count=count, squares=kept**2 * old.total.squares)
    total = jax.tree.map(partial(jnp.where, full), update(faded, recent), old.total)
    return Stream(total, jax.tree.map(lambda field: jnp.where(full, jnp.zeros_like(field), field), recent))


def normalize(
    stream: Stream,
    x: ArrayLike,
    *,
    center: bool = True,
    clip: float | jax.Array | None = None,
    epsilon: float | jax.Array = 1e-8,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Normalize by what has been seen of a stream.

        y = clip((x - mean) / sqrt(var + epsilon), -clip, clip)

    Before anything has been seen of a feature its mean is 0 and its variance 1. Nothing is communicated.

    Args:
      stream: as `observe` gives it.
      x: [...], float16, bfloat16, float32 or float64.
      center: subtract the mean; rewards are mostly divided alone, since their sign is what they say.
      clip: the most that is given, such as 10 for observations; by default all is given. May be traced.
      epsilon: added to the variance; may be traced.
      feature_axis: the axis or axes that keep their own statistics.
      weights: as in `jbn.moments`; where the weight is 0, `x` is not computed with, and y is 0.

    Returns:
      `y` with the shape and dtype of `x`.

    Raises:
      TypeError, ValueError: as in `jbn.normalize_running`; `clip` is below 0.

    Examples:
      >>> import jbn.streams
      >>> stream = jbn.streams.observe(jbn.streams.init(1), jnp.array([[1.0], [3.0]]))
      >>> jbn.streams.normalize(stream, jnp.array([[3.0], [99.0]]), clip=5.0).tolist()
      [[1.0], [5.0]]
    """
    found = stream.moments
    found = found._replace(var=jnp.where(found.count > 0, found.var, jnp.ones_like(found.var)))
    if not center:
        nothing = jnp.zeros_like(found.mean)
        found = found._replace(mean=nothing, mean_low=nothing)
    options = {"epsilon": epsilon, "feature_axis": feature_axis, "weights": weights}
    y = normalize_running(x, Params(None, None), found, **options)
    if clip is None:
        return y
    check_limit("clip", clip, 0)
    most = jnp.asarray(clip, y.dtype)
    return jnp.clip(y, -most, most)
