"""Private training: each example's gradient is clipped and noise is added, so that none may depend on another.

Batch norm by the batch's statistics forbids that; by public ones, of other data, it does not.
"""

from functools import partial

import claim
import figures
import images
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networks
import numpy as np
import optax
from jax import lax

import jbn

CLIP, NOISE = 1.0, 1.0  # of a gradient's norm; standard deviation of the noise, times it
BATCH, PUBLIC = 256, 512
DEPTH = 3
RATES = (0.5, 1.0, 2.0)
METHODS = {
    "without": "nothing between the layers",
    "layer norm": "each example by itself",
    "photographs, once": "public statistics: CIFAR-10 in gray, at the start",
    "photographs, each step": "public statistics: CIFAR-10 in gray, at each step",
    "digits, each step": "public statistics: 512 digits, at each step",
    "not private": "the batch's own, no clipping, no noise",
}


def photographs(folder, count, side) -> np.ndarray:
    """[count, side * side], as large as digits, gray, with mean 0 and standard deviation 1."""
    gray = images.cifar10(folder).train[:count].mean(-1)
    margin = (gray.shape[1] - side) // 2
    cut = gray[:, margin : margin + side, margin : margin + side].reshape(count, -1)
    return (cut - cut.mean()) / cut.std()


def given_norm(x, params, state, *, train, weights=None):
    del train, weights
    return jbn.normalize_running(x, params, state), state


def measured_norm(x, params, state, *, train, weights=None):
    """Normalized by the batch, of which the state becomes the statistics."""
    del train, weights
    return jbn.batch_norm(x, params, state, train=True, decay=0.0)


def trained(method, private, public, size, seed, rate):
    """Accuracy on the test images after training by private gradients."""
    start, key = jax.random.split(jax.random.key(seed))
    params, states = networks.init(start, private.train.shape[1], size.width, DEPTH, 10)
    norm = {"without": networks.none, "layer norm": networks.layer_norm}.get(method, given_norm)
    batch = min(BATCH, len(private.train))

    def measured(params, states):
        return networks.apply(params, states, public, measured_norm, train=True)[1]

    def loss(params, states, x, labels, norm):
        logits, states, _ = networks.apply(params, states, x, norm, train=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), states

    def clipped(params, states, row, label):
        gradient, _ = jax.grad(loss, has_aux=True)(params, states, row[None], label[None], norm)
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(1, optax.tree.norm(gradient) / CLIP), gradient)

    def noisy(key, leaf):
        return (jnp.sum(leaf, 0) + CLIP * NOISE * jax.random.normal(key, leaf.shape[1:])) / batch

    def step(carry, key):
        params, states = carry
        rows = jax.random.choice(key, len(private.train), (batch,), replace=False)
        x, labels = private.train[rows], private.train_labels[rows]
        if method == "not private":
            gradients, states = jax.grad(loss, has_aux=True)(params, states, x, labels, networks.batch_norm)
        else:
            states = measured(params, states) if method.endswith("each step") else states
            each = jax.vmap(clipped, (None, None, 0, 0))(params, states, x, labels)
            leaves, structure = jax.tree.flatten(each)
            keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
            gradients = jax.tree.unflatten(structure, list(map(noisy, keys, leaves)))
        return (jax.tree.map(lambda value, slope: value - rate * slope, params, gradients), states), None

    states = measured(params, states) if "photographs" in method or "digits" in method else states
    (params, states), _ = lax.scan(step, (params, states), jax.random.split(key, size.steps // 2))
    states = measured(params, states) if method.endswith("each step") else states
    norm = networks.batch_norm if method == "not private" else norm
    return networks.accuracy(params, states, private.test, private.test_labels, norm)


def jobs(folder, size) -> claim.Jobs:
    def run(method):
        whole = images.mnist(folder).halved.rows
        private = whole.first(20_000, 2 * size.images)
        count = min(PUBLIC, size.images)
        side = round(whole.train.shape[1] ** 0.5)
        public = photographs(folder, count, side) if "photographs" in method else whole.test[-count:]
        arrays = jax.tree.map(jnp.asarray, private._replace(name=None))
        seeds, rates = (np.ravel(each) for each in np.meshgrid(np.arange(size.seeds), RATES, indexing="ij"))
        one = jax.jit(lambda seed, rate, private, public: trained(method, private, public, size, seed, rate))
        found = [one(seed, rate, arrays, public) for seed, rate in zip(seeds, rates, strict=True)]
        return {"accuracy": np.reshape(found, (size.seeds, len(RATES)))}

    return {method: partial(run, method) for method in METHODS}


def at_best_rate(found) -> dict[str, tuple[float, np.ndarray]]:
    """Rate and accuracy [seeds] in percent, where the mean is best."""
    accuracy = {method: 100 * claim.array(found[method]["accuracy"]) for method in METHODS}
    best = {method: values.mean(0).argmax() for method, values in accuracy.items()}
    return {method: (RATES[best[method]], values[:, best[method]]) for method, values in accuracy.items()}


def draw(found, path) -> None:
    figure, axis = plt.subplots(figsize=(11, 5))
    best = at_best_rate(found)
    color = ["silver" if method in ("without", "layer norm", "not private") else figures.OWN for method in best]
    low, middle, high = ([function(values) for _, values in best.values()] for function in (np.min, np.mean, np.max))
    places = np.arange(len(best))
    axis.barh(places, middle, color=color)
    axis.hlines(places, low, high, color="black", linewidth=1.5)
    for place, value in enumerate(middle):
        axis.text(2, place, f"{value:.1f}", va="center")
    axis.set_yticks(places, [METHODS[method] for method in best])
    axis.set(xlabel="test accuracy, %", xlim=(0, 100))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    figure.suptitle("Clipped and noisy gradients: batch norm by public statistics")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = ["| by | accuracy, % | at rate |", "| --- | --- | --- |"]
    for method, (rate, values) in at_best_rate(found).items():
        lines.append(f"| {METHODS[method]} | {claim.spread(values)} | {rate:g} |")
    return lines
