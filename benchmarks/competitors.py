"""Batch normalization by jbn and by its peers on JAX, each as the same pure function.

    normalize(x, scale, bias, mean, var, mask) -> y, mean, var

for x with its features on `axis`, the last or 1; mean and var [features] are the running ones, moved by a tenth towards
the batch's in training. mask is None or as x with one feature, for those in MASKED. Epsilon is 1e-5.
"""

import os
from collections.abc import Callable

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp

import jbn

DECAY, EPSILON = 0.9, 1e-5


def with_jbn(features: int, axis: int, train: bool, activation: Callable | None = None) -> Callable:
    def normalize(x, scale, bias, mean, var, mask=None):
        state = jbn.State(mean, var, jnp.ones((), mean.dtype))
        params = jbn.Params(scale, bias)
        options = {"feature_axis": axis, "weights": mask, "activation": activation}
        y, state = jbn.batch_norm(x, params, state, train=train, decay=DECAY, unbiased=False, **options)
        return y, state.mean, state.var

    return normalize


def with_flax_linen(features: int, axis: int, train: bool) -> Callable:
    from flax import linen

    def normalize(x, scale, bias, mean, var, mask=None):
        layer = linen.BatchNorm(not train, axis=axis, momentum=DECAY, epsilon=EPSILON, dtype=x.dtype)
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
        y, updated = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, updated["batch_stats"]["mean"], updated["batch_stats"]["var"]

    return normalize


def with_flax_nnx(features: int, axis: int, train: bool) -> Callable:
    from flax import nnx

    def normalize(x, scale, bias, mean, var, mask=None):
        layer = nnx.BatchNorm(
            features,
            axis=axis,
            momentum=DECAY,
            epsilon=EPSILON,
            dtype=x.dtype,
            use_running_average=not train,
            rngs=nnx.Rngs(0),
        )
        for variable, value in ((layer.scale, scale), (layer.bias, bias), (layer.mean, mean), (layer.var, var)):
            variable[...] = value  # pyright: ignore[reportOptionalSubscript]
        y = layer(x, mask=mask)
        return y, layer.mean[...], layer.var[...]

    return normalize


def with_haiku(features: int, axis: int, train: bool) -> Callable:
    import haiku

    def layer(x):
        others = [other for other in range(x.ndim) if other != axis % x.ndim]
        return haiku.BatchNorm(True, True, DECAY, EPSILON, axis=others, name="norm")(x, is_training=train)

    apply = haiku.without_apply_rng(haiku.transform_with_state(layer)).apply

    def normalize(x, scale, bias, mean, var, mask=None):
        shape = [features if each == axis % x.ndim else 1 for each in range(x.ndim)]
        scale, bias, mean, var = (jnp.reshape(value, shape) for value in (scale, bias, mean, var))
        state = {
            f"norm/~/{name}_ema": {"counter": jnp.zeros((), jnp.int32), "hidden": value, "average": value}
            for name, value in (("mean", mean), ("var", var))
        }
        y, state = apply({"norm": {"scale": scale, "offset": bias}}, state, x)
        return y, *(jnp.ravel(state[f"norm/~/{name}_ema"]["hidden"]) for name in ("mean", "var"))

    return normalize


def with_equinox(features: int, axis: int, train: bool) -> Callable:
    import equinox

    def normalize(x, scale, bias, mean, var, mask=None):
        layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
            features, "batch", eps=EPSILON, momentum=DECAY, mode="batch"
        )
        layer = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, (scale, bias))
        layer = equinox.nn.inference_mode(layer, not train)
        state = state.set(layer.batch_state_index, (mean, var))

        def of_one(x, state):  # [..., features] or [features, ...]
            y, state = layer(jnp.moveaxis(x, -1, 0) if axis == -1 else x, state)
            return (jnp.moveaxis(y, 0, -1) if axis == -1 else y), state

        y, state = jax.vmap(of_one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y, *state.get(layer.batch_state_index)

    return normalize


def with_keras(features: int, axis: int, train: bool) -> Callable:
    import keras

    layer = keras.layers.BatchNormalization(axis=axis, momentum=DECAY, epsilon=EPSILON)

    def normalize(x, scale, bias, mean, var, mask=None):
        if not layer.built:
            layer.build(x.shape)
        y, running, *_ = layer.stateless_call([scale, bias], [mean, var], x, training=train)
        return y, *running[:2]

    return normalize


BEHIND = "jbn, relu behind"  # without the argument for it
JAX_PEERS = {
    "jbn": with_jbn,
    BEHIND: with_jbn,
    "flax linen": with_flax_linen,
    "flax nnx": with_flax_nnx,
    "haiku": with_haiku,
    "equinox": with_equinox,
    "keras": with_keras,
}
MASKED = ("jbn", "flax linen", "flax nnx")
