"""Equinox: `eqx.nn.BatchNorm` by jbn, with the same signature and a `jbn.State` in the `eqx.nn.State`.

`jbn.equinox.BatchRenorm` is the same with batch renormalization.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError("jbn.equinox needs Equinox: pip install 'jbn[equinox]'") from error

from jbn._batch_norm import batch_norm
from jbn._renorm import Limits, batch_renorm, limits_at
from jbn._start import init
from jbn._types import Params, State


class BatchNorm(eqx.nn.StatefulLayer):
    """Batch normalization as a layer of Equinox, in the place of `eqx.nn.BatchNorm`.

    In training by the mean and variance of all examples of `axis_name` and of all positions, in inference by the
    running ones; with m the `momentum` and weight' = m * weight + 1 - m, from weight 0:

        y = weight * (x - mean) / sqrt(var + eps) + bias
        state' = state + (1 - m) / weight' * (measured - state)         for mean and for var

    The running statistics are a `jbn.State`, `state.get(layer.state_index)`: the exactly debiased averages at every
    step, float32 (float64 where `dtype` is) whatever `x` is. A batch that is not finite leaves them as they were. So
    `jbn.drift`, `jbn.recalibrate` and `jbn.merge_states` take the `eqx.nn.State` of a network as it is.

    Args:
      input_size: the number of features.
      axis_name: the axis or axes of `vmap`, `pmap` or `shard_map` to pool statistics over.
      eps: added to the variance.
      channelwise_affine: learn `weight` (starts at 1) and `bias` (starts at 0); without it both are `None`.
      momentum: weight of the old running value, in [0, 1].
      inference: normalize by the running statistics and leave them; toggled by `eqx.nn.inference_mode`.
      dtype: of `weight` and `bias`; by default float32, and float64 in JAX's 64-bit mode.
      mode: "batch", so that calls of `eqx.nn.BatchNorm` with it stand as they are.
      activation: a function of each element behind the normalization, such as `jax.nn.relu`, in fewer passes over a
        GPU's memory than by itself, see `jbn.batch_norm`.
      unbiased: divide the running variance by count - 1, as PyTorch, rather than by count, as Equinox; see
        `jbn.batch_norm`.

    Raises:
      ValueError: `input_size`, `momentum` or `mode` is out of range.
      TypeError: `input_size` is not an int, or `dtype` not a floating-point type.

    Source: Ioffe & Szegedy 2015, "Batch Normalization"; debiased as in Kingma & Ba 2015, "Adam", section 3.

    Examples:
      >>> import equinox as eqx
      >>> from jbn.equinox import BatchNorm
      >>> layer, state = eqx.nn.make_with_state(BatchNorm)(2, axis_name="batch")
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
      >>> y.round(3).tolist(), state.get(layer.state_index).mean.tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 20.0])
    """

    weight: jax.Array | None  # [input_size]
    bias: jax.Array | None  # [input_size]
    state_index: eqx.nn.StateIndex[State]
    inference: bool
    axis_name: str | tuple[str, ...] = eqx.field(static=True)
    input_size: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    activation: Callable[[jax.Array], jax.Array] | None = eqx.field(static=True)
    unbiased: bool = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: str | Sequence[str],
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        mode: str = "batch",
        activation: Callable[[jax.Array], jax.Array] | None = None,
        unbiased: bool = False,
    ):
        if mode != "batch":
            raise ValueError(
                f"mode is {mode!r}; expected 'batch': jbn normalizes by the batch in training. Near to 'ema', which "
                f"normalizes by statistics that are averaged over steps, is jbn.batch_renorm."
            )
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}; expected a number in [0, 1]: the weight of the old value.")
        dtype = jnp.result_type(float) if dtype is None else dtype
        affine = channelwise_affine
        (self.weight, self.bias), state = init(input_size, scale=affine, bias=affine, dtype=dtype)
        self.state_index = eqx.nn.StateIndex(state)
        self.inference = inference
        self.axis_name = axis_name if isinstance(axis_name, str) else tuple(axis_name)
        self.input_size = input_size
        self.eps = eps
        self.channelwise_affine = channelwise_affine
        self.momentum = momentum
        self.activation = activation
        self.unbiased = unbiased

    def __call__(
        self,
        x: jax.Array,
        state: eqx.nn.State,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        weights: ArrayLike | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalize one example, inside of a `vmap` over all of them.

        Args:
          x: [input_size, dim_1, ..., dim_N], float16, bfloat16, float32 or float64.
          state: the `eqx.nn.State` that `eqx.nn.make_with_state` made.
          key: ignored, as in Equinox.
          inference: `True` or `False` takes the place of `self.inference`.
          weights: a boolean mask, or real-valued weights, of the positions [dim_1, ..., dim_N] or of the shape of `x`;
            where there are no positions a scalar, that of the example. Where it is 0, `x` is never computed with, and
            the output and its gradient are 0.

        Returns:
          `y` with the shape and dtype of `x`, and the new state, which is the same for all examples: `out_axes` is
          (0, None).

        Raises:
          TypeError, ValueError, NameError: as in `jbn.batch_norm`.
        """
        del key
        train = not (self.inference if inference is None else inference)
        rule, state = self._rule(state, train)
        y, new = rule(
            x,
            Params(self.weight, self.bias),
            state.get(self.state_index),
            train=train,
            decay=self.momentum,
            epsilon=self.eps,
            feature_axis=0,
            weights=weights,
            axis_name=self.axis_name,
            unbiased=self.unbiased,
            activation=self.activation,
        )
        return y, state.set(self.state_index, new) if train else state

    def _rule(self, state: eqx.nn.State, train: bool) -> tuple[Callable, eqx.nn.State]:
        """What computes this step, and the state behind it but for its statistics."""
        return batch_norm, state


class BatchRenorm(BatchNorm):
    """`jbn.equinox.BatchNorm`, computed by `jbn.batch_renorm`: for small batches, and for data that moves.

    In training, with s = sqrt(var + eps), and r and d without gradient,

        r = clip(s / s_run, 1 / r_max, r_max),  d = clip((mean - mean_run) / s_run, -d_max, d_max)
        y = weight * ((x - mean) / s * r + d) + bias

    For the first `warmup_steps` steps r_max is 1 and d_max 0, which is batch norm; then they are `limits`.
    `state.get(layer.steps_index)`, int32 of shape [], counts the steps of training. All else is as in `BatchNorm`.

    Args:
      input_size, axis_name: as in `BatchNorm`.
      limits: r_max and d_max; or a function that is given the number of steps so far, and gives them, with a warm-up of
        its own, such as `jbn.renorm_limits`: `warmup_steps` then has no part.
      warmup_steps: 100,000, as in CrossQ.
      **options: those of `BatchNorm`.

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1; the warm-up as in Bhatt et al. 2024, "CrossQ".

    Examples:
      >>> import equinox as eqx
      >>> from jbn.equinox import BatchRenorm
      >>> layer, state = eqx.nn.make_with_state(BatchRenorm)(1, axis_name="batch", momentum=0.5, warmup_steps=1)
      >>> over_batch = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, state = over_batch(x, state)
      >>> y.round(3).tolist(), int(state.get(layer.steps_index))
      ([[-1.0], [1.0]], 1)
      >>> over_batch(x + 1, state)[0].round(3).tolist()  # running mean 2, variance 1
      [[0.0], [2.0]]
    """

    steps_index: eqx.nn.StateIndex[jax.Array]
    limits: Limits = eqx.field(static=True)
    warmup_steps: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: str | Sequence[str],
        *,
        limits: Limits = (3.0, 5.0),
        warmup_steps: int = 100_000,
        **options,
    ):
        super().__init__(input_size, axis_name, **options)
        self.steps_index = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))
        self.limits = limits
        self.warmup_steps = warmup_steps

    def _rule(self, state, train):
        if not train:
            return batch_norm, state
        steps = state.get(self.steps_index)
        r_max, d_max = limits_at(steps, self.limits, self.warmup_steps)
        return partial(batch_renorm, r_max=r_max, d_max=d_max), state.set(self.steps_index, steps + 1)
