"""Compile training steps for CPU, GPU and TPU; count what each device sends, moves, runs and keeps. Nothing is run.

    pip install . 'jax[cuda12,tpu]' flax optax rich tyro    the compilers; they need neither GPU nor TPU
    python benchmarks/communication.py                      1 to 3 minutes a row for TPU, 1 to 20 s otherwise
    python benchmarks/communication.py --networks example   the steps of examples/cifar10 alone
    python benchmarks/communication.py --markdown

What has been compiled is kept in docs/communication.json and not compiled again.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import example
import hlo
import jax
import numpy as np
import resnet50
import six_layers
import tables
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

H100 = Path(__file__).with_name("h100.textproto")  # XLA's description of the chip
GPUS = ("h100:1", "h100:8")
# Chips, and what libtpu calls them all together: for v5p it counts cores, two a chip.
TPUS = {"v5e:2x4": "v5litepod-8", "v5e:4x4": "v5litepod-16", "v5p:8x8x8": "v5p-1024"}
COMPILERS = dict.fromkeys(GPUS, "jax-cuda12-pjrt") | dict.fromkeys(TPUS, "libtpu")
TARGETS = ("cpu:8", *COMPILERS)
LARGE = ("cpu:8", *GPUS, "v5e:4x4", "v5p:8x8x8")
MODES = ("jit", "shard_map")
NORMS = tuple(resnet50.NORMS)
RIVALS = ("jbn", "flax fast")
console = Console(highlight=False, width=160)


class Network(NamedTuple):
    init: Callable  # its params and state
    make_step: Callable
    inputs: Callable  # the shapes and shardings of a step's arguments
    batch: int  # images
    of: str  # "a device", or "in all"
    size: int  # their height and width
    unit: int  # bytes in which traffic of the main memory is told
    unit_name: str
    modes: tuple[str, ...] = MODES
    targets: tuple[str, ...] = LARGE
    norms: tuple[str, ...] = ("jbn", "flax fast", "flax two-pass")
    others: int = 1  # numbers that a step adds up over the devices besides gradients and its norms': the loss


def parts(program: ModuleType) -> tuple[Callable, Callable, Callable]:
    return program.init, program.make_step, program.inputs


ACTIVATIONS = six_layers.LAYERS * 64 * 56 * 56 * six_layers.WIDTH * 2  # bytes: one of each layer, in bfloat16
SIX_LAYERS = Network(*parts(six_layers), 64, "a device", 56, ACTIVATIONS, "activations a layer", norms=NORMS)
RESNET_50 = Network(
    *parts(resnet50), 32, "a device", 224, 10**9, "GB", norms=("jbn", "scale and bias", "flax fast", "flax two-pass")
)
NETWORKS = {
    "six layers": SIX_LAYERS,
    "six layers, silu": SIX_LAYERS._replace(
        make_step=partial(six_layers.make_step, activation=jax.nn.silu), targets=("h100:1",), norms=RIVALS
    ),
    "ResNet-50": RESNET_50,
    "ResNet-50, remat": RESNET_50._replace(
        make_step=partial(resnet50.make_step, remat=True),
        modes=("jit",),
        targets=("cpu:8", "h100:1", "v5e:4x4"),
        norms=("jbn",),
    ),
    "example": Network(
        *parts(example),
        example.CONFIG.batch,
        "in all",
        32,
        10**9,
        "GB",
        modes=("shard_map",),
        targets=(*GPUS, "v5e:2x4"),
        norms=RIVALS,
        # and how many are correct, of how many; and the images; but not the gradient of the layer that is not trained
        others=3 + example.CONFIG.batch * (32 * 32 * 3 + 1) - example.FIXED,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    networks: tuple[str, ...] = tuple(NETWORKS)
    targets: tuple[str, ...] = TARGETS
    modes: tuple[str, ...] = MODES
    norms: tuple[str, ...] = NORMS
    results: Path = Path(__file__).resolve().parents[1] / "docs" / "communication.json"
    texts: Path | None = None
    """Folder to keep the compiled programs in."""
    markdown: bool = False
    """Print the results as Markdown; compile nothing."""


def mesh_of(target: str) -> jax.sharding.Mesh:
    if target in TPUS:
        devices = topologies.get_topology_desc(target, platform="tpu").devices
    elif target in GPUS:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=H100.read_text(), topology="1x1x8"
        ).devices
    else:
        devices = jax.devices()
    return jax.sharding.Mesh(np.array(devices[: device_count(target)]), (resnet50.AXIS,))


def device_count(target: str) -> int:
    return math.prod(int(size) for size in target.partition(":")[2].split("x"))


def besides_norms(init: Callable, others: int = 1) -> int:
    """How many numbers a step adds up over the devices that are none of its norms': gradients, and `others`."""
    without = resnet50.Norm(lambda features: ((), ()), lambda *operands: None)
    params, _ = jax.eval_shape(lambda: init(jax.random.key(0), without))
    return sum(leaf.size for leaf in jax.tree.leaves(params)) + others


def count(text: str, devices: int, besides: int) -> dict[str, Any]:
    """What a compiled step sends, moves and runs; `besides` of the numbers it adds up are none of its norms'.

    They are told apart by number: the compiler for GPU joins what it sends into one long vector.
    """
    found = hlo.collectives(text)
    values = sum(math.prod(operand.shape) for collective in found for operand in collective.operands)
    norm = 4 * (values - besides) if found else 0
    return {
        "collectives": Counter(collective.kind for collective in found),
        "norm_bytes": norm,
        "other_bytes": sum(collective.bytes for collective in found) - norm,
        "sent_bytes": round(sum(hlo.sent(collective.kind, collective.bytes, devices) for collective in found)),
        "main_memory_bytes": sum(hlo.traffic(text).values()),
        "kernels": hlo.kernels(text),
        "branches": hlo.branches(text),
    }


def measure(target: str, network: Network, mode: str, norm: str) -> tuple[str, dict]:
    """The compiled program of one step, and what is counted in it."""
    mesh, kind = mesh_of(target), resnet50.NORMS[norm]
    jax.clear_caches()  # what was traced before does not see a change
    step, inputs = network.make_step(kind, mesh, mode), network.inputs(kind, mesh, network.batch, network.size)
    lowered = step.lower(*inputs)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    text, cost, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
    assert text and memory
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return text, {
        "devices": mesh.size,
        **count(text, mesh.size, besides_norms(network.init, network.others)),
        "bytes_accessed": cost["bytes accessed"] if cost else None,  # the compiler for GPU does not tell
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": arguments + memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def measure_target(target: str, config: Config) -> None:
    """What is missing of one target, in a process whose environment is the target's."""
    packages = ("jax", "jaxlib", "flax", *([COMPILERS[target]] if target in COMPILERS else []))
    versions = {name: found for name in packages if (found := version(name))}
    for name, mode, norm in itertools.product(config.networks, config.modes, config.norms):
        network = NETWORKS[name]
        modes = network.modes[:1] if device_count(target) == 1 else network.modes
        if target not in network.targets or mode not in modes or norm not in network.norms:
            continue
        key, steps = f"{target} {name} {mode} {norm}", load(config)
        setting = {"batch": network.batch, "size": network.size, "versions": versions}
        if setting != {field: steps.get(key, {}).get(field) for field in setting}:
            text, counts = measure(target, network, mode, norm)
            steps = load(config) | {key: setting | counts}
            config.results.write_text(json.dumps(steps, indent=1) + "\n")
            if config.texts:
                config.texts.mkdir(parents=True, exist_ok=True)
                (config.texts / f"{key}.txt").write_text(text)
            console.print(f"{key}: {counts['compile_seconds']} s")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load(config: Config) -> dict[str, dict]:
    """All that has been measured, by target, network, mode and norm."""
    return json.loads(config.results.read_text()) if config.results.exists() else {}


def environment(target: str) -> dict[str, str]:
    if target in TPUS:
        where = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
        return where | {"JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": TPUS[target]}
    flags = f"--xla_force_host_platform_device_count={device_count(target)}"
    return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": flags}


def table(name: str, targets: tuple[str, ...], steps: dict[str, dict]) -> Table:
    """One row for each target, mode and normalization of a network."""
    network, versions, columns = NETWORKS[name], {}, columns_of(NETWORKS[name])
    found = Table("target", "mode", "normalization", *columns)
    for key in itertools.product(targets, [name], MODES, NORMS):
        if step := steps.get(" ".join(key)):
            found.add_row(key[0], *key[2:], *(column(step) for column in columns.values()))
            versions |= step["versions"]
    images = f"{network.batch} images of {network.size} x {network.size} {network.of}"
    found.title = ", ".join([name, images, *(" ".join(pair) for pair in versions.items())])
    return found


def columns_of(network: Network) -> dict[str, Callable[[dict], str]]:
    """Headers, and what stands below them for a step."""

    def memory(key):
        return lambda step: f"{step[key] / network.unit:.2f}" if step[key] else ""

    return {
        "collectives": lambda step: f"{sum(step['collectives'].values())}",
        "of norms, KB": lambda step: f"{step['norm_bytes'] / 1e3:.1f}",
        "sent, MB": lambda step: f"{step['sent_bytes'] / 1e6:.2f}",
        "kernels (fusions)": lambda step: f"{sum(step['kernels'].values())} ({step['kernels'].get('fusion', 0)})",
        "branches": lambda step: f"{step['branches']}",
        f"accessed, {network.unit_name}": memory("bytes_accessed"),
        f"main memory, {network.unit_name}": memory("main_memory_bytes"),
        "temporary, MB": lambda step: f"{step['temporary_bytes'] / 1e6:.0f}" if "temporary_bytes" in step else "",
        "peak, MB": lambda step: f"{step['peak_bytes'] / 1e6:.0f}",
        "compile, s": lambda step: f"{step['compile_seconds']:.3g}",
    }


def message(features: int = 2048) -> Table:
    """On paper: what one device receives in the forward pass of one normalization."""
    found = Table("devices", "jbn: sums of one size", "an all-gather", title=f"bytes, {features} features, float32")
    for devices in (8, 64, 512, 4096):
        # An all-gather brings count, mean, the mean's low part and variance of every device.
        found.add_row(f"{devices}", f"{4 * (2 * features + 1):,}", f"{4 * (3 * features + 1) * devices:,}")
    return found


def main(config: Config) -> None:
    if not config.markdown:
        measure_all(config)
    steps = load(config)
    for each in [*(table(name, config.targets, steps) for name in config.networks), message()]:
        if config.markdown:
            print(tables.markdown(each))
        else:
            console.print(each)


def measure_all(config: Config) -> None:
    if not version("flax"):
        console.print("Flax is not installed and left out")
        config = dataclasses.replace(config, norms=tuple(norm for norm in config.norms if not norm.startswith("flax")))
    for target in config.targets:
        if (compiler := COMPILERS.get(target)) and not version(compiler):
            console.print(f"{target} is left out: {compiler} is not installed")
            continue
        with mock.patch.dict(os.environ, environment(target)):
            process = multiprocessing.get_context("spawn").Process(target=measure_target, args=(target, config))
            process.start()
        process.join()
        if process.exitcode:
            console.print(f"{target} failed with exit code {process.exitcode}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
