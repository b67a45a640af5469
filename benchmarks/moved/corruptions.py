"""Six ways in which images arrive otherwise than in training, each at one strength; seeded."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

# Of CIFAR-10 (objects in color) and MNIST (digits): each takes something from a trained network, and not everything.
STRENGTHS = {
    "noise": (0.12, 0.4),  # standard deviation, of the full range
    "blur": (1.0, 2.0),  # standard deviation, in pixels
    "contrast": (0.25, 0.25),  # what is left of it
    "haze": (0.6, 0.6),  # share of the light that is haze
    "jpeg": (8, 1),  # quality
    "shift": (5, 3),  # pixels, in either direction of both axes
}
KINDS = ("clean", *STRENGTHS)


def corrupt(images: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """`images` [count, height, width, channels], uint8, corrupted; the same for the same seed."""
    if kind == "clean":
        return images
    random = np.random.default_rng([seed, KINDS.index(kind)])
    gray = images.shape[-1] == 1
    values = FUNCTIONS[kind](images / 255.0, STRENGTHS[kind][gray], random)
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)


def noise(images, strength, random):
    return images + random.normal(0, strength, images.shape)


def blur(images, strength, random):
    del random
    reach = int(np.ceil(3 * strength))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * strength**2))
    for axis in (1, 2):
        padding = [(reach, reach) if each == axis else (0, 0) for each in range(4)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(images, padding, "edge"), len(kernel), axis)
        images = windows @ (kernel / kernel.sum())
    return images


def contrast(images, strength, random):
    del random
    mean = images.mean((1, 2), keepdims=True)
    return mean + strength * (images - mean)


def haze(images, strength, random):
    """White that is denser here and thinner there: random values at 4 x 4 places, and between them linearly."""
    count, height, width, _ = images.shape
    density = random.uniform(0.5, 1, (count, 4, 4))
    for axis, length in ((1, height), (2, width)):
        at = np.linspace(0, 3, length)
        low = np.minimum(np.int64(at), 2)
        part = np.reshape(at - low, [-1 if each == axis else 1 for each in range(3)])
        density = (1 - part) * density.take(low, axis) + part * density.take(low + 1, axis)
    share = strength * density[..., None]
    return (1 - share) * images + share


def jpeg(images, strength, random):
    del random

    def one(image):
        file = io.BytesIO()
        pixels = np.round(255 * image).astype(np.uint8)
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=strength)
        return np.asarray(Image.open(file)).reshape(pixels.shape) / 255.0

    return np.stack([one(image) for image in images])


def shift(images, strength, random):
    """Each image by as much in one of the four diagonal directions; its edge goes on."""
    padded = np.pad(images, ((0, 0), (strength, strength), (strength, strength), (0, 0)), "edge")
    _, height, width, _ = images.shape
    starts = 2 * strength * random.integers(0, 2, (len(images), 2))
    rows, columns = (start[:, None] + np.arange(size) for start, size in zip(starts.T, (height, width), strict=True))
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


FUNCTIONS: dict[str, Callable] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "haze": haze,
    "jpeg": jpeg,
    "shift": shift,
}
