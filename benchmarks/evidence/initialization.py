"""Claim 6: it makes training less sensitive to the initialization."""

import claim
import figures
import images
import matplotlib.pyplot as plt
import networks
import numpy as np

SCALES = tuple(float(scale) for scale in np.logspace(-2, 2, 9))
RATES = {"with": (0.1, 0.3, 1.0), "without": (0.03, 0.1, 0.3)}  # around the best ones of rates.py; the best counts
DEPTH = 6


def jobs(folder, size: claim.Size) -> claim.Jobs:
    scales = SCALES[:: size.sweep]

    def sweep(name):
        data = images.mnist(folder).halved.rows.first(size.train, size.test)
        scale, rate, seed = np.meshgrid(scales, RATES[name], np.arange(size.seeds), indexing="ij")
        setting = networks.settings(scale=scale.ravel(), rate=rate.ravel(), seed=seed.ravel())
        shape = {"depth": DEPTH, "width": size.width, "batch": size.batch, "steps": size.steps}
        trained = networks.train(setting, data, networks.NORMS[name], momentum=0.0, **shape)
        return {"scales": scales, "accuracy": np.reshape(trained.accuracy, scale.shape)}  # [scales, rates, seeds]

    return {name: lambda name=name: sweep(name) for name in networks.NORMS}


def at_best_rate(found, name) -> np.ndarray:
    """Accuracy [scales, seeds], in percent, at the rate with the best mean for each scale."""
    accuracy = 100 * claim.array(found[name]["accuracy"])
    at = accuracy.mean(2).argmax(1)
    return accuracy[np.arange(len(at)), at]


def draw(found, path) -> None:
    figure, axis = plt.subplots(figsize=(10, 5.5))
    for name, color in claim.COLORS.items():
        claim.band(axis, found[name]["scales"], at_best_rate(found, name).T, color, claim.NAMES[name])
    axis.set(xscale="log", xlabel="scale of the initial kernels, times He's", ylabel="test accuracy, %", ylim=(0, 105))
    axis.set_xlim(0.008, 900)
    figure.suptitle("With batch norm the scale of the initialization matters less")
    figures.save(figure, path)


def tell(found) -> list[str]:
    scales = found["with"]["scales"]
    lines = [
        f"| accuracy, %, at times He's | {' | '.join(f'{scale:.2g}' for scale in scales)} |",
        "| --- |" + " --- |" * len(scales),
    ]
    for name, text in claim.NAMES.items():
        lines.append(
            f"| {text} | {' | '.join(claim.spread(values, '{:.0f}') for values in at_best_rate(found, name))} |"
        )
    return lines
