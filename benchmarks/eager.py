"""Time calls outside of `jit`, as in a notebook or a single step of reinforcement learning: training and evaluation.

    python benchmarks/eager.py                  [64, 32] in float32; milliseconds, medians of 200 rounds, in turns

Beside the compiled program, which is what a call costs inside of one's own `jit`, Flax's module, and PyTorch's.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jbn


@dataclasses.dataclass(frozen=True)
class Config:
    shape: tuple[int, int] = (64, 32)
    rounds: int = 200


def of_jbn(x, compiled: bool) -> dict[bool, Callable]:
    params, state = jbn.init(x.shape[-1])

    def call(train):
        def run(x, params, state):
            return jbn.batch_norm(x, params, state, train=train)

        run = jax.jit(run) if compiled else run
        return lambda: jax.block_until_ready(run(x, params, state))

    return {train: call(train) for train in (True, False)}


def of_flax(x) -> dict[bool, Callable]:
    import flax.linen as nn

    layer = nn.BatchNorm(use_running_average=None)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)

    def call(train):
        changed = ["batch_stats"] if train else False
        return lambda: jax.block_until_ready(layer.apply(variables, x, use_running_average=not train, mutable=changed))

    return {train: call(train) for train in (True, False)}


def of_torch(x) -> dict[bool, Callable]:
    import torch

    given, layer = torch.from_numpy(np.array(x)), torch.nn.BatchNorm1d(x.shape[-1])
    return {train: lambda train=train: layer.train(train)(given) for train in (True, False)}


def main(config: Config) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(config.shape), jnp.float32)
    layers = {"jbn": of_jbn(x, False), "jbn, compiled": of_jbn(x, True)}
    layers |= {"Flax linen": of_flax(x)} if importlib.util.find_spec("flax") else {}
    layers |= {"PyTorch": of_torch(x)} if importlib.util.find_spec("torch") else {}
    calls = {(name, train): call for name, of in layers.items() for train, call in of.items()}
    times = {key: [] for key in calls}
    random, keys = np.random.default_rng(0), list(calls)
    for number in range(config.rounds + 2):
        for key in random.permutation(len(keys)):
            start = time.perf_counter()
            calls[keys[key]]()
            if number > 1:  # the first compile
                times[keys[key]].append(1e3 * (time.perf_counter() - start))
    table = Table(f"{list(config.shape)}, ms", "training", "quartiles", "evaluation", "quartiles")
    for name in layers:
        cells = []
        for train in (True, False):
            low, middle, high = np.quantile(times[name, train], (0.25, 0.5, 0.75))
            cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(name, *cells)
    Console(highlight=False).print(f"{jax.default_backend()}, jax {jax.__version__}", table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
