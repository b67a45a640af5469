"""CrossQ on gymnasium's pendulum: with batch renormalization, with batch norm, with none, and without the joint batch.

python benchmarks/pendulum.py                   15 minutes on 2 CPU cores; stopped, it goes on where it was
python benchmarks/pendulum.py --markdown        print the table of what was found
"""

import dataclasses
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "evidence"), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import claim
import crossq
import figures
import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

KINDS = {  # what is said of it, what it differs by, and its color
    "renorm": ("batch renormalization", {}, figures.OWN),
    "batch": ("batch norm", {"norm": "batch"}, figures.OTHER),
    "apart": ("batch norm, halves apart", {"norm": "batch", "joint": False}, figures.THIRD),
    "none": ("none", {"norm": "none"}, figures.PLAIN),
}
GOOD = -200  # a return near the best there is
console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Config:
    folder: Path = ROOT / "docs"
    """Where numbers (JSON) and the figure go."""
    seeds: int = 5
    steps: int = 6_000
    """In the environment."""
    markdown: bool = False
    """Compute nothing; print the table of what `folder` holds."""


def main(config: Config) -> None:
    path = config.folder / "pendulum.json"
    if config.markdown:
        print(*tell(claim.read(path)), sep="\n")
        return
    facts = {
        "steps": config.steps,
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "flax", "gymnasium")},
    }
    record = claim.Record(path, facts)
    jobs = {f"{kind} {seed}": (kind, seed) for seed in range(config.seeds) for kind in KINDS}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=len(jobs) * config.steps)
        for name, (kind, seed) in jobs.items():
            if name not in record.jobs:
                started, curve = time.perf_counter(), []
                for step, score, _ in crossq.train(crossq.Config(steps=config.steps, **KINDS[kind][1]), seed):
                    curve.append((step, score))
                    progress.advance(bar, step - (curve[-2][0] if len(curve) > 1 else 0))
                steps, scores = zip(*curve, strict=True)
                record.add(name, {"step": steps, "return": scores}, time.perf_counter() - started)
                progress.console.print(f"{name}: {scores[-1]:.0f}, {record.jobs[name]['took']:.0f} s")
            else:
                progress.advance(bar, config.steps)
    draw(record.jobs, config.folder / "pendulum.png")
    console.print(*tell(record.jobs), sep="\n")


def curves(found, kind) -> tuple[np.ndarray, np.ndarray]:
    """The steps, and the returns [seeds, steps]."""
    of_kind = [job for name, job in found.items() if name.split()[0] == kind]
    return claim.array(of_kind[0]["step"]), claim.array([job["return"] for job in of_kind])


def draw(found, path: Path) -> None:
    figure, axes = plt.subplots(1, len(KINDS), figsize=(13, 4.5), sharey=True)
    for axis, (kind, (name, _, color)) in zip(axes, KINDS.items(), strict=True):
        steps, returns = curves(found, kind)
        axis.plot(steps, returns.T, color=color, linewidth=1, alpha=0.5)
        axis.plot(steps, returns.mean(0), color=color, linewidth=3)
        axis.axhline(GOOD, color="black", linewidth=1, linestyle="--")
        axis.set_title(name, color=color, fontweight="bold")
        axis.set_xlabel("steps in the environment")
    axes[0].set_ylabel("return of an evaluation")
    figure.suptitle(f"CrossQ on Pendulum-v1, by what normalizes: {len(found) // len(KINDS)} seeds and their mean")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = ["| | return at a quarter of the steps | at half | at the end | steps to -200 |", "|" + " --- |" * 5]
    for kind, (name, _, _) in KINDS.items():
        steps, returns = curves(found, kind)
        some = [claim.spread(returns[:, len(steps) // part - 1], "{:.0f}") for part in (4, 2, 1)]
        reached = [steps[np.argmax(scores >= GOOD)] if (scores >= GOOD).any() else np.inf for scores in returns]
        came = int(np.isfinite(reached).sum())
        first = claim.spread(reached, "{:,.0f}") if came == len(reached) else f"{came} of {len(reached)} came there"
        lines.append(f"| {name} | {' | '.join(some)} | {first} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
