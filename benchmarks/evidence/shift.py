"""Claim 10: the cause is internal covariate shift. A layer's input over training, and what noise does to it.

As Ioffe & Szegedy 2015, figure 1: three layers of 100 sigmoids on MNIST. As Santurkar et al. 2018, section 2 and 3:
noise whose mean and spread change at every step behind each norm, and the loss along the gradient.
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

DEPTH = 3
KINDS = {"without": figures.OTHER, "with": figures.OWN, "with, and noise behind": figures.THIRD}
RATE = {"without": 0.3, "with": 0.3, "with, and noise behind": 0.3}
PERCENTILES = (15, 50, 85)
DISTANCES = (0.25, 0.5, 1.0, 2.0)  # along the gradient, in units of a step of training
EVERY = 10


def jobs(folder, size: claim.Size) -> claim.Jobs:
    steps, width = 2 * size.steps, size.width + size.width // 2

    def run(kind):
        data = images.mnist(folder).halved.rows.first(size.train, size.test)
        norm = networks.NORMS["without" if kind == "without" else "with"]
        arrays = jax.tree.map(jnp.asarray, data._replace(name=None))

        def noise(key):
            """[depth - 1, batch, width], of a mean and a spread that are drawn anew for every step and feature."""
            if not kind.endswith("noise behind"):
                return None
            of_mean, of_spread, of_each = jax.random.split(key, 3)
            shape = (DEPTH - 1, 1, width)
            mean = jax.random.uniform(of_mean, shape, minval=-1, maxval=1)
            spread = jax.random.uniform(of_spread, shape, minval=1, maxval=1.5)
            return mean + spread * jax.random.normal(of_each, (DEPTH - 1, size.batch, width))

        def one(seed, images):
            start, draw = jax.random.split(jax.random.key(seed))
            params, states = networks.init(start, images.train.shape[1], width, DEPTH, 10)
            descend = optax.sgd(RATE[kind])

            def step(carry, key):
                params, states, moving = carry
                rows = jax.random.randint(key, (size.batch,), 0, len(images.train))

                def loss(params):
                    logits, new, _ = networks.apply(
                        params,
                        states,
                        images.train[rows],
                        norm,
                        train=True,
                        activation=jax.nn.sigmoid,
                        shifts=noise(jax.random.fold_in(key, 1)),
                    )
                    return networks.cross_entropy(logits, images.train_labels[rows]), new

                (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)

                def along(distance):
                    return jax.tree.map(lambda p, g: p - distance * RATE[kind] * g, params, gradients)

                def look():
                    """What three sigmoids of the last layer are given; the loss and the gradient along the gradient."""
                    x, behind = images.test[: size.batch], noise(key)
                    _, _, inputs = networks.apply(
                        params, states, x, norm, train=True, activation=jax.nn.sigmoid, shifts=behind
                    )
                    last = jax.tree.map(lambda field: field[-1], (params["rest"]["norm"], states["rest"]))
                    given, _ = norm(inputs[-1], *last, train=True)
                    given = given if behind is None else given + behind[-1]
                    there = [jax.value_and_grad(loss, has_aux=True)(along(distance)) for distance in DISTANCES]
                    apart = [optax.tree.norm(jax.tree.map(jnp.subtract, other, gradients)) for _, other in there]
                    return (
                        jnp.percentile(given[:, :3], jnp.array(PERCENTILES), 0),
                        jnp.stack([value for (value, _), _ in there]),
                        jnp.stack(apart) / optax.tree.norm(gradients),
                    )

                updates, moving = descend.update(gradients, moving)
                return (optax.apply_updates(params, updates), new, moving), (value, look)

            def several(carry, keys):
                def plain(carry, key):
                    carry, (value, _) = step(carry, key)
                    return carry, value

                _, (_, look) = step(carry, keys[0])
                seen = look()
                carry, values = lax.scan(plain, carry, keys)
                return carry, (values, *seen)

            every = min(EVERY, steps)
            keys = jax.random.split(draw, (steps // every, every))
            (params, states, _), found = lax.scan(several, (params, states, descend.init(params)), keys)
            forward = partial(networks.apply, activation=jax.nn.sigmoid)
            return *found, networks.accuracy(params, states, images.test, images.test_labels, norm, forward)

        values, percentiles, along, turned, accuracy = jax.jit(jax.vmap(one, (0, None)))(jnp.arange(size.seeds), arrays)
        return {
            "loss": values.mean(-1),  # [seeds, steps / 10]
            "percentiles": percentiles,  # [seeds, steps / 10, 3 percentiles, 3 features]
            "along": along,  # [seeds, steps / 10, distances]
            "turned": turned,
            "accuracy": accuracy,
        }

    return {kind: partial(run, kind) for kind in KINDS}


def moved(found, kind) -> np.ndarray:
    """[seeds], how far a feature's median moves over training, in the spread between its 15th and 85th percentile."""
    values = claim.array(found[kind]["percentiles"])
    half = values.shape[1] // 2  # the first steps are all change
    spread = (values[:, half:, 2] - values[:, half:, 0]).mean(1)
    return (values[:, half:, 1].std(1) / spread).mean(-1)


def draw(found, path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(17, 9))
    x = EVERY * np.arange(len(found["with"]["loss"][0]))
    for axis, (kind, color) in zip(axes[0], KINDS.items(), strict=True):
        values = claim.array(found[kind]["percentiles"])[0]  # one seed
        for feature, alpha in enumerate((1.0, 0.6, 0.35)):
            for percentile in range(len(PERCENTILES)):
                width = 2 if PERCENTILES[percentile] == 50 else 1
                axis.plot(x, values[:, percentile, feature], color=color, alpha=alpha, linewidth=width)
        axis.set(
            title=f"input of three sigmoids, {kind}",
            xlabel="step",
            ylabel="15th, 50th, 85th percentile",
            ylim=(-3.6, 3.6),
        )
    for kind, color in KINDS.items():
        claim.band(axes[1, 0], x, claim.array(found[kind]["loss"]), color)
        along = claim.array(found[kind]["along"])
        claim.band(axes[1, 1], x, along.max(-1) - along.min(-1), color)
        claim.band(axes[1, 2], x, claim.array(found[kind]["turned"])[..., DISTANCES.index(1.0)], color)
    axes[1, 0].set(title="training loss", xlabel="step", yscale="log")
    axes[1, 1].set(title="range of the loss along the gradient", xlabel="step", yscale="log")
    axes[1, 2].set(title="how far the gradient turns in a step", xlabel="step", yscale="log")
    figures.names(axes[1, 0], {kind: kind for kind in KINDS}, KINDS, at=(0.42, 0.76))
    figure.suptitle("What a layer is given over training, with and without batch norm, and with noise behind it")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = [
        "| | how far a median moves, in its spread | test accuracy, % | last loss "
        "| range of the loss along the gradient | how far the gradient turns |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        along, turned = claim.array(found[kind]["along"]), claim.array(found[kind]["turned"])
        cells = [
            claim.spread(moved(found, kind), "{:.2f}"),
            claim.spread(100 * claim.array(found[kind]["accuracy"])),
            claim.spread(claim.array(found[kind]["loss"])[:, -5:].mean(1), "{:.2f}"),
            claim.spread((along.max(-1) - along.min(-1)).mean(1), "{:.3f}"),
            claim.spread(turned[..., DISTANCES.index(1.0)].mean(1), "{:.2f}"),
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines
