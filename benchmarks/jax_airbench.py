"""The example's airbench as a side of airbench_peer.py: its own steps, one at a time."""

from collections.abc import Callable
from functools import partial

import config
import data
import jax
import jax.numpy as jnp
import recipes
import steps

import jbn


class Training:
    """As `airbench_peer.Training`, on one device. `normalize`: a norm in the place of `jbn.batch_norm`."""

    def __init__(self, dataset: data.Dataset, settings: config.Config, *, normalize: Callable = jbn.batch_norm):
        self.dataset, self.batch = dataset, settings.batch
        count = len(dataset.train_labels)
        recipe = recipes.make(settings, dataset, settings.epochs * (count // self.batch))
        recipe = recipe._replace(apply=partial(recipe.apply, normalize=normalize))
        mean, std = steps.channel_statistics(dataset.train_images)
        mesh = jax.make_mesh((1,), (steps.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        inputs = {"mean": mean, "std": std, "dtype": jnp.dtype(settings.dtype)}
        self.train_step, self.evaluate_step = recipe.make_steps(settings, mesh, **inputs)
        self.train_set = steps.place_all(dataset.train_images, dataset.train_labels, mesh)
        self.test_set = steps.place_all(dataset.test_images, dataset.test_labels, mesh)
        everywhere = partial(jax.jit, out_shardings=jax.NamedSharding(mesh, steps.REPLICATED))
        self.zero = everywhere(steps.Totals.zero)

        self.init, self.everywhere, self.carry_of = recipe.init, everywhere, everywhere(recipe.start)
        self.shuffled = everywhere(lambda key, epoch: jax.random.permutation(jax.random.fold_in(key, epoch), count))

    def start(self, seed: int) -> None:
        self.key = self.everywhere(lambda: jax.random.key(seed))()
        self.begin(*self.init(self.key))

    def begin(self, params: dict, state: dict) -> None:
        """Start from params and state of airbench.py."""
        self.carry = self.carry_of(params, state)

    def draw(self, epoch: int) -> list[jax.Array]:
        order = jax.block_until_ready(self.shuffled(self.key, epoch + 1))  # train.py counts from 1
        return [order] * (len(self.dataset.train_labels) // self.batch)

    def step(self, given: jax.Array) -> float:
        self.carry, totals = self.train_step(self.carry, self.zero(), self.train_set, given, self.key, 1)
        jax.block_until_ready(self.carry)
        return float(totals.loss) / self.batch

    def evaluate(self) -> tuple[float, float]:
        totals, count = self.zero(), len(self.dataset.test_labels)
        for first in range(0, count, self.batch):
            totals = self.evaluate_step(self.carry, totals, self.test_set, first, count)
        means = totals.means("test")
        return means["test_accuracy"], means["test_loss"]
