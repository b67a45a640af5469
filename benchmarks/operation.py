"""Time one batch normalization by jbn and its peers, in one run, in a new order every round.

    python benchmarks/operation.py                            training in float32, channels last, on this machine
    python benchmarks/operation.py --what relu --axis 1       see --help
    python benchmarks/operation.py --markdown                 print what docs/operation.json holds as a table

Two ways. Alone: one call after another, each with fresh outputs. Chained: many calls in one compiled loop, as in a
training step; each hands y and dx on to the next as x and dy, and the time of a loop that only hands on is taken off.
Both beside the floor, the passes over memory that the formulas need, measured as copies of x. In training they are
eight: reading x for the statistics, reading x and writing y, reading x and dy for the sums, and reading x and dy and
writing dx. A peer that is not installed is named and left out. On a GPU PyTorch is timed on it too, and compiled.
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
import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHAPES = (
    (128, 32, 32, 16),
    (128, 16, 16, 32),
    (128, 8, 8, 64),
    (64, 32, 32, 64),
    (32, 28, 28, 128),
    (32, 7, 7, 2048),
    (4096, 1024),
)
RESNET_50 = (
    (256, 112, 112, 64),
    (256, 56, 56, 64),
    (256, 56, 56, 256),
    (256, 28, 28, 512),
    (256, 14, 14, 1024),
    (256, 7, 7, 2048),
)
PASSES = {"training": 8, "relu": 8, "residual": 8, "masked": 8, "forward": 3, "evaluation": 2}
BASE, FLOOR = "flax linen", "floor"
TORCH, COMPILED_TORCH = "torch", "torch compiled"
PACKAGES = {competitors.BEHIND: "jbn", "flax linen": "flax", "flax nnx": "flax", COMPILED_TORCH: "torch"}
console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Config:
    what: Literal["training", "relu", "residual", "masked", "forward", "evaluation"] = "training"
    """Forward and backward: alone, followed by relu, by adding x and relu, or with a mask. Or forward only.

    A relu is inside of the normalization where that takes one."""
    rounds: int = 15
    """How often each is timed; medians are reported."""
    chain: int = 8
    """Calls in one compiled loop."""
    axis: Literal[-1, 1] = -1
    """Where the features are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    shapes: tuple[int, ...] = ()
    """Which of the shapes, by number; none for all. On a GPU they are those of ResNet-50."""
    peers: tuple[str, ...] = (*competitors.JAX_PEERS, TORCH, COMPILED_TORCH)
    folder: Path | None = None
    """Where operation.json is kept and, for training in float32 with channels last, operation.png."""
    markdown: bool = False
    """Time nothing; print what docs/operation.json (or that in `folder`) holds."""


def step_of(what, normalize, mask, x, dy, scale, bias, mean, var):
    """y, the running statistics and, but for "forward" and "evaluation", the gradients for the cotangent dy."""

    def forward(x, scale, bias):
        y, *running = normalize(x, scale, bias, mean, var, mask)
        y = y.astype(x.dtype)  # some give float32 for bfloat16
        if mask is not None:
            y = jnp.where(mask, y, jnp.zeros_like(y))
        if what == "residual":
            y = y + x
        return (jax.nn.relu(y) if what in ("relu", "residual") else y), running

    if what in ("forward", "evaluation"):
        y, running = forward(x, scale, bias)
        return y, *running
    y, pullback, running = jax.vjp(forward, x, scale, bias, has_aux=True)
    return y, *running, *pullback(dy)


def hand_on(x, dy, scale, bias, mean, var):
    """What a link of the chain gives when nothing is computed."""
    return lax.optimization_barrier((x, mean, var, dy, scale, bias))


def chained(step, length, x, dy, scale, bias, mean, var):
    """`length` steps in a loop; the gradients of scale and bias are used, so that nothing can be left out."""

    def link(carry, _):
        x, dy, mean, var, total = carry
        y, mean, var, *gradients = step(x, dy, scale, bias, mean, var)
        dx, dscale, dbias = gradients or (dy, y[(0,) * y.ndim], mean)
        return (y, dx, mean, var, total + dscale + dbias), None

    return lax.scan(link, (x, dy, mean, var, jnp.zeros_like(scale)), None, length=length)[0]


def with_torch(config, x, dy, compiled):
    """One pass of PyTorch, channels last where x is, on the GPU if JAX has one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, config.dtype)
    features = x.shape[config.axis]
    running = torch.zeros(features, device=device), torch.ones(features, device=device)
    params = [make(features, device=device, requires_grad=True) for make in (torch.ones, torch.zeros)]

    def as_torch(array):
        array = torch.from_numpy(np.array(array, np.float32)).to(device, dtype)
        return array.moveaxis(-1, 1) if config.axis == -1 and array.ndim > 2 else array  # a view: channels last

    def normalize(x):
        training = config.what != "evaluation"
        y = torch.nn.functional.batch_norm(x, *running, *params, training=training, momentum=0.1, eps=1e-5)
        if config.what == "residual":
            y = y + x
        return torch.relu(y) if config.what in ("relu", "residual") else y

    forward_only = config.what in ("forward", "evaluation")
    x, dy = as_torch(x).requires_grad_(not forward_only), as_torch(dy)
    function = torch.compile(normalize) if compiled else normalize

    def run():
        if forward_only:
            with torch.no_grad():
                outputs = (function(x),)
        else:
            x.grad = params[0].grad = params[1].grad = None
            y = function(x)
            y.backward(dy)
            outputs = y, x.grad
        if device == "cuda":
            torch.cuda.synchronize()
        return outputs

    def as_numpy(array):
        array = array.detach().float().cpu()
        return (array.moveaxis(1, -1) if config.axis == -1 and array.ndim > 2 else array).numpy()

    return run, lambda: [as_numpy(array) for array in run()]


def copies_of(x, passes):
    """So many passes over memory: a copy is two, one more is a copy of half."""
    half = x[: len(x) // 2]
    if jax.default_backend() == "cpu":
        sources = [np.asarray(x)] * (passes // 2) + [np.asarray(half)] * (passes % 2)
        target = np.empty_like(sources[0])
        return lambda: [np.copyto(target[: len(source)], source) for source in sources]
    copy = jax.jit(jnp.copy)
    return lambda: jax.block_until_ready([copy(x) for _ in range(passes // 2)] + [copy(half)] * (passes % 2))


def prepare(config, shape, peers) -> dict:
    """The functions to time for one shape, by way and name, when all have been seen to compute the same."""
    features = shape[-1]
    random = np.random.default_rng(0)
    shape = shape if config.axis == -1 else (shape[0], features, *shape[1:-1])
    x, dy = (jnp.asarray(random.standard_normal(shape), config.dtype) for _ in range(2))
    x = x + jnp.asarray(0.5, x.dtype)
    rest = jnp.ones(features), jnp.zeros(features), jnp.zeros(features), jnp.ones(features)
    mask = None
    if config.what == "masked":  # some four fifths
        mask = jnp.take(x, jnp.array([0]), config.axis) > -0.3
    ways: dict[str, dict] = {"alone": {}, "chained": {}}
    expected: tuple = ()
    stray = 1e-3 if config.what in ("relu", "residual") else 0  # where y is 0 to rounding, either gradient is right
    tolerance = 1e-3 if config.dtype == "float32" else 0.1  # gradients of scale are sums of up to 131,072 values

    def check(name, values):
        for got, wanted in zip(values, expected, strict=False):
            got, wanted = np.float32(got), np.float32(wanted)
            same = np.isclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
            assert np.mean(~same) <= stray, f"{name} computes something else: {got} for {wanted}"

    for name in peers:
        if name in (TORCH, COMPILED_TORCH):
            run, outputs = with_torch(config, x, dy, name == COMPILED_TORCH)
            y, *dx = outputs()
            check(name, [y])
            for value in dx:
                assert np.mean(~np.isclose(value, np.float32(expected[3]), rtol=tolerance, atol=tolerance)) <= stray
            ways["alone"][name] = run
            continue
        inside = {"activation": jax.nn.relu} if config.what == "relu" and name == "jbn" else {}
        normalize = competitors.JAX_PEERS[name](features, config.axis, config.what != "evaluation", **inside)
        step = partial(step_of, "training" if inside else config.what, normalize, mask)
        compiled, chain = jax.jit(step), jax.jit(partial(chained, step, config.chain))
        outputs = compiled(x, dy, *rest)
        expected = expected or outputs
        check(name, outputs)
        ways["alone"][name] = partial(lambda run: jax.block_until_ready(run(x, dy, *rest)), compiled)
        ways["chained"][name] = partial(lambda run: jax.block_until_ready(run(x, dy, *rest)), chain)
    nothing = jax.jit(partial(chained, hand_on, config.chain))
    ways["chained"]["loop"] = lambda: jax.block_until_ready(nothing(x, dy, *rest))
    for way in ways.values():
        way[FLOOR] = copies_of(x, PASSES[config.what])
    return ways


def seconds(functions: dict, rounds: int) -> dict[str, list[float]]:
    """The times of every function; the first round warms up.

    Each round has an order of its own: a call may find the pages that the one before it gave back.
    """
    times = {name: [] for name in functions}
    order = np.random.default_rng(0)
    for index in range(rounds + 1):
        for name in order.permutation(list(functions)):
            started = time.perf_counter()
            functions[name]()
            if index:
                times[name].append(time.perf_counter() - started)
    return times


def measure(config, peers) -> dict:
    """Seconds of one call, all rounds, by way, shape and name."""
    found = {"alone": {}, "chained": {}}
    shapes = RESNET_50 if jax.default_backend() == "gpu" else SHAPES
    for number in track(config.shapes or range(len(shapes)), "shapes", console=console, transient=True):
        for way, functions in prepare(config, shapes[number], peers).items():
            times = seconds(functions, config.rounds)
            if way == "chained":
                loop = np.median(times.pop("loop"))
                floor = times.pop(FLOOR)
                times = {name: [(value - loop) / config.chain for value in values] for name, values in times.items()}
                times[FLOOR] = floor
            found[way]["x".join(map(str, shapes[number]))] = times
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
    table = Table("shape", *names, title=f"{way}: ms (+- half the interquartile range)")
    for shape, times in by_shape.items():
        cells = []
        for name in names:
            low, middle, high = np.percentile(np.multiply(times[name], 1e3), (25, 50, 75))
            cells.append(f"{middle:.2f} +- {(high - low) / 2:.2f}")
        table.add_row(shape, *cells)
    for to in (BASE, FLOOR, TORCH):
        if to in names:
            table.add_row(f"of {to}", *(f"{mean_ratio(by_shape, name, to):.2f}" for name in names))
    return table


def figure_of(found: dict, hardware: str, path: Path) -> None:
    """Bars of time over the floor, a panel a way; the middle half of the shapes as a line."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    titles = {"chained": "many in one compiled loop, as in a training step", "alone": "one call after another"}
    for axis, (way, title) in zip(axes, titles.items(), strict=True):
        values = {}
        for name in (name for name in next(iter(found[way].values())) if name != FLOOR):
            low, high = np.percentile(ratios(found[way], name, FLOOR), (25, 75))
            values[name] = float(low), mean_ratio(found[way], name, FLOOR), float(high)
        figures.bars(axis, values, cut=2, reference=(1, "eight passes over memory"))
        axis.set(title=title, xlim=(0, 2.2), xlabel="time, in units of eight passes over memory")
    figure.suptitle(f"One batch normalization in training, {hardware}")
    figures.save(figure, path)


def installed(name: str) -> bool:
    """Whether a peer can be timed here; the compiled PyTorch only on a GPU."""
    if name == COMPILED_TORCH and jax.default_backend() != "gpu":
        return False
    package = PACKAGES.get(name, name)
    return any(importlib.util.find_spec(each) is not None for each in (package, f"dm_{package}"))


def markdown(record: dict) -> str:
    """All cases of a record as one table: the geometric means over the shapes."""
    lines = ["| case | way | peer | of flax linen | of the floor |", "| --- | --- | --- | ---: | ---: |"]
    for case, found in record["cases"].items():
        for way, by_shape in found.items():
            for name in next(iter(by_shape.values())):
                if name != FLOOR:
                    of = (f"{mean_ratio(by_shape, name, to):.2f}" for to in (BASE, FLOOR))
                    lines.append(f"| {case} | {way} | {name} | {' | '.join(of)} |")
    return "\n".join(lines)


def of_machine() -> str:
    kind = jax.devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} cores, {platform.machine()}; jax {jax.__version__}"


def main(config: Config) -> None:
    file = (config.folder or Path(__file__).resolve().parents[1] / "docs") / "operation.json"
    if config.markdown:
        print(markdown(json.loads(file.read_text())))
        return
    peers = []
    for name in config.peers:
        if name == competitors.BEHIND and config.what != "relu":
            continue
        if config.what == "masked" and name not in competitors.MASKED:
            console.print(f"{name} takes no mask and is left out.")
        elif installed(name):
            peers.append(name)
        else:
            console.print(f"{name} is not there and is left out.")
    hardware = of_machine()
    case = f"{config.what}, {config.dtype}, channels {'last' if config.axis == -1 else 'first'}"
    console.print(f"{hardware}; {case}")
    found = measure(config, peers)
    for way, by_shape in found.items():
        console.print(table_of(way, by_shape))
    if config.folder is None:
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(file.read_text()) if file.exists() else {}
    if record.get("hardware") != hardware:  # one machine a file
        record = {"hardware": hardware, "cases": {}}
    record["cases"][case] = found
    file.write_text(json.dumps(record) + "\n")
    if case == "training, float32, channels last":
        figure_of(found, hardware, config.folder / "operation.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
