"""Show what a tutorial says of batch normalization, with data: one file a claim, a figure and numbers for each.

    python benchmarks/evidence --data FOLDER                   all; stopped, it goes on where it was
    python benchmarks/evidence --claims depth --data FOLDER    one of them
    python benchmarks/evidence --markdown                      print the tables of what was found

FOLDER holds MNIST (four .gz files) and CIFAR-10 (official binary layout), or folders mnist and cifar10 with them. Where
one is missing, or without --data, the embedded shapes take its place, and the figure says so.
"""

import dataclasses
import importlib
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "evidence"), str(ROOT / "benchmarks"), str(ROOT / "examples" / "cifar10")]

import claim
import figures
import images
import jax
import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.progress import track

CLAIMS = ("layer", "rates", "initialization", "regularization", "depth", "tuning", "cost", "recurrent", "shift")
console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with MNIST and CIFAR-10."""
    folder: Path = ROOT / "docs" / "evidence"
    """Where numbers (JSON) and figures go."""
    claims: tuple[str, ...] = CLAIMS
    """Which of them."""
    tiny: bool = False
    """In seconds, to see that it runs."""
    markdown: bool = False
    """Compute nothing; print the tables of what `folder` holds."""


def record_of(name: str, config: Config) -> claim.Record:
    size = claim.TINY if config.tiny else claim.FULL
    hardware = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    facts = {
        "size": size._asdict(),
        "hardware": hardware,
        "jax": jax.__version__,
        "images": [images.mnist(config.data).name, images.cifar10(config.data).name],
    }
    return claim.Record(config.folder / f"{name}.json", facts)


def main(config: Config) -> None:
    modules = {name: importlib.import_module(name) for name in config.claims}
    if config.markdown:
        for name, module in modules.items():
            found = claim.read(config.folder / f"{name}.json")
            print(f"**{name}**\n", *module.tell(found), "", sep="\n")
        return
    size = claim.TINY if config.tiny else claim.FULL
    records = {name: record_of(name, config) for name in modules}
    missing = []
    for name, module in modules.items():
        for job, run in module.jobs(config.data, size).items():
            if job not in records[name].jobs:
                missing.append((name, job, run))
    for name, job, run in track(missing, "showing", console=console, disable=not console.is_terminal):
        started = time.perf_counter()
        found = run()
        records[name].add(job, jax.block_until_ready(found), time.perf_counter() - started)
        console.print(f"{name}: {job}, {time.perf_counter() - started:.0f} s")
    names = {name for record in records.values() for name in record.facts["images"]}
    figures.footnotes[:] = [f"images: {name}" for name in sorted(names) if name.startswith("embedded")]
    for name, module in modules.items():
        order = module.jobs(config.data, size)
        found = {job: records[name].jobs[job] for job in order}
        with plt.rc_context():
            module.draw(found, config.folder / f"{name}.png")
        console.print(f"\n{name}", *module.tell(found), sep="\n")
    seconds = sum(job["took"] for record in records.values() for job in record.jobs.values())
    console.print(f"\n{seconds / 60:.0f} minutes in all, {' and '.join(records[config.claims[0]].facts['images'])}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
