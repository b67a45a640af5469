"""Claim 8, its second half: it simplifies tuning. Random settings, and how many of them train well."""

import claim
import figures
import images
import matplotlib.pyplot as plt
import networks
import numpy as np

DEPTH = 6
COUNT = 40  # random settings, the same for both
LARGEST = 256


def draws(count: int) -> dict[str, np.ndarray]:
    """Log-uniform: the rate from 1e-3 to 10, decay from 1e-6 to 1e-2, scale from 0.1 to 10, the batch from 8 to 256."""
    random = np.random.default_rng(0)
    ranges = {"rate": (1e-3, 10), "decay": (1e-6, 1e-2), "scale": (0.1, 10), "rows": (8, LARGEST)}
    found = {name: low * (high / low) ** random.uniform(size=count) for name, (low, high) in ranges.items()}
    return found | {"rows": found["rows"].astype(int)}


def jobs(folder, size: claim.Size) -> claim.Jobs:
    count = COUNT // size.sweep

    def sweep(name):
        data = images.mnist(folder).halved.rows.first(size.train, size.test)
        drawn = {field: np.repeat(values, size.seeds) for field, values in draws(count).items()}
        setting = networks.settings(seed=np.tile(np.arange(size.seeds), count), **drawn)
        shape = {"depth": DEPTH, "width": size.width, "batch": LARGEST, "steps": size.steps // 2 or 1}
        trained = networks.train(setting, data, networks.NORMS[name], momentum=0.0, **shape)
        return {"accuracy": np.reshape(trained.accuracy, (count, size.seeds))}

    return {name: lambda name=name: sweep(name) for name in networks.NORMS}


def share(found, name, level) -> np.ndarray:
    """[seeds], percent of the settings with an accuracy of `level` percent."""
    return 100 * np.mean(100 * claim.array(found[name]["accuracy"]) >= level, 0)


def draw(found, path) -> None:
    figure, axis = plt.subplots(figsize=(10, 5.5))
    levels = np.arange(10, 97)
    for name, color in claim.COLORS.items():
        values = np.transpose([share(found, name, level) for level in levels])
        claim.band(axis, levels, values, color)
        figures.name_line(axis, 50, values.mean(0)[40] + 4, claim.NAMES[name], color)
    axis.set(xlabel="test accuracy of at least, %", ylabel="random settings that reach it, %", ylim=(0, 105))
    figure.suptitle("With batch norm more of the random settings train")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = ["| settings, %, that reach | 50 % | 80 % | 90 % |", "| --- | --- | --- | --- |"]
    for name, text in claim.NAMES.items():
        lines.append(
            f"| {text} | {' | '.join(claim.spread(share(found, name, level), '{:.0f}') for level in (50, 80, 90))} |"
        )
    return lines
