"""Ways to adapt a trained network to the images that arrive, batch by batch, each answered before the next is seen."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sources import Source

import jbn

# In the place of jbn.batch_norm: (x, params, state, **options) -> y, state.


def frozen(x, params, state, *, activation=None, **_):
    return jbn.normalize_running(x, params, state, activation=activation), state


def own(x, params, state, *, activation=None, **_):
    """By the batch's own statistics."""
    return jbn.normalize_batch(x, params, activation=activation)[0], state


def leaning(x, params, state, *, keep, activation=None, **_):
    """By the state after a step from it towards the batch."""
    state = jbn.update(state, jbn.moments(x), decay=keep, unbiased=False)
    return jbn.normalize_running(x, params, state, activation=activation), state


# Entropy


def entropies(logits):
    """[batch]"""
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1)


def parted(params):
    """The norms' params, and what makes of such the whole again."""
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, jbn.Params))
    norms = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, jbn.Params)}

    def whole(norms):
        return jax.tree.unflatten(structure, [norms.get(place, leaf) for place, leaf in enumerate(leaves)])

    return norms, whole


def trustworthy(logits, seen, *, margin=0.4, similarity=0.4):
    """EATA's weight of each row [batch], 0 where it is uncertain or like what was seen; and what has been seen then."""
    probabilities, entropy = jax.nn.softmax(logits), entropies(logits)
    bound = margin * jnp.log(logits.shape[-1])
    norms = jnp.linalg.norm(probabilities, axis=-1) * jnp.linalg.norm(seen)
    alike = (probabilities @ seen) / jnp.where(norms > 0, norms, 1)
    chosen = (entropy < bound) & (alike < similarity)
    measured = jbn.moments(probabilities, weights=chosen)
    follow = jnp.where(jnp.any(seen != 0), 0.1, 1.0) * (measured.count > 0)
    return chosen * jnp.exp(bound - entropy), seen + follow * (measured.mean - seen)


PRIOR = 16  # images that the source's statistics count for
DECAY = 0.9  # of slow statistics, for 64 images
RATE = 1e-3  # of TENT and EATA, by Adam
ANCHOR = 1.0  # how much the Fisher information holds EATA's scale and bias


class Method(NamedTuple):
    """What is carried from batch to batch, made of a source, and a step (apply, carry, pixels) -> (carry, logits)."""

    start: Callable[[Source], Any]
    step: Callable


def plain(source):
    return source.params, source.states


def by(normalize: Callable, keeps: bool = False) -> Method:
    """Statistics alone: `normalize(count)` gives what normalizes so many images; states are handed on if it `keeps`."""

    def step(apply, carry, pixels):
        params, states = carry
        logits, new = apply(params, states, pixels, normalize(len(pixels)))
        return (params, new if keeps else states), logits

    return Method(plain, step)


def tent(apply, carry, pixels):
    params, states, moving = carry
    norms, whole = parted(params)

    def loss(norms):
        logits, _ = apply(whole(norms), states, pixels, own)
        return jnp.mean(entropies(logits)), logits

    gradients, logits = jax.grad(loss, has_aux=True)(norms)
    updates, moving = optax.adam(RATE).update(gradients, moving)
    return (whole(optax.apply_updates(norms, updates)), states, moving), logits


def eata(apply, carry, pixels):
    params, states, moving, seen, start, importance = carry
    norms, whole = parted(params)

    def loss(norms):
        logits, _ = apply(whole(norms), states, pixels, own)
        weights, now = jax.lax.stop_gradient(trustworthy(logits, seen))
        held = jax.tree.map(lambda f, p, q: jnp.sum(f * (p - q) ** 2), importance, norms, start)
        mean = jnp.sum(weights * entropies(logits)) / jnp.maximum(jnp.sum(weights > 0), 1)
        return mean + ANCHOR * sum(jax.tree.leaves(held)), (logits, now)

    gradients, (logits, seen) = jax.grad(loss, has_aux=True)(norms)
    updates, moving = optax.adam(RATE).update(gradients, moving)
    return (whole(optax.apply_updates(norms, updates)), states, moving, seen, start, importance), logits


def start_tent(source):
    return *plain(source), optax.adam(RATE).init(parted(source.params)[0])


def start_eata(source):
    start = parted(source.params)[0]
    return *start_tent(source), jnp.zeros(10), start, fisher(source.apply, *plain(source), source.train_pixels)


def fisher(apply, params, states, pixels, batches=8, batch=64):
    """Mean squared gradients of scale and bias on training images, labelled by the network itself."""
    parts = np.array_split(pixels[: batches * batch], batches)
    return jax.tree.map(
        lambda *values: sum(values) / batches, *(squared(apply, params, states, part) for part in parts)
    )


@partial(jax.jit, static_argnums=0)
def squared(apply, params, states, pixels):
    norms, whole = parted(params)

    def loss(norms):
        logits, _ = apply(whole(norms), states, pixels, frozen)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(logits, -1)))

    return jax.tree.map(jnp.square, jax.grad(loss)(norms))


def mixed(count):
    return partial(leaning, keep=PRIOR / (PRIOR + count))


def slow(count):
    return partial(leaning, keep=DECAY ** (count / 64))


NONE = by(lambda count: frozen)
METHODS = {
    "own statistics": by(lambda count: own),
    "mixed": by(mixed),
    "slow": by(slow, keeps=True),
    "TENT": Method(start_tent, tent),
    "EATA": Method(start_eata, eata),
}


def answers(method: Method, source: Source, pixels: np.ndarray, batch: int) -> np.ndarray:
    """[images], as they come, in batches; each batch is answered before the next is seen."""
    carry, found = method.start(source), []
    step = compiled(method.step)
    for part in pixels.reshape(-1, batch, *pixels.shape[1:]):  # in a scan XLA's gradients take eight times as long
        carry, logits = step(source.apply, carry, part)
        found.append(np.argmax(logits, -1))
    return np.concatenate(found)


@cache
def compiled(step: Callable) -> Callable:
    return jax.jit(step, static_argnums=0)


def adabn(source: Source, pixels: np.ndarray, batch: int = 128):
    """The states of all of `pixels`, which have to be there beforehand."""
    batches = pixels.reshape(-1, min(batch, len(pixels)), *pixels.shape[1:])
    return jbn.recalibrate(measuring(source.apply), source.params, source.states, batches)


@cache
def measuring(apply):
    def measure(params, states, pixels):
        return apply(params, states, pixels, jbn.batch_norm)

    return measure
