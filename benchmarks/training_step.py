"""Time the training step of the example's ResNet on jbn, on Flax, on scale and bias alone, and on PyTorch, in one run.

    python benchmarks/training_step.py                        ResNet-20, batch 128
    python benchmarks/training_step.py --dtype bfloat16       see --help

Forward, backward and SGD with momentum on one batch that stays on the device. "scale and bias" is the network of jbn
without statistics: what is above it is the cost of batch normalization. The networks of jbn and of scale and bias have
the example's convolution, which Flax's own modules do not; "jbn, plain convolution" has not either.
"jbn, remat" keeps what convolutions give, and the moments. Steps in a new order every round; medians. Memory
is what the compiler sets aside beside arguments and results.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import convolution
import model
import steps

SMOOTHING = 0.1
console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Config:
    depth: model.Depth = 20
    batch: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 15
    folder: Path | None = None
    """Where training_step.json and training_step.png go."""


def scale_and_bias(x, params, state, *, activation=None, **options):
    """What is left of batch normalization when nothing is measured."""
    y = x * params.scale.astype(x.dtype) + params.bias.astype(x.dtype)
    return y if activation is None else activation(y), state


def with_flax(config):
    import flax_resnet

    params, _ = model.init(jax.random.key(0), config.depth)
    return partial(flax_resnet.apply, depth=config.depth, train=True), *flax_resnet.convert(params)


def with_jbn(config, convolve=convolution.convolve, remat=False, **options):
    apply = partial(model.apply, depth=config.depth, train=True, convolve=convolve, **options)
    if remat:
        apply = jax.checkpoint(apply, policy=steps.REMAT_POLICY)
    return apply, *model.init(jax.random.key(0), config.depth)


NETWORKS = {
    "jbn": with_jbn,
    "flax": with_flax,
    "scale and bias": partial(with_jbn, normalize=scale_and_bias),
    "jbn, plain convolution": partial(with_jbn, convolve=convolution.plain),
    "jbn, remat": partial(with_jbn, remat=True),
}


def compiled_step(name, config, images, labels):
    """A function that makes one step, and the MiB that the compiler sets aside."""
    apply, params, state = NETWORKS[name](config)
    optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)

    def train(params, state, moments):
        def loss(params):
            logits, after = apply(params, state, images)
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), SMOOTHING)
            return jnp.mean(optax.softmax_cross_entropy(logits, targets)), after

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), after, moments), value

    carry = params, state, optimizer.init(params)
    compiled = jax.jit(train, donate_argnums=(0, 1, 2)).lower(*carry).compile()
    memory = compiled.memory_analysis()
    assert memory is not None

    def step():
        nonlocal carry
        carry, value = compiled(*carry)
        return float(value)

    return step, memory.temp_size_in_bytes / 2**20


def torch_step(config, images, labels, compiled):
    """As `compiled_step`, by PyTorch with channels last."""
    import torch
    from torch import nn
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, config.dtype)

    def unit(inputs, outputs, size, stride=1):
        layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.body = nn.Sequential(unit(inputs, outputs, 3, stride), nn.ReLU(), unit(outputs, outputs, 3))
            self.shortcut = nn.Identity() if inputs == outputs else unit(inputs, outputs, 1, stride)

        def forward(self, x):
            return functional.relu(self.body(x) + self.shortcut(x))

    blocks = [Block(*widths_and_stride) for _, *widths_and_stride in model.blocks(config.depth)]
    body = nn.Sequential(unit(3, 16, 3), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(64, 10)).to(device)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    x = torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2).to(device)
    y = torch.from_numpy(np.array(labels)).long().to(device)
    call = torch.compile(network) if compiled else network

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = functional.cross_entropy(call(x), y, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measure(config) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every step, and MiB, by name."""
    images = jax.random.normal(jax.random.key(1), (config.batch, 32, 32, 3), config.dtype)
    labels = jax.random.randint(jax.random.key(2), (config.batch,), 0, 10)
    functions, memory = {}, {}
    for name in NETWORKS:
        if name == "flax" and importlib.util.find_spec("flax") is None:
            console.print("flax is not installed and is left out.")
            continue
        functions[name], memory[name] = compiled_step(name, config, images, labels)
    if importlib.util.find_spec("torch") is None:
        console.print("torch is not installed and is left out.")
    else:
        functions["torch"] = torch_step(config, images, labels, compiled=False)
        if jax.default_backend() == "gpu":
            functions["torch compiled"] = torch_step(config, images, labels, compiled=True)
    first = {name: function() for name, function in functions.items()}
    tolerance = 1e-4 if config.dtype == "float32" else 2e-2
    for name in ("flax", "jbn, plain convolution"):
        if name in first:  # PyTorch draws other kernels
            np.testing.assert_allclose(first[name], first["jbn"], rtol=tolerance, err_msg=name)
    times, order = {name: [] for name in functions}, np.random.default_rng(0)
    for index in range(config.rounds + 1):
        for name in order.permutation(list(functions)):
            started = time.perf_counter()
            functions[name]()
            if index:
                times[name].append(time.perf_counter() - started)
    return times, memory


def table_of(times, memory, config) -> Table:
    """Images/s with the quartiles, the ratio to each of three, and memory."""
    table = Table(
        "network",
        "images/s",
        "quartiles",
        *(f"of {name}" for name in ("flax", "scale and bias", "torch")),
        "MiB",
        title=f"Training step, ResNet-{config.depth}, batch {config.batch}, {config.dtype}",
    )
    rate = {name: config.batch / np.median(values) for name, values in times.items()}
    for name, values in times.items():
        low, high = np.percentile(config.batch / np.array(values), (25, 75))
        ratios = (f"{rate[name] / rate[to]:.2f}" if to in rate else "" for to in ("flax", "scale and bias", "torch"))
        size = f"{memory[name]:.0f}" if name in memory else ""
        table.add_row(name, f"{rate[name]:.0f}", f"{low:.0f} to {high:.0f}", *ratios, size)
    return table


def figure_of(times, config, hardware, path) -> None:
    """Bars of images/s, and a line from quartile to quartile."""
    figure, axis = plt.subplots(figsize=(10, 4))
    rates = {name: np.percentile(config.batch / np.array(values), (25, 50, 75)) for name, values in times.items()}
    figures.bars(axis, {name: tuple(values.tolist()) for name, values in rates.items()}, form="{:.0f}")
    axis.set(xlabel="images per second")
    axis.margins(x=0.1)
    figure.suptitle(f"A training step of ResNet-{config.depth}, batch {config.batch}, {config.dtype}\n{hardware}")
    figures.save(figure, path)


def main(config: Config) -> None:
    device = jax.devices()[0]
    hardware = f"{device.device_kind}, {os.cpu_count()} cores, {platform.machine()}; jax {jax.__version__}"
    console.print(hardware)
    times, memory = measure(config)
    console.print(table_of(times, memory, config))
    if config.folder is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        record = {"hardware": hardware, "seconds": times, "MiB": memory, "depth": config.depth, "batch": config.batch}
        (config.folder / "training_step.json").write_text(json.dumps(record | {"dtype": config.dtype}) + "\n")
        figure_of(times, config, hardware, config.folder / "training_step.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
