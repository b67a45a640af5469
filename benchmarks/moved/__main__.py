"""Show what batch norm does when the data moves: at test time, over places, by domains; a figure and numbers for each.

    python benchmarks/moved --data FOLDER                      all; stopped, it goes on where it was
    python benchmarks/moved --claims corrupted --data FOLDER   one of them
    python benchmarks/moved --pages --data FOLDER              and write the tables into docs/
    python benchmarks/moved --markdown                         print the tables of what was found

FOLDER holds MNIST (four .gz files) and CIFAR-10 (official binary layout), or folders mnist and cifar10 with them. Where
one is missing, or without --data, the embedded shapes take its place, and the figure says so.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("benchmarks/moved", "benchmarks/evidence", "benchmarks", "examples/cifar10")
sys.path[:0] = [str(ROOT / place) for place in PLACES]

import showing
import sizes
import sources
import tyro

CLAIMS = ("corrupted", "domains", "places", "private")


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with MNIST and CIFAR-10."""
    folder: Path = ROOT / "docs" / "moved"
    """Where numbers (JSON) and figures go."""
    runs: Path = ROOT / "runs" / "moved"
    """Where the example's program leaves the networks that are adapted, and finds them again."""
    claims: tuple[str, ...] = CLAIMS
    """Which of them."""
    tiny: bool = False
    """In seconds, to see that it runs."""
    markdown: bool = False
    """Compute nothing; print the tables of what `folder` holds."""
    pages: bool = False
    """Write the tables into the pages of docs."""


def main(config: Config) -> None:
    sources.runs = config.runs
    size = sizes.TINY if config.tiny else sizes.FULL
    pages = sorted((ROOT / "docs").glob("*.md")) if config.pages else ()
    showing.show(config, size, lambda: [of(config.data).name for of in (sources.mnist, sources.cifar10)], pages)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
