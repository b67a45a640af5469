"""Train the example's ResNet on jbn and on Flax's own modules: same data, order and starting values, in one run.

    python benchmarks/resnet_peer.py                      the embedded set
    python benchmarks/resnet_peer.py --data FOLDER        a part of CIFAR-10

Prints the test accuracy of both after the same epochs, for every seed and in the mean. benchmarks/training_step.py has
their speed.
"""

import dataclasses
import os
import platform
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import config as example
import data
import flax_resnet
import model
import recipes
import report
import training

NAMES = "jbn", "flax"


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10 in the official binary layout; without it the embedded set."""
    depth: model.Depth = 8
    epochs: int = 8
    seeds: int = 3
    batch: int = 64
    train_images: int = 4096
    """How many training images to use, the first ones."""


def recipe_of(name: str, settings: example.Config, dataset: data.Dataset) -> recipes.Recipe:
    """The example's, or the same with Flax's modules in its place."""
    total = settings.epochs * (len(dataset.train_labels) // settings.batch)
    own = recipes.make(settings, dataset, total)
    if name == "jbn":
        return own

    def init(key):
        params, _ = own.init(key)
        return flax_resnet.convert(params)

    return own._replace(init=init, apply=partial(flax_resnet.apply, depth=settings.depth))


def accuracy(name: str, dataset: data.Dataset, config: Config, seed: int) -> float:
    """Test accuracy after `config.epochs`."""
    settings = example.Config(depth=config.depth, epochs=config.epochs, batch=config.batch, seed=seed)
    return training.train(recipe_of(name, settings, dataset), settings, dataset).accuracy()


def main(config: Config) -> None:
    dataset = (data.read(config.data) if config.data else data.embedded()).first(config.train_images)
    device = jax.devices()[0]
    hardware = f"{device.device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    report.console.print(f"{dataset.name}; {hardware}; jax {jax.__version__}")

    title = f"Test accuracy, ResNet-{config.depth}, {len(dataset.train_labels):,} images, {config.epochs} epochs"
    table = Table("seed", *NAMES, title=title)
    found = {name: [] for name in NAMES}
    for seed in range(config.seeds):
        for name in NAMES:
            found[name].append(accuracy(name, dataset, config, seed))
        table.add_row(str(seed), *(f"{values[-1]:.2%}" for values in found.values()))
    table.add_row("mean", *(f"{np.mean(values):.2%}" for values in found.values()))
    report.console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
