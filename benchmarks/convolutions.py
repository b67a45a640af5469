"""Time the convolutions of the example's ResNet-20 at batch 128: JAX's, the example's own for CPUs, and PyTorch's.

    python benchmarks/convolutions.py

Forward, and both gradients, each call by itself, in a new order every round; medians in ms.
"""

import importlib.util
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from training_step import convolution

BATCH, ROUNDS = 128, 15
SHAPES = ((32, 3, 16, 1), (32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1))
WAYS = {"JAX": convolution.plain, "own rule": convolution.convolve}


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
    x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).requires_grad_()
    kernel = torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    kernel.requires_grad_()
    run = partial(torch.nn.functional.conv2d, stride=stride, padding=1)
    y = run(x, kernel)
    dy = torch.ones_like(y)
    return (lambda: run(x, kernel)), (lambda: torch.autograd.grad(y, (x, kernel), dy, retain_graph=True))


def main() -> None:
    random, names = np.random.default_rng(0), list(WAYS)
    if importlib.util.find_spec("torch") is not None:
        names.append("PyTorch")
    table = Table("x, outputs, stride", *names, title="3 x 3 convolutions: ms forward + both gradients")
    for size, inputs, outputs, stride in SHAPES:
        x = jnp.asarray(random.standard_normal((BATCH, size, size, inputs)), jnp.float32)
        kernel = jnp.asarray(random.standard_normal((3, 3, inputs, outputs)), jnp.float32)
        functions = {}
        for name in names:
            pair = with_jax(name, x, kernel, stride) if name in WAYS else with_torch(x, kernel, stride)
            functions |= {(name, index): function for index, function in enumerate(pair)}
        times = {key: [] for key in functions}
        for index in range(ROUNDS + 1):
            for place in random.permutation(len(functions)):
                key = list(functions)[place]
                started = time.perf_counter()
                functions[key]()
                if index:
                    times[key].append(time.perf_counter() - started)
        ms = {key: 1e3 * np.median(values) for key, values in times.items()}
        cells = (f"{ms[name, 0]:.1f} + {ms[name, 1]:.1f}" for name in names)
        table.add_row(f"[{BATCH}, {size}, {size}, {inputs}], {outputs}, {stride}", *cells)
    Console(highlight=False, width=140).print(table)


if __name__ == "__main__":
    main()
