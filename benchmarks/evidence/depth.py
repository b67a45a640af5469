"""Claim 8: it supports deeper networks, against gradients that vanish or explode. Plain networks, no shortcuts."""

from functools import partial

import claim
import figures
import images
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networks
import numpy as np

DEPTHS = (2, 4, 8, 16, 32, 64)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
GRADIENTS = 32  # the depth at which gradients are looked at
# Yang et al. 2019, section 3: with batch norm and relu the squared gradient grows by so much a layer, in expectation.
GROWTH = np.pi / (np.pi - 1)


def jobs(folder, size: claim.Size) -> claim.Jobs:
    shape = {"width": size.width, "batch": size.batch}

    def data():
        return images.mnist(folder).halved.rows.first(size.train, size.test)

    def accuracies(name, depth):
        rate, seed = np.meshgrid(RATES, np.arange(size.seeds), indexing="ij")
        setting = networks.settings(rate=rate.ravel(), seed=seed.ravel())
        trained = networks.train(setting, data(), networks.NORMS[name], depth=depth, steps=2 * size.steps, **shape)
        return {"accuracy": np.reshape(trained.accuracy, rate.shape)}  # [rates, seeds]

    def gradients(name, steps):
        rows = data()
        setting = networks.settings(rate=0.01, seed=jnp.arange(size.seeds))
        norm, x, labels = networks.NORMS[name], jnp.asarray(rows.train[: size.batch]), rows.train_labels[: size.batch]
        trained = networks.train(setting, rows, norm, depth=min(GRADIENTS, 4 * size.width), steps=steps, **shape)

        def norms(params, states):
            def loss(params):
                return networks.cross_entropy(networks.apply(params, states, x, norm, train=True)[0], labels)

            kernels = jax.grad(loss)(params)["rest"]["kernel"]
            return jnp.sqrt(jnp.sum(kernels**2, (1, 2)))

        return {"norms": jax.jit(jax.vmap(norms))(trained.params, trained.states)}  # [seeds, layers]

    found: claim.Jobs = {}
    for name in networks.NORMS:
        for depth in DEPTHS[:: size.sweep]:
            found[f"{name}, depth {depth}"] = partial(accuracies, name, depth)
        for stage, steps in (("start", 0), ("end", size.steps)):
            found[f"{name}, gradients at the {stage}"] = partial(gradients, name, steps)
    return found


def by_depth(found, name) -> dict[int, np.ndarray]:
    """Accuracy of every seed, in percent, at the best rate for each depth."""
    values = {}
    for job, content in found.items():
        if job.startswith(f"{name}, depth "):
            accuracy = 100 * claim.array(content["accuracy"])
            values[int(job.rpartition(" ")[2])] = accuracy[accuracy.mean(1).argmax()]
    return values


def draw(found, path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2))
    for name, color in claim.COLORS.items():
        values = by_depth(found, name)
        claim.band(axes[0], list(values), np.transpose(list(values.values())), color)
        for axis, stage in zip(axes[1:], ("start", "end"), strict=True):
            norms = claim.array(found[f"{name}, gradients at the {stage}"]["norms"])
            claim.band(axis, 2 + np.arange(norms.shape[1]), np.maximum(norms, 1e-12), color)
    depths = list(by_depth(found, "with"))
    axes[0].set(
        title="accuracy, at the best of five rates",
        xscale="log",
        xlabel="layers",
        ylabel="test accuracy, %",
        ylim=(0, 105),
    )
    axes[0].set_xticks(depths, list(map(str, depths)))
    axes[0].minorticks_off()
    norms = claim.array(found["with, gradients at the start"]["norms"]).mean(0)
    layers = 2 + np.arange(len(norms))
    predicted = norms[-1] * GROWTH ** ((layers[-1] - layers) / 2)
    axes[1].plot(layers, predicted, color="black", linestyle="--", linewidth=1)
    axes[1].annotate(
        "Yang et al. 2019", (layers[len(layers) // 4], predicted[len(layers) // 4]), (8, 6), textcoords="offset points"
    )
    for axis, title in zip(axes[1:], ("start", "end"), strict=True):
        axis.set(
            title=f"gradient of each layer's kernel, {title} of training",
            xlabel="layer, from the image on",
            yscale="log",
        )
    figures.names(axes[0], claim.NAMES, claim.COLORS)
    figure.suptitle("Deep plain networks: with batch norm gradients explode at the start, and depth costs accuracy")
    figures.save(figure, path)


def tell(found) -> list[str]:
    both = {name: by_depth(found, name) for name in claim.NAMES}
    depths = list(both["with"])
    lines = [f"| accuracy, %, by layers | {' | '.join(map(str, depths))} |", "| --- |" + " --- |" * len(depths)]
    for name, text in claim.NAMES.items():
        lines.append(f"| {text} | {' | '.join(claim.spread(values) for values in both[name].values())} |")
    lines += ["", "| gradient of layer 2 to that of the last | start | end |", "| --- | --- | --- |"]
    for name, text in claim.NAMES.items():
        cells = []
        for stage in ("start", "end"):
            norms = claim.array(found[f"{name}, gradients at the {stage}"]["norms"])
            cells.append(claim.spread(norms[:, 0] / norms[:, -1], "{:.2g}"))
        lines.append(f"| {text} | {' | '.join(cells)} |")
    layers = len(claim.array(found["with, gradients at the start"]["norms"])[0])
    lines.append(f"| as Yang et al. predict, with | {GROWTH ** ((layers - 1) / 2):.3g} | |")
    return lines
