"""The networks that are adapted, as trained on clean images, and the images they are tested on."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import config as example  # of examples/cifar10, as are the next four
import data
import images
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import steps
import train
from checkpoints import Checkpoints
from convolution import plain

import jbn

DEPTH = 8  # of the example's ResNet
WIDTHS = (16, 32, 32)  # of the network for digits
runs = Path("runs")  # where the example's program leaves its checkpoints; the command says


class Source(NamedTuple):
    """A network and the images that it has not seen."""

    apply: Callable  # (params, states, pixels, normalize) -> logits, states
    params: Any
    states: Any
    train_pixels: np.ndarray  # [train, height, width, channels], uint8
    pixels: np.ndarray  # [test, height, width, channels], uint8
    labels: np.ndarray  # [test]


@cache
def mnist(folder: Path | None) -> data.Dataset:
    """MNIST, or the embedded shapes in gray."""
    for place in (folder, folder / "mnist") if folder else ():
        if (place / "train-images-idx3-ubyte.gz").is_file():
            parts = []
            for part in ("train", "t10k"):
                pixels = images.idx(place / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
                parts += [pixels, np.int32(images.idx(place / f"{part}-labels-idx1-ubyte.gz", 8))]
            return data.Dataset("MNIST", *parts)
    shapes = cifar10(None)
    train, test = (np.uint8(pixels.mean(-1, keepdims=True)) for pixels in (shapes.train_images, shapes.test_images))
    return shapes._replace(train_images=train, test_images=test)


@cache
def cifar10(folder: Path | None) -> data.Dataset:
    """CIFAR-10 in the official binary layout, or the embedded shapes."""
    for place in (folder, folder / "cifar10") if folder else ():
        try:
            return data.read(place)
        except (ValueError, OSError):
            continue
    return data.embedded()._replace(name="embedded shapes")


def first_test(dataset: data.Dataset, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """So many test images, drawn by the seed, in random order."""
    rows = np.random.default_rng(seed).permutation(len(dataset.test_labels))[:count]
    return dataset.test_images[rows], dataset.test_labels[rows]


@cache
def trained_resnet(folder: Path | None, size: Any) -> Source:
    """The example's ResNet from the example's own program, which goes on where it was stopped."""
    dataset = cifar10(folder).first(size.train)
    run = runs / f"resnet{DEPTH}"
    settings = example.Config(
        data=folder, run=run, depth=DEPTH, epochs=size.epochs, evaluate_every=size.epochs, batch=size.batch
    )
    params, states = model.init(jax.random.key(settings.seed), DEPTH)
    total = size.epochs * (len(dataset.train_labels) // size.batch)
    optimizer = model.make_optimizer(
        settings.peak_rate, total, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    empty = steps.Carry(params, states, optimizer.init(params), jnp.zeros((), jnp.int32))
    carry, history = Checkpoints(run).restore(empty)
    if len(history) < size.epochs:
        example.write_config(settings, run, dataset)
        mesh = jax.make_mesh((1,), (steps.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        train.train(settings, run, dataset, mesh)
        carry, _ = Checkpoints(run).restore(empty)
    mean, std = steps.channel_statistics(dataset.train_images)
    apply = residual(tuple(mean), tuple(std))
    return Source(apply, carry.params, carry.state, dataset.train_images, dataset.test_images, dataset.test_labels)


def resnet(folder: Path | None, seed: int, size: Any) -> Source:
    """One network for all seeds, which draw the images, half as many as digits, their order and their noise."""
    pixels, labels = first_test(cifar10(folder), size.images // 2, seed)
    return trained_resnet(folder, size)._replace(pixels=pixels, labels=labels)


def residual(mean, std):
    def apply(params, states, pixels, normalize):
        scaled = (pixels - jnp.array(mean)) / jnp.array(std)
        return model.apply(params, states, scaled, depth=DEPTH, train=True, normalize=normalize)

    return apply


def convolutional(params, states, pixels, normalize):
    """Logits [batch, 10] of digits [batch, 28, 28, 1], and the new states: three convolutions, each normalized."""
    x, new = pixels / 255.0, []
    for layer, state in zip(params["layers"], states, strict=True):
        x = plain(x, layer["kernel"], 2 if len(new) < 2 else 1)
        x, after = normalize(x, layer["norm"], state, train=True, activation=jax.nn.relu)
        new.append(after)
    return x.reshape(len(x), -1) @ params["head"] + params["bias"], new


def init_convolutional(key, height):
    layers, states, inputs = [], [], 1
    for index, width in enumerate(WIDTHS):
        kernel = jax.nn.initializers.he_normal()(jax.random.fold_in(key, index), (3, 3, inputs, width))
        norm, state = jbn.init(width)
        layers.append({"kernel": kernel, "norm": norm})
        states.append(state)
        inputs = width
    side = -(-height // 4)
    head = 0.01 * jax.random.normal(jax.random.fold_in(key, len(WIDTHS)), (side * side * inputs, 10))
    return {"layers": layers, "head": head, "bias": jnp.zeros(10)}, states


@cache
def digits(folder: Path | None, seed: int, size: Any) -> Source:
    """Three convolutions, trained for seconds."""
    dataset = mnist(folder)
    start = init_convolutional(jax.random.key(seed), dataset.train_images.shape[1])
    params, states = fit(convolutional, *start, dataset.train_images, dataset.train_labels, size, seed)
    pixels, labels = first_test(dataset, size.images, seed)
    return Source(convolutional, params, states, dataset.train_images, pixels, labels)


def fit(apply, params, states, pixels, labels, size, seed, normalize=jbn.batch_norm, domains=None):
    """`size.steps` steps of Adam. With `domains` [images], of the normalization too: those of the batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, size.steps))

    @jax.jit
    def step(carry, pixels, labels, domain):
        params, states, moving = carry
        by = normalize if domain is None else partial(normalize, domain=domain)

        def loss(params):
            logits, new = apply(params, states, pixels, by)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), new

        gradients, states = jax.grad(loss, has_aux=True)(params)
        updates, moving = optimizer.update(gradients, moving)
        return optax.apply_updates(params, updates), states, moving

    carry = params, states, optimizer.init(params)
    random = np.random.default_rng(seed)
    for _ in range(size.steps):
        rows = random.integers(0, len(labels), size.batch)
        carry = step(carry, pixels[rows], labels[rows], None if domains is None else domains[rows])
    return carry[0], carry[1]


NETWORKS = {"CIFAR-10": resnet, "MNIST": digits}
