"""Train a ResNet on CIFAR-10 with jbn.

    python examples/cifar10/train.py --help

The files beside this one: model.py (the network), steps.py (the compiled steps), data.py and shapes.py (what it learns
from), report.py (what a person sees), cluster.py (several processes).
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
from typing import Literal, NamedTuple

import cluster
import data
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import orbax.checkpoint as ocp
import report
import steps
import tyro

import jbn

PASSES = 3  # of recalibration; more make deeper layers exact, which hardly moves the accuracy


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10 in the official binary layout. Without it: the cache, the network, the embedded set."""
    cache: Path = Path("~/.cache/jbn")
    """Where a download is kept."""
    run: Path | None = None
    """Folder for config.json, metrics.csv, curves.png and checkpoints. Without it: runs/ and the time."""
    resume: Path | None = None
    """Go on with the run in this folder from its last whole checkpoint. All else, epochs too, is as it was."""
    depth: model.Depth = 20
    """Layers of the network."""
    zero_last_scale: bool = False
    """Start the last scale of every block at 0, so that each block starts as its shortcut."""
    epochs: int = 5
    """Times each image is seen."""
    batch: int = 64
    """Images per step, over all devices together."""
    train_images: int | None = None
    """Use only so many training images, the first ones."""
    peak_rate: float = 0.1
    """Highest learning rate of the one-cycle schedule."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """On the kernels, not on scale and bias."""
    smoothing: float = 0.1
    """Label smoothing."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in. Params and statistics are float32."""
    seed: int = 0
    """Of the initialization, the order of the images and their augmentation."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    ema: float = 0.0
    """Average the params with this decay, in [0, 1), and evaluate the average too, at the end. 0: do not."""
    recalibrate: bool = False
    """At the end, evaluate with the exact statistics of the training images in the place of the running ones, too."""
    drift: bool = False
    """At the end, show how far each layer's running statistics are from those of the images; also of a --resume."""
    require_accuracy: float = 0.0
    """End with an error if the last test accuracy is below this, in [0, 1]."""
    launch: tyro.conf.OmitArgPrefixes[cluster.Cluster] = dataclasses.field(default_factory=cluster.Cluster)


def resolve(cli: Callable[..., Config], started_at: str) -> tuple[Config, Path]:
    """The config that the command line asks for, for a resumed run the one it was started with; and the run folder."""
    config = cli()
    if config.resume is None:
        run = config.run or Path("runs") / started_at
        if (run / "config.json").exists():
            raise ValueError(f"{run} holds a run already; go on with it by --resume {run}, or name another --run.")
        return config, run
    path = config.resume / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {config.resume} is not the folder of a run.")
    saved = json.loads(path.read_text())["config"] | {"run": config.resume, "resume": config.resume}
    paths = {name: Path(saved[name]) for name in ("data", "cache") if saved[name] is not None}
    looking = {"drift": config.drift, "launch": config.launch}  # what changes nothing in the run
    started = Config(**{**saved, **paths, **looking})
    given = cli(default=started)
    for name in saved:
        value, was = getattr(given, name), getattr(started, name)
        if value != was:
            raise ValueError(f"--resume takes {name} from {path}: it is {was}, and {value} was given. Leave it out.")
    return started, config.resume


def write_config(config: Config, run: Path, dataset: data.Dataset) -> None:
    """Write config.json where there is none; the first process does."""
    path = run / "config.json"
    if path.exists() or jax.process_index() > 0:
        return
    settings = dataclasses.asdict(config)
    del settings["launch"]  # any number of processes may go on with a run
    content = {"config": settings, "dataset": dataset.name, "jax": jax.__version__}
    run.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2, default=str) + "\n")
    scratch.replace(path)


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
    for name in ("epochs", "batch", "evaluate_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; expected at least 1.")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema is {config.ema}; expected a decay in [0, 1), such as 0.99.")
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
    for name in ("data", "cache", "launch"):  # the data counts, not where it lies
        del settings[name]
    facts = {**settings, "run": run, "data": dataset.name, "jax": jax.__version__}
    return Prepared(config, run, dataset, mesh), facts


def train(config: Config, run: Path, dataset: data.Dataset, mesh: jax.sharding.Mesh) -> float:
    """Train as `config` says and leave all results in `run`; returns the test accuracy of what was evaluated last."""
    train_count, test_count = len(dataset.train_labels), len(dataset.test_labels)
    first_process = jax.process_index() == 0
    title = f"ResNet-{config.depth} on {dataset.name}"
    report.console.print(f"{title}; {mesh.size} x {jax.devices()[0].device_kind}; results in {run}")

    mean, std = steps.channel_statistics(dataset.train_images)
    per_epoch = train_count // config.batch
    optimizer = steps.make_optimizer(
        config.peak_rate, config.epochs * per_epoch, momentum=config.momentum, weight_decay=config.weight_decay
    )
    averager = optax.ema(config.ema) if config.ema else optax.identity()
    apply = partial(model.apply, depth=config.depth)
    inputs = {"mean": mean, "std": std, "dtype": jnp.dtype(config.dtype)}
    train_step, evaluate_step = steps.make_steps(
        apply, optimizer, mesh, batch=config.batch, smoothing=config.smoothing, averager=averager, **inputs
    )

    # Made by a compiled program, a value is on all devices of all processes.
    everywhere = partial(jax.jit, out_shardings=jax.NamedSharding(mesh, steps.REPLICATED))
    zero = everywhere(steps.Totals.zero)

    @everywhere
    def start(key):
        params, state = model.init(key, config.depth, zero_last_scale=config.zero_last_scale)
        step = jnp.zeros((), jnp.int32)
        return steps.Carry(params, state, optimizer.init(params), step, averager.init(params)), key

    def test(carry):
        totals = zero()
        for first in range(0, test_count, config.batch):
            rows = np.minimum(first + np.arange(config.batch), test_count - 1)  # beyond the end: not counted
            batch = steps.place(dataset.test_images, dataset.test_labels, rows, mesh)
            totals = evaluate_step(carry, totals, batch, test_count - first)
        return totals

    key = jax.random.key(config.seed)
    carry, shared_key = start(key)
    checkpoints = Checkpoints(run)
    carry, history = checkpoints.restore(carry)

    with report.Meter(config.epochs * per_epoch, len(history) * per_epoch, config.batch) as meter:
        for epoch in range(len(history) + 1, config.epochs + 1):
            started = time.monotonic()
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), train_count))
            totals = zero()
            for step in range(per_epoch):
                if stop.is_set():
                    raise KeyboardInterrupt
                rows = order[step * config.batch : (step + 1) * config.batch]
                batch = steps.place(dataset.train_images, dataset.train_labels, rows, mesh)
                carry, totals = train_step(carry, totals, batch, shared_key)
                meter.update(epoch, (epoch - 1) * per_epoch + step + 1, totals)
            row = {"epoch": epoch, **totals.means("train")}
            row["seconds"] = time.monotonic() - started
            row["images_per_second"] = per_epoch * config.batch / row["seconds"]
            evaluated = epoch % config.evaluate_every == 0 or epoch == config.epochs
            history.append(row | (test(carry) if evaluated else zero()).means("test"))
            checkpoints.save(carry, history)
            if first_process:
                report.write_metrics(run / "metrics.csv", history)
            report.print_row(history[-1])

    @jax.jit
    def alone(params, state, pixels):
        sample = jax.vmap(steps.augment)(jax.random.split(key, len(pixels)), (pixels - mean) / std)
        # With decay 0 the new state is the batch's own statistics.
        return apply(params, state, sample.astype(config.dtype), train=True, decay=0.0)[1]

    batch = alone(carry.params, carry.state, dataset.train_images[:512])
    names = [f"{name}/conv2" for name, *_ in model.blocks(config.depth)]
    layers = {name: (carry.state[name], batch[name]) for name in ("stem", names[len(names) // 2], names[-1])}
    if first_process:
        report.write_curves(run / "curves.png", history, layers, title)
    report.print_table(history, title)

    accuracy = history[-1]["test_accuracy"]
    if config.ema:
        carry = everywhere(partial(steps.Carry.averaged, decay=config.ema))(carry)
        accuracy = test(carry).means("test")["test_accuracy"]
    params = f"averaged params ({config.ema})" if config.ema else "params of the last step"
    if config.ema or config.recalibrate:
        report.console.print(f"{params}, running statistics: test accuracy {accuracy:.2%}")
    measure = steps.make_measure(apply, mesh, **inputs)
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
    return accuracy


class Checkpoints:
    """What a run needs to go on bit for bit, kept after every epoch: orbax writes each whole or not at all."""

    def __init__(self, run: Path):
        self.manager = ocp.CheckpointManager(
            (run / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
            ),
        )

    def save(self, carry: steps.Carry, history: list[dict]) -> None:
        arguments = ocp.args.Composite(
            carry=ocp.args.StandardSave(carry), history=ocp.args.JsonSave({"epochs": history})
        )
        self.manager.save(len(history), args=arguments)

    def restore(self, carry: steps.Carry) -> tuple[steps.Carry, list[dict]]:
        """The last whole checkpoint, or `carry` and no history where there is none."""
        epoch = self.manager.latest_step()
        if epoch is None:
            return carry, []
        arguments = ocp.args.Composite(carry=ocp.args.StandardRestore(carry), history=ocp.args.JsonRestore())
        restored = self.manager.restore(epoch, args=arguments)
        report.console.print(f"Going on after epoch {epoch}.")
        return restored["carry"], restored["history"]["epochs"]


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
