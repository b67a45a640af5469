"""A batch that cannot be wrong, and how it is read: the door makes it, and everything below takes it as it is."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jbn._core.layout import layout_of
from jbn._core.pool import ALONE, Pool
from jbn._types import statistics_dtype


class Features(NamedTuple):
    """What a value for each feature looks like."""

    shape: tuple[int, ...]
    dtype: jnp.dtype  # of statistics
    layout: NamedSharding | None
    source: tuple[int, ...]  # the shape of what they are the features of
    name: str = "x"  # of that
    option: str = "feature_axis"  # which says along which axes they lie


def features_of(x, axes=()) -> Features:
    """The features of `x` [...], where `axes` are reduced."""
    shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    return Features(shape, statistics_dtype(x.dtype), layout_of(x, axes), x.shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "weights"],
    meta_fields=["axes", "pool", "groups", "interleaved"],
)
@dataclass(frozen=True)
class Batch:
    """What is measured and normalized."""

    x: Any  # [...]
    weights: Any  # `None`, or of the rank of x: a mask, numbers of repeats or real ones, none below 0
    axes: tuple[int, ...]  # that are reduced, over the pool too
    pool: Pool = ALONE
    groups: int = 1  # of axis 0, each normalized by its own statistics
    interleaved: bool = False  # row i is of group i mod groups, rather than the groups being contiguous

    @property
    def features(self) -> Features:
        return features_of(self.x, self.axes)

    @property
    def real(self) -> bool:
        """Whether weights are in some unit, rather than a mask or the number of times that each value counts."""
        return self.weights is not None and jnp.issubdtype(self.weights.dtype, jnp.floating)

    def wide(self) -> "Batch":
        """With `x` in the dtype of statistics."""
        return replace(self, x=self.x.astype(self.features.dtype))

    def along(self, value):
        """`value` [*features] with the rank of `x`."""
        return jnp.expand_dims(value, self.axes)

    def select(self, values, instead: ArrayLike = 0):
        """`values` with `instead` wherever the weight is 0, whatever stands there."""
        if self.weights is None:
            return values
        return jnp.where(self.weights.astype(bool), values, jnp.asarray(instead, values.dtype))

    def deviation(self, center):
        """x - center in the dtype of `center` [*features], and 0 where the weight is."""
        center = self.along(center)
        return self.select(self.x.astype(center.dtype), center) - center

    def weigh(self, values):
        """weights * values, for `values` that are 0 wherever a mask is."""
        if self.weights is None or self.weights.dtype == jnp.bool_:
            return values
        return self.weights.astype(values.dtype) * values

    def sum(self, values):
        """sum(weights * values) of each feature, for `values` that are 0 wherever a mask is."""
        return jnp.sum(self.weigh(values), self.axes)

    def count(self, weights):
        """The sum of what `weights` broadcast to: [], or [*features] where they differ between features."""
        shape, dtype, *_ = self.features
        repeats = math.prod(self.x.shape[axis] for axis in self.axes if weights is None or weights.shape[axis] == 1)
        if weights is None:
            return jnp.asarray(repeats, dtype)
        total = repeats * jnp.sum(weights.astype(dtype), self.axes)
        return jnp.reshape(total, ()) if set(total.shape) <= {1} else jnp.broadcast_to(total, shape)
