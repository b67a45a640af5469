"""Train the example's airbench on jbn, with Flax's norm in its place, and in PyTorch: same start, order and crops.

    python benchmarks/airbench_peer.py --data FOLDER --torch PYTHON      PYTHON is one that has PyTorch
    python benchmarks/airbench_peer.py --data FOLDER --seeds 0 --sides jbn flax --out FILE.json
    python benchmarks/airbench_peer.py --markdown --out FILE.json        print the table of what was found

Each side is a process of its own, on all cores of the CPU. They take turns, an epoch each, in an order that rotates.
Prints the accuracy on 6 views of the test images, the time as a ratio, and the most memory that each process held, with
its libraries and the images. What is compiled is compiled in the first step. PyTorch's order and crops are drawn by JAX
before the clock starts; the other sides draw their crops within the step.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tyro
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import airbench
import config as example
import data
import jax_airbench
import report
import tables

ROOT = Path(__file__).resolve().parents[1]
BASE = "torch"
Side = Literal["jbn", "flax", "torch"]
PACKAGES = {"jbn": ("jax",), "flax": ("jax", "flax"), "torch": ("torch",)}


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10 in the official binary layout; without it the embedded set."""
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    train_images: int | None = None
    """Use only so many training images, the first ones."""
    test_images: int | None = None
    """Use only so many test images, the first ones."""
    batch: int = example.NETWORKS["airbench"]["batch"]
    width: int = airbench.WIDTH
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the network computes in; PyTorch by autocast."""
    sides: tuple[Side, ...] = ("jbn", "flax", "torch")
    torch: Path = Path(sys.executable)
    """The Python of the side of PyTorch, which also has what the example needs."""
    compile: bool = False
    """Compile the network in PyTorch."""
    out: Path | None = None
    """Where all that was measured goes, as JSON."""
    markdown: bool = False
    """Train nothing; print the table of what `out` holds."""


class Training(Protocol):
    """One side: `start`, then for each epoch `draw` and its steps, then `evaluate`; and again."""

    def start(self, seed: int) -> None:
        """Forget all training; start as airbench.py does from this seed."""

    def draw(self, epoch: int) -> list[Any]:
        """For each step of `epoch`, from 0, what it is given; made before the clock starts."""
        ...

    def step(self, given: Any) -> float:
        """Make one step to its end; the loss."""
        ...

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test images."""
        ...


def training_of(side: str, config: Config) -> Training:
    """What `side` trains with, on the data of `config`."""
    dataset = dataset_of(config)
    own = {name: getattr(config, name) for name in ("epochs", "batch", "width", "dtype")}
    settings = example.Config(**example.defaults("airbench", "paper") | own)
    match side:
        case "torch":
            import torch_airbench

            return torch_airbench.Training(dataset, settings, compiled=config.compile)
        case "flax":
            import flax_norm  # before anything is compiled: jax 0.12 would compile it again

            return jax_airbench.Training(dataset, settings, normalize=flax_norm.batch_norm)
        case _:
            return jax_airbench.Training(dataset, settings)


def dataset_of(config: Config) -> data.Dataset:
    dataset = (data.read(config.data) if config.data else data.embedded()).first(config.train_images)
    if config.batch > len(dataset.train_labels):
        raise ValueError(f"batch is {config.batch}; expected up to the {len(dataset.train_labels)} images.")
    test = slice(config.test_images)
    return dataset._replace(test_images=dataset.test_images[test], test_labels=dataset.test_labels[test])


def epoch_of(training: Training, epoch: int) -> dict[str, Any]:
    """Train for an epoch: the seconds of every step, and the mean loss."""
    drawn, seconds, losses = training.draw(epoch), [], []
    for given in drawn:
        started = time.perf_counter()
        losses.append(training.step(given))
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "loss": float(np.mean(losses))}


def evaluation_of(training: Training) -> dict[str, float]:
    started = time.perf_counter()
    accuracy, loss = training.evaluate()
    return {"accuracy": accuracy, "loss": loss, "seconds": time.perf_counter() - started, "MiB": memory()}


def memory() -> float:
    """The most MiB that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def work(side: str) -> None:
    """Be one side: a request a line, of which the first is the config, and a line for each answer."""
    config = from_json(sys.stdin.readline())
    training = training_of(side, config)
    answer: Any = {"python": platform.python_version()}
    answer |= {name: importlib.metadata.version(name) for name in PACKAGES[side]}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case ["start", seed]:
                answer = training.start(seed)
            case ["epoch", epoch]:
                answer = epoch_of(training, epoch)
            case ["evaluate"]:
                answer = evaluation_of(training)
        print(json.dumps(answer), flush=True)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), default=str)


def from_json(text: str) -> Config:
    given = json.loads(text)
    paths = {name: Path(given[name]) for name in ("data", "torch", "out") if given[name] is not None}
    return Config(**given | paths)


class Worker:
    """The process of one side, as the driver sees it."""

    def __init__(self, side: str, config: Config):
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        python = str(config.torch) if side == "torch" else sys.executable
        self.side = side
        self.process = subprocess.Popen(
            [python, __file__, "worker", side],
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.packages = self.ask(to_json(config))

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"error: the process of {self.side} ended with {self.process.wait()}; see above.")
        return json.loads(answer)

    def do(self, *request: Any) -> Any:
        return self.ask(json.dumps(request))

    def end(self) -> None:
        self.process.communicate()


def measure(config: Config, workers: list[Worker]) -> dict[str, list[dict]]:
    """By side and seed: the seconds of every step of every epoch, its loss, and the evaluation."""
    found: dict[str, list[dict]] = {worker.side: [] for worker in workers}
    turn = 0
    for seed in config.seeds:
        for worker in workers:
            worker.do("start", seed)
            found[worker.side].append({"seed": seed, "epochs": []})
        for epoch in range(config.epochs):
            for worker in in_turn(workers, turn := turn + 1):
                row = worker.do("epoch", epoch)
                found[worker.side][-1]["epochs"].append(row)
                seconds = sum(row["seconds"])
                report.console.print(
                    f"seed {seed}  epoch {epoch + 1}  {worker.side:5}  loss {row['loss']:.4f}  {seconds:.1f} s"
                )
        for worker in in_turn(workers, turn := turn + 1):
            test = found[worker.side][-1]["test"] = worker.do("evaluate")
            report.console.print(
                f"seed {seed}  test accuracy  {worker.side:5}  {test['accuracy']:.2%}  {test['seconds']:.1f} s"
            )
    return found


def in_turn(workers: list[Worker], turn: int) -> list[Worker]:
    first = turn % len(workers)
    return workers[first:] + workers[:first]


def seconds_of(run: dict) -> tuple[float, float]:
    """Of one training, all seconds, and those without the first step."""
    every = [seconds for epoch in run["epochs"] for seconds in epoch["seconds"]]
    return sum(every), sum(every[1:])


def table_of(record: dict) -> Table:
    """A row a side; the ratio is of seconds without the first step, of all seeds together."""
    config, found = record["config"], record["found"]
    title = f"airbench, {config['width']} wide, {config['epochs']} epochs, {config['dtype']}"
    seeds = [f"seed {run['seed']}" for run in next(iter(found.values()))]
    columns = "median", "seconds", "without first step", f"of {BASE}", "evaluation", "MiB"
    table = Table("side", *seeds, *columns, title=title)
    rest = {side: sum(seconds_of(run)[1] for run in runs) for side, runs in found.items()}
    for side, runs in found.items():
        accuracies = [run["test"]["accuracy"] for run in runs]
        total, without = (f"{np.median(values):.1f}" for values in zip(*map(seconds_of, runs), strict=True))
        ratio = f"{rest[side] / rest[BASE]:.2f}" if BASE in rest else ""
        evaluation = np.median([run["test"]["seconds"] for run in runs])
        mebibytes = max(run["test"]["MiB"] for run in runs)
        cells = (total, without, ratio, f"{evaluation:.1f}", f"{mebibytes:.0f}")
        percent = (f"{100 * value:.2f} %" for value in (*accuracies, np.median(accuracies)))
        table.add_row(side, *percent, *cells)
    return table


def main(config: Config) -> None:
    if config.markdown:
        if config.out is None:
            sys.exit("error: --markdown prints the table of --out FILE.json, which was not given.")
        print(tables.markdown(table_of(json.loads(config.out.read_text()))))
        return
    dataset = dataset_of(config)
    workers = [Worker(side, config) for side in config.sides]
    hardware = report.hardware()
    packages = {worker.side: worker.packages for worker in workers}
    report.console.print(f"{dataset.name}; {hardware}")
    for side, versions in packages.items():
        report.console.print(f"{side}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    found = measure(config, workers)
    for worker in workers:
        worker.end()
    settings = json.loads(to_json(config))
    for name in ("data", "torch", "out", "markdown"):  # the data counts, not where it lies
        del settings[name]
    facts = {"dataset": dataset.name, "hardware": hardware, "packages": packages}
    record = {"config": settings, **facts, "found": found}
    report.console.print(table_of(record))
    if config.out is not None:
        config.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2])
    else:
        main(tyro.cli(Config, description=__doc__))
