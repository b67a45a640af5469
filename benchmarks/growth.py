"""How the time of one normalization grows: with rows, with features, and with the devices that share a batch.

    python benchmarks/growth.py                  1 minute; docs/growth.json and growth.png
    python benchmarks/growth.py --folder FOLDER

Training in float32, forward and backward, one call after another, of jbn and of Flax, in one run and in a new order
every round. Beside it two limits, measured as copies of as many bytes: eight passes over memory, which the formulas
need where a pass begins when the one before has ended, and five, which a kernel needs that keeps x and dy on the chip
in between. Devices are virtual ones of a CPU: what is seen of them is what it costs to split, not what is gained.
"""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import tyro

POINTS = {"rows": [10**n for n in range(2, 8)], "features": [10**n for n in range(6)], "devices": [1, 2, 4, 8]}
TITLES = {
    "rows": "rows of 16 features",
    "features": "features, 1,024 rows",
    "devices": "virtual devices, [65,536, 64] in all",
}
NAMES = ("jbn", "flax linen")
LIMITS = {"eight passes": 8, "five passes": 5}


@dataclasses.dataclass(frozen=True)
class Config:
    folder: Path = Path(__file__).resolve().parents[1] / "docs"
    """Where growth.json and growth.png are kept."""
    rounds: int = 11
    """How often each is timed; medians are reported."""
    most: int = 10**7
    """Rows or features, at most."""
    only: str = ""
    """Time rows, features or devices, and print them as JSON; what the others are made of."""


def shape_of(what: str, point: int) -> tuple[int, int]:
    return {"rows": (point, 16), "features": (1024, point), "devices": (65536, 64)}[what]


def functions(what: str, point: int) -> dict:
    """What is timed at one point, by name."""
    import competitors
    import jax
    import jax.numpy as jnp
    import numpy as np
    import operation
    from jax.sharding import NamedSharding, PartitionSpec

    shape = shape_of(what, point)
    rest = [make(shape[-1]) for make in (jnp.ones, jnp.zeros, jnp.zeros, jnp.ones)]
    x, dy = (np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in (0, 1))
    found = {name: operation.copies_of(x, passes) for name, passes in LIMITS.items()}
    if what == "devices":
        mesh = jax.sharding.Mesh(jax.devices()[:point], "i")
        x, dy = (jax.device_put(each, NamedSharding(mesh, PartitionSpec("i"))) for each in (x, dy))
        rest = jax.device_put(rest, NamedSharding(mesh, PartitionSpec()))
    else:
        x, dy = map(jnp.asarray, (x, dy))
    for name in NAMES:
        step = partial(operation.step_of, "training", competitors.JAX_PEERS[name](shape[-1], -1, True), None)
        compiled = jax.jit(step).lower(x, dy, *rest).compile()
        found[name] = partial(lambda run: jax.block_until_ready(run(x, dy, *rest)), compiled)
    return found


def measure(config: Config, what: str) -> dict:
    """Median seconds and quartiles, by point and name."""
    import numpy as np
    import operation

    found = {}
    for point in (point for point in POINTS[what] if point <= config.most):
        times = operation.seconds(functions(what, point), config.rounds)
        found[point] = {name: np.percentile(values, (25, 50, 75)).tolist() for name, values in times.items()}
    return found


def in_a_process(config: Config, what: str) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={8 if what == 'devices' else 1}"
    command = [sys.executable, __file__, "--only", what, "--rounds", str(config.rounds), "--most", str(config.most)]
    run = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def figure_of(record: dict, path: Path) -> None:
    """Nanoseconds a value, a panel for each of what grows."""
    import figures
    import matplotlib.pyplot as plt
    import numpy as np

    colors = {"jbn": figures.OWN, "flax linen": figures.OTHER, "eight passes": figures.PLAIN, "five passes": "black"}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), sharey=True)
    for axis, (what, title) in zip(axes, TITLES.items(), strict=True):
        points = list(map(int, record["times"][what]))
        values = np.array([np.prod(shape_of(what, point)) for point in points])
        for name, color in colors.items():
            times = np.array([record["times"][what][str(point)][name] for point in points]) / values[:, None] * 1e9
            style = "-" if name in NAMES else "--"
            axis.plot(points, times[:, 1], style, color=color, marker="o" if name in NAMES else None)
            if name in NAMES:
                axis.fill_between(points, times[:, 0], times[:, 2], color=color, alpha=0.2, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=title, xticks=points)
        axis.set_xticks(points, [f"{point:,}" if point < 10**4 else f"1e{len(str(point)) - 1}" for point in points])
        axis.minorticks_off()
    axes[0].set_ylabel("ns a value")
    figures.names(axes[0], {name: name for name in reversed(colors)}, colors, at=(0.55, 0.6))
    figure.suptitle(f"Time of one normalization in training, forward and backward: {record['machine']}")
    figures.save(figure, path)


def main(config: Config) -> None:
    if config.only:
        print(json.dumps(measure(config, config.only)))
        return
    import operation
    from rich.progress import track

    console = operation.console
    times = {what: in_a_process(config, what) for what in track(TITLES, "what grows", console=console, transient=True)}
    machine = f"{operation.of_machine()}, flax {importlib.metadata.version('flax')}"
    record = {"machine": machine, "times": times}
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
    figure_of(record, config.folder / "growth.png")
    for what, points in times.items():
        for point, found in points.items():
            ratios = {name: found[name][1] / found["eight passes"][1] for name in NAMES}
            console.print(what, point, *(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), "of eight passes")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
