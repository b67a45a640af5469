"""Test time: a trained network on images that arrive otherwise, with and without adaptation."""

from functools import partial

import adapting
import claim
import corruptions
import figures
import matplotlib.pyplot as plt
import numpy as np
import sources

ORDERS = ("random", "sorted")
COLORS = {
    "none": "black",
    "AdaBN": figures.PLAIN,
    "own statistics": figures.OTHER,
    "mixed": figures.OWN,
    "slow": figures.THIRD,
    "TENT": "tab:red",
    "EATA": "tab:purple",
}
SHOWN = 64  # the batch of the tables that have one alone


def jobs(folder, size) -> claim.Jobs:
    def run(name, kind, seed):
        source = sources.NETWORKS[name](folder, seed, size)
        pixels, labels = corruptions.corrupt(source.pixels, kind, seed), source.labels
        answers = adapting.answers(adapting.NONE, source, pixels, size.batches[-1])
        adapted = source._replace(states=adapting.adabn(source, pixels))
        found = {
            "none": np.mean(answers == labels),
            "AdaBN": np.mean(adapting.answers(adapting.NONE, adapted, pixels, size.batches[-1]) == labels),
        }
        for order in ORDERS:
            rows = np.arange(len(labels)) if order == "random" else np.argsort(labels, kind="stable")
            for batch in size.batches:
                for method, how in adapting.METHODS.items():
                    right = adapting.answers(how, source, pixels[rows], batch) == labels[rows]
                    found[f"{method}, {order}, {batch}"] = np.mean(right)
        return found

    return {
        f"{name}, {kind}, seed {seed}": partial(run, name, kind, seed)
        for seed in range(size.seeds)
        for name in sources.NETWORKS
        for kind in corruptions.KINDS
    }


def parts(found) -> tuple[list[str], list[int], list[int]]:
    """Networks, seeds and batches that there are."""
    keys = [job.split(", ") for job in found]
    batches = {int(key.split(", ")[2]) for row in found.values() for key in row if key.count(",") == 2}
    names = list(dict.fromkeys(name for name, _, _ in keys))
    return names, sorted({int(seed.removeprefix("seed ")) for _, _, seed in keys}), sorted(batches)


def accuracy(found, name, method, order, batch, kinds=tuple(corruptions.STRENGTHS)) -> np.ndarray:
    """[seeds], in percent, the mean over `kinds`."""
    key = method if method in ("none", "AdaBN") else f"{method}, {order}, {batch}"
    _, seeds, _ = parts(found)
    return np.array([100 * np.mean([found[f"{name}, {kind}, seed {seed}"][key] for kind in kinds]) for seed in seeds])


def draw(found, path) -> None:
    names, _, batches = parts(found)
    figure, axes = plt.subplots(len(names), 2, figsize=(14, 5 * len(names)), sharey="row", squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, order in zip(row, ORDERS, strict=True):
            for method, color in COLORS.items():
                values = np.stack([accuracy(found, name, method, order, batch) for batch in batches], 1)
                style = {"linestyle": "--"} if method in ("none", "AdaBN") else {"marker": "o"}
                claim.band(axis, np.arange(len(batches)), values, color, **style)
            axis.set(title=f"{name}, {order} order", xlabel="images in a batch", xticks=np.arange(len(batches)))
            axis.set_xticklabels(map(str, batches))
        row[0].set_ylabel("accuracy, mean of six corruptions, %")
    figures.names(axes[0, 0], {method: method for method in COLORS}, COLORS, at=(0.6, 0.04))
    figure.suptitle("Adapting statistics helps in random order, from some images a batch on; sorted by label it breaks")
    figures.save(figure, path)
    draw_kinds(found, path)


def draw_kinds(found, path) -> None:
    """What each method gives or takes for each kind of image, in batches of `SHOWN`."""
    names, _, batches = parts(found)
    batch = SHOWN if SHOWN in batches else batches[-1]
    methods = [method for method in COLORS if method != "none"]
    figure, axes = plt.subplots(len(names), 2, figsize=(14, 4.6 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, order in zip(row, ORDERS, strict=True):
            gains = np.array(
                [
                    [
                        np.mean(
                            accuracy(found, name, method, order, batch, (kind,))
                            - accuracy(found, name, "none", order, batch, (kind,))
                        )
                        for kind in corruptions.KINDS
                    ]
                    for method in methods
                ]
            )
            axis.imshow(gains, cmap="RdBu", vmin=-60, vmax=60, aspect="auto")
            axis.grid(visible=False)
            axis.set_xticks(range(len(corruptions.KINDS)), corruptions.KINDS)
            axis.set_yticks(range(len(methods)), methods)
            for (y, x), gain in np.ndenumerate(gains):
                color = "white" if abs(gain) > 40 else "black"
                axis.text(x, y, f"{gain:+.0f}", ha="center", va="center", color=color)
            axis.set_title(f"{name}, {order} order")
    figure.suptitle(f"Points of accuracy that adaptation gives or takes, batches of {batch}")
    figures.save(figure, path.with_name("corrupted_kinds.png"))


def tell(found) -> list[str]:
    names, _, batches = parts(found)
    shown = SHOWN if SHOWN in batches else batches[-1]
    lines = []
    for name in names:
        heads = [f"{order}, {batch}" for order in ORDERS for batch in batches]
        lines += [f"| {name}, %, by order and batch | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for method in COLORS:
            cells = [
                claim.spread(accuracy(found, name, method, order, batch), "{:.0f}")
                for order in ORDERS
                for batch in batches
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
        lines += [
            f"| {name}, %, in batches of {shown}: random / sorted | {' | '.join(corruptions.KINDS)} |",
            "| --- |" + " --- |" * len(corruptions.KINDS),
        ]
        for method in COLORS:
            cells = []
            for kind in corruptions.KINDS:
                means = [accuracy(found, name, method, order, shown, (kind,)).mean() for order in ORDERS]
                fixed = method in ("none", "AdaBN")
                cells.append(f"{means[0]:.0f}" if fixed else f"{means[0]:.0f} / {means[1]:.0f}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]
