"""Show what a tutorial says of batch normalization, with data: one file a claim, a figure and numbers for each.

    python benchmarks/evidence --data FOLDER                   all; stopped, it goes on where it was
    python benchmarks/evidence --claims depth --data FOLDER    one of them
    python benchmarks/evidence --markdown                      print the tables of what was found

FOLDER holds MNIST (four .gz files) and CIFAR-10 (official binary layout), or folders mnist and cifar10 with them. Where
one is missing, or without --data, the embedded shapes take its place, and the figure says so.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "evidence"), str(ROOT / "benchmarks"), str(ROOT / "examples" / "cifar10")]

import claim
import images
import showing
import tyro

CLAIMS = (
    "layer",
    "rates",
    "initialization",
    "regularization",
    "depth",
    "residual",
    "tuning",
    "cost",
    "recurrent",
    "shift",
)


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


def main(config: Config) -> None:
    size = claim.TINY if config.tiny else claim.FULL
    showing.show(config, size, lambda: [images.mnist(config.data).name, images.cifar10(config.data).name])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
