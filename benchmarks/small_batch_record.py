"""What small_batch.py has found: kept in a file, told as a table and as a figure."""

import json
from pathlib import Path
from typing import NamedTuple

import figures
import matplotlib.pyplot as plt
import numpy as np
import remedies

STAGES = ("halfway", "end")


class Network(NamedTuple):
    """What one training differs by from the others."""

    remedy: str
    size: int  # images of a worker
    seed: int


class Line(NamedTuple):
    """A row of the tables and a line of the figure: what a network was trained and evaluated with."""

    name: str
    remedy: str
    statistics: str
    shown: str = ""  # its name in the figure, where it is in there
    color: str = ""

    @property
    def alone(self) -> bool:
        """Whether each image is treated by itself, so that the size is nothing to it."""
        return not remedies.RUNNING[self.remedy]


LINES = (
    Line("batch norm, running of one worker", "batch_norm", "one worker"),
    Line("batch norm with `groups`, running", "batch_norm", "all workers", "batch norm", figures.OWN),
    Line("batch norm, recalibrated", "batch_norm", "recalibrated"),
    Line("renormalized, running", "renormalized", "all workers", "renormalized", figures.OTHER),
    Line("renormalized, recalibrated", "renormalized", "recalibrated"),
    Line("synchronized, running", "synchronized", "all workers", "synchronized", figures.THIRD),
    Line("synchronized, recalibrated", "synchronized", "recalibrated"),
    Line("group norm", "group_norm", "any", "group norm", figures.PLAIN),
    Line("scale and bias alone", "scale_and_bias", "any"),
)


class Record:
    """A file that holds what was found so far, written whole or not at all.

    Raises:
      ValueError: the file was begun with other `facts`, or is none of these.
      OSError: the folder cannot be made.
    """

    def __init__(self, path: Path, facts: dict):
        self.path, self.facts, self.rows = path, json.loads(json.dumps(facts)), {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            rows = {Network(*row.pop("network")): row for row in content["networks"]}
            was, now = ({**facts, **facts["settings"]} for facts in (content, self.facts))
            changed = [name for name in now if name != "settings" and was[name] != now[name]]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no record of this program ({error!r}); take another --name.") from error
        if changed:
            said = ", ".join(f"{name} {was[name]}, not {now[name]}" for name in changed)
            raise ValueError(f"{path} was begun with {said}; take another --name.")
        self.rows = rows

    def add(self, network: Network, accuracy: dict, seconds: float) -> None:
        """Keep the test accuracy, in [0, 1], by stage and statistics."""
        self.rows[network] = {"accuracy": accuracy, "seconds": round(seconds, 1)}
        scratch = self.path.with_suffix(".tmp")
        rows = ",\n".join(json.dumps({"network": network, **row}) for network, row in self.rows.items())
        scratch.write_text(f'{json.dumps(self.facts)[:-1]}, "networks": [\n{rows}\n]}}\n')
        scratch.replace(self.path)

    def percent(self, remedy: str, size: int, statistics: str, stage: str) -> list[float]:
        """Test accuracy of every seed."""
        found = [row["accuracy"][stage] for network, row in self.rows.items() if network[:2] == (remedy, size)]
        return [100 * accuracy[statistics] for accuracy in found]

    def by_size(self, line: Line, stage: str) -> list[list[float]]:
        """Test accuracy of every size and seed."""
        settings = self.facts["settings"]
        sizes = [settings["batch"] if line.alone else size for size in settings["sizes"]]
        return [self.percent(line.remedy, size, line.statistics, stage) for size in sizes]

    def markdown(self, stage: str) -> str:
        """Mean and standard deviation over the seeds, in percent, by size."""
        sizes = self.facts["settings"]["sizes"]
        rows = [["images of a worker", *map(str, sizes)], ["---"] * (1 + len(sizes))]
        for line in LINES:
            found = map(spread, self.by_size(line, stage))
            rows.append([line.name, *(" ± ".join(f"{value:.1f}" for value in values) for values in found)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def noise(self, stage: str) -> str:
        """Standard deviation, within a seed, of trainings that are one computation but for rounding."""
        settings, found = self.facts["settings"], []
        for statistics in ("all workers", "recalibrated"):
            same = [self.percent("synchronized", size, statistics, stage) for size in settings["sizes"]]
            same.append(self.percent("batch_norm", settings["batch"], statistics, stage))
            same = [values for values in same if values]
            found.append(np.sqrt(np.var(same, 0, ddof=1).mean()) if len(same) > 1 else np.nan)
        return "{:.1f} points with running statistics, {:.1f} with recalibrated ones".format(*found)

    def draw(self, path: Path) -> None:
        """Test accuracy at the end by size, with running statistics: the mean as a line, every seed as a dot."""
        sizes = self.facts["settings"]["sizes"]
        figure, axis = plt.subplots(figsize=(10, 5.5))
        for line in (line for line in LINES if line.shown):
            found = [(size, values) for size, values in zip(sizes, self.by_size(line, "end"), strict=True) if values]
            if not found:  # no size is smaller than the batch: none to synchronize
                continue
            x, values = zip(*found, strict=True)
            means = [np.mean(each) for each in values]
            axis.plot(x, means, color=line.color)
            for size, each in found:
                axis.plot([size] * len(each), each, ".", color=line.color, alpha=0.6)
            at = -1 if x[-1] == sizes[-1] else 0  # above its start, where others go on behind its end
            figures.name_line(axis, x[at], float(means[at]) + (0.8 if at == 0 else 0), line.shown, line.color)
        axis.set(xscale="log", xlabel="images that share their statistics", ylabel="test accuracy, %")
        axis.set_xticks(sizes, list(map(str, sizes)))
        axis.set_xlim(sizes[0] * 0.85, sizes[-1] * 2.6)  # room for the names
        axis.minorticks_off()
        figure.suptitle("Small batches cost accuracy; only pooled statistics give it back")
        figures.save(figure, path)


def spread(values: list[float]) -> tuple[float, ...]:
    """Mean and standard deviation; the mean alone of one value, and nothing of none."""
    if len(values) < 2:
        return tuple(values)
    return float(np.mean(values)), float(np.std(values, ddof=1))
