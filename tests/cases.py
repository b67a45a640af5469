"""The cases, once: layouts of x, and weights of every kind for each."""

import numpy as np
import reference

import jbn

LAYOUTS = {  # shape and feature axis, with two values of each feature at least
    "two values": ((2, 3), -1),
    "two values of one row": ((1, 2, 3), -1),
    "no row axis": ((5, 3), 0),
    "channels first": ((2, 3, 4, 5), 1),
    "channels in the middle": ((2, 4, 3, 5), 2),
    "two feature axes apart": ((3, 4, 2, 5), (0, 2)),
    "from the end": ((3, 4, 2, 5), (-1, -3)),
    "one feature for all": ((7, 1, 1), (1, 2)),
    "three feature axes": ((2, 3, 2, 3, 4), (4, -3, 0)),
    "size 1 all around": ((1, 8, 1, 3, 1), (3, 4)),
    "many axes": ((2, 1, 2, 1, 2, 1, 2, 3), -1),
}
WEIGHTS = ("none", "mask", "repeats", "real", "mask by feature", "real by feature")


def batch(shape, feature_axis=-1, seed=0):
    """x around 1, its first value and its last far enough apart, with params and a state that has evidence."""
    rng = np.random.default_rng(seed)
    axes = reference.reduced_axes(len(shape), feature_axis)
    features = tuple(np.delete(shape, axes))
    scale, bias, mean = rng.uniform(-2, 2, (3, *features)).astype(np.float32)
    var, weight = rng.uniform(0.5, 1, (2, *features)).astype(np.float32)
    x = rng.uniform(0, 2, shape).astype(np.float32)
    x[end(0, shape, axes)] -= 2
    x[end(-1, shape, axes)] += 2
    return x, jbn.Params(scale, bias), jbn.State(mean, var, weight)


def end(index, shape, axes):
    """The first or the last value of every feature."""
    return tuple(index if axis in axes else slice(None) for axis in range(len(shape)))


def weights(kind, shape, feature_axis=-1, seed=1):
    """Of the reduced axes, or by feature of the whole shape; the first and the last value of a feature have some."""
    if kind == "none":
        return None
    rng = np.random.default_rng(seed)
    axes = reference.reduced_axes(len(shape), feature_axis)
    if "by feature" not in kind:
        shape, axes = [shape[axis] for axis in axes], range(len(axes))
    there = rng.uniform(size=shape) < 0.6
    there[end(0, shape, axes)] = there[end(-1, shape, axes)] = True
    if "mask" in kind:
        return there
    numbers = rng.integers(1, 4, shape) if kind == "repeats" else rng.uniform(0.5, 2, shape)
    return (there * numbers).astype(np.int32 if kind == "repeats" else np.float32)
