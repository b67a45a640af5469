"""Arrays of other libraries by name: picked, copied, and freed of what is left of an initial 0 and 1."""

import math
import operator
import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jbn._core.batch import features_of
from jbn._door.fields import check_fields
from jbn._types import Params, State, statistics_dtype


def pick(source, entries, required, optional, hint="", ignored=(), counts=()) -> dict[str, np.ndarray]:
    """The arrays of `entries` by name: all of `required`, some of `optional`, no other than `counts` and `ignored`.

    `counts` have to be there, and are not floating-point.
    """
    given = {name: value for name, value in entries.items() if value is not None}
    missing = [name for name in (*required, *counts) if name not in given]
    unknown = [name for name in given if name not in (*required, *counts, *optional, *ignored)]
    if missing or unknown:
        faults = [f"missing: {', '.join(missing)}"] * bool(missing)
        faults += [f"unknown: {', '.join(map(str, unknown))}"] * bool(unknown)
        raise ValueError(
            f"{source} has {listed(entries)}; expected {', '.join((*required, *counts))} and, where the layer has "
            f"them, {', '.join((*optional, *ignored))} ({'; '.join(faults)}). {hint}".strip()
        )
    return {
        name: as_entry(f"{source}[{name!r}]", value) for name, value in given.items() if name not in (*counts, *ignored)
    }


def check_mapping(source, entries, hint=""):
    if not isinstance(entries, Mapping):
        hint = "docs/files.md has what reads a file." if isinstance(entries, str | os.PathLike) else hint
        raise TypeError(
            f"{source} is a {type(entries).__name__}; expected a mapping of names to arrays. {hint}".strip()
        )


def listed(entries) -> str:
    """The names in `entries`, of which those of a network are many."""
    names = [name if entries[name] is not None else f"{name} (None)" for name in entries]
    shown = ", ".join(map(str, names[:12])) or "nothing"
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown


def as_entry(name, given) -> np.ndarray:
    try:
        if hasattr(given, "asnumpy"):  # of MXNet and MindSpore
            given = given.asnumpy()
        elif hasattr(given, "detach"):  # a tensor of PyTorch, PaddlePaddle, MegEngine or tinygrad
            given = given.detach()
            given = given.cpu() if hasattr(given, "cpu") else given
            narrow = str(given.dtype).endswith(".bfloat16")  # which NumPy cannot hold
            given = given.float().numpy().astype(jnp.bfloat16) if narrow else given.numpy()
        array = np.asarray(given)
    except (TypeError, ValueError, NotImplementedError) as error:  # the last of a tensor on PyTorch's meta device
        raise TypeError(f"{name} is a {type(given).__name__}; expected an array. {error}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        found = f"a {type(given).__name__}" if array.dtype == object else f"{array.dtype}{list(array.shape)}"
        raise TypeError(f"{name} is {found}; expected a floating-point array.")
    return array


def assemble(named, names, steps=None, decay=None, start=1.0) -> tuple[Params, State]:
    """Copies of what `names` says is scale, bias, mean and var; less the initial values where `steps` are given.

    `start` is the initial variance.
    """
    shapes = {name: list(array.shape) for name, array in named.items()}
    if len({*map(tuple, shapes.values())}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes differ: {listed}; expected one value per feature in each.")
    scale, bias, mean, var = (named.get(name) for name in names)
    for name, array in named.items():
        faulty = ~np.isfinite(array) | ((array < 0) & (name == names[3]))
        if np.any(faulty):
            wanted = "finite variances, none below 0" if name == names[3] else "finite numbers"
            way = (
                "Set the scale or bias of those features anew."
                if name in names[:2]
                else "jbn.State(mean, var), made by hand, takes those features as ones without evidence: train on, or "
                "jbn.recalibrate."
            )
            raise ValueError(
                f"{name} has {np.sum(faulty)} of {array.size} values such as {array[faulty][0]}; expected {wanted}. "
                f"{way}"
            )
    weight = 1.0
    if steps is not None or decay is not None:
        mean, var, weight = _without_start(mean, var, steps, decay, start)
    dtype = statistics_dtype(*(named[name].dtype for name in names[2:]))
    statistics = (jnp.array(np.asarray(field).astype(dtype)) for field in (mean, var, np.full(mean.shape, weight)))
    params = (None if field is None else jnp.array(field) for field in (scale, bias))
    return Params(*params), State(*statistics)


def _without_start(mean, var, steps, decay, start):
    """Mean, variance and weight, less an initial mean 0 and variance `start` that have decayed for so many steps."""
    if steps is None or decay is None:
        raise ValueError(
            f"steps is {steps} and decay is {decay}; expected both, to take out the initial mean 0 and variance "
            f"{start:g}, or neither, to keep them as data. PyTorch counts steps in num_batches_tracked; decay is 1 - "
            f"its momentum."
        )
    left = check_decay(decay) ** check_steps(steps)
    if left == 1:
        if np.any(mean != 0) or np.any(var != start):
            raise ValueError(
                f"steps is 0, and the running statistics are not the initial mean 0 and variance {start:g}; expected "
                f"the steps since the start. A layer that was given its statistics, as by to_torch, has not counted "
                f"them."
            )
        return mean, np.ones_like(var), 0.0
    # A variance is at least what is left of the initial one, but for the rounding of every step.
    kept = left * start
    if np.any(var.astype(np.float64) < kept * (1 - 1e-3) - float(jnp.finfo(var.dtype).eps)):
        raise ValueError(
            f"steps is {steps} and decay is {decay}, by which {left:.4g} of the initial variance {start:g} is left, "
            f"and the least running variance is {np.min(var):.4g}; expected the steps since the start, all with that "
            f"decay (one minus PyTorch's momentum)."
        )
    mean, var = mean.astype(np.float64) / (1 - left), (var.astype(np.float64) - kept) / (1 - left)
    return mean, np.maximum(var, 0), 1 - left


def check_steps(steps, name="steps") -> int:
    try:
        count = -1 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{name} is {steps!r}; expected a whole number of steps.")
    return count


def check_decay(decay) -> float:
    if isinstance(decay, bool) or not 0 <= decay < 1:
        raise ValueError(f"decay is {decay!r}; expected a number in [0, 1), the weight of the old value.")
    return float(decay)


def steps_of(weight: float, decay: float) -> int:
    """The steps of `decay` whose evidence is nearest to `weight`, and at least one where there is any."""
    if weight <= 0 or decay == 0:
        return int(weight > 0)
    left = max(1 - weight, 2**-26)  # with which the weight is 1 in float32
    fewer = math.floor(math.log(left) / math.log(decay))
    return max(1, min((fewer, fewer + 1), key=lambda steps: abs(decay**steps - left)))


def entries_of(params, state, names) -> dict[str, np.ndarray]:
    """Copies of scale, bias, mean and var under `names`, without those that are `None`."""
    state = check_fields("state", state, State)
    params = check_fields("params", params, Params, features_of(state.mean))
    fields = zip(names, (*params, state.mean, state.var), strict=True)
    return {name: np.array(field) for name, field in fields if field is not None}
