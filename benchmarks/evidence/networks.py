"""Plain networks, any number of them as one `vmap`: dense layers, each followed by what normalizes it and a relu."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jbn


class Setting(NamedTuple):
    """What networks of one `vmap` differ by; every field a number, or [networks]."""

    seed: jax.Array | int
    rate: jax.Array | float
    scale: jax.Array | float = 1.0  # of the first kernels, times He's
    decay: jax.Array | float = 0.0  # of the weights
    rows: jax.Array | int = 10**9  # of a batch that are used, the first ones


def settings(**fields) -> Setting:
    """All fields as arrays of one length."""
    filled = {**Setting(0, 0.0)._asdict(), **fields}
    arrays = jnp.broadcast_arrays(*(jnp.asarray(filled[name]) for name in Setting._fields))
    return Setting(*arrays)


# What comes between a dense layer and its relu: (x, params, state, train=, weights=) -> y, state.


def batch_norm(x, params, state, *, train, weights=None, groups=1):
    if groups > 1 and train:
        return jbn.batch_norm(x, params, state, train=True, groups=groups)
    return jbn.batch_norm(x, params, state, train=train, weights=weights)


def none(x, params, state, *, train, weights=None):
    del train, weights
    return x + params.bias, state


def layer_norm(x, params, state, *, train, weights=None):
    del train, weights
    y, _ = jbn.normalize_batch(x.T, jbn.Params(None, None))
    return y.T * params.scale + params.bias, state


NORMS: dict[str, Callable] = {"with": batch_norm, "without": none}


def init(key: jax.Array, inputs: int, width: int, depth: int, outputs: int, scale=1.0) -> tuple[dict, dict]:
    """Params and states of `depth` hidden layers; those after the first are stacked, for a scan over them."""
    first, rest, head = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()

    def layer(key, inputs):
        return {"kernel": scale * he(key, (inputs, width)), "norm": jbn.init(width)[0]}

    kernels = jax.vmap(partial(layer, inputs=width))(jax.random.split(rest, depth - 1))
    state = jbn.init(width)[1]
    states = {"first": state, "rest": jax.tree.map(lambda field: jnp.stack([field] * (depth - 1)), state)}
    last = {"kernel": scale * he(head, (width, outputs)), "bias": jnp.zeros(outputs)}
    return {"first": layer(first, inputs), "rest": kernels, "head": last}, states


def apply(params, states, x, norm, *, train, weights=None, activation=jax.nn.relu, shifts=None):
    """Logits [batch, outputs], the new states, and what reaches each norm after the first [depth - 1, batch, width].

    `shifts` [depth - 1, batch, width] are added behind those norms.
    """

    def layer(x, params, state, shift=None):
        inputs = x @ params["kernel"]
        y, state = norm(inputs, params["norm"], state, train=train, weights=weights)
        return activation(y if shift is None else y + shift), state, inputs

    x, first, _ = layer(x, params["first"], states["first"])

    def one(x, layer_and_state):
        x, state, inputs = layer(x, *layer_and_state)
        return x, (state, inputs)

    x, (rest, inputs) = lax.scan(one, x, (params["rest"], states["rest"], shifts))
    return x @ params["head"]["kernel"] + params["head"]["bias"], {"first": first, "rest": rest}, inputs


def cross_entropy(logits, labels, weights=None):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses) if weights is None else jnp.sum(losses * weights) / jnp.sum(weights)


class Trained(NamedTuple):
    params: optax.Params
    states: dict
    loss: jax.Array  # [networks, steps], of the batch of each step
    accuracy: jax.Array  # [networks], on the test images


def train(
    setting: Setting, images, norm, *, depth, width, steps, batch, begin=init, forward=apply, momentum=0.9
) -> Trained:
    """Train a network for each of `setting`, all in one `vmap`, and evaluate each.

    The batches are drawn by the seed: networks of one seed start alike and see the same images. `begin` and `forward`
    are those of the network, as `init` and `apply` here.
    """
    outputs, masked = int(images.train_labels.max()) + 1, bool(np.any(np.asarray(setting.rows) < batch))

    def one(setting, images):
        start, draw = jax.random.split(jax.random.key(setting.seed))
        params, states = begin(start, images.train.shape[-1], width, depth, outputs, setting.scale)
        descend = optax.chain(optax.add_decayed_weights(setting.decay), optax.sgd(setting.rate, momentum=momentum))

        def step(carry, key):
            params, states, moving = carry
            rows = jax.random.randint(key, (batch,), 0, len(images.train))
            weights = jnp.arange(batch) < setting.rows if masked else None

            def loss(params):
                logits, new, _ = forward(params, states, images.train[rows], norm, train=True, weights=weights)
                return cross_entropy(logits, images.train_labels[rows], weights), new

            (value, states), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            updates, moving = descend.update(gradients, moving, params)
            return (optax.apply_updates(params, updates), states, moving), value

        carry = params, states, descend.init(params)
        (params, states, _), losses = lax.scan(step, carry, jax.random.split(draw, steps))
        return Trained(params, states, losses, accuracy(params, states, images.test, images.test_labels, norm, forward))

    arrays = jax.tree.map(jnp.asarray, images._replace(name=None))
    return jax.jit(jax.vmap(one, (0, None)))(setting, arrays)


def accuracy(params, states, x, labels, norm, forward=apply):
    logits, _, _ = forward(params, states, x, norm, train=False)
    return jnp.mean(jnp.argmax(logits, -1) == labels)
