"""What of the recipe of examples/cifar10/airbench.py matters, and what of that is the norm, by one change at a time.

    python benchmarks/speed --data FOLDER                    all; stopped, it goes on where it was
    python benchmarks/speed --claims norms --data FOLDER     one of: left_out, norms
    python benchmarks/speed --pages --data FOLDER            and write the tables into docs/speed.md
    python benchmarks/speed --markdown                       print the tables of what was found

FOLDER holds CIFAR-10 in the official binary layout; without it the embedded shapes take its place.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("benchmarks/speed", "benchmarks/evidence", "benchmarks", "examples/cifar10")
sys.path[:0] = [str(ROOT / place) for place in PLACES]

import changes
import showing
import tyro


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10."""
    folder: Path = ROOT / "docs" / "speed"
    """Where numbers (JSON) and figures go."""
    claims: tuple[str, ...] = ("left_out", "norms")
    """Which of them."""
    tiny: bool = False
    """In seconds, to see that it runs."""
    markdown: bool = False
    """Compute nothing; print the tables of what `folder` holds."""
    pages: bool = False
    """Write the tables into docs/speed.md."""


def main(config: Config) -> None:
    size = changes.TINY if config.tiny else changes.FULL
    pages = [ROOT / "docs" / "speed.md"] if config.pages else ()
    showing.show(config, size, lambda: [changes.dataset(config.data, size).name], pages)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
