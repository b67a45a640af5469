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
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import data
import flax_resnet
import model
import report
import steps


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10 in the official binary layout; without it the embedded set."""
    depth: int = 8
    epochs: int = 8
    seeds: int = 3
    batch: int = 64
    train_images: int = 4096
    """How many training images to use, the first ones."""


NETWORKS = {
    "jbn": (model.apply, lambda params, state: (params, state)),
    "flax": (flax_resnet.apply, lambda params, state: flax_resnet.convert(params)),
}


def prepare(name, dataset, config, seed):
    """Compiled steps, what they start from, and the mesh."""
    apply, convert = NETWORKS[name]
    mesh = jax.make_mesh((1,), (steps.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    total = config.epochs * (len(dataset.train_labels) // config.batch)
    optimizer = steps.make_optimizer(0.1, total, momentum=0.9, weight_decay=5e-4)
    mean, std = steps.channel_statistics(dataset.train_images)
    train, evaluate = steps.make_steps(
        partial(apply, depth=config.depth),
        optimizer,
        mesh,
        batch=config.batch,
        mean=mean,
        std=std,
        smoothing=0.1,
        dtype=jnp.dtype("float32"),
    )
    params, state = convert(*model.init(jax.random.key(seed), config.depth))
    carry = steps.Carry(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, steps.REPLICATED))
    return train, evaluate, put((carry, steps.Totals.zero(), jax.random.key(seed))), mesh


def accuracy(name, dataset, config, seed) -> float:
    """Test accuracy after `config.epochs`."""
    train, evaluate, (carry, totals, key), mesh = prepare(name, dataset, config, seed)
    count = len(dataset.train_labels)
    train_set = steps.place_all(dataset.train_images, dataset.train_labels, mesh)
    test_set = steps.place_all(dataset.test_images, dataset.test_labels, mesh)
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
        for _ in range(count // config.batch):
            carry, totals = train(carry, totals, train_set, order, key, 1)
            float(totals.loss)
    totals = jax.tree.map(jnp.zeros_like, totals)
    count = len(dataset.test_labels)
    for start in range(0, count, config.batch):
        totals = evaluate(carry, totals, test_set, start, count)
    return totals.means("test")["test_accuracy"]


def main(config: Config) -> None:
    dataset = (data.read(config.data) if config.data else data.embedded()).first(config.train_images)
    device = jax.devices()[0]
    hardware = f"{device.device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    report.console.print(f"{dataset.name}; {hardware}; jax {jax.__version__}")

    title = f"Test accuracy, ResNet-{config.depth}, {len(dataset.train_labels):,} images, {config.epochs} epochs"
    table = Table("seed", *NETWORKS, title=title)
    found = {name: [] for name in NETWORKS}
    for seed in range(config.seeds):
        for name in NETWORKS:
            found[name].append(accuracy(name, dataset, config, seed))
        table.add_row(str(seed), *(f"{values[-1]:.2%}" for values in found.values()))
    table.add_row("mean", *(f"{np.mean(values):.2%}" for values in found.values()))
    report.console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
