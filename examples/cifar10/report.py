"""What a person sees of a run: progress, a table, metrics.csv and curves.png."""

import csv
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

import jbn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

console = Console(highlight=False, soft_wrap=True)
COLUMNS = {  # of metrics.csv and of the table, with the format of the latter
    "epoch": "d",
    "train_loss": ".4f",
    "train_accuracy": ".2%",
    "test_loss": ".4f",
    "test_accuracy": ".2%",
    "images_per_second": ".0f",
    "seconds": ".1f",
}


class Meter:
    """A bar over all steps of a run; plain lines, at most one in 20 seconds, where the output is no terminal."""

    def __init__(self, steps: int, done: int, batch: int):
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("compiling", total=steps, completed=done)
        self.calls, self.done = 0, done
        self.steps, self.batch, self.interval = steps, batch, 0.5 if console.is_terminal else 20.0
        self.started: tuple[int, float] | None = None
        self.shown = (done, 0.0)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def update(self, epoch: int, count: int, totals, tested: str) -> None:
        """Show where the run stands after `count` more steps, now and then: reading `totals` waits for the device.

        `tested` is the last test accuracy as text.
        """
        self.done += count
        step = self.done
        self.calls += 1
        if self.calls % 4 == 0:  # or Python runs far ahead of the device, shows steps late and stops late
            totals.count.block_until_ready()
        now = time.monotonic()
        if self.started is None:  # the first step is mostly compilation
            float(totals.loss)
            self.started = self.shown = (step, time.monotonic())
            return
        if now - self.shown[1] >= self.interval:
            loss, accuracy = float(totals.loss) / int(totals.count), int(totals.correct) / int(totals.count)
            now = time.monotonic()
            rate = (step - self.shown[0]) / (now - self.shown[1])
            self.shown = (step, now)
            left = (self.steps - step) * (now - self.started[1]) / (step - self.started[0])
            speed = f"{rate * self.batch:.0f} images/s"
            text = f"epoch {epoch}  loss {loss:.3f}  accuracy {accuracy:.1%}  test {tested}  {speed}"
            if console.is_terminal:
                self.bar.update(self.task, completed=step, description=text)
            else:
                console.print(f"step {step}/{self.steps}  {text}  {duration(left)} left")


class Trace:
    """Makes calls; of three of them, after the first two, which compile, there is a trace in `folder`."""

    def __init__(self, folder: Path | None):
        self.folder, self.calls, self.running = folder, 0, False

    def __call__(self, function: Callable, *operands):
        if self.folder and self.calls == 2:
            jax.profiler.start_trace(self.folder)
            self.running = True
        results = function(*operands)
        self.calls += 1
        if self.running and self.calls == 5:
            jax.block_until_ready(results)
            self.stop()
        return results

    def stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
        console.print(f"A trace of {self.calls - 2} calls is in {self.folder}.")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.running:
            self.stop()


def bar(values, text: str):
    """`values` under a bar, or after a line where the output is no terminal."""
    if not console.is_terminal:
        console.print(text)
    return track(values, text, console=console, disable=not console.is_terminal)


def duration(seconds: float) -> str:
    """Seconds as text: 0:07, 27:05 or 3:02:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def hardware() -> str:
    """What the program runs on, as precisely as it is known."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def result_line(accuracy: float, title: str, config, history: list[dict]) -> str:
    """A run as a row of a Markdown table."""
    seconds = duration(sum(row["seconds"] for row in history))
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    cells = f"{accuracy:.2%}", title, f"{config.epochs} epochs, seed {config.seed}", seconds, hardware(), versions
    return f"| {' | '.join(cells)} |"


def row_text(row: dict) -> dict[str, str]:
    """The values of one epoch as text; what was not measured is a dash."""
    return {name: "-" if row[name] is None else format(row[name], form) for name, form in COLUMNS.items()}


def last_tested(history: list[dict]) -> str:
    """The last test accuracy as text, a dash where there is none yet."""
    return next((f"{row['test_accuracy']:.2%}" for row in history[::-1] if row["test_accuracy"] is not None), "-")


def print_row(row: dict) -> None:
    console.print("  ".join(f"{name.replace('_', ' ')} {text}" for name, text in row_text(row).items()))


def print_table(history: list[dict], title: str) -> None:
    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    for row in history:
        table.add_row(*row_text(row).values())
    console.print(table)


def print_drift(drifts: dict[str, dict[str, jbn.Drift]], title: str) -> None:
    """A line for each layer, of its worst feature on each part of the data; the layer worst on the first part first."""
    table = Table(title=title, caption="of each layer the worst feature; error: of its output, in standard deviations")
    table.add_column("layer", no_wrap=True)
    for part in drifts:
        for name in ("error", "shift", "ratio"):
            table.add_column(f"{part}\n{name}", justify="right")

    def worst(drift: jbn.Drift) -> tuple[float, float, float]:
        feature = int(np.argmax(drift.error))
        return float(drift.error[feature]), float(drift.shift[feature]), float(drift.ratio[feature])

    rows = {layer: [worst(drift[layer]) for drift in drifts.values()] for layer in next(iter(drifts.values()))}
    for layer, cells in sorted(rows.items(), key=lambda row: row[1][0], reverse=True):
        texts = [(f"{error:.2f}", f"{shift:+.2f}", f"{ratio:.2f}") for error, shift, ratio in cells]
        table.add_row(layer, *(text for cell in texts for text in cell))
    console.print(table)


def write_metrics(path: Path, history: list[dict]) -> None:
    """Write metrics.csv whole or not at all."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    scratch.replace(path)


def write_curves(path: Path, history: list[dict], layers: dict[str, jbn.Drift], title: str) -> None:
    """Write curves.png: loss and accuracy by epoch, and how far evaluation is from training in every layer."""
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2)
    for column, name in enumerate(("loss", "accuracy")):
        axis = figure.add_subplot(grid[0, column])
        for part in ("train", "test"):
            measured = [(row["epoch"], row[f"{part}_{name}"]) for row in history if row[f"{part}_{name}"] is not None]
            x, y = zip(*measured, strict=True)
            axis.plot(x, y, marker="o", label=part)
        axis.set(xlabel="epoch", ylabel=name)
        axis.legend()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axis = figure.add_subplot(grid[1, :])
    worst = {name: float(np.max(layer.error)) for name, layer in layers.items()}
    named = sorted(worst, key=worst.__getitem__)[-3:]
    for place, (name, layer) in enumerate(layers.items()):
        axis.plot([place] * len(layer.error), layer.error, ".", color="tab:red" if name in named else "tab:gray")
        if name in named:
            feature = int(np.argmax(layer.error))
            at = (place, worst[name])
            axis.annotate(f"{name}, feature {feature}", at, (0, 6), textcoords="offset points", ha="center")
    axis.axhline(0.1, color="black", linewidth=1, linestyle="--")
    axis.annotate("goes\nunnoticed\nbelow", (1, 0.1), (4, 0), ("axes fraction", "data"), "offset points", va="center")
    axis.set(
        title="How far evaluation is from training, each feature of each layer a dot, the three worst layers named",
        xlabel="layer, from the image on",
        ylabel="error of the output, in standard deviations",
        ylim=(0, 1.15 * max(0.1, *worst.values())),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
