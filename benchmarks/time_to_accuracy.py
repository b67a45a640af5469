"""Seconds of training until the example first has a test accuracy of 94 %.

    python benchmarks/time_to_accuracy.py --data FOLDER
    python benchmarks/time_to_accuracy.py --data FOLDER --target 0.8 --arguments --depth 8 --epochs 10

Trains the example once; counts the epochs' own seconds, with compilation and without evaluation. A CPU takes hours.
"""

import csv
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "cifar10" / "train.py"


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path
    """Folder with CIFAR-10 in the official binary layout."""
    target: float = 0.94
    arguments: tuple[str, ...] = ("--preset", "accelerator")
    """What else the example is given."""


def seconds_until(target: float, metrics: Path) -> tuple[float, int] | None:
    """Seconds and epochs until the test accuracy in metrics.csv reaches `target`."""
    seconds = 0.0
    for row in csv.DictReader(metrics.read_text().splitlines()):
        seconds += float(row["seconds"])
        if row["test_accuracy"] and float(row["test_accuracy"]) >= target:
            return seconds, int(row["epoch"])
    return None


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, TRAIN, "--data", config.data, "--run", run, *config.arguments]
        subprocess.run([str(part) for part in command], check=True)
        found = seconds_until(config.target, run / "metrics.csv")
    print(
        f"{config.target:.0%} after {found[0]:.0f} s, epoch {found[1]}"
        if found
        else f"{config.target:.0%}: not reached"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
