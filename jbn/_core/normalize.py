"""Normalize a batch by given statistics, or by its own, with their derivative; and a step of training of both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core.affine import Affine, Rule, affine
from jbn._core.batch import Batch
from jbn._core.compilers import settled
from jbn._core.held import Held
from jbn._core.layout import automatically, everywhere, layout_of, lie
from jbn._core.measure import moments_of, named_moments, remat
from jbn._core.merge import combine
from jbn._core.running import advance
from jbn._types import Moments, State, sound


@partial(jax.jit, static_argnames="activation")  # traced once for all layers of one shape
def by_given(batch: Batch, rule: Rule, given: State | Moments, activation: Callable | None) -> jax.Array:
    """`y` by the map of `rule` for `given` statistics, where a `State` is constant in differentiation."""
    if isinstance(given, State):
        given = Moments(jnp.ones(()), *lax.stop_gradient((given.mean, given.var)))
    fields = given.mean, given.var, jnp.broadcast_to(given.mean_low, given.mean.shape)
    mean, var, low = (lie(jnp.astype(field, batch.features.dtype), batch.features.layout) for field in fields)
    count = jnp.ones((), mean.dtype)
    measured = Moments(count, mean, var, low, count)

    def run(batch: Batch, coefficients: Affine):
        return affine(activation, batch.wide(), coefficients).astype(batch.x.dtype)

    return remat(run)(batch, rule(measured))


@partial(jax.jit, static_argnames="activation")
def by_batch(batch: Batch, center, rule: Rule, activation: Callable | None) -> tuple[jax.Array, Moments]:
    """`y` by the map of `rule` for the batch's own statistics, and those, as `moments_of` gives them."""
    y, measured = (_of_one if batch.groups == 1 else _of_each_group)(batch, center, rule, activation)
    return y, settled(measured)


def _of_one(batch: Batch, center, rule: Rule, activation) -> tuple[jax.Array, Moments]:
    def run(batch: Batch, center, rule):
        wide = batch.wide()  # once, so that the gradient of a narrower x is rounded once
        measured = named_moments(wide, center)
        return affine(activation, wide, rule(measured)).astype(batch.x.dtype), measured

    return remat(run)(batch, center, rule)


def _of_each_group(batch: Batch, center, rule: Rule, activation) -> tuple[jax.Array, Moments]:
    """`y` of every group of axis 0 on its own, and the moments of all."""
    axis = 1 if batch.interleaved else 0

    def cut(values):
        each = values.shape[0] // batch.groups
        return jnp.reshape(values, ((each, batch.groups) if axis else (batch.groups, each)) + values.shape[1:])

    def run(x, weights, center, rule):
        shared = weights is None or weights.shape[0] == 1  # one weight for all rows
        of = Batch(axis, None if shared else axis, batch.axes, batch.pool)
        each = jax.vmap(partial(_of_one, activation=activation), (of, None, None), (axis, 0))
        # What is cut is kept for the backward pass: JAX would find a masked NaN in there, where it is told to look.
        x = Batch(x, weights, batch.axes).select(x)
        parts = Batch(cut(x), weights if shared else cut(weights), batch.axes, batch.pool)
        y, measured = each(parts, center, rule)
        return jnp.reshape(y, x.shape), *combine(measured)

    x, weights = batch.x, batch.weights
    count = features = layout_of(x, batch.axes)
    kept = [axis for axis in range(x.ndim) if axis not in batch.axes]
    if features and (weights is None or all(weights.shape[axis] == 1 for axis in kept)):
        count = everywhere(features)
    y, *fields = automatically(run, layout_of(x), count, *[features] * 3, count)(x, weights, center, rule)
    return y, Moments(*fields)


@partial(jax.jit, static_argnames=("activation", "unbiased"))
def train_step(
    batch: Batch, rule: Rule, carried: State | Moments | Held, activation, *, decay, unbiased
) -> tuple[jax.Array, Any]:
    """`y` in training, and what is carried on: about the running mean, where a `State` has one."""
    center = None
    if isinstance(carried, Held) and carried.given:
        y, measured = by_given(batch, rule, carried.given, activation), moments_of(batch, None)
    else:
        center = center_of(batch, carried) if isinstance(carried, State) else None
        y, measured = by_batch(batch, center, rule, activation)
    return y, advance(carried, measured, decay=decay, unbiased=unbiased, centered=center is not None)


def center_of(batch: Batch, state: State) -> jax.Array:
    """The running mean, which is near that of a batch: the same on all devices, and 0 where the state is not sound."""
    mean = lax.stop_gradient(sound(state).mean.astype(batch.features.dtype))
    return batch.pool.agreed(lie(mean, batch.features.layout))
