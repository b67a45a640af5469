"""What small_batch.py has found: kept in a file, told as a table and as a figure."""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOMENTS = ("halfway", "end")


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
    color: str
    style: str


ANY = ("group_norm", "nothing")  # the size of a worker is nothing to them
LINES = (
    Line("batch norm, running of one worker", "apart", "one worker", "tab:blue", ":"),
    Line("batch norm with `groups`, running", "apart", "all workers", "tab:blue", "--"),
    Line("batch norm, recalibrated", "apart", "recalibrated", "tab:blue", "-"),
    Line("renormalized, running", "renormalized", "all workers", "tab:orange", "--"),
    Line("renormalized, recalibrated", "renormalized", "recalibrated", "tab:orange", "-"),
    Line("synchronized, running", "synchronized", "all workers", "tab:green", "--"),
    Line("synchronized, recalibrated", "synchronized", "recalibrated", "tab:green", "-"),
    Line("group norm", "group_norm", "any", "tab:gray", "-"),
    Line("scale and bias alone", "nothing", "any", "tab:gray", ":"),
)


class Record:
    """A file that holds what was found so far, written whole or not at all.

    Raises:
      ValueError: the file was begun with other `facts`.
    """

    def __init__(self, path: Path, facts: dict):
        self.path, self.facts, self.rows = path, json.loads(json.dumps(facts)), {}
        if path.exists():
            content = json.loads(path.read_text())
            for name, value in self.facts.items():
                if content[name] != value:
                    raise ValueError(f"{path} was begun with {name} {content[name]}, not {value}; take another --name.")
            self.rows = {Network(*row.pop("network")): row for row in content["networks"]}

    def add(self, network: Network, accuracy: dict, seconds: float) -> None:
        """Keep the test accuracy, in [0, 1], by moment and statistics."""
        self.rows[network] = {"accuracy": accuracy, "seconds": round(seconds, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        rows = ",\n".join(json.dumps({"network": network, **row}) for network, row in self.rows.items())
        scratch.write_text(f'{json.dumps(self.facts)[:-1]}, "networks": [\n{rows}\n]}}\n')
        scratch.replace(self.path)

    def percent(self, line: Line, size: int, moment: str) -> list[float]:
        """Test accuracy of every seed."""
        wanted = (line.remedy, self.facts["settings"]["batch"] if line.remedy in ANY else size)
        found = [row["accuracy"][moment] for network, row in self.rows.items() if network[:2] == wanted]
        return [100 * accuracy[line.statistics] for accuracy in found]

    def markdown(self, moment: str) -> str:
        """Mean and standard deviation over the seeds, in percent, by size."""
        sizes = self.facts["settings"]["sizes"]
        rows = [["images of a worker", *map(str, sizes)], ["---"] * (1 + len(sizes))]
        for line in LINES:
            found = [self.percent(line, size, moment) for size in sizes]
            rows.append([line.name, *(" ± ".join(f"{value:.1f}" for value in spread(values)) for values in found)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def draw(self, path: Path) -> None:
        """Mean by size, the standard deviation as a bar, or as a band where no size matters; a panel a moment."""
        sizes = self.facts["settings"]["sizes"]
        figure, axes = plt.subplots(1, 2, figsize=(11, 6), layout="constrained")
        for panel, moment in zip(axes, MOMENTS, strict=True):
            for line in LINES:
                found = [(size, *spread(self.percent(line, size, moment))) for size in sizes]
                found = [point for point in found if len(point) > 1]
                if not found:  # none was trained, such as one to synchronize where a worker has the whole batch
                    continue
                style = {"color": line.color, "linestyle": line.style, "label": line.name.replace("`", "")}
                if line.remedy in ANY:
                    _, mean, *deviation = found[0]
                    panel.axhline(mean, **style)
                    for half in deviation:
                        panel.axhspan(mean - half, mean + half, color=line.color, alpha=0.2)
                else:
                    x, mean, *deviation = zip(*found, strict=True)
                    panel.errorbar(x, mean, *deviation, **style, capsize=3)
            panel.set(title=moment, xscale="log", xlabel="images of a worker", ylabel="test accuracy, %")
            panel.set_xticks(sizes, list(map(str, sizes)))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(f"{self.facts['dataset']}; standard deviation over {self.facts['settings']['seeds']} seeds")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def spread(values: list[float]) -> tuple[float, ...]:
    """Mean and standard deviation; the mean alone of one value, and nothing of none."""
    if len(values) < 2:
        return tuple(values)
    return float(np.mean(values)), float(np.std(values, ddof=1))
