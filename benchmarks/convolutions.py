"""Time the convolutions of the example's networks: JAX's, the example's own for CPUs, and PyTorch's.

    python benchmarks/convolutions.py                                          ResNet-20's, 128 images, float32
    python benchmarks/convolutions.py --network airbench --dtype bfloat16      250 images

Forward, and both gradients, each call by itself, in a new order every round; medians in ms, and GFLOP/s beside those of
a product of two matrices of 2048 x 2048.
"""

import dataclasses
import importlib.util
import os
import time
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from training_step import convolution

ROUNDS = 15
SHAPES = {  # images at once; size, inputs, outputs, stride, and how many layers are alike
    "resnet": (
        128,
        (
            (32, 3, 16, 1, 1),
            (32, 16, 16, 1, 6),
            (32, 16, 32, 2, 1),
            (16, 32, 32, 1, 5),
            (16, 32, 64, 2, 1),
            (8, 64, 64, 1, 5),
        ),
    ),
    "airbench": (
        250,
        ((31, 24, 64, 1, 1), (15, 64, 64, 1, 1), (15, 64, 256, 1, 1), (7, 256, 256, 1, 2), (3, 256, 256, 1, 1)),
    ),
}
WAYS = {"JAX": convolution.plain, "own rule": convolution.convolve}


@dataclasses.dataclass(frozen=True)
class Config:
    network: Literal["resnet", "airbench"] = "resnet"
    dtype: Literal["float32", "bfloat16"] = "float32"


def with_jax(way, x, kernel, stride):
    function = WAYS[way]
    run = jax.jit(partial(function, stride=stride))
    dy = run(x, kernel)

    def gradients(x, kernel, dy):
        return jax.vjp(partial(function, stride=stride), x, kernel)[1](dy)

    back = jax.jit(gradients)
    return (lambda: jax.block_until_ready(run(x, kernel))), (lambda: jax.block_until_ready(back(x, kernel, dy)))


def with_torch(x, kernel, stride):
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, x.dtype.name)
    x = torch.from_numpy(np.array(x, np.float32)).to(dtype).permute(0, 3, 1, 2).requires_grad_()
    kernel = torch.from_numpy(np.array(kernel, np.float32)).to(dtype).permute(3, 2, 0, 1)
    kernel = kernel.contiguous(memory_format=torch.channels_last).requires_grad_()
    run = partial(torch.nn.functional.conv2d, stride=stride, padding=1)
    y = run(x, kernel)
    dy = torch.ones_like(y)
    return (lambda: run(x, kernel)), (lambda: torch.autograd.grad(y, (x, kernel), dy, retain_graph=True))


def product(dtype: str):
    """A product of two matrices, and its floating-point operations."""
    matrix = jnp.ones((2048, 2048), dtype)
    run = jax.jit(jnp.dot)
    return (lambda: jax.block_until_ready(run(matrix, matrix))), 2 * 2048**3


def medians(functions: dict) -> dict:
    """Seconds of each, in a new order every round."""
    random, times = np.random.default_rng(0), {key: [] for key in functions}
    for index in range(ROUNDS + 1):
        for place in random.permutation(len(functions)):
            key = list(functions)[place]
            started = time.perf_counter()
            functions[key]()
            if index:
                times[key].append(time.perf_counter() - started)
    return {key: np.median(values) for key, values in times.items()}


def main(config: Config) -> None:
    random, names = np.random.default_rng(0), list(WAYS)
    if importlib.util.find_spec("torch") is not None:
        names.append("PyTorch")
    batch, shapes = SHAPES[config.network]
    title = f"3 x 3 convolutions in {config.dtype}: ms forward + both gradients (GFLOP/s)"
    table, totals = Table("x, outputs, stride", *names, title=title), dict.fromkeys(names, 0.0)
    multiply, product_operations = product(config.dtype)
    peaks, of_network = [], 0
    for size, inputs, outputs, stride, layers in shapes:
        x = jnp.asarray(random.standard_normal((batch, size, size, inputs)), config.dtype)
        kernel = jnp.asarray(random.standard_normal((3, 3, inputs, outputs)), config.dtype)
        functions: dict = {"product": multiply}
        for name in names:
            pair = with_jax(name, x, kernel, stride) if name in WAYS else with_torch(x, kernel, stride)
            functions |= {(name, index): function for index, function in enumerate(pair)}
        seconds = medians(functions)
        peaks.append(product_operations / seconds["product"])
        operations = 2 * batch * (-(-size // stride)) ** 2 * 9 * inputs * outputs
        of_network += 3 * layers * operations
        cells = []
        for name in names:
            forward, back = seconds[name, 0], seconds[name, 1]
            totals[name] += layers * (forward + back)
            rates = f"{operations / forward / 1e9:.0f} + {2 * operations / back / 1e9:.0f}"
            cells.append(f"{1e3 * forward:.1f} + {1e3 * back:.1f} ({rates})")
        table.add_row(f"[{batch}, {size}, {size}, {inputs}], {outputs}, {stride}", *cells)
    cells = (f"{1e3 * total:.0f} ({of_network / total / 1e9:.0f})" for total in totals.values())
    table.add_row("all layers", *cells)
    console = Console(highlight=False, width=140)
    console.print(table)
    console.print(f"{of_network / batch / 1e9:.3f} GFLOP an image, forward and both gradients; jax {jax.__version__}")
    console.print(f"A product of two matrices: {np.median(peaks) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
