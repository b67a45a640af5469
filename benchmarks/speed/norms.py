"""What of it is the norm: others, or none, in the place of jbn's."""

from functools import partial
from pathlib import Path
from typing import Any

import changes
import claim
import figures
import flax_norm
import matplotlib.pyplot as plt

import jbn

RATES = (0.5, 0.15, 0.05, 0.015)  # of the network without norm; jbn's and the others' is 1.5


def scale_and_bias(x, params, state, *, activation, **_):
    """The params of the norms alone: scales are frozen at 1, so biases."""
    return activation(x + params.bias.astype(x.dtype)), state


CHANGES = {
    "jbn.batch_norm": changes.Change("the recipe"),
    "Flax's": changes.Change("linen.BatchNorm and the activation behind", normalize=flax_norm.batch_norm),
    "jbn.batch_renorm": changes.Change("within r 3, d 5", normalize=jbn.batch_renorm),
    "jbn.batch_renorm, narrow": changes.Change(
        "within r 1.5, d 0.5", normalize=partial(jbn.batch_renorm, r_max=1.5, d_max=0.5)
    ),
    **{
        f"none, rate {rate}": changes.Change(
            f"biases alone, peak rate {rate} for 1.5", options={"peak_rate": rate}, normalize=scale_and_bias
        )
        for rate in RATES
    },
}


def jobs(folder: Path | None, size: changes.Size) -> claim.Jobs:
    return changes.jobs(CHANGES, folder, size, recalibrate=True)


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    accuracy = changes.of(found, "accuracy")
    figures.bars(
        axis, {name: (each.min(), float(each.mean()), each.max()) for name, each in accuracy.items()}, form="{:.1f}"
    )
    axis.set(xlabel="test accuracy, %", title="The same training with other norms, or none")
    figures.save(figure, path)


def tell(found: dict[str, Any]) -> list[str]:
    lines = [
        "| norm | that is | test accuracy, % | with recalibrated statistics |",
        "| --- | --- | --- | --- |",
    ]
    accuracy, again = (changes.of(found, value) for value in ("accuracy", "recalibrated"))
    for name, change in CHANGES.items():
        if name not in accuracy:
            continue
        recalibrated = "-" if change.normalize is scale_and_bias else claim.spread(again[name], "{:.2f}")
        lines.append(f"| {name} | {change.says} | {claim.spread(accuracy[name], '{:.2f}')} | {recalibrated} |")
    return lines
