"""Claims 1 to 3: a layer measures each feature, takes it to mean 0 and standard deviation 1, then scales and shifts."""

import claim
import figures
import images
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networks
import numpy as np

import jbn

DEPTH, LAYER = 4, 1
STAGES = {"start": 0, "end": 1}
PARTS = ("before", "normalized", "after scale and shift")
BINS = np.linspace(-5, 5, 31)


def jobs(folder, size: claim.Size) -> claim.Jobs:
    def measure(steps):
        data = images.cifar10(folder).rows.first(size.train, size.test)
        setting = networks.settings(seed=jnp.arange(size.seeds), rate=0.05)
        shape = {"depth": DEPTH, "width": size.width, "batch": size.batch}
        trained = networks.train(setting, data, networks.batch_norm, steps=steps, **shape)

        def of_one_layer(params, states):
            _, _, inputs = networks.apply(params, states, data.test[:512], networks.batch_norm, train=True)
            norm = jax.tree.map(lambda field: field[LAYER], params["rest"]["norm"])
            normalized, _ = jbn.normalize_batch(inputs[LAYER], jbn.Params(None, None))
            after, _ = jbn.normalize_batch(inputs[LAYER], norm)
            return jnp.stack([inputs[LAYER], normalized, after])

        values = np.asarray(jax.vmap(of_one_layer)(trained.params, trained.states))  # [seeds, parts, batch, features]
        features = values[0].transpose(0, 2, 1)[:, :6]
        return {
            "mean": values.mean(2),
            "std": values.std(2),
            "histograms": [[np.histogram(feature, BINS, density=True)[0] for feature in part] for part in features],
        }

    return {stage: lambda steps=steps: measure(steps) for stage, steps in zip(STAGES, (0, size.steps), strict=True)}


def draw(found, path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), sharex=True, sharey=True)
    middle = (BINS[1:] + BINS[:-1]) / 2
    for row, stage in zip(axes, STAGES, strict=True):
        for axis, part, histograms in zip(row, PARTS, found[stage]["histograms"], strict=True):
            for histogram in histograms:
                axis.plot(middle, histogram, linewidth=1.5)
            axis.set(title=f"{part}, {stage} of training")
    for axis in axes[1]:
        axis.set_xlabel("value")
    for axis in axes[:, 0]:
        axis.set(ylabel="density", yticks=[])
    figure.suptitle("Six features of one layer, for one batch")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = ["| | largest mean of a feature | standard deviations |", "| --- | --- | --- |"]
    for stage in STAGES:
        mean, std = claim.array(found[stage]["mean"]), claim.array(found[stage]["std"])
        for index, part in enumerate(PARTS):
            low, high = np.percentile(std[:, index], (0, 100))
            lines.append(f"| {part}, {stage} | {abs(mean[:, index]).max():.2g} | {low:.3g} to {high:.3g} |")
    return lines
