"""What the layers for Flax's linen and for its nnx do alike: both are given Flax's attributes, under the same names."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

from jbn._batch_norm import normalize
from jbn._core.batch import Batch
from jbn._core.held import held_by
from jbn._door.batch import check_batch
from jbn._door.numbers import as_array
from jbn._renorm import correction
from jbn._types import Params, State, statistics_dtype

NOTHING = 1e-30  # no evidence, of a mean and variance that are set: those of a batch that was too far away


class Call(NamedTuple):
    """What a layer is called with."""

    batch: Batch  # in the dtype it is computed in
    dtype: jnp.dtype  # of what the layer returns
    train: bool

    def normalize(self, layer, params: Params, state: State, limits) -> tuple[jax.Array, State]:
        """`batch_norm`, or `batch_renorm` within `limits`, with what Flax's attributes mean to it."""
        numbers = {"decay": layer.momentum, "epsilon": layer.epsilon, "unbiased": layer.unbiased}
        numbers |= {"correct": correction(self.batch, *limits)} if limits else {}
        y, state = normalize(self.batch, params, state, train=self.train, activation=layer.activation, **numbers)
        return y.astype(self.dtype), state


def prepare(layer, x, mask, *, train: bool) -> Call:
    """`x` and `mask` in the meaning that they have for Flax."""
    x = as_array("x", x)
    own = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.dtype(jnp.float32)
    dtype = canonicalize_dtype(dtype=own if layer.dtype is None else layer.dtype)
    axes = layer.axis if isinstance(layer.axis, Iterable) else (layer.axis,)
    axes = sorted({axis + x.ndim if axis < 0 else axis for axis in axes})
    if mask is not None:
        mask = as_array("mask", mask).astype(bool)
        if mask.ndim > x.ndim or any(size not in (1, x.shape[-at]) for at, size in enumerate(mask.shape[::-1], 1)):
            raise ValueError(
                f"mask has shape {list(mask.shape)} and x has shape {list(x.shape)}; expected one that broadcasts to "
                f"that, with size 1 for what it does not differ in, such as {[*x.shape[:-1], 1]}."
            )
        mask = jnp.expand_dims(mask, range(x.ndim - mask.ndim))
    pooling = (layer.axis_name, layer.axis_index_groups) if train else ()
    return Call(check_batch(x.astype(jnp.promote_types(own, dtype)), axes, mask, *pooling), jnp.dtype(dtype), train)


def state_of(mean, var, weight=None) -> State:
    """A `State` of arrays, of variables: float32 where they are narrower, and of full evidence without a weight.

    A weight of 0 is none too where mean or variance are not the initial ones: these have been replaced, as by those of
    a checkpoint without a weight. No evidence of them is NOTHING.
    """
    mean, var = (jnp.asarray(field) for field in (mean, var))
    mean, var = (field.astype(statistics_dtype(field.dtype)) for field in (mean, var))
    if weight is None:
        return State(mean, var, jnp.ones_like(mean))
    state = State(mean, var, jnp.asarray(weight))
    if held_by(state):
        return state
    replaced = (state.weight == 0) & _started(state)
    return state._replace(weight=jnp.where(replaced, 1.0, jnp.where(state.weight > NOTHING, state.weight, 0.0)))


def weight_of(state: State) -> ArrayLike:
    """The weight of a state as the variable that `state_of` takes."""
    return state.weight if held_by(state) else jnp.maximum(state.weight, jnp.where(_started(state), NOTHING, 0.0))


def _started(state: State):
    """Whether the mean and variance of a feature are not the initial ones."""
    return (jnp.asarray(state.mean) != 0) | (jnp.asarray(state.var) != 1)
