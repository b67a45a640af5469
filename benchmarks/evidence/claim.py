"""What all claims share: how large they are run, how numbers are kept, how seeds are drawn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import figures
import numpy as np

WITH, WITHOUT = figures.OWN, figures.OTHER
COLORS = {"with": WITH, "without": WITHOUT}
NAMES = {"with": "with batch norm", "without": "without"}


class Size(NamedTuple):
    """How much is trained: that of the figures, or one that is over in seconds, for the tests."""

    seeds: int = 5
    steps: int = 400
    batch: int = 128
    width: int = 64
    train: int = 10_000  # images
    test: int = 2_000
    sweep: int = 1  # take each so many of the rates, scales and depths


FULL = Size()
TINY = Size(seeds=2, steps=3, batch=16, width=8, train=64, test=32, sweep=4)
Jobs = dict[str, Callable[[], dict[str, Any]]]


def numbers(value: Any, digits: int = 5) -> Any:
    """Arrays as lists of rounded numbers; what is not finite as None, which JSON has."""
    if isinstance(value, dict):
        return {str(name): numbers(each, digits) for name, each in value.items()}
    array = np.asarray(value, np.float64)
    rounded = np.vectorize(lambda each: float(f"{each:.{digits}g}") if np.isfinite(each) else None, otypes=[object])
    return rounded(array).tolist()


def array(value: Any) -> np.ndarray:
    """As `numbers` wrote it, None as NaN."""
    return np.array(value, np.float64)


class Record:
    """The results of one claim, a file that is written whole after every job."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.jobs = path, json.loads(json.dumps(facts)), {}
        if path.exists():
            content = json.loads(path.read_text())
            if content["facts"] == self.facts:
                self.jobs = content["jobs"]

    def add(self, name: str, found: dict[str, Any], seconds: float) -> None:
        self.jobs[name] = {"took": round(seconds, 1), **numbers(found)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"facts": self.facts, "jobs": self.jobs}) + "\n")
        scratch.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["jobs"]


def spread(values, form: str = "{:.1f}") -> str:
    """Mean and range over the seeds, if there are several."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return f"{np.isnan(values).sum()} of {values.size} diverged"
    if values.size == 1:
        return form.format(values.item())
    low, middle, high = (form.format(value) for value in (values.min(), values.mean(), values.max()))
    return f"{middle} ({low} to {high})"


def band(axis, x, values, color: str, name: str | None = None, **style) -> None:
    """The mean over the seeds, the first axis of `values`, and their range; the line is named where it ends."""
    values = np.asarray(values, np.float64)
    mean = np.mean(values, 0)
    axis.plot(x, mean, color=color, **style)
    axis.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    shown = np.flatnonzero(np.isfinite(mean))
    if name and len(shown):
        figures.name_line(axis, x[shown[-1]], float(mean[shown[-1]]), name, color)


def smooth(losses, window: int = 10) -> np.ndarray:
    """Means of so many steps: [..., steps] to [..., steps / window]."""
    losses = np.asarray(losses, np.float64)
    window = min(window, losses.shape[-1])
    count = losses.shape[-1] // window
    return losses[..., : count * window].reshape(*losses.shape[:-1], count, window).mean(-1)
