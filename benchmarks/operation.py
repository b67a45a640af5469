"""Time one batch normalization in training, forward and backward, by jbn and its peers, in turn and in one run.

    python benchmarks/operation.py                            float32, channels last, on this machine
    python benchmarks/operation.py --dtype bfloat16 --axis 1  see --help

Two ways. Alone: one call after another, each with fresh outputs. Chained: many calls in one compiled loop, as in a
training step; each hands y and dx on to the next as x and dy, and the time of a loop that only hands on is taken off.
Both beside the floor: eight passes over memory, the least for reading x for the statistics, reading x and writing y,
reading x and dy for the sums, and reading x and dy and writing dx, measured as four copies of x. A peer that is not
installed is left out.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Literal

import competitors
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPES = (
    (128, 32, 32, 16),
    (128, 16, 16, 32),
    (128, 8, 8, 64),
    (64, 32, 32, 64),
    (32, 28, 28, 128),
    (32, 7, 7, 2048),
    (4096, 1024),
)
BASE, FLOOR = "flax linen", "floor"
PACKAGES = {"flax linen": "flax", "flax nnx": "flax"}
console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 15
    """How often each is timed, all in turn; medians are reported."""
    chain: int = 8
    """Calls in one compiled loop."""
    axis: Literal[-1, 1] = -1
    """Where the features are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    shapes: tuple[int, ...] = tuple(range(len(SHAPES)))
    """Which of the shapes, by number."""
    folder: Path | None = None
    """Where operation.json and operation.png go."""


def training_step(normalize, x, dy, scale, bias, mean, var):
    """y, the running statistics, and the gradients of x, scale and bias for the cotangent dy."""

    def forward(x, scale, bias):
        y, *running = normalize(x, scale, bias, mean, var)
        return y, running

    y, pullback, running = jax.vjp(forward, x, scale, bias, has_aux=True)
    return y, *running, *pullback(dy)


def hand_on(x, dy, scale, bias, mean, var):
    """What a link of the chain gives when nothing is computed."""
    return lax.optimization_barrier((x, mean, var, dy, scale, bias))


def chained(step, length, x, dy, scale, bias, mean, var):
    """`length` steps in a loop; the gradients of scale and bias are used, so that nothing can be left out."""

    def link(carry, _):
        x, dy, mean, var, total = carry
        y, mean, var, dx, dscale, dbias = step(x, dy, scale, bias, mean, var)
        return (y, dx, mean, var, total + dscale + dbias), None

    return lax.scan(link, (x, dy, mean, var, jnp.zeros_like(scale)), None, length=length)[0]


def with_torch(config, x, dy):
    """One forward and backward pass of PyTorch, channels last where x is."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, config.dtype)
    features = x.shape[config.axis]
    running = torch.zeros(features), torch.ones(features)
    params = [torch.ones(features, requires_grad=True), torch.zeros(features, requires_grad=True)]

    def as_torch(array):
        array = torch.from_numpy(np.array(array, np.float32)).to(dtype)
        return array.moveaxis(-1, 1) if config.axis == -1 and array.ndim > 2 else array  # a view: channels last

    x, dy = as_torch(x).requires_grad_(), as_torch(dy)

    def run():
        x.grad = params[0].grad = params[1].grad = None
        y = torch.nn.functional.batch_norm(x, *running, *params, training=True, momentum=0.1, eps=1e-5)
        y.backward(dy)
        return y, x.grad

    def as_numpy(array):
        array = array.detach().float()
        return (array.moveaxis(1, -1) if config.axis == -1 and array.ndim > 2 else array).numpy()

    return run, lambda: [as_numpy(array) for array in run()]


def copies_of(x):
    """Eight passes over memory: four copies of x."""
    if jax.default_backend() == "cpu":
        source = np.asarray(x)
        target = np.empty_like(source)
        return lambda: [np.copyto(target, source) for _ in range(4)]
    copy = jax.jit(jnp.copy)
    return lambda: jax.block_until_ready([copy(x) for _ in range(4)])


def prepare(config, shape, peers) -> dict:
    """The functions to time for one shape, by way and name, when all have been seen to compute the same."""
    features = shape[-1]
    random = np.random.default_rng(0)
    shape = shape if config.axis == -1 else (shape[0], features, *shape[1:-1])
    x, dy = (jnp.asarray(random.standard_normal(shape), config.dtype) for _ in range(2))
    x = x + jnp.asarray(0.5, x.dtype)
    rest = jnp.ones(features), jnp.zeros(features), jnp.zeros(features), jnp.ones(features)
    ways: dict[str, dict] = {"alone": {}, "chained": {}}
    expected: tuple = ()
    tolerance = 1e-3 if config.dtype == "float32" else 0.1  # gradients of scale are sums of up to 131,072 values

    def check(name, values):
        for got, wanted in zip(values, expected, strict=False):
            np.testing.assert_allclose(
                np.float32(got),
                np.float32(wanted),
                rtol=tolerance,
                atol=tolerance * float(jnp.max(jnp.abs(wanted))),
                err_msg=name,
            )

    for name in peers:
        if name == "torch":
            run, outputs = with_torch(config, x, dy)
            check(name, outputs()[:1])
            np.testing.assert_allclose(outputs()[1], np.float32(expected[3]), rtol=tolerance, atol=tolerance)
            ways["alone"][name] = run
            continue
        step = partial(training_step, competitors.JAX_PEERS[name](features, config.axis))
        compiled, chain = jax.jit(step), jax.jit(partial(chained, step, config.chain))
        outputs = compiled(x, dy, *rest)
        expected = expected or outputs
        check(name, outputs)
        ways["alone"][name] = partial(lambda run: jax.block_until_ready(run(x, dy, *rest)), compiled)
        ways["chained"][name] = partial(lambda run: jax.block_until_ready(run(x, dy, *rest)), chain)
    nothing = jax.jit(partial(chained, hand_on, config.chain))
    ways["chained"]["loop"] = lambda: jax.block_until_ready(nothing(x, dy, *rest))
    for way in ways.values():
        way[FLOOR] = copies_of(x)
    return ways


def seconds(functions: dict, rounds: int) -> dict[str, list[float]]:
    """The times of every function, called in turn; the first round warms up."""
    times = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if index:
                times[name].append(time.perf_counter() - started)
    return times


def measure(config, peers) -> dict:
    """Seconds of one call, all rounds, by way, shape and name."""
    found = {"alone": {}, "chained": {}}
    for number in track(config.shapes, "shapes", console=console, transient=True):
        for way, functions in prepare(config, SHAPES[number], peers).items():
            times = seconds(functions, config.rounds)
            if way == "chained":
                loop = np.median(times.pop("loop"))
                floor = times.pop(FLOOR)
                times = {name: [(value - loop) / config.chain for value in values] for name, values in times.items()}
                times[FLOOR] = floor
            found[way]["x".join(map(str, SHAPES[number]))] = times
    return found


def ratios(by_shape: dict, name: str, to: str) -> list[float]:
    """Median time of `name` over that of `to`, for every shape."""
    return [float(np.median(times[name]) / np.median(times[to])) for times in by_shape.values()]


def mean_ratio(by_shape: dict, name: str, to: str) -> float:
    """The geometric mean over the shapes."""
    return float(np.exp(np.mean(np.log(ratios(by_shape, name, to)))))


def table_of(way: str, by_shape: dict) -> Table:
    """Milliseconds, a row a shape, with half the range of the middle half of the rounds; then means of ratios."""
    names = list(next(iter(by_shape.values())))
    table = Table("shape", *names, title=f"{way}: ms, forward and backward (+- half the interquartile range)")
    for shape, times in by_shape.items():
        cells = []
        for name in names:
            low, middle, high = np.percentile(np.multiply(times[name], 1e3), (25, 50, 75))
            cells.append(f"{middle:.2f} +- {(high - low) / 2:.2f}")
        table.add_row(shape, *cells)
    for to in (BASE, FLOOR, "torch"):
        if to in names:
            table.add_row(f"of {to}", *(f"{mean_ratio(by_shape, name, to):.2f}" for name in names))
    return table


def figure_of(found: dict, title: str, path: Path) -> None:
    """Bars of time over the floor, one group a way."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, (way, by_shape) in zip(axes, found.items(), strict=True):
        names = [name for name in next(iter(by_shape.values())) if name != FLOOR]
        values = [mean_ratio(by_shape, name, FLOOR) for name in names]
        bars = axis.bar(names, values, color=["tab:blue" if name == "jbn" else "silver" for name in names])
        axis.bar_label(bars, fmt="%.2f")
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=way, ylabel="time / eight passes over memory")
        axis.tick_params("x", rotation=20)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    peers = []
    for name in (*competitors.JAX_PEERS, "torch"):
        if importlib.util.find_spec(PACKAGES.get(name, name)) or importlib.util.find_spec(f"dm_{name}"):
            peers.append(name)
        else:
            console.print(f"{name} is not installed and is left out.")
    device = jax.devices()[0]
    hardware = f"{device.device_kind}, {os.cpu_count()} cores, {platform.machine()}; jax {jax.__version__}"
    console.print(f"{hardware}; {config.dtype}, features on axis {config.axis}")
    found = measure(config, peers)
    for way, by_shape in found.items():
        console.print(table_of(way, by_shape))
    if config.folder is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        record = {"hardware": hardware, "dtype": config.dtype, "axis": config.axis, "seconds": found}
        (config.folder / "operation.json").write_text(json.dumps(record) + "\n")
        figure_of(found, f"Batch normalization in training, {hardware}", config.folder / "operation.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
