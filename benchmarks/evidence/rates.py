"""Claims 4 and 5: it accelerates training, and allows higher learning rates."""

import claim
import figures
import images
import matplotlib.pyplot as plt
import networks
import numpy as np

RATES = tuple(float(rate) for rate in np.logspace(-3, 1.5, 10))
DEPTH = 6


def jobs(folder, size: claim.Size) -> claim.Jobs:
    rates = RATES[:: size.sweep]

    def sweep(name):
        data = images.mnist(folder).halved.rows.first(size.train, size.test)
        rate, seed = np.meshgrid(rates, np.arange(size.seeds), indexing="ij")
        setting = networks.settings(rate=rate.ravel(), seed=seed.ravel())
        shape = {"depth": DEPTH, "width": size.width, "batch": size.batch, "steps": size.steps}
        trained = networks.train(setting, data, networks.NORMS[name], momentum=0.0, **shape)
        return {
            "rates": rates,
            "accuracy": np.reshape(trained.accuracy, rate.shape),  # [rates, seeds]
            "loss": np.reshape(claim.smooth(trained.loss), (*rate.shape, -1)),  # [rates, seeds, steps / 10]
        }

    return {name: lambda name=name: sweep(name) for name in networks.NORMS}


def best(found, name) -> int:
    """The rate, by number, with the highest mean test accuracy."""
    return int(claim.array(found[name]["accuracy"]).mean(1).argmax())


def steps_to(loss, target: float) -> np.ndarray:
    """[seeds], the first step from which the loss is below `target`, infinite where it never is."""
    below = claim.array(loss) < target
    return np.where(below.any(-1), 10.0 * (below.argmax(-1) + 1), np.inf)


def draw(found, path) -> None:
    """Two figures: loss by step, and accuracy by rate."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    same = best(found, "without")
    panels = {
        "the same learning rate, the best without": {"with": same, "without": same},
        "each at its own best learning rate": {name: best(found, name) for name in claim.NAMES},
    }
    for axis, (title, rates) in zip(axes, panels.items(), strict=True):
        for name, rate in rates.items():
            loss = claim.array(found[name]["loss"])[rate]
            x = 10 * (1 + np.arange(loss.shape[1]))
            claim.band(axis, x, loss, claim.COLORS[name])
        texts = {name: f"{claim.NAMES[name]}, {found[name]['rates'][rate]:.2g}" for name, rate in rates.items()}
        figures.names(axis, texts, claim.COLORS, at=(0.5, 0.8))
        axis.set(title=title, xlabel="step", yscale="log")
    axes[0].set_ylabel("training loss")
    figure.suptitle("Batch norm trains faster by the higher learning rate that it allows")
    figures.save(figure, path)

    figure, axis = plt.subplots(figsize=(10, 5.5))
    for name, color in claim.COLORS.items():
        accuracy = 100 * claim.array(found[name]["accuracy"]).T
        claim.band(axis, found[name]["rates"], accuracy, color)
        at = accuracy.mean(0).argmax()
        axis.annotate(
            claim.NAMES[name],
            (found[name]["rates"][at], accuracy.mean(0)[at]),
            (0, 12),
            textcoords="offset points",
            color=color,
            ha="center",
            fontweight="bold",
        )
    axis.set(
        xscale="log", xlabel="learning rate", ylabel="test accuracy after a fixed number of steps, %", ylim=(0, 110)
    )
    figure.suptitle("Batch norm allows higher learning rates")
    figures.save(figure, path.with_name("rates_accuracy.png"))


def tell(found) -> list[str]:
    lines = [
        "| | best rate | accuracy there, % | steps to a loss of 0.3 | rates that reach 85 % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, text in claim.NAMES.items():
        at, accuracy = best(found, name), claim.array(found[name]["accuracy"])
        good = [rate for rate, mean in zip(found[name]["rates"], accuracy.mean(1), strict=True) if mean > 0.85]
        reach = f"{good[0]:.2g} to {good[-1]:.2g}" if good else "none"
        steps = claim.spread(steps_to(found[name]["loss"][at], 0.3), "{:.0f}")
        lines.append(
            f"| {text} | {found[name]['rates'][at]:.2g} | {claim.spread(100 * accuracy[at])} | {steps} | {reach} |"
        )
    return lines
