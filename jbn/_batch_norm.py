"""The everyday composition: normalize, and in training move the running statistics."""

import jax
from jax.typing import ArrayLike

from jbn._check import check_fraction, check_train
from jbn._normalize import normalize_batch, normalize_running
from jbn._types import Params, State
from jbn._update import update


def batch_norm(
    x: ArrayLike,
    params: Params,
    state: State,
    *,
    train: bool,
    decay: float | jax.Array = 0.9,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | tuple[int, ...] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    unbiased: bool = True,
    groups: int = 1,
    interleaved: bool = False,
) -> tuple[jax.Array, State]:
    """Batch normalization: by the batch's statistics in training, by the running ones in evaluation.

    In training this is `normalize_batch` and then `update`; in evaluation it is `normalize_running`, the state comes
    back as it was, and nothing is communicated. For which statistics normalize and whether the running ones move as two
    separate choices, call those functions.

    Args:
      x: [...], float16, bfloat16, float32 or float64.
      params, state: as made by `init`, fields of shape `[*features]`.
      train: a Python bool.
      decay, unbiased: as in `update`.
      epsilon, groups, interleaved: as in `normalize_batch`. In evaluation there are no groups.
      feature_axis, weights, axis_name: as in `moments`. Where the weight is 0, the output and its gradient are 0.

    Returns:
      `y` with the shape and dtype of `x`, and the new `State`.

    Raises:
      TypeError, ValueError, NameError: as in the functions above, and where `train` is traced.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithms 1 and 2.

    Example:
      >>> params, state = jbn.init(3)
      >>> x = jnp.arange(12.0).reshape(4, 3)
      >>> y, state = jbn.batch_norm(x, params, state, train=True)
      >>> y, state = jbn.batch_norm(x, params, state, train=False)
      >>> state.mean.tolist()
      [4.5, 5.5, 6.5]
    """
    check_train(train)
    check_fraction("decay", decay)
    if not train:
        y = normalize_running(x, params, state, epsilon=epsilon, feature_axis=feature_axis, weights=weights)
        return y, state
    y, measured = normalize_batch(
        x,
        params,
        epsilon=epsilon,
        feature_axis=feature_axis,
        weights=weights,
        axis_name=axis_name,
        groups=groups,
        interleaved=interleaved,
    )
    return y, update(state, measured, decay=decay, unbiased=unbiased)
