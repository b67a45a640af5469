"""What each part of the recipe is worth: the same training without it."""

from pathlib import Path
from typing import Any

import airbench
import changes
import claim
import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np


def moved_alone(key, image, times_seen, **options):
    return airbench_augment(key, image, jnp.zeros_like(times_seen), **options)


def flipped_by_chance(key, image, times_seen, **options):
    flipped = jax.random.bernoulli(jax.random.fold_in(key, 1)).astype(jnp.int32)
    return airbench_augment(key, image, flipped, **options)


def not_whitening(pixels, mean, std):
    """A first layer that is drawn as PyTorch draws any, and no more trained than the other."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, airbench.WHITENING)).astype(np.float32) / np.sqrt(12)


def all_drawn(key, kernel, width=airbench.WIDTH, **options):
    """Params and state with no convolution that passes its inputs on."""
    params, state = airbench_init(key, kernel, width, **options)
    for number, (name, inputs, outputs) in enumerate(airbench.layers(width)):
        drawn = jax.random.uniform(jax.random.fold_in(key, number), (3, 3, inputs, outputs), minval=-1, maxval=1)
        params[name]["kernel"] = drawn / np.sqrt(9 * inputs)
    return params, state


airbench_augment, airbench_init = airbench.augment, airbench.init  # while others take their places
CHANGES = {
    "nothing": changes.Change("all of the recipe"),
    "whitening": changes.Change("a first layer drawn at random", {"whitening": not_whitening}),
    "identity": changes.Change("no convolution starts by passing its inputs on", {"init": all_drawn}),
    "fast biases": changes.Change("biases of norms at the rate of kernels", {"BIAS_RATE": 1}),
    "forgetting": changes.Change("running statistics by a decay of 0.9 for 0.6", {"DECAY": 0.9}),
    "epsilon": changes.Change("an epsilon of 1e-5 for 1e-12", {"EPSILON": 1e-5}),
    "lookahead": changes.Change("no lookahead", {"lookahead": lambda carry, total: carry}),
    "turns": changes.Change("flips by chance for flips in turn", {"augment": flipped_by_chance}),
    "flips": changes.Change("no flips", {"augment": moved_alone}),
    "moves": changes.Change("no moves by up to 2 pixels", options={"moves": 0}),
    "smoothing": changes.Change("no label smoothing", options={"smoothing": 0.0}),
    "bfloat16": changes.Change("all in float32", options={"dtype": "float32"}),
}


def jobs(folder: Path | None, size: changes.Size) -> claim.Jobs:
    return changes.jobs(CHANGES, folder, size)


def accuracies(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """[seeds], of the whole recipe first."""
    return changes.of(found, "accuracy") | {"views": changes.of(found, "one view")["nothing"]}


def draw(found: dict[str, Any], path: Path) -> None:
    accuracy = accuracies(found)
    lost = {name: each - accuracy["nothing"] for name, each in accuracy.items() if name != "nothing"}
    names = sorted(lost, key=lambda name: -lost[name].mean())
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, name in enumerate(names):
        axis.barh(place, lost[name].mean(), color=figures.OWN, alpha=0.6)
        axis.plot(lost[name], [place] * len(lost[name]), ".", color="black")
    axis.set_yticks(range(len(names)), names)
    axis.axvline(0, color="black", linewidth=1)
    axis.set(
        xlabel="points of test accuracy by leaving it out; a dot a seed", title="What each part of the recipe gives"
    )
    figures.save(figure, path)


def tell(found: dict[str, Any]) -> list[str]:
    lines = ["| left out | that is | test accuracy, % | points |", "| --- | --- | --- | --- |"]
    says = {name: change.says for name, change in CHANGES.items()} | {"views": "one view of a test image for six"}
    accuracy = accuracies(found)
    for name in sorted(accuracy, key=lambda name: (name != "nothing", accuracy[name].mean())):
        points = "" if name == "nothing" else f"{(accuracy[name] - accuracy['nothing']).mean():+.2f}"
        lines.append(f"| {name} | {says[name]} | {claim.spread(accuracy[name], '{:.2f}')} | {points} |")
    return lines
