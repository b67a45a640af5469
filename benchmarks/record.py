"""Train the example for several seeds and keep a record of it: docs/records/DATE-NAME.md, which is never written again.

    python benchmarks/record.py --name airbench --target 0.93 -- --network airbench --data FOLDER
    python benchmarks/record.py --name resnet-20 --seeds 0 --target 0.9 -- --epochs 45 --data FOLDER
    python benchmarks/record.py                  print the table of what is there

Behind -- is what the example is given. A record is the result of each seed, their median, the first step after which
`target` was reached, and with them date, commit, machine, versions, command and the log of every run. Runs are kept in
`runs`; stopped, this goes on with them.
"""

import csv
import dataclasses
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

from report import duration, hardware

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "examples" / "cifar10" / "train.py"
PACKAGES = ("jax", "jaxlib", "numpy", "optax")


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = ""
    """Of the record. Without it, print the table of the records that are there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    target: float = 0.94
    """A test accuracy: the step after which it was first reached is shown."""
    runs: Path = ROOT / "runs" / "records"
    """Where the runs are."""
    folder: Path = ROOT / "docs" / "records"
    """Where records are kept."""
    note: str = ""
    """A sentence or two for the record."""


def main(config: Config, arguments: list[str]) -> None:
    """`arguments` are those of the example, but for --seed and --run."""
    if not config.name:
        print("\n".join(table(config.folder)))
        return
    commit = committed()
    path = config.folder / f"{time.strftime('%Y-%m-%d')}-{config.name}.md"
    if path.exists():
        sys.exit(f"error: {path} is there, and a record is never written again. Give another --name.")
    runs = [config.runs / config.name / str(seed) for seed in config.seeds]
    for run, seed in zip(runs, config.seeds, strict=True):
        belongs_to(run, commit)
        train(run, (*arguments, "--seed", str(seed)))
    config.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text(config, arguments, runs, commit))
    print(path)


def committed() -> str:
    """The commit of what is here. Records are made of nothing else."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    if changed := git("status", "--porcelain", "--untracked-files=no"):
        sys.exit(f"error: what is here is not what was committed; commit it first:\n{changed}")
    return git("rev-parse", "--short", "HEAD")


def belongs_to(run: Path, commit: str) -> None:
    """A run is all of one commit, the one that its record names."""
    path = run / "commit.txt"
    if path.exists() and (other := path.read_text()) != commit:
        sys.exit(f"error: {run} is of commit {other}, and this is {commit}; check that out, or move the run.")
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


def train(run: Path, arguments: Iterable[str]) -> None:
    """Start the run, or go on with it, and add what it prints to its log."""
    started = (run / "config.json").exists()
    command = [sys.executable, str(TRAIN), *(("--resume", str(run)) if started else ("--run", str(run), *arguments))]
    log = run / "log.txt"
    if log.exists() and log.read_text().rstrip().endswith("|"):  # the row at the end
        return
    with log.open("a") as file, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    if process.returncode:
        sys.exit(f"error: {run} ended with {process.returncode}; this command goes on with it.")


def reached(target: float, rows: list[dict]) -> int | None:
    """The first of these epochs, as of metrics.csv, with a test accuracy of `target` or more."""
    tested = [row for row in rows if row["test_accuracy"]]
    return next((int(row["epoch"]) for row in tested if float(row["test_accuracy"]) >= target), None)


def text(config: Config, arguments: list[str], runs: list[Path], commit: str) -> str:
    """The record as Markdown."""
    logs = [(run / "log.txt").read_text() for run in runs]
    found = []
    for run, log in zip(runs, logs, strict=True):
        rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
        accuracy = float(re.findall(r"^\| (\d+\.\d+)% \|", log, re.MULTILINE)[-1])
        found.append((accuracy, sum(float(row["seconds"]) for row in rows), len(rows), reached(config.target, rows)))
    settings = json.loads((runs[0] / "config.json").read_text())
    steps = (settings["config"]["train_images"] or 50_000) // settings["config"]["batch"]
    lines = [f"# {config.name}, {time.strftime('%Y-%m-%d')}", ""]
    lines += [config.note, ""] if config.note else []
    median, seconds = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
    lines += [
        f"**{median:.2f} %** of the test images of {settings['dataset']}, median of {len(runs)} "
        f"seed{'s' * (len(runs) > 1)}, in {duration(seconds)} (training and evaluation; without start and compilation "
        "of what is after the last epoch).",
        "",
        f"| seed | test accuracy | time | first seen at {config.target:.1%} or more |",
        "| --- | --- | --- | --- |",
    ]
    for seed, (accuracy, seconds, epochs, first) in zip(config.seeds, found, strict=True):
        where = f"epoch {first} of {epochs}, step {first * steps:,}" if first else "not"
        lines.append(f"| {seed} | {accuracy:.2f} % | {duration(seconds)} | {where} |")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    own = "--name", config.name, "--seeds", *map(str, config.seeds), "--target", str(config.target)
    command = " ".join(("python benchmarks/record.py", *own, "--", *without_folder(arguments)))
    lines += [
        "",
        f"- commit: {commit}",
        f"- machine: {hardware()}",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- seeds: {', '.join(map(str, config.seeds))}",
        f"- command: `{command}`",
        "",
    ]
    for seed, log in zip(config.seeds, logs, strict=True):
        lines += [f"## Log of seed {seed}", "", "```", without_run(log).rstrip(), "```", ""]
    return "\n".join(lines)


def table(folder: Path) -> list[str]:
    """All records of the folder, the best first, as Markdown."""
    rows = []
    for path in folder.glob("2*.md"):
        found = path.read_text()
        summary = r"^\*\*(\S+) %\*\* .* of (\d+) seeds?, in (\S+)"
        row = r"^\| \S+% \| (.+?) on .* \| (\d+ epochs), seed .* \| \S+ \| (.+) \| (jax .+) \|$"
        accuracy, seeds, time_taken = re.findall(summary, found, re.MULTILINE)[0]
        network, epochs, machine, versions = re.findall(row, found, re.MULTILINE)[0]
        params = re.findall(r"; (\S+) params; ", found) or ["not kept"]
        cells = f"[{path.stem}]({path.name})", f"{network}, {epochs}", params[0], f"{accuracy} %", seeds, time_taken
        rows.append((float(accuracy), " | ".join(("", *cells, machine, versions, "")).strip()))
    head = "| record | network | parameters | test accuracy, median | seeds | time, median | machine | versions |"
    return [head, "| --- " * head.count(" | ") + "| --- |", *(row for _, row in sorted(rows, reverse=True))]


def without_folder(arguments: Iterable[str]) -> list[str]:
    """The arguments with FOLDER for where the data lies."""
    words = list(arguments)
    return ["FOLDER" if before == "--data" else word for before, word in zip(["", *words], words, strict=False)]


def without_run(log: str) -> str:
    """The log without where the run lies."""
    return re.sub(r"results in \S+", "results in FOLDER", log)


if __name__ == "__main__":
    words = [*sys.argv[1:], "--"]
    own = words.index("--")
    main(tyro.cli(Config, description=__doc__, args=words[:own]), words[own + 1 : -1])
