"""Convert the layers in tests/golden, and compare evaluation and next step with what their library made of them.

python benchmarks/conversion.py
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jbn
from jbn import convert, presets

GOLDEN = Path(__file__).parents[1] / "tests/golden"
EQUINOX = dict(presets.FLAX)  # momentum 0.99, eps 1e-5 and the biased variance


class Differences(NamedTuple):
    """The largest ones: from the source and, of evaluation, from float64 over all batches so far."""

    evaluation: float
    output: float
    running_mean: float
    running_var: float
    evaluation_after: float
    source_exact: float  # the source's evaluation from float64
    jbn_exact: float  # jbn's


def nested(golden, prefix) -> dict:
    """The arrays whose name starts with `prefix`, by the rest of it."""
    return {name.removeprefix(prefix): golden[name] for name in golden if name.startswith(prefix)}


def from_flax(entries, **start):
    return convert.from_flax(nested(entries, "params."), nested(entries, "batch_stats."), **start)


def from_haiku(entries):
    parts = (nested(entries, f"{part}.") for part in ("params", "mean_ema", "var_ema"))
    return convert.from_haiku(*parts, decay=presets.HAIKU["decay"])


def from_equinox(mode, entries):
    """The layer's fields and a state that is looked up as Equinox's, of arrays alone."""
    held = {"statistics": (entries["mean"], entries["var"])} | entries
    index = {"batch_state_index": "statistics", "batch_counter": "counter"}
    index |= {"ema_state_index": "statistics", "ema_first_time_index": "first_time"}
    weights = {"weight": entries["weight"], "bias": entries["bias"], "momentum": float(entries["momentum"])}
    return convert.from_equinox(SimpleNamespace(mode=mode, **weights, **index), SimpleNamespace(get=held.__getitem__))


class Source(NamedTuple):
    convert: Callable[..., tuple[jbn.Params, jbn.State]]
    preset: dict
    start: str  # of its statistics: "full" evidence of 0 and 1, "none", or "first", replaced by the first batch


SOURCES = {
    "torch": Source(convert.from_torch, dict(presets.TORCH), "full"),
    "flax": Source(from_flax, dict(presets.FLAX), "full"),
    "keras": Source(convert.from_keras, dict(presets.KERAS), "full"),
    "haiku": Source(from_haiku, dict(presets.HAIKU), "none"),
    "equinox_ema": Source(partial(from_equinox, "ema"), EQUINOX, "first"),
    "equinox_batch": Source(partial(from_equinox, "batch"), EQUINOX, "none"),
}


def load(name) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as golden:
        return dict(golden)


def exact(batches, preset, start):
    """Running mean and variance in float64."""
    decay = preset["decay"]
    mean, var, weight = np.zeros(1), np.ones(1), 1.0
    for step, batch in enumerate(np.asarray(batches, np.float64)):
        keep = 0 if start == "first" and step == 0 else decay
        mean = keep * mean + (1 - keep) * batch.mean(0)
        var = keep * var + (1 - keep) * batch.var(0, ddof=int(preset["unbiased"]))
        weight *= keep
    if start == "none":
        mean, var = mean / (1 - weight), (var - weight) / (1 - weight)
    return mean, var


def compare(name) -> Differences:
    golden, (convert_entries, preset, start) = load(name), SOURCES[name]
    params, state = convert_entries(nested(golden, "entries."))
    x = jnp.asarray(golden["x"])
    epsilon = preset["epsilon"]
    evaluation = jbn.normalize_running(x, params, state, epsilon=epsilon)
    output, after = jbn.batch_norm(x, params, state, train=True, **preset)
    evaluation_after = jbn.normalize_running(x, params, after, epsilon=epsilon)
    if start == "first":  # Equinox's mode ema normalizes by the running statistics it has just moved, also in training
        output = evaluation_after

    running = golden["running_mean"].astype(np.float64), golden["running_var"].astype(np.float64)
    if name == "equinox_batch":  # what it holds counts the initial 0 and 1 as data
        left = preset["decay"] ** (len(golden["history"]) + 1)
        running = running[0] / (1 - left), (running[1] - left) / (1 - left)

    mean, var = exact(golden["history"], preset, start)
    scale, bias = np.float64(params.scale), np.float64(params.bias)
    right = scale * (np.float64(golden["x"]) - mean) / np.sqrt(var + epsilon) + bias
    pairs = (
        (evaluation, golden["evaluation"]),
        (output, golden["output"]),
        (after.mean, running[0]),
        (after.var, running[1]),
        (evaluation_after, golden["evaluation_after"]),
        (golden["evaluation"], right),
        (evaluation, right),
    )
    return Differences(*(float(np.abs(np.float64(ours) - np.float64(theirs)).max()) for ours, theirs in pairs))


if __name__ == "__main__":
    print(f"| source | {' | '.join(field.replace('_', ' ') for field in Differences._fields)} |")
    print(f"| --- |{' --- |' * len(Differences._fields)}")
    for name in SOURCES:
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in compare(name))} |")
