"""Compile a training step of ResNet-50 for CPU and TPU; count what each chip sends, reads and keeps. Nothing is run.

    pip install 'jax[tpu]'                     the TPU compiler; it needs no TPU
    python benchmarks/communication.py         everything, 1 to 3 minutes for each of 32 compilations
    python benchmarks/communication.py --markdown

What has been compiled is kept in docs/communication.json and not compiled again.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import resnet50
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

# Chips, and what libtpu calls them all together: for v5p it counts cores, two a chip.
TPUS = {"v5e:4x4": "v5litepod-16", "v5e:16x16": "v5litepod-256", "v5p:8x8x8": "v5p-1024"}
TARGETS = ("cpu:8", *TPUS)
MODES = ("jit", "shard_map")
USUAL = "jbn, usual path"  # compiled without what runs only where sums about 0 would lose digits
NORMS = {"jbn": "jbn", USUAL: "jbn", "flax fast": "flax fast", "flax two-pass": "flax two-pass"}
PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
console = Console(highlight=False, width=160)


@dataclasses.dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] = TARGETS
    modes: tuple[str, ...] = MODES
    norms: tuple[str, ...] = tuple(NORMS)
    batch: int = 32
    """Images a chip."""
    size: int = 224
    """Height and width of the images."""
    results: Path = Path(__file__).resolve().parents[1] / "docs" / "communication.json"
    texts: Path | None = None
    """Folder to keep the compiled programs in."""
    markdown: bool = False
    """Print the results as Markdown; compile nothing."""


def count(text: str, devices: int, classes: int = 1000) -> dict[str, dict]:
    """By place: collectives of a compiled step by kind, bytes they carry, and bytes that each device sends."""
    kinds = {place: Counter() for place in hlo.PLACES}
    norm, other, sent = (dict.fromkeys(hlo.PLACES, 0) for _ in range(3))
    for kind, place, operands in hlo.collectives(text):
        kinds[place][kind] += 1
        for operand in operands:
            (norm if of_norm(operand.shape, classes) else other)[place] += operand.bytes
            sent[place] += round(hlo.sent(kind, operand.bytes, devices))
    return {"collectives": kinds, "norm_bytes": norm, "other_bytes": other, "sent_bytes": sent}


def of_norm(shape: tuple[int, ...], classes: int) -> bool:
    """Whether this is a vector of features, or two: not the loss, the head, or the kernel of a convolution."""
    is_kernel = len(shape) == 4 and max(shape) < math.prod(shape)
    return bool(shape) and classes not in shape and not is_kernel


def measure(target: str, mode: str, norm: str, config: Config) -> dict:
    """Compile one step and count."""
    devices = topologies.get_topology_desc(target, platform="tpu").devices if target in TPUS else jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), (resnet50.AXIS,))
    kind = resnet50.NORMS[NORMS[norm]]
    jax.clear_caches()  # what was traced before does not see a change
    with contextlib.ExitStack() as changes:
        for user in ("_moments", "_normalize") if norm == USUAL else ():
            changes.enter_context(mock.patch(f"jbn.{user}.cancelled", lambda _: jnp.array(False)))
        lowered = resnet50.make_step(kind, mesh, mode).lower(*resnet50.inputs(kind, mesh, config.batch, config.size))
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    text, cost, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
    assert text and cost and memory
    if config.texts:
        config.texts.mkdir(parents=True, exist_ok=True)
        (config.texts / f"{target} {mode} {norm}.txt").write_text(text)
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "chips": len(devices),
        **count(text, len(devices)),
        "bytes_accessed": cost["bytes accessed"],
        "main_memory_bytes": hlo.traffic(text),
        "peak_bytes": arguments + memory.temp_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def measure_target(target: str, config: Config) -> None:
    """What is missing of one target, in a process whose environment is the target's."""
    packages = PACKAGES if target in TPUS else PACKAGES[:-1]
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    setting = {"batch": config.batch, "size": config.size, "versions": versions}
    for mode, norm in itertools.product(config.modes, config.norms):
        name, steps = f"{target} {mode} {norm}", load(config)
        if setting != {key: steps.get(name, {}).get(key) for key in setting}:
            steps[name] = setting | measure(target, mode, norm, config)
            config.results.parent.mkdir(parents=True, exist_ok=True)
            config.results.write_text(json.dumps(steps, indent=1) + "\n")
            console.print(f"{name}: {steps[name]['compile_seconds']} s")
            jax.clear_caches()


def load(config: Config) -> dict[str, dict]:
    """All that has been measured, by target, mode and norm."""
    return json.loads(config.results.read_text()) if config.results.exists() else {}


def environment(target: str) -> dict[str, str]:
    if target in TPUS:
        where = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
        return where | {"JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": TPUS[target]}
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={target.split(':')[1]}"}


COLUMNS = (
    "mode",
    "norm",
    "collectives",
    "norm, KB",
    "rest, MB",
    "sent, MB",
    "accessed, GB",
    "main memory, GB",
    "peak, MB",
    "compile, s",
)


def table(target: str, steps: dict[str, dict]) -> Table:
    """One row for each mode and normalization; in brackets what is in a branch that is rarely taken."""
    found = Table(*COLUMNS)
    for mode, norm in itertools.product(MODES, NORMS):
        if step := steps.get(f"{target} {mode} {norm}"):
            found.add_row(mode, norm, *cells(step))
            versions = ", ".join(f"{name} {version}" for name, version in step["versions"].items())
            found.title = f"{target}, {step['batch']} images of {step['size']} x {step['size']} a chip; {versions}"
    return found


def cells(step: dict) -> list[str]:
    def places(numbers: dict[str, float], unit: float, form: str) -> str:
        usual, rare = numbers[hlo.ONCE] + numbers[hlo.LOOP], numbers[hlo.BRANCH]
        return f"{usual / unit:{form}}" + (f" ({rare / unit:{form}})" if rare else "")

    return [
        places({place: sum(kinds.values()) for place, kinds in step["collectives"].items()}, 1, ".0f"),
        places(step["norm_bytes"], 1e3, ".0f"),
        places(step["other_bytes"], 1e6, ".1f"),
        places(step["sent_bytes"], 1e6, ".2f"),
        f"{step['bytes_accessed'] / 1e9:.2f}",
        places(step["main_memory_bytes"], 1e9, ".2f"),
        f"{step['peak_bytes'] / 1e6:.0f}",
        f"{step['compile_seconds']:.0f}",
    ]


def message(features: int = 2048) -> Table:
    """On paper: what one device receives in the forward pass of one normalization."""
    found = Table("devices", "jbn: sums of one size", "an all-gather", title=f"bytes, {features} features, float32")
    for devices in (8, 64, 512, 4096):
        # An all-gather brings count, mean, the mean's low part and variance of every device.
        found.add_row(f"{devices}", f"{4 * (2 * features + 1):,}", f"{4 * (3 * features + 1) * devices:,}")
    return found


def markdown(table: Table) -> str:
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [[str(column.header) for column in table.columns], ["---"] * len(table.columns), *rows]
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])


def main(config: Config) -> None:
    if not config.markdown:
        measure_all(config)
    for each in [table(target, load(config)) for target in config.targets] + [message()]:
        if config.markdown:
            print(markdown(each))
        else:
            console.print(each)


def measure_all(config: Config) -> None:
    if not importlib.util.find_spec("flax"):
        console.print("Flax is not installed and left out")
        config = dataclasses.replace(config, norms=tuple(norm for norm in config.norms if NORMS[norm] == "jbn"))
    for target in config.targets:
        if target in TPUS and not importlib.util.find_spec("libtpu"):
            console.print(f"{target} is left out: libtpu is not installed")
            continue
        with mock.patch.dict(os.environ, environment(target)):
            process = multiprocessing.get_context("spawn").Process(target=measure_target, args=(target, config))
            process.start()
        process.join()
        if process.exitcode:
            console.print(f"{target} failed with exit code {process.exitcode}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
