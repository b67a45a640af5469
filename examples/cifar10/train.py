"""Train a ResNet on CIFAR-10 with jbn, or a network for speed.

    python examples/cifar10/train.py --data FOLDER --evaluate-every 5     80.6 % in 12 minutes on two CPU cores
    python examples/cifar10/train.py --data FOLDER --network airbench     91.4 % in 58 minutes, with jax 0.12
    python examples/cifar10/train.py --resume runs/20261126-120000        go on with a run, bit for bit
    python examples/cifar10/train.py --data FOLDER --preset accelerator   for a GPU or TPU
    python examples/cifar10/train.py --depth 8 --epochs 3 --ema 0.999 --recalibrate --drift

The files beside this one: config.py (the options), model.py and airbench.py (the networks), recipes.py (how each is
trained), convolution.py and pooling.py, steps.py (the compiled steps), data.py and shapes.py (what it learns from),
checkpoints.py, report.py (what a person sees), cluster.py (several processes).
"""

import dataclasses
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cluster
import data
import jax
import jax.numpy as jnp
import numpy as np
import recipes
import report
import steps
import tyro
from checkpoints import Checkpoints
from config import Config, check, resolve, write_config

import jbn

PASSES = 3  # of recalibration; more make deeper layers exact, which hardly moves the accuracy
STEPS_PER_CALL = 50  # on accelerators, in one compiled loop

stop = threading.Event()


def stop_soon(*_) -> None:
    """On Ctrl-C: end after the steps that run now. A library that is writing a checkpoint may swallow an exception."""
    stop.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("Stopping after the steps that run now; Ctrl-C again stops at once.", file=sys.stderr)


class Prepared(NamedTuple):
    config: Config
    run: Path
    dataset: data.Dataset
    mesh: jax.sharding.Mesh  # the devices of all processes


def prepare(cli: Callable[..., Config], started_at: str) -> tuple[Prepared, dict]:
    """All that training starts from, and of it what has to be the same in every process.

    Whatever can be wrong with a config is found here.
    """
    config, run = resolve(cli, started_at)
    check(config)
    dataset = data.load(config.data, config.cache.expanduser(), report.console.print).first(config.train_images)
    train_count = len(dataset.train_labels)
    mesh = jax.make_mesh((len(jax.devices()),), (steps.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    if config.batch % mesh.size or config.batch > train_count:
        raise ValueError(
            f"batch is {config.batch}; expected a multiple of the {mesh.size} devices, up to the {train_count} images."
        )
    if (run / "config.json").exists():
        was = json.loads((run / "config.json").read_text())["dataset"]
        if was != dataset.name:
            raise ValueError(f"{run} was started on {was}; what is here now is {dataset.name}.")
    settings = dataclasses.asdict(config)
    for name in ("data", "cache", "launch", "profile"):  # the data counts, not where it lies
        del settings[name]
    facts = {**settings, "run": run, "data": dataset.name, "jax": jax.__version__}
    return Prepared(config, run, dataset, mesh), facts


def train(config: Config, run: Path, dataset: data.Dataset, mesh: jax.sharding.Mesh) -> float:
    """Train as `config` says and leave all results in `run`; returns the test accuracy of what was evaluated last."""
    train_count, test_count = len(dataset.train_labels), len(dataset.test_labels)
    first_process = jax.process_index() == 0
    mean, std = steps.channel_statistics(dataset.train_images)
    per_epoch = train_count // config.batch
    recipe = recipes.make(config, dataset, config.epochs * per_epoch)
    title = f"{recipe.title} on {dataset.name}"
    learned, _ = jax.eval_shape(recipe.init, jax.random.key(0))
    size = f"{sum(leaf.size for leaf in jax.tree.leaves(learned)):,} params"
    report.console.print(f"{title}; {size}; {mesh.size} x {jax.devices()[0].device_kind}; results in {run}")

    inputs = {"mean": mean, "std": std, "dtype": jnp.dtype(config.dtype)}
    per_call = config.steps_per_call or (1 if jax.default_backend() == "cpu" else STEPS_PER_CALL)
    counts = [len(part) for part in np.array_split(np.arange(per_epoch), -(-per_epoch // per_call))]  # of every call
    train_steps, evaluate_step = recipe.make_steps(config, mesh, **inputs)
    train_set = steps.place_all(dataset.train_images, dataset.train_labels, mesh)
    test_set = steps.place_all(dataset.test_images, dataset.test_labels, mesh)

    # Made by a compiled program, a value is on all devices of all processes.
    everywhere = partial(jax.jit, out_shardings=jax.NamedSharding(mesh, steps.REPLICATED))
    zero = everywhere(steps.Totals.zero)

    @everywhere
    def start(key):
        return recipe.start(*recipe.init(key)), key

    @everywhere
    def shuffled(key, epoch):
        return jax.random.permutation(jax.random.fold_in(key, epoch), train_count)

    def test(carry):
        totals = zero()
        for first in range(0, test_count, config.batch):
            totals = evaluate_step(carry, totals, test_set, first, test_count)
        return totals

    key = jax.random.key(config.seed)
    carry, shared_key = start(key)
    checkpoints = Checkpoints(run)
    carry, history = checkpoints.restore(carry)

    meter = report.Meter(config.epochs * per_epoch, len(history) * per_epoch, config.batch)
    tested = report.last_tested(history)
    with meter, report.Trace(config.profile) as trace:
        for epoch in range(len(history) + 1, config.epochs + 1):
            started = time.monotonic()
            totals, order = zero(), shuffled(shared_key, epoch)
            for count in counts:
                if stop.is_set():
                    raise KeyboardInterrupt
                carry, totals = trace(train_steps, carry, totals, train_set, order, shared_key, count)
                meter.update(epoch, count, totals, tested)
            row = {"epoch": epoch, **totals.means("train")}
            row["images_per_second"] = per_epoch * config.batch / (time.monotonic() - started)
            evaluated = epoch % config.evaluate_every == 0 or epoch == config.epochs
            row |= (test(carry) if evaluated else zero()).means("test")
            history.append(row | {"seconds": time.monotonic() - started})
            tested = report.last_tested(history)
            checkpoints.save(carry, history)
            if first_process:
                report.write_metrics(run / "metrics.csv", history)
            report.print_row(history[-1])

    def as_in_training(params, state, pixels):
        sample = jax.vmap(recipe.augment, (0, 0, None))(jax.random.split(key, len(pixels)), (pixels - mean) / std, 0)
        return recipe.apply(params, state, sample.astype(config.dtype), train=True)

    distances = jbn.drift(as_in_training, carry.params, carry.state, [dataset.train_images[:512]])
    if first_process:
        report.write_curves(run / "curves.png", history, distances, title)
    report.print_table(history, title)

    accuracy = history[-1]["test_accuracy"]
    if config.ema:
        carry = everywhere(partial(steps.Carry.averaged, decay=config.ema))(carry)
        accuracy = test(carry).means("test")["test_accuracy"]
    params = f"averaged params ({config.ema})" if config.ema else "params of the last step"
    if config.ema or config.recalibrate:
        report.console.print(f"{params}, running statistics: test accuracy {accuracy:.2%}")
    measure = steps.make_measure(recipe.apply, mesh, **inputs)
    parts = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }

    def batches(part, text):
        images, labels = parts[part]
        for first in report.bar(range(0, max(1, len(labels) - config.batch + 1), config.batch), text):
            if stop.is_set():
                raise KeyboardInterrupt
            rows = (first + np.arange(config.batch)) % len(labels)
            yield steps.place(images, labels, rows, mesh)

    if config.drift:
        found = {
            part: jbn.drift(measure, carry.params, carry.state, batches(part, f"drift on {part} images"))
            for part in parts
        }
        report.print_drift(found, f"running statistics, {params}: how far they are from the images")
    if config.recalibrate:
        passes = itertools.count(1)

        def again():
            return batches("train", f"recalibrating, pass {next(passes)} of up to {PASSES}")

        state = jbn.recalibrate(measure, carry.params, carry.state, again, passes=PASSES)
        accuracy = test(carry._replace(state=state)).means("test")["test_accuracy"]
        report.console.print(f"{params}, recalibrated statistics: test accuracy {accuracy:.2%}")
    report.console.print(report.result_line(accuracy, title, config, history))
    return accuracy


def main() -> None:
    signal.signal(signal.SIGINT, stop_soon)
    cli = partial(tyro.cli, Config, description=__doc__)
    try:
        cluster.join(cli().launch)
        report.console.quiet = jax.process_index() > 0
        started_at = cluster.gather(time.strftime("%Y%m%d-%H%M%S"))[0]
        prepared = cluster.agree(partial(prepare, cli, started_at))
        cluster.agree(lambda: (write_config(prepared.config, prepared.run, prepared.dataset), {}))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    config, run = prepared.config, prepared.run
    with cluster.ending_at_once(f"Start all again with --resume {run}"):
        try:
            accuracy = train(*prepared)
        except KeyboardInterrupt:
            saved = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]
            last = f"The last checkpoint is of epoch {max(saved)}" if saved else "There is no checkpoint yet"
            print(f"Stopped. {last}; go on with --resume {run}", file=sys.stderr)
            sys.exit(130)
    if accuracy < config.require_accuracy:
        sys.exit(f"error: test accuracy {accuracy:.2%} is below the required {config.require_accuracy:.2%}")


if __name__ == "__main__":
    main()
