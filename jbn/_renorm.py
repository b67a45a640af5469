"""Batch renormalization: batch normalization with another scale and bias, drawn from the running statistics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._batch_norm import normalize
from jbn._core.affine import Affine, Rule, Standardize
from jbn._core.batch import Batch
from jbn._core.held import Held
from jbn._door.batch import check_batch
from jbn._door.fields import check_fields
from jbn._door.numbers import check_limit, check_train
from jbn._types import Moments, Params, State, sound


def batch_renorm(
    x: ArrayLike,
    params: Params,
    state: State,
    *,
    train: bool,
    r_max: float | jax.Array = 3.0,
    r_min: float | jax.Array | None = None,
    d_max: float | jax.Array = 5.0,
    decay: float | jax.Array = 0.9,
    epsilon: float | jax.Array = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = True,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, State]:
    """Batch renormalization: normalize a batch close to how evaluation will.

    With s = sqrt(var + epsilon) of the batch and s_run of the running statistics, and r and d without gradient,

        r = clip(s / s_run, r_min, r_max),  d = clip((mean - mean_run) / s_run, -d_max, d_max)
        y = activation(scale * ((x - mean) / s * r + d) + bias)

    `r_max=1, d_max=0` is `batch_norm`; with both infinite y is what `normalize_running` gives, while
    gradients flow through the batch's statistics. A feature without evidence (weight 0) is not corrected. The batch is
    measured about the running mean, with the promises of `batch_norm`, and the state moves after it has been used.
    Evaluation is that of `batch_norm`.

    Args:
      x: as in `batch_norm`, as all that is not named below.
      params: fields of shape `[*features]`.
      state: a `State`, fields of shape `[*features]`; it cannot be `Moments` here.
      train: a Python bool, known when the program is compiled.
      r_max: at least 1; may be infinite or traced. `renorm_limits` gives the schedule of the paper.
      r_min: in [0, 1], may be traced; 1 / r_max, as in the paper, where it is not given.
      d_max: at least 0; may be infinite or traced.
      decay: weight of the old running value, in [0, 1]; may be traced.
      epsilon: added to the variance; may be traced.
      feature_axis: the axis or axes that keep their own statistics.
      weights: a mask, numbers of repeats or real-valued weights; see `moments`.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool statistics over.
      axis_index_groups: pool only within these subgroups of `axis_name`.
      unbiased: divide the running variance by count - 1 rather than by count.
      activation: a function of each element behind the normalization; see `normalize_batch`.

    Returns:
      `y` with the shape and dtype of `x`, and the new `State`.

    Raises:
      TypeError, ValueError, NameError, NotImplementedError: as in `batch_norm`, and where a limit is out of range.

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1.

    Examples:
      >>> params, state = jbn.init(1)
      >>> state = state._replace(mean=jnp.array([1.0]), var=jnp.array([4.0]), weight=jnp.array([1.0]))
      >>> y, state = jbn.batch_renorm(jnp.array([[1.0], [3.0]]), params, state, train=True)
      >>> y.round(3).tolist()
      [[0.0], [1.0]]
    """
    check_train(train)
    pooling = (axis_name, axis_index_groups) if train else (None, None)
    batch = check_batch(x, feature_axis, weights, *pooling)
    numbers = {"decay": decay, "epsilon": epsilon, "unbiased": unbiased}
    correct = correction(batch, r_max, d_max, r_min)
    return normalize(batch, params, state, train=train, activation=activation, **numbers, correct=correct)


def correction(batch: Batch, r_max, d_max, r_min=None) -> Callable[[Standardize, State | Held], Rule]:
    """What `normalize` takes to renormalize a batch within these limits."""
    check_limit("r_max", r_max, 1)
    check_limit("d_max", d_max, 0)
    if r_min is not None:
        check_limit("r_min", r_min, 0, 1)
    features, dtype = batch.features, batch.features.dtype
    r_max, d_max = (jnp.asarray(limit, dtype) for limit in (r_max, d_max))
    r_min = 1 / r_max if r_min is None else jnp.asarray(r_min, dtype)

    def correct(rule: Standardize, carried: State | Held) -> Rule:
        if isinstance(carried, Held):
            return rule
        return Corrected(rule, r_min, r_max, d_max, sound(check_fields("state", carried, State, features)))

    return correct


class Corrected(NamedTuple):
    """The map of `Standardize` for params that r and d are part of."""

    standard: Standardize
    r_min: jax.Array
    r_max: jax.Array
    d_max: jax.Array
    running: State

    def __call__(self, measured: Moments) -> Affine:
        (scale, bias), epsilon = self.standard
        mean, var, weight = (lax.stop_gradient(jnp.astype(field, measured.var.dtype)) for field in self.running)
        spread, apart = var + epsilon, measured.mean - mean + measured.mean_low
        usable = (weight > 0) & (spread > 0)  # selected rather than multiplied: what is not used may be infinite
        spread = jnp.where(usable, spread, jnp.ones_like(spread))
        r = jnp.clip(jnp.sqrt((measured.var + epsilon) / spread), self.r_min, self.r_max)
        d = jnp.clip(apart / jnp.sqrt(spread), -self.d_max, self.d_max)
        r, d = lax.stop_gradient((jnp.where(usable, r, jnp.ones_like(r)), jnp.where(usable, d, jnp.zeros_like(d))))
        scale = jnp.ones_like(r) if scale is None else scale.astype(r.dtype)
        bias = jnp.zeros_like(d) if bias is None else bias.astype(d.dtype)
        return Standardize(Params(scale * r, scale * d + bias), epsilon)(measured)


def renorm_limits(
    step: int | jax.Array, *, start: int = 5_000, r_end: int = 40_000, d_end: int = 25_000
) -> tuple[jax.Array, jax.Array]:
    """The limits of batch renormalization by training step: plain batch norm first, then ever freer.

        r_max: 1 up to `start`, then in a straight line to 3 at `r_end`;  d_max: 0 up to `start`, then to 5 at `d_end`

    Args:
      step: the number of the training step, may be traced.
      start: the last step of plain batch norm, as in the paper by default.
      r_end: the step at which `r_max` is open, as in the paper by default.
      d_end: the step at which `d_max` is open, as in the paper by default.

    Returns:
      `r_max` and `d_max`, float32 of shape `[]`.

    Raises:
      ValueError: a ramp ends before it starts.

    Source: Ioffe 2017, "Batch Renormalization", section 4.

    Examples:
      >>> r_max, d_max = jbn.renorm_limits(15_000)
      >>> round(float(r_max), 3), float(d_max)
      (1.571, 2.5)
    """
    if min(r_end, d_end) <= start:
        raise ValueError(f"start is {start}, r_end {r_end}, d_end {d_end}; both ends must come after the start.")
    steps = jnp.asarray(step, jnp.float32)
    r_ramp, d_ramp = (jnp.clip((steps - start) / (end - start), 0, 1) for end in (r_end, d_end))
    return 1 + 2 * r_ramp, 5 * d_ramp


Limits = tuple[Any, Any] | Callable[[jax.Array], tuple[Any, Any]]


def limits_at(step: jax.Array, limits: Limits, warmup_steps: int) -> tuple[Any, Any]:
    """The limits of a layer that has trained for `step` steps: (1, 0), and from `warmup_steps` on what it was given."""
    if callable(limits):
        return limits(step)
    r_max, d_max = limits
    check_limit("r_max", r_max, 1)
    check_limit("d_max", d_max, 0)
    warm = step >= warmup_steps
    return jnp.where(warm, r_max, 1.0), jnp.where(warm, d_max, 0.0)
