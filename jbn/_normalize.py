"""Normalize a batch by given statistics: its own, with their derivative, or the running ones."""

from collections.abc import Callable, Sequence

import jax
from jax.typing import ArrayLike

from jbn._core.affine import Standardize
from jbn._core.normalize import by_batch, by_given
from jbn._door.batch import check_activation, check_batch, check_more_than_one
from jbn._door.fields import check_center, check_fields, check_given
from jbn._door.numbers import check_epsilon
from jbn._types import Moments, Params, State


def normalize_batch(
    x: ArrayLike,
    params: Params,
    *,
    center: ArrayLike | None = None,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int = 1,
    interleaved: bool = False,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize `x` by its own statistics.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias)

    with mean and population variance as `moments` measures them. With xhat = (x - mean) / sqrt(var + epsilon) and means
    over the pooled batch, and dy behind the activation, the derivative is

        dx = scale / sqrt(var + epsilon) * (dy - mean(dy) - xhat * mean(dy * xhat)),
        dscale = sum(dy * xhat),  dbias = sum(dy)

    in reverse and forward mode and to any order. The backward pass keeps `x` in its own dtype and per-feature vectors,
    of which the measured ones have the `checkpoint_name` "jbn.moments": a policy of `jax.checkpoint` that saves them
    has normalization and activation made again from `x`, and nothing measured or communicated again.

    Args:
      x: [...], float16, bfloat16, float32 or float64; reduced in float32 or wider.
      params: `Params` with fields of shape `[*features]`.
      center: a value for each feature that is known to be near its mean, such as a running mean: one pass over `x` and
        one message to measure it, rather than two; see `moments`. Where it was too far away `batch_norm` starts the
        running statistics anew; `update`, which does not know of it, takes the variance as it is.
      epsilon: added to the variance; may be traced. A feature that is constant gives the bias even where this is 0.
      feature_axis: the axis or axes that keep their own statistics; all others are reduced.
      weights: as in `moments`. Where the weight is 0, the output and its gradient are 0.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool over; see `moments`.
      axis_index_groups: pool only within these subgroups of `axis_name`; see `moments`.
      groups: cut axis 0 into so many equal groups and normalize each by its own statistics, pooled over `axis_name`
        ("ghost" batch normalization, Hoffer, Hubara & Soudry 2017, algorithm 1). The moments are those of all groups.
      interleaved: row i belongs to group i mod `groups`, rather than the groups being contiguous.
      activation: a function of each element, such as `jax.nn.relu`, that `y` goes through before it is rounded to the
        dtype of `x`. Its derivative is made again from `x`: the backward pass keeps nothing for it, and on a GPU writes
        nothing to memory for it either. (There relu's multiplies: where y is 0, an infinite dy gives NaN.) A function
        of nothing else, and the same object in every call: for another one all is compiled anew.

    Returns:
      `y` with the shape and dtype of `x`, and the `Moments` it was normalized by, which are differentiable too.

    Raises:
      TypeError: `x` is not floating-point, `params` is not a `Params`, or `activation` is no function of elements.
      ValueError: a shape does not fit, `epsilon` is negative, `groups` does not divide axis 0, or there is a single
        value per feature in all, or in each group.
      NameError, NotImplementedError: as in `moments`.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1 and section 3.

    Examples:
      >>> params, _ = jbn.init(1)
      >>> y, moments = jbn.normalize_batch(jnp.array([[1.0], [3.0]]), params)
      >>> y.round(3).tolist(), moments.mean.tolist(), moments.var.tolist()
      ([[-1.0], [1.0]], [2.0], [1.0])
    """
    batch = check_batch(x, feature_axis, weights, axis_name, axis_index_groups, groups, interleaved)
    params, center = check_fields("params", params, Params, batch.features), check_center(center, batch)
    rule = Standardize(params, check_epsilon(epsilon, batch.features.dtype))
    check_activation(activation, batch)
    check_more_than_one(batch)
    return by_batch(batch, center, rule, activation)


def normalize_running(
    x: ArrayLike,
    params: Params,
    state: State | Moments,
    *,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Normalize `x` by given statistics, as in evaluation by the running ones. Nothing is communicated.

        y = activation(scale * (x - state.mean) / sqrt(state.var + epsilon) + bias)

    The state is used as it stands, whatever its evidence: a fresh one has mean 0 and variance 1, and a feature whose
    last batch was far away (see `batch_norm`) what that batch was normalized by. A state is constant in
    differentiation; `Moments` in its place, such as those of another batch, are differentiable in mean and variance, to
    any order; without
    an activation:

        dmean = -sum(dy * scale) / sqrt(var + epsilon),  dvar = -sum(dy * (y - bias)) / (2 (var + epsilon))

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      params: `Params` with fields of shape `[*features]`.
      state: `State` or `Moments` with fields of shape `[*features]`.
      epsilon: added to the variance; may be traced.
      feature_axis: the axis or axes that keep their own statistics.
      weights: as in `moments`; all they do here is to blank: where the weight is 0, the output and its gradient are 0.
      activation: a function of each element behind the normalization; see `normalize_batch`.

    Returns:
      `y` with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not floating-point, `params` or `state` is something else, or `activation` is no function of
        elements.
      ValueError: a shape does not fit, or `epsilon` is negative.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 2.

    Examples:
      >>> params, state = jbn.init(1)
      >>> state = state._replace(mean=jnp.array([2.0]), var=jnp.array([4.0]))
      >>> jbn.normalize_running(jnp.array([[4.0]]), params, state).round(3).tolist()
      [[1.0]]
    """
    batch = check_batch(x, feature_axis, weights)
    params = check_fields("params", params, Params, batch.features)
    rule = Standardize(params, check_epsilon(epsilon, batch.features.dtype))
    check_activation(activation, batch)
    return by_given(batch, rule, check_given(state, batch.features), activation)
