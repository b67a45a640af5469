"""What the layers for Flax's linen and for its nnx do alike: both are given Flax's attributes, under the same names."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from jbn._batch_norm import batch_norm
from jbn._check import as_array, check_batch, statistics_dtype
from jbn._fields import features_of
from jbn._types import Params, State


class Call(NamedTuple):
    """What a layer is called with, as jbn takes it."""

    x: jax.Array  # in the dtype it is computed in
    dtype: jnp.dtype  # of what the layer returns
    features: tuple[int, ...]
    options: dict[str, Any]  # what `moments` takes


def prepare(layer, x, mask) -> Call:
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
    x, mask, reduced = check_batch(x.astype(jnp.promote_types(own, dtype)), axes, mask)
    options = {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}
    return Call(x, jnp.dtype(dtype), features_of(x, reduced).shape, options | {"feature_axis": axes, "weights": mask})


def normalize(layer, call: Call, params: Params, state: State, *, train: bool) -> tuple[jax.Array, State]:
    """`batch_norm` with what Flax's attributes mean to it."""
    options = call.options | {"decay": layer.momentum, "epsilon": layer.epsilon, "activation": layer.activation}
    y, state = batch_norm(call.x, params, state, train=train, unbiased=False, **options)
    return y.astype(call.dtype), state


def state_of(mean, var, weight=None) -> State:
    """A `State` of arrays: float32 where they are narrower, and of full evidence without a weight."""
    mean, var = (jnp.asarray(field) for field in (mean, var))
    mean, var = (field.astype(statistics_dtype(field.dtype)) for field in (mean, var))
    return State(mean, var, jnp.ones_like(mean) if weight is None else weight)
