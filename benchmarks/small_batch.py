"""What small batches cost batch norm, and what the remedies give back: test accuracy of a small ResNet on real data.

    python benchmarks/small_batch.py --data FOLDER                    train; see --help
    python benchmarks/small_batch.py --data FOLDER --folder docs      draw what docs/small-batch.md shows again

Each step takes one batch of 128 images, shared by workers of 2, 4, ... images each: the gradient is always that of 128
images, and only what normalizes them differs (remedies.py). For each seed all start from the same kernels and see the
same images in the same order. Networks are evaluated with their running statistics and with those that
`jbn.recalibrate` takes of training images, after half of the steps, where the learning rate is high, and after the
last, where it is zero. Images are halved in width and height, so that two CPU cores do all of it in half an hour.
Trainings that are one computation but for rounding, synchronized of any size and one worker, tell the noise.

Stopped at any time, the same command goes on after the last network that was finished.
"""

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import data
import model
import remedies
import report
import small_batch_record
import steps
from small_batch_record import Network, Record

import jbn


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10 in the official binary layout; without it the embedded set."""
    folder: Path = Path("runs/small_batch")
    """Where the record and the figure go."""
    name: str = "small_batch"
    """Of the record (.json) and the figure (.png)."""
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 128)
    """Images of a worker, which are normalized together."""
    batch: int = 128
    """Images of a gradient, over all workers."""
    images: int = 12_800
    """Training images, the first ones."""
    epochs: int = 5
    """Times each image is seen."""
    seeds: int = 3
    """Trainings of each kind."""
    depth: model.Depth = 8
    """Layers of the network."""
    peak_rate: float = 0.5
    """Highest learning rate of the one-cycle schedule."""
    bare_rate: float = 0.2
    """The same of scale and bias alone, which may diverge where batch norm learns best."""
    recalibration_images: int = 5_120
    """Training images whose statistics replace the running ones, the first ones."""


def networks(config: Config) -> list[Network]:
    """All that are trained, seed by seed; those that the size is nothing to are there once."""
    found = []
    for seed in range(config.seeds):
        for size in config.sizes:
            found += [Network("batch_norm", size, seed), Network("renormalized", size, seed)]
            if size < config.batch:
                found.append(Network("synchronized", size, seed))
        found += [Network(remedy, config.batch, seed) for remedy in ("group_norm", "scale_and_bias")]
    return found


def experiment(config: Config, dataset: data.Dataset) -> Callable[[Network, Callable], dict]:
    """A function that trains a network, calls another after every step, and gives accuracies by stage and statistics.

    Each program is compiled once, when it is first needed.
    """
    count, test_count = len(dataset.train_labels), len(dataset.test_labels)
    per_epoch = count // config.batch
    total = config.epochs * per_epoch
    mean, std = steps.channel_statistics(dataset.train_images)
    apply = partial(model.apply, depth=config.depth)

    def optimizer(remedy):
        rate = config.bare_rate if remedy == "scale_and_bias" else config.peak_rate
        return model.make_optimizer(rate, total, momentum=0.9, weight_decay=5e-4)

    def halved(images):
        height, width, channels = images.shape[-3:]
        return images.reshape(-1, height // 2, 2, width // 2, 2, channels).mean((2, 4))

    @partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
    def train(remedy, size, carry, pixels, labels, key):
        keys = jax.random.split(jax.random.fold_in(key, carry.step), config.batch)
        inputs = halved(jax.vmap(model.augment)(keys, (pixels - mean) / std))
        # They open as in the paper, only sooner.
        limits = jbn.renorm_limits(carry.step, start=total // 20, d_end=total // 5, r_end=3 * total // 10)

        def normalize(x, params, states, *, activation, **_):
            return remedies.normalize(remedy, activation, x, params, states, size, limits)

        def loss(params):
            logits, state = apply(params, carry.state, inputs, train=True, normalize=normalize)
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
            return optax.softmax_cross_entropy(logits, targets).mean(), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(carry.params)
        updates, optimizer_state = optimizer(remedy).update(gradients, carry.optimizer, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return steps.Carry(params, state, optimizer_state, carry.step + 1), value

    @partial(jax.jit, static_argnums=0)
    def correct(remedy, params, states, pixels, labels):
        def normalize(x, params, state, *, activation, **options):
            if remedies.RUNNING[remedy]:
                return jbn.batch_norm(x, params, state, activation=activation, **options)
            return remedies.normalize(remedy, activation, x, params, state, config.batch, None)

        logits, _ = apply(params, states, halved((pixels - mean) / std), train=False, normalize=normalize)
        return jnp.sum(jnp.argmax(logits, -1) == labels)

    def measure(params, states, pixels):
        return apply(params, states, halved((pixels - mean) / std), train=True)

    def accuracies(remedy, params, states):
        """Test accuracy by the statistics it is evaluated with; the key of what needs none is "any"."""
        kept = {name: {layer: state[name] for layer, state in states.items()} for name in remedies.RUNNING[remedy]}
        if kept:
            images = dataset.train_images[: config.recalibration_images]
            batches = [images[first : first + 512] for first in range(0, len(images), 512)]
            kept["recalibrated"] = jbn.recalibrate(measure, params, kept["all workers"], batches, passes=2)
        found = {}
        for name, chosen in (kept or {"any": states}).items():
            right = 0
            for first in range(0, test_count, 1000):
                part = slice(first, first + 1000)
                right += int(correct(remedy, params, chosen, dataset.test_images[part], dataset.test_labels[part]))
            found[name] = right / test_count
        return found

    def run(network: Network, after_step: Callable[[], None]) -> dict:
        remedy, size, seed = network
        # Each block starts as its shortcut, for the sake of scale and bias alone.
        params, state = model.init(jax.random.key(seed), config.depth, zero_last_scale=True)
        names = remedies.RUNNING[remedy]
        copy = partial(jax.tree.map, jnp.copy)  # what is donated must be there once
        states = {layer: {name: copy(each) for name in names} for layer, each in state.items()}
        carry = steps.Carry(params, states, optimizer(remedy).init(params), jnp.zeros((), jnp.int32))
        key, found = jax.random.key(seed), {}
        for epoch in range(config.epochs):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), count))
            for step in range(per_epoch):
                rows = order[step * config.batch : (step + 1) * config.batch]
                carry, value = train(remedy, size, carry, dataset.train_images[rows], dataset.train_labels[rows], key)
                float(value)  # or steps would pile up before the device
                after_step()
                stage = {total // 2: "halfway", total: "end"}.get(epoch * per_epoch + step + 1)
                if stage:
                    found[stage] = accuracies(remedy, carry.params, carry.state)
        return found

    return run


def train_all(left: list[Network], record: Record, run: Callable, total: int) -> None:
    """Train what is `left`, `total` steps each, under a bar, or with a line each where the output is no terminal."""
    console = report.console
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.1f} %"),
        TimeRemainingColumn(),
    )
    # Compiling and evaluating stand between steps: the time that is left is told from ten minutes.
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=len(left) * total)
        for number, network in enumerate(left, 1):
            name = f"{number} of {len(left)}: {network.remedy}, {network.size} images, seed {network.seed}"
            progress.update(task, description=name)
            started = time.monotonic()
            found = run(network, partial(progress.advance, task))
            record.add(network, found, time.monotonic() - started)
            if not console.is_terminal:
                console.print(f"{name}: {time.monotonic() - started:.0f} s, test accuracy {found['end']}")


def main(config: Config) -> None:
    counts = {name: getattr(config, name) for name in ("batch", "images", "epochs", "seeds", "recalibration_images")}
    for name, count in counts.items():
        if count < 1:
            sys.exit(f"error: {name} is {count}; expected at least 1.")
    if not config.sizes or len(set(config.sizes)) < len(config.sizes):
        sys.exit(f"error: sizes is {config.sizes}; expected each size once.")
    for size in config.sizes:
        if size < 1 or config.batch % size:
            sys.exit(f"error: sizes has {size}; expected divisors of the batch of {config.batch}.")
    not_settings = ("data", "folder", "name")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in not_settings}
    hardware = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    try:
        dataset = (data.read(config.data) if config.data else data.embedded()).first(config.images)
        facts = {"hardware": hardware, "jax": jax.__version__, "dataset": dataset.name, "settings": settings}
        record = Record(config.folder / f"{config.name}.json", facts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    total = config.epochs * (len(dataset.train_labels) // config.batch)
    if total < 5:
        sys.exit(f"error: epochs is {config.epochs} and images {config.images}: {total} steps; expected at least 5.")
    report.console.print(f"{dataset.name}; {hardware}; jax {jax.__version__}")
    left = [network for network in networks(config) if network not in record.rows]
    try:
        train_all(left, record, experiment(config, dataset), total)
    except KeyboardInterrupt:
        print(f"Stopped after {len(record.rows)} networks. The same command trains the others.", file=sys.stderr)
        sys.exit(130)
    for stage in small_batch_record.STAGES:
        print(f"\n{stage}, with a noise of {record.noise(stage)}\n\n{record.markdown(stage)}")
    record.draw(config.folder / f"{config.name}.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
