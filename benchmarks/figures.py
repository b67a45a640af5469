"""One style for every figure: a title for people, lines named where they end, spread shown, text for a projector."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

footnotes: list[str] = []  # what every figure of a run has to say
OWN, OTHER, THIRD, PLAIN = "tab:blue", "tab:orange", "tab:green", "tab:gray"
plt.rcParams.update(
    {
        "font.size": 12,
        "axes.titlesize": 13,
        "figure.titlesize": 15,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "lines.linewidth": 2,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 110,
    }
)


def bars(
    axis: Axes,
    values: dict[str, tuple[float, float, float]],
    *,
    form: str = "{:.2f}",
    cut: float = float("inf"),
    reference: tuple[float, str] | None = None,
) -> None:
    """Horizontal bars of (low, middle, high) with the middle's number; jbn's in color, the longest cut at `cut`.

    `reference` is a value, and what the line there says.
    """
    names = list(values)
    low, middle, high = zip(*values.values(), strict=True)
    shown = [min(value, cut) for value in middle]
    axis.barh(names, shown, color=["tab:blue" if name.startswith("jbn") else "silver" for name in names])
    for index, (start, value, end) in enumerate(zip(low, middle, high, strict=True)):
        if value > cut:
            axis.text(cut, index, f"{form.format(value)}  ▸ ", ha="right", va="center")
        else:
            axis.plot([start, min(end, cut)], [index, index], color="black", linewidth=1.2)
            white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            at = (max(value, min(end, cut)), index)
            axis.annotate(form.format(value), at, (8, 0), textcoords="offset points", va="center", bbox=white)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    if reference:
        at, text = reference
        axis.axvline(at, color="black", linewidth=1, linestyle="--")
        axis.text(at, len(names) - 0.4, f" {text}", va="top", fontsize=10)
        axis.set_ylim(len(names) - 0.1, -0.6)


def name_line(axis: Axes, x: float, y: float, text: str, color: str) -> None:
    """The name of a line, to the right of where it ends."""
    axis.annotate(text, (x, y), (8, 0), textcoords="offset points", color=color, va="center", fontweight="bold")


def names(axis: Axes, texts: dict[str, str], colors: dict[str, str], at: tuple[float, float] = (0.04, 0.04)) -> None:
    """The names of lines in their colors, from a point of the panel upwards, where ends are too close."""
    for index, name in enumerate(texts):
        style = {"transform": axis.transAxes, "color": colors[name], "fontweight": "bold", "va": "bottom"}
        axis.text(at[0], at[1] + 0.07 * index, texts[name], **style)


def save(figure: Figure, path: Path) -> None:
    if footnotes:
        figure.supxlabel("; ".join(footnotes), fontsize=10)
    figure.savefig(path)
    plt.close(figure)
