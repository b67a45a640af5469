"""Ten shapes in random colours, places, sizes and turns: a set of CIFAR's shape that needs no download."""

import numpy as np

CLASSES = ("disk", "ring", "square", "frame", "triangle", "cross", "bar", "crescent", "stripes", "pair")


def make(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 32, 32, 3] uint8 and labels [count] int32.

    A shape may be darker or brighter than what is behind it, so no single pixel says anything about the class and a
    linear model has little to go by.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(len(CLASSES), size=count).astype(np.int32)
    row, column, turn, radius = (
        random.uniform(low, high, (count, 1, 1)) for low, high in ((-6, 6), (-6, 6), (-0.4, 0.4), (7, 12))
    )
    down = np.arange(32).reshape(1, 32, 1) - 15.5 - row
    right = np.arange(32).reshape(1, 1, 32) - 15.5 - column
    # u, v: coordinates in the frame of the shape, in units of its radius
    u = (right * np.cos(turn) + down * np.sin(turn)) / radius
    v = (down * np.cos(turn) - right * np.sin(turn)) / radius
    inside = _inside(u, v, labels.reshape(count, 1, 1))

    behind, before = random.uniform(0, 1, (2, count, 1, 1, 3))
    before = np.where(np.abs(before - behind).max(-1, keepdims=True) < 0.35, 1 - behind.round(), before)
    shade = 1 + 0.3 * random.uniform(-1, 1, (count, 1, 1, 1)) * (right + down)[..., None] / 16
    images = np.where(inside[..., None], before, behind) * shade + 0.08 * random.standard_normal((count, 32, 32, 3))
    return (255 * images.clip(0, 1)).astype(np.uint8), labels


def _inside(u, v, label):
    """Where the points lie in the shape of each image's label."""
    distance, farthest, nearest = np.hypot(u, v), np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    shapes = (
        distance < 0.9,
        abs(distance - 0.75) < 0.2,
        farthest < 0.8,
        abs(farthest - 0.65) < 0.18,
        (v < 0.55) & (v > 1.73 * abs(u) - 1),
        (nearest < 0.25) & (farthest < 0.95),
        (abs(u) < 0.25) & (abs(v) < 0.95),
        (distance < 0.9) & (np.hypot(u - 0.45, v) > 0.7),
        (farthest < 0.9) & (np.cos(10 * u) > 0),
        np.hypot(abs(u) - 0.6, v) < 0.38,
    )
    return np.choose(label, shapes)
