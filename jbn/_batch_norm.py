"""The everyday composition: normalize, and in training move the running statistics."""

from collections.abc import Callable, Sequence

import jax
from jax.typing import ArrayLike

from jbn._core.affine import Standardize
from jbn._core.batch import Batch
from jbn._core.normalize import by_given, train_step
from jbn._door.batch import check_activation, check_batch, check_more_than_one
from jbn._door.fields import check_carried, check_fields, check_given
from jbn._door.numbers import check_decay, check_epsilon, check_train
from jbn._types import Carried, Moments, Params


def batch_norm(
    x: ArrayLike,
    params: Params,
    state: Carried,
    *,
    train: bool,
    decay: float | jax.Array = 0.9,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = True,
    groups: int = 1,
    interleaved: bool = False,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Carried]:
    """Batch normalization: by the batch's statistics in training, by the running ones in evaluation.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias)

    In training this is `normalize_batch` about the running mean and then `update`: one pass over `x` to measure it, one
    message where it is pooled. In evaluation it is `normalize_running`, the state comes back as it was, and nothing is
    communicated. For which statistics normalize and whether the running ones move as two separate choices, call those
    functions.

    The variance is within 1e-4 where the batch's mean is within 12 standard deviations of the running one, as it is
    after the first step of a training. Beyond some 20 of them, as for a feature far from 0 in the first step or after a
    jump of the data, the variance used is at least what rounding can have made of it, 2e-6 of the squared distance, so
    that `y` stays bounded in training, though not exact, nor are its gradients. The running mean and variance become
    those of the batch, whatever `decay`, with the evidence that they deserve: a weight of 1 - decay times 1e-3 of the
    variance over what rounding can have made of it, and 0 where all of it may be rounding. Evaluation is as training
    was, and the next step is exact if its batch is near this one. Each feature is for itself. Where a first step has to
    be exact on such data: `recalibrate` on one batch before.

    A feature of the state with a value that is not finite, or a variance below 0, has no evidence, whatever its weight:
    training goes on as from a fresh one.

    Args:
      x: [...], float16, bfloat16, float32 or float64; statistics are float32 (float64 for float64 `x`).
      params: as made by `init`, fields of shape `[*features]`.
      state: as made by `init`, fields of shape `[*features]`. In training, `Moments` in its place accumulate where a
        state decays: see `update`.
      train: a Python bool, known when the program is compiled.
      decay: weight of the old running value, in [0, 1]; may be traced. One minus PyTorch's momentum.
      epsilon: added to the variance; may be traced.
      feature_axis: the axis or axes that keep their own statistics; all others are reduced.
      weights: a boolean mask, numbers of repeats (an integer dtype) or real-valued weights in any unit, of the shape of
        `x` or without the feature axes; see `moments`. Where the weight is 0, `x` is never computed with, and the
        output and its gradient are 0. A feature of which they leave a single value, counting repeats, gives the bias,
        and its state stays as it was.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool statistics over. `None` under plain `jit`.
      axis_index_groups: pool only within these subgroups of `axis_name`; see `moments`.
      unbiased: divide the running variance by count - 1, as PyTorch, rather than by count, as Flax; with real-valued
        weights by what makes it unbiased, see `update`.
      groups: in training, cut axis 0 into so many virtual batches with statistics of their own; see `normalize_batch`.
      interleaved: row i belongs to group i mod `groups`, rather than the groups being contiguous.
      activation: a function of each element behind the normalization, such as `jax.nn.relu`. On a GPU training costs no
        more passes over memory with it than without; see `normalize_batch`.

    Returns:
      `y` with the shape and dtype of `x`, and the new `State` or `Moments`.

    Raises:
      TypeError: `train` is traced, `x` is not floating-point, `params` or `state` is something else, or `activation` is
        no function of elements.
      ValueError: a shape does not fit, a number is out of range, or training on a single value per feature.
      NameError: in training, `axis_name` is not bound.
      NotImplementedError: in training, JAX has no `axis_index_groups` here.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithms 1 and 2.

    Examples:
      >>> params, state = jbn.init(3)
      >>> x = jnp.arange(12.0).reshape(4, 3)
      >>> y, state = jbn.batch_norm(x, params, state, train=True)
      >>> y, state = jbn.batch_norm(x, params, state, train=False, activation=jax.nn.relu)
      >>> state.mean.tolist()
      [4.5, 5.5, 6.5]
    """
    check_train(train)
    if train:
        batch = check_batch(x, feature_axis, weights, axis_name, axis_index_groups, groups, interleaved)
    else:
        batch = check_batch(x, feature_axis, weights)
    numbers = {"decay": decay, "epsilon": epsilon, "unbiased": unbiased}
    return normalize(batch, params, state, train=train, activation=activation, **numbers)


def normalize(
    batch: Batch, params: Params, state: Carried, *, train: bool, activation, decay, epsilon, unbiased, correct=None
) -> tuple[jax.Array, Carried]:
    """`batch_norm` of a batch that has been checked; `correct(rule, state)` is what a variant makes of its rule."""
    if not train and isinstance(state, Moments):
        raise TypeError(
            "state is a Moments, which accumulates in training; to evaluate make a state of it, such as "
            "jbn.update(state, moments, decay=0.0)."
        )
    check_decay(decay)
    features = batch.features
    rule = Standardize(check_fields("params", params, Params, features), check_epsilon(epsilon, features.dtype))
    check_activation(activation, batch)
    if not train:
        return by_given(batch, rule, check_given(state, features), activation), state
    check_more_than_one(batch)
    carried = check_carried(state, features)
    rule = correct(rule, carried) if correct else rule
    return train_step(batch, rule, carried, activation, decay=decay, unbiased=unbiased)
