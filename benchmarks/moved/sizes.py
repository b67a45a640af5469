"""How much is trained and tested: for the figures, or over in seconds, for the tests."""

from typing import NamedTuple


class Size(NamedTuple):
    seeds: int = 3
    images: int = 1024  # digits of a test; half as many for the ResNet
    batches: tuple[int, ...] = (1, 8, 64, 512)  # in which they arrive
    train: int | None = None  # images that the ResNet is trained on; None: all
    epochs: int = 3
    batch: int = 64  # of training
    steps: int = 600  # of the small networks
    width: int = 64


FULL = Size()
TINY = Size(seeds=2, images=32, batches=(16,), train=64, epochs=1, batch=16, steps=4, width=8)
