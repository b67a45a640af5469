"""What each --network is: its start, its layers, and how it is trained."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import airbench
import data
import jax
import jax.numpy as jnp
import model
import optax
import steps
from config import Config


class Recipe(NamedTuple):
    """A network and how it is trained."""

    title: str
    init: Callable[[jax.Array], tuple[dict, dict]]  # params and state of a key
    apply: Callable  # apply(params, state, images, train=, axis_name=) gives logits and the new state
    optimizer: optax.GradientTransformation
    augment: Callable  # as `make_steps` takes it, and after_step
    after_step: Callable[[steps.Carry], steps.Carry]
    start_average: Callable  # start_average(params, state) gives the first `Carry.average`

    def start(self, params: dict, state: dict) -> steps.Carry:
        """Before the first step."""
        average = self.start_average(params, state)
        return steps.Carry(params, state, self.optimizer.init(params), jnp.zeros((), jnp.int32), average)

    def make_steps(self, config: Config, mesh: jax.sharding.Mesh, **inputs) -> tuple[Callable, Callable]:
        """`steps.make_steps` as `config` says; `inputs` are its mean, std and dtype."""
        return steps.make_steps(
            self.apply,
            self.optimizer,
            mesh,
            batch=config.batch,
            smoothing=config.smoothing,
            augment=self.augment,
            after_step=self.after_step,
            view_count=config.views,
            remat=config.remat,
            **inputs,
        )


def resnet(config: Config, dataset: data.Dataset, total: int) -> Recipe:
    start, after_step = (
        steps.averaging(config.ema) if config.ema else (lambda params: optax.EmptyState(), lambda it: it)
    )
    return Recipe(
        f"ResNet-{config.depth}{'' if config.width == 16 else f', {config.width} wide,'}",
        partial(model.init, depth=config.depth, width=config.width, zero_last_scale=config.zero_last_scale),
        partial(model.apply, depth=config.depth),
        model.make_optimizer(config.peak_rate, total, momentum=config.momentum, weight_decay=config.weight_decay),
        partial(model.augment, moves=config.moves, cutout=config.cutout),
        after_step,
        lambda params, state: start(params),
    )


def speed(config: Config, dataset: data.Dataset, total: int) -> Recipe:
    kernel = airbench.whitening(dataset.train_images, *steps.channel_statistics(dataset.train_images))
    return Recipe(
        f"airbench{'' if config.width == airbench.WIDTH else f', {config.width} wide,'}",
        partial(airbench.init, kernel=kernel, width=config.width),
        airbench.apply,
        airbench.make_optimizer(config.peak_rate, total, momentum=config.momentum, weight_decay=config.weight_decay),
        partial(airbench.augment, moves=config.moves, cutout=config.cutout),
        partial(airbench.lookahead, total=total),
        lambda params, state: (params, state),
    )


def make(config: Config, dataset: data.Dataset, total: int) -> Recipe:
    """That of `config`, for `total` steps."""
    return {"resnet": resnet, "airbench": speed}[config.network](config, dataset, total)
