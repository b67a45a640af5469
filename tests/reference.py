"""Batch normalization in float64 NumPy, and as a textbook formula for plain autodiff: what the tests compare with."""

import jax.numpy as jnp
import numpy as np


def reduced_axes(ndim, feature_axis=-1):
    kept = feature_axis if isinstance(feature_axis, tuple) else (feature_axis,)
    return tuple(axis for axis in range(ndim) if axis not in {axis % ndim for axis in kept})


def full_weights(x, weights=None, feature_axis=-1):
    """The weights in float64 and in the shape of `x`."""
    axes = reduced_axes(np.ndim(x), feature_axis)
    weights = np.asarray(1.0 if weights is None else weights, np.float64)
    if weights.ndim < np.ndim(x):
        weights = weights.reshape(
            np.ones(np.ndim(x), int)
            if weights.ndim == 0
            else [weights.shape[axes.index(axis)] if axis in axes else 1 for axis in range(np.ndim(x))]
        )
    return np.broadcast_to(weights, np.shape(x))


def moments(x, weights=None, feature_axis=-1):
    """Count, mean and population variance in float64."""
    axes = reduced_axes(np.ndim(x), feature_axis)
    weights = full_weights(x, weights, feature_axis)
    x = np.where(weights > 0, np.asarray(x, np.float64), 0)
    count = weights.sum(axes)
    mean = (weights * x).sum(axes) / count
    var = (weights * (x - np.expand_dims(mean, axes)) ** 2).sum(axes) / count
    return count if np.ptp(count) else count.flat[0], mean, var


def number(weights, shape, feature_axis=-1):
    """The effective number of values of each feature of `shape` in float64: of a mask, how many it leaves."""
    axes = reduced_axes(len(shape), feature_axis)
    weights = full_weights(np.empty(shape), weights, feature_axis)
    total = weights.sum(axes)
    return np.divide(total**2, (weights**2).sum(axes), out=np.zeros_like(total), where=total > 0)


def normalize(x, mean, var, scale, bias, epsilon=1e-5, feature_axis=-1):
    axes = reduced_axes(np.ndim(x), feature_axis)
    mean, var, scale, bias = (np.expand_dims(np.asarray(a, np.float64), axes) for a in (mean, var, scale, bias))
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon) * scale + bias


def renormalize(x, params, state, r_max, d_max, epsilon=1e-5):
    """y and r of batch renormalization in float64, as the paper writes it; features last."""
    _, mean, var = moments(x)
    deviation, running = np.sqrt(var + epsilon), np.sqrt(np.float64(state.var) + epsilon)
    r = np.clip(deviation / running, 1 / r_max, r_max)
    d = np.clip((mean - np.float64(state.mean)) / running, -d_max, d_max)
    xhat = (np.float64(x) - mean) / deviation
    return np.float64(params.scale) * (xhat * r + d) + np.float64(params.bias), r


def gradients(x, dy, scale, epsilon=1e-5, weights=None, feature_axis=-1):
    """dx, dscale and dbias by the closed form of Ioffe & Szegedy 2015, weighted."""
    axes = reduced_axes(np.ndim(x), feature_axis)
    count, mean, var = moments(x, weights, feature_axis)
    share = full_weights(x, weights, feature_axis) / count
    dy = np.where(share > 0, np.asarray(dy, np.float64), 0)
    xhat = np.where(share > 0, normalize(x, mean, var, np.ones_like(var), 0 * var, epsilon, feature_axis), 0)
    dscale, dbias = (dy * xhat).sum(axes), dy.sum(axes)
    slope, dscale_full, dbias_full = (
        np.expand_dims(a, axes) for a in (np.asarray(scale, np.float64) / np.sqrt(var + epsilon), dscale, dbias)
    )
    return slope * (dy - share * dbias_full - share * xhat * dscale_full), dscale, dbias


def update(state, measured, decay=0.9, amount=1.0, unbiased=True):
    """(mean, var, weight) after one step of the update rule, in float64."""
    (mean, var, weight), (count, batch_mean, batch_var) = state, measured
    if unbiased:
        batch_var = batch_var / (1 - 1 / np.asarray(count, np.float64))
    kept = 1 - amount * (1 - decay)
    new_weight = np.asarray(kept * weight + (1 - kept), np.float64)
    share = np.divide(1 - kept, new_weight, out=np.zeros_like(new_weight), where=new_weight > 0)
    return mean + share * (batch_mean - mean), var + share * (batch_var - var), new_weight


def textbook(x, scale, bias, epsilon, weights=None, axes=(0,)):
    """Batch normalization in plain JAX, for autodiff; `weights` has as many axes as `x`."""
    weights = jnp.ones_like(x) if weights is None else jnp.broadcast_to(weights.astype(x.dtype), x.shape)
    count = jnp.sum(weights, axes, keepdims=True)
    mean = jnp.sum(weights * x, axes, keepdims=True) / count
    var = jnp.sum(weights * (x - mean) ** 2, axes, keepdims=True) / count
    y = (x - mean) / jnp.sqrt(var + epsilon) * jnp.expand_dims(scale, axes) + jnp.expand_dims(bias, axes)
    return jnp.where(weights > 0, y, jnp.zeros_like(y))
