"""Claim 8, in residual networks: it supports deeper ones. With batch norm, without, and by SkipInit.

Blocks are those of He et al. 2016, "Identity Mappings in Deep Residual Networks": twice a norm, a relu and a kernel,
added to the shortcut. SkipInit is of De & Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity
Function in Deep Networks": no norm, and each branch times a learned number that starts at 0.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import claim
import figures
import images
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networks
import numpy as np
from depth import by_depth
from jax import lax

import jbn

DEPTHS = (8, 20, 56, 110)  # 6 n + 2, so that three stages of convolutions are alike
DEEP = 56  # layers of the convolutional network
NAMES = {**claim.NAMES, "skip": "SkipInit"}
COLORS = {**claim.COLORS, "skip": figures.THIRD}


def powers(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{rate:.3g}") for rate in np.logspace(low, high, count))


# Without, what leaves n blocks is 2 ** n times what enters, so that deep networks need the lowest rates.
RATES = {"with": powers(-2, 0, 5), "without": powers(-10, -5, 6) + powers(-4, -1, 7), "skip": powers(-2.5, -0.5, 5)}
DEEP_RATES = {"with": powers(-1.5, -0.5, 3), "without": powers(-6, -2, 5), "skip": powers(-2, -1, 3)}


def scale_and_bias(x, params, state, *, train, weights=None):
    del train, weights
    return x * params.scale + params.bias, state


NORMS = {"with": networks.batch_norm, "without": scale_and_bias, "skip": scale_and_bias}


def init(key: jax.Array, inputs: int, width: int, depth: int, outputs: int, scale=1.0, *, stages=0, skip=False):
    """Params and states of `depth` layers: the first, blocks of two, and the head.

    Of dense layers `width` wide, or of `stages` of convolutions, each stage twice as wide as the one before. The blocks
    of a stage are stacked, for a scan over them; each has the number of SkipInit where `skip`.
    """
    first, rest, head = jax.random.split(key, 3)
    he, window = jax.nn.initializers.he_normal(), (3, 3) if stages else ()
    count = (depth - 2) // (2 * max(stages, 1))

    def block(key, width):
        kernels = [scale * he(part, (*window, width, width)) for part in jax.random.split(key)]
        found = {"kernels": kernels, "norms": [jbn.init(width)[0]] * 2}
        return {**found, "factor": jnp.zeros(())} if skip else found

    widths = [width * 2**stage for stage in range(max(stages, 1))]
    blocks, states = [], []
    for width, part in zip(widths, jax.random.split(rest, len(widths)), strict=True):
        blocks.append(jax.vmap(partial(block, width=width))(jax.random.split(part, count)))
        states.append(jax.tree.map(lambda field: jnp.stack([field] * count), [jbn.init(width)[1]] * 2))
    params = {
        "first": scale * he(first, (*window, inputs, widths[0])),
        "blocks": blocks,
        "norm": jbn.init(width)[0],
        "head": {"kernel": scale * he(head, (width, outputs)), "bias": jnp.zeros(outputs)},
    }
    return params, {"blocks": states, "norm": jbn.init(width)[1]}


def linear(x, kernel):
    """Dense, x [batch, features], or a convolution of 3 x 3, x [batch, height, width, channels], padded by zeros.

    The convolution is a product with the windows, as XLA's own is slow under `vmap` and `scan` on CPUs.
    """
    if kernel.ndim == 2:
        return x @ kernel
    rows, columns = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, top : top + rows, left : left + columns] for top in range(3) for left in range(3)]
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, kernel.shape[-1])


def apply(params, states, x, norm, *, train, weights=None):
    """Logits [batch, outputs], the new states, and the share of each block's variance that is its branch's [blocks].

    The variance is over images, places and features. Between stages every second pixel is left, and each channel taken
    twice, so that the variance goes on as it was.
    """

    def normalized(x, params, state):
        y, state = norm(x, params, state, train=train, weights=weights)
        return jax.nn.relu(y), state

    def block(x, block_and_states):
        params, states = block_and_states
        branch, after = x, []
        for kernel, *norm_and_state in zip(params["kernels"], params["norms"], states, strict=True):
            branch, state = normalized(branch, *norm_and_state)
            branch, after = linear(branch, kernel), [*after, state]
        branch = branch * params.get("factor", 1.0)
        return x + branch, (after, jnp.var(branch) / jnp.var(x + branch))

    x, blocks, shares = linear(x, params["first"]), [], []
    for stage, stacked in enumerate(zip(params["blocks"], states["blocks"], strict=True)):
        if stage:
            x = jnp.concatenate([x[:, ::2, ::2]] * 2, -1)
        x, (after, share) = lax.scan(block, x, stacked)
        blocks, shares = [*blocks, after], [*shares, share]
    x, state = normalized(x, params["norm"], states["norm"])
    x = jnp.mean(x.reshape(len(x), -1, x.shape[-1]), 1)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return logits, {"blocks": blocks, "norm": state}, jnp.concatenate(shares)


class Network(NamedTuple):
    """What is trained, on which images."""

    rows: images.Images
    depth: int
    width: int
    stages: int  # of convolutions; 0: dense


def jobs(folder, size: claim.Size) -> claim.Jobs:
    depths = DEPTHS[:: size.sweep]

    def dense(depth):
        return Network(images.mnist(folder).halved.rows.first(size.train, size.test), depth, size.width, 0)

    def convolutional():
        rows = images.cifar10(folder).first(5 * size.train, 5 * size.test)
        return Network(rows, min(DEEP, depths[-1]), max(size.width // 8, 1), 3)

    def accuracies(name, depth):
        rate, seed = np.meshgrid(RATES[name], np.arange(size.seeds), indexing="ij")
        setting = networks.settings(rate=rate.ravel(), seed=seed.ravel())
        trained, shares = train(name, dense(depth), setting, size.steps, size.batch)
        found = {"rates": RATES[name], "accuracy": np.reshape(trained.accuracy, rate.shape)}  # [rates, seeds]
        return {**found, "shares": np.reshape(shares(), (*rate.shape, -1))[best(found)]}  # [seeds, blocks]

    def deep(name):
        """All rates for a sixth of the steps, and the best of them for all."""
        network, steps = convolutional(), 3 * size.steps // 2
        setting = networks.settings(rate=jnp.array(DEEP_RATES[name]))
        tried, _ = train(name, network, setting, max(1, steps // 6), size.batch)
        found = {"rates": DEEP_RATES[name], "tried": tried.accuracy}  # [rates]
        rate = DEEP_RATES[name][int(jnp.argmax(tried.accuracy))]
        trained, shares = train(name, network, networks.settings(rate=jnp.array([rate])), steps, size.batch)
        loss = claim.smooth(trained.loss[0])  # [steps / 10]
        return {**found, "rate": rate, "accuracy": trained.accuracy, "loss": loss, "shares": shares()}

    def start(name, network):
        return {"shares": at_start(name, network(), jnp.arange(size.seeds), size.batch)}

    found: claim.Jobs = {}
    for name in NAMES:
        for depth in depths:
            found[f"{name}, depth {depth}"] = partial(accuracies, name, depth)
        found[f"{name}, CIFAR-10"] = partial(deep, name)
    for name in claim.NAMES:  # SkipInit's branches start at 0
        found[f"{name}, start, dense"] = partial(start, name, partial(dense, depths[-1]))
        found[f"{name}, start, convolutional"] = partial(start, name, convolutional)
    return found


def train(name, network: Network, setting, steps, batch) -> tuple[networks.Trained, Callable[[], jax.Array]]:
    """What is trained, and what gives the shares of its blocks on the first images [networks, blocks]."""
    begin = partial(init, stages=network.stages, skip=name == "skip")
    shape = {"depth": network.depth, "width": network.width, "steps": steps, "batch": batch}
    trained = networks.train(setting, network.rows, NORMS[name], begin=begin, forward=apply, **shape)
    x = jnp.asarray(network.rows.train[:batch])

    def shares(params, states):
        return apply(params, states, x, NORMS[name], train=True)[2]

    return trained, partial(jax.jit(jax.vmap(shares)), trained.params, trained.states)


def at_start(name, network: Network, seeds: jax.Array, batch) -> jax.Array:
    """The shares [seeds, blocks] of the networks that `train` starts with."""
    x = jnp.asarray(network.rows.train[:batch])

    def shares(seed):
        key, _ = jax.random.split(jax.random.key(seed))
        params, states = init(key, x.shape[-1], network.width, network.depth, 10, stages=network.stages)
        return apply(params, states, x, NORMS[name], train=True)[2]

    return jax.jit(jax.vmap(shares))(seeds)


def best(content) -> int:
    """The rate, by number, with the highest mean test accuracy."""
    return int(claim.array(content["accuracy"]).mean(1).argmax())


def deepest(found, name) -> str:
    return [job for job in found if job.startswith(f"{name}, depth ")][-1]


def predicted(name, blocks: int) -> np.ndarray:
    """De & Smith: with batch norm each branch adds 1 to a variance of 1; without, as much as there is."""
    return 1 / (2 + np.arange(blocks)) if name == "with" else np.full(blocks, 0.5)


def draw(found, path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2))
    blocks = len(found["with, start, dense"]["shares"][0])
    for name, color in COLORS.items():
        values = by_depth(found, name)
        claim.band(axes[0], list(values), np.transpose(list(values.values())), color)
        loss = claim.array(found[f"{name}, CIFAR-10"]["loss"])
        axes[2].plot(10 * (1 + np.arange(len(loss))), loss, color=color)
    for name in claim.NAMES:
        for network, style in {"convolutional": ":", "dense": "-"}.items():
            shares = claim.array(found[f"{name}, start, {network}"]["shares"])
            claim.band(axes[1], 1 + np.arange(shares.shape[1]), shares, COLORS[name], linestyle=style)
        axes[1].plot(1 + np.arange(blocks), predicted(name, blocks), color="black", linestyle="--", linewidth=1)
    depths = list(by_depth(found, "with"))
    axes[0].set(
        title="accuracy, each at its best rate", xscale="log", xlabel="layers", ylabel="test accuracy, %", ylim=(0, 105)
    )
    axes[0].set_xticks(depths, list(map(str, depths)))
    axes[0].minorticks_off()
    figures.names(axes[0], NAMES, COLORS, at=(0.04, 0.3))
    axes[1].set(
        title="share of the branch in a block's variance, at the start",
        xscale="log",
        xlabel="block, from the image on",
        yscale="log",
    )
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick <= blocks]
    axes[1].set_xticks(ticks, list(map(str, ticks)))
    axes[1].xaxis.minorticks_off()
    axes[1].text(0.04, 0.04, "dashed: De & Smith 2020\ndotted: convolutional, CIFAR-10", transform=axes[1].transAxes)
    axes[2].set(title="a convolutional network on CIFAR-10", xlabel="step", ylabel="training loss", yscale="log")
    figure.suptitle("Deep residual networks: with batch norm depth costs little, as branches start small")
    figures.save(figure, path)


def tell(found) -> list[str]:
    accuracy = {name: by_depth(found, name) for name in NAMES}
    depths = list(accuracy["with"])
    lines = [f"| accuracy, %, by layers | {' | '.join(map(str, depths))} |", "| --- |" + " --- |" * len(depths)]
    for name, text in NAMES.items():
        lines.append(f"| {text} | {' | '.join(claim.spread(values) for values in accuracy[name].values())} |")
    for name, text in NAMES.items():
        contents = [found[f"{name}, depth {depth}"] for depth in depths]
        rates = " | ".join(f"{content['rates'][best(content)]:.2g}" for content in contents)
        lines.append(f"| best rate, {text} | {rates} |")

    lines += [
        "",
        "| share of the branch in a block's variance | first block | middle | last |",
        "| --- |" + " --- |" * 3,
    ]
    rows = {}
    for name, text in claim.NAMES.items():
        for network, images_of in {"dense": "dense, MNIST", "convolutional": "convolutional, CIFAR-10"}.items():
            rows[f"{text}, start, {images_of}"] = found[f"{name}, start, {network}"]["shares"]
        rows[f"{text}, as De & Smith predict"] = [predicted(name, len(found[f"{name}, start, dense"]["shares"][0]))]
    for name in ("with", "skip"):
        rows[f"{NAMES[name]}, trained, dense, MNIST"] = found[deepest(found, name)]["shares"]
    for text, shares in rows.items():
        shares = claim.array(shares)
        ends = (shares[:, at] for at in (0, shares.shape[1] // 2, -1))
        cells = (claim.spread(end, "{:.2g}") if len(end) > 1 else f"{end[0]:.2g}" for end in ends)
        lines.append(f"| {text} | {' | '.join(cells)} |")

    lines += ["", "| CIFAR-10 | rate | test accuracy, % | last training loss |", "| --- | --- | --- | --- |"]
    for name, text in NAMES.items():
        content = found[f"{name}, CIFAR-10"]
        loss = claim.array(content["loss"])[-1]
        last = f"{loss:.2f}" if np.isfinite(loss) else "diverged"
        lines.append(f"| {text} | {content['rate']:.2g} | {100 * content['accuracy'][0]:.1f} | {last} |")
    return lines
