"""Train a network of the example as examples/cifar10/train.py does, on one device, without what is for a person."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import data
import steps
from config import Config
from recipes import Recipe

import jbn


class Trained(NamedTuple):
    carry: steps.Carry
    losses: list[float]  # [epochs], of training
    accuracy: Callable[..., float]  # accuracy(state) on the test images; by the views of the config, or view_count
    recalibrated: Callable[[], dict]  # the exact statistics of the training images


def train(recipe: Recipe, config: Config, dataset: data.Dataset) -> Trained:
    """The recipe's network after `config.epochs`."""
    mesh = jax.make_mesh((1,), (steps.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    mean, std = steps.channel_statistics(dataset.train_images)
    inputs = {"mean": mean, "std": std, "dtype": jnp.dtype(config.dtype)}

    def start(key):
        return recipe.start(*recipe.init(key)), steps.Totals.zero(), key

    everywhere = jax.NamedSharding(mesh, steps.REPLICATED)
    carry, totals, key = jax.jit(start, out_shardings=everywhere)(jax.random.key(config.seed))
    train_step, _ = recipe.make_steps(config, mesh, **inputs)
    train_set = steps.place_all(dataset.train_images, dataset.train_labels, mesh)
    test_set = steps.place_all(dataset.test_images, dataset.test_labels, mesh)
    count, test_count, losses = len(dataset.train_labels), len(dataset.test_labels), []
    for epoch in range(1, config.epochs + 1):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
        totals = jax.tree.map(jnp.zeros_like, totals)
        for _ in range(count // config.batch):
            carry, totals = train_step(carry, totals, train_set, order, key, 1)
            totals.count.block_until_ready()
        losses.append(float(totals.loss) / int(totals.count))

    def accuracy(state=carry.state, view_count=config.views):
        _, evaluate = recipe.make_steps(dataclasses.replace(config, views=view_count), mesh, **inputs)
        found = jax.tree.map(jnp.zeros_like, totals)
        for first in range(0, test_count, config.batch):
            found = evaluate(carry._replace(state=state), found, test_set, first, test_count)
        return int(found.correct) / int(found.count)

    def recalibrated():
        measure = steps.make_measure(recipe.apply, mesh, **inputs)

        def batches():
            for first in range(0, count - config.batch + 1, config.batch):
                rows = first + np.arange(config.batch)
                yield steps.place(dataset.train_images, dataset.train_labels, rows, mesh)

        return jbn.recalibrate(measure, carry.params, carry.state, batches, passes=3)

    return Trained(carry, losses, accuracy, recalibrated)
