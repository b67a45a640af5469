"""The images that the claims are shown on, as rows of numbers with mean 0 and standard deviation 1."""

import gzip
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from data import embedded, read  # of examples/cifar10


class Images(NamedTuple):
    name: str
    train: np.ndarray  # [train, height, width, channels], float32
    train_labels: np.ndarray  # [train], int32
    test: np.ndarray
    test_labels: np.ndarray

    @property
    def rows(self) -> "Images":
        """Each image as one row."""
        return self._replace(train=flat(self.train), test=flat(self.test))

    @property
    def halved(self) -> "Images":
        return self._replace(train=halve(self.train), test=halve(self.test))

    def first(self, train: int, test: int) -> "Images":
        return Images(
            self.name, self.train[:train], self.train_labels[:train], self.test[:test], self.test_labels[:test]
        )


def halve(images: np.ndarray) -> np.ndarray:
    """Each square of four pixels as one."""
    parts = [images[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return np.asarray(np.mean(parts, 0), np.float32)


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


@cache
def mnist(folder: Path | None) -> Images:
    """MNIST from the four files of its authors, in `folder` or its part mnist; else the embedded shapes in gray."""
    for place in (folder, folder / "mnist") if folder else ():
        if (place / "train-images-idx3-ubyte.gz").is_file():
            parts = []
            for part in ("train", "t10k"):
                pixels = idx(place / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
                parts += [pixels, idx(place / f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int32)]
            return scaled("MNIST", *parts)
    return embedded_shapes(gray=True)


@cache
def cifar10(folder: Path | None) -> Images:
    """CIFAR-10 in the official binary layout, in `folder` or its part cifar10, halved; else the embedded shapes."""
    for place in (folder, folder / "cifar10") if folder else ():
        try:
            found = read(place)
        except (ValueError, OSError):
            continue
        return scaled("CIFAR-10", found.train_images, found.train_labels, found.test_images, found.test_labels).halved
    return embedded_shapes(gray=False)


def embedded_shapes(gray: bool) -> Images:
    found = embedded()
    pixels = [images.mean(-1, keepdims=True) if gray else images for images in (found.train_images, found.test_images)]
    return scaled("embedded shapes", pixels[0], found.train_labels, pixels[1], found.test_labels)


def scaled(name, train, train_labels, test, test_labels) -> Images:
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    train, test = (np.asarray((images - mean) / std, np.float32) for images in (train, test))
    return Images(name, train, train_labels, test, test_labels)


def idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def adding(key: jax.Array, batch: int, length: int):
    """The adding task of Hochreiter & Schmidhuber 1997: sum the two marked numbers of a sequence.

    Gives x [length, batch, 2], numbers in [0, 1] and marks, one in each half; and the sums [batch].
    """
    numbers, first, second = jax.random.split(key, 3)
    values = jax.random.uniform(numbers, (length, batch))
    half = length // 2
    places = jax.random.randint(first, (batch,), 0, half), jax.random.randint(second, (batch,), half, length)
    marks = sum(jax.nn.one_hot(place, length, axis=0) for place in places)
    return jnp.stack([values, marks], -1), jnp.sum(values * marks, 0)
