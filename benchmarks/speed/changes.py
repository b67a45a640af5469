"""One change of the recipe of airbench.py, and a training with it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import airbench
import claim
import data
import numpy as np
import recipes
import training
from config import Config, defaults


class Size(NamedTuple):
    """How much is trained: that of the tables, or one that is over in seconds."""

    width: int = 32
    epochs: int = 4
    batch: int = 500
    images: int | None = 20_000  # of training, the first ones
    test_images: int | None = None
    seeds: int = 1
    changes: int | None = None  # only the first ones


FULL = Size()
TINY = Size(width=4, epochs=1, batch=16, images=32, test_images=32, seeds=1, changes=2)


class Change(NamedTuple):
    says: str
    pieces: Mapping[str, Any] = {}  # of airbench.py, by name, that others take the place of
    options: Mapping[str, Any] = {}  # of the example
    normalize: Callable | None = None  # in the place of jbn.batch_norm


def jobs(changes: Mapping[str, Change], folder: Path | None, size: Size, recalibrate: bool = False) -> claim.Jobs:
    """A training for each of the seeds and each change."""
    return {
        f"{name}, seed {seed}": partial(train, changes[name], folder, size, seed, recalibrate)
        for seed in range(size.seeds)
        for name in list(changes)[: size.changes]
    }


def of(found: Mapping[str, Any], value: str) -> dict[str, np.ndarray]:
    """For each change the values [seeds] of what its trainings found."""
    values: dict[str, list[float]] = {}
    for job, results in found.items():
        values.setdefault(job.partition(", seed ")[0], []).append(results[value])
    return {name: np.array(each) for name, each in values.items()}


def dataset(folder: Path | None, size: Size) -> data.Dataset:
    found = data.read(folder / "cifar10" if (folder / "cifar10").is_dir() else folder) if folder else data.embedded()
    found = found.first(size.images)
    shown = slice(size.test_images)
    return found._replace(test_images=found.test_images[shown], test_labels=found.test_labels[shown])


def train(change: Change, folder: Path | None, size: Size, seed: int, recalibrate: bool) -> dict[str, Any]:
    """Test accuracy in percent, also by one view and, on demand, by recalibrated statistics."""
    images = dataset(folder, size)
    own = {"width": size.width, "epochs": size.epochs, "batch": size.batch, "seed": seed, **change.options}
    config = Config(**defaults("airbench", "paper") | own)
    total = config.epochs * (len(images.train_labels) // config.batch)
    with ExitStack() as stack:
        for name, piece in change.pieces.items():
            stack.enter_context(mock.patch.object(airbench, name, piece))
        recipe = recipes.make(config, images, total)
        if change.normalize is not None:
            recipe = recipe._replace(apply=partial(airbench.apply, normalize=change.normalize))
        trained = training.train(recipe, config, images)
        found = {"accuracy": trained.accuracy(), "one view": trained.accuracy(view_count=1)}
        if recalibrate:
            found["recalibrated"] = trained.accuracy(trained.recalibrated())
    return {name: 100 * value for name, value in found.items()} | {"loss": trained.losses[-1]}
