"""Claim 9, its middle part: it costs time. The share of a training step in networks of several widths.

The example's ResNet-8 with batch norm, and with scale and bias alone, in turns. What the compilers for accelerators
make of it is in docs/communication.json, by benchmarks/communication.py.
"""

import time
from functools import partial

import claim
import communication
import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import model
import networks
import numpy as np
from training_step import scale_and_bias

import jbn

WIDTHS = (8, 16, 32, 64)
DEPTH, BATCH = 8, 64
ACCELERATORS = {"h100:1": "one H100", "v5e:4x4": "TPU v5e"}


def jobs(folder, size: claim.Size) -> claim.Jobs:
    del folder
    batch, rounds = min(BATCH, size.batch), 2 * size.seeds + 1

    def step(normalize, width):
        params, state = model.init(jax.random.key(0), DEPTH, width)
        images, labels = jnp.ones((batch, 32, 32, 3)), jnp.zeros(batch, jnp.int32)

        @jax.jit
        def gradient(params, state, images, labels):
            def loss(params):
                logits, new = model.apply(params, state, images, depth=DEPTH, train=True, normalize=normalize)
                return networks.cross_entropy(logits, labels), new

            return jax.grad(loss, has_aux=True)(params)

        return lambda: jax.block_until_ready(gradient(params, state, images, labels))

    def share(width):
        functions = {"with": step(jbn.batch_norm, width), "without": step(scale_and_bias, width)}
        seconds = {name: [] for name in functions}
        for index in range(rounds + 1):  # the first compiles
            for name, function in functions.items():
                started = time.perf_counter()
                function()
                if index:
                    seconds[name].append(time.perf_counter() - started)
        return {"seconds": seconds}

    return {f"width {width}": partial(share, width) for width in WIDTHS[:: size.sweep]}


def shares(found) -> dict[int, np.ndarray]:
    """By width: percent of a step that is batch norm, for every round."""
    values = {}
    for job, content in found.items():
        seconds = {name: claim.array(each) for name, each in content["seconds"].items()}
        values[int(job.rpartition(" ")[2])] = 100 * (1 - seconds["without"] / seconds["with"])
    return values


def accelerators() -> dict[str, float]:
    """Percent of a step's main-memory traffic that is batch norm: ResNet-50, by the compilers."""
    steps, found = communication.load(communication.Config()), {}
    for target, name in ACCELERATORS.items():
        both = [steps.get(f"{target} ResNet-50 jit {norm}") for norm in ("jbn", "scale and bias")]
        if all(both):
            moved, without = (step["main_memory_bytes"] for step in both if step)
            found[name] = 100 * (1 - without / moved)
    return found


def draw(found, path) -> None:
    values = {
        f"this machine, width {width}": tuple(np.percentile(each, (25, 50, 75)))
        for width, each in shares(found).items()
    }
    values |= {f"{name}, memory traffic of ResNet-50": (each,) * 3 for name, each in accelerators().items()}
    figure, axis = plt.subplots(figsize=(10, 4.5))
    figures.bars(axis, values, form="{:.1f} %")
    axis.margins(x=0.15)
    axis.set(xlabel="share of a training step, %")
    figure.suptitle("What measuring and normalizing cost of a training step")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = ["| | share of a step, % |", "| --- | --- |"]
    for width, values in shares(found).items():
        low, middle, high = np.percentile(values, (25, 50, 75))
        lines.append(f"| ResNet-8, {width} wide, time | {middle:.0f} ({low:.0f} to {high:.0f}) |")
    lines += [f"| ResNet-50, {name}, main memory | {value:.0f} |" for name, value in accelerators().items()]
    return lines
