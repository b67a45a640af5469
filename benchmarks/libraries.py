"""How libraries mean batch norm: the tables of docs/libraries.md, or how far jbn is from what each library made.

python benchmarks/libraries.py [differences]
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import jbn
from jbn import convert, presets
from jbn._libraries.find import one_layer
from jbn._libraries.library import Library
from jbn._libraries.rows import LIBRARIES

GOLDEN = Path(__file__).parents[1] / "tests/golden/libraries"
SCRIPTS = GOLDEN.parent / "make"


class Golden(NamedTuple):
    """What a library made: see tests/golden/make/golden.py."""

    x: np.ndarray
    entries: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    evaluated: np.ndarray
    trained: np.ndarray
    settings: dict


def path_of(name) -> Path:
    return GOLDEN / f"{name.replace(' ', '-')}.npz"


def load(name) -> Golden:
    with np.load(path_of(name)) as file:
        held = dict(file)

    def under(start):
        return {key.removeprefix(start): value for key, value in held.items() if key.startswith(start)}

    settings = json.loads(str(held["settings"]))
    return Golden(held["x"], under("entries/"), under("next/"), held["evaluated"], held["trained"], settings)


class Differences(NamedTuple):
    """The largest differences, of each value over 1 + its size."""

    evaluation: float
    output: float  # of the next training step
    entries: float  # that are stored after it
    back: float  # entries read and written, from what they were


def apart(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.max(np.abs(ours - theirs) / (1 + np.abs(theirs))))


def converted(name, entries, settings):
    library = LIBRARIES[name]
    counted = library.evidence in ("average", "hidden")
    return convert.from_library(entries, name, decay=settings["decay"] if counted else None)


def written(name, params, state, like, settings) -> float:
    """How far the entries written are from `like`, as the library means them; counts and dtypes have to be the same."""
    library = LIBRARIES[name]
    like = {key: value for key, value in one_layer(library, like, "like", "").items() if key not in library.ignored}
    ours = convert.to_library(params, state, name, decay=settings["decay"], shape=like[library.names[2]].shape)
    assert ours.keys() == like.keys(), (ours.keys(), like.keys())
    worst = 0.0
    for key, theirs in like.items():
        if not np.issubdtype(theirs.dtype, np.floating):
            assert key == library.counter or ours[key] == theirs, key
            continue
        if key == library.names[0] and library.scale in ("fixed", "relu"):  # what is stored without a meaning is lost
            theirs = np.ones_like(theirs) if library.scale == "fixed" else np.maximum(theirs, 0)
        assert ours[key].dtype == theirs.dtype, key
        worst = max(worst, apart(ours[key], theirs))
    return worst


def compare(name) -> Differences:
    golden, preset = load(name), presets.of(name)
    x, axes = golden.x[-1], np.ravel(golden.settings["feature_axis"]).tolist()
    params, state = converted(name, golden.entries, golden.settings)
    evaluation = jbn.normalize_running(x, params, state, epsilon=preset["epsilon"], feature_axis=axes)
    output, after = evaluation, state
    if LIBRARIES[name].momentum:  # else nothing moves
        output, after = jbn.batch_norm(x, params, state, train=True, feature_axis=axes, **preset)
    return Differences(
        apart(evaluation, golden.evaluated),
        apart(output, golden.trained),
        written(name, params, after, golden.after, golden.settings),
        written(name, params, state, golden.entries, golden.settings),
    )


def command(name: str) -> str:
    """What makes its golden file; a script may make those of several rows."""
    words = name.split()
    scripts = ["-".join(words[:count]) for count in range(len(words), 0, -1)]
    return f"`make goldens ARGS={next(each for each in scripts if (SCRIPTS / f'{each}.py').exists())}`"


def numbers(name: str, library: Library) -> list[str]:
    moves, weighs = bool(library.momentum), 1 - library.decay if library.momentum == "new" else library.decay
    starts = {"full": f"0 and {library.start:g}", "first": "the first batch", "average": "0 and 0, debiased"}
    return [
        library.title,
        f"`{name}`",
        ("n - 1" if library.unbiased else "n") if moves else "-",
        f"{weighs:.6g} of the {library.momentum}" if moves else "-",
        short(library.epsilon),
        starts.get(library.evidence, "0 and 1, debiased") if moves else "-",
        library.version,
        f"read: {library.read}" if library.read else command(name),
    ]


def names(name: str, library: Library) -> list[str]:
    others = ", ".join(f"`{each}`" for each in (*library.needed, library.counter) if each)
    shape = f"{library.shape}, statistics {library.running}" if library.running else library.shape
    return [library.title, *(f"`{each}`" for each in library.names), others or "-", library.nameless or f"`{shape}`"]


NUMBERS = ("library", "name here", "running variance over", "momentum is the weight", "epsilon", "averages start at")
NUMBERS += ("version", "run by")
NAMES = ("library", "scale", "bias", "mean", "variance", "beside them", "shape, or what a file has")


def markdown(titles, cells) -> str:
    lines = [titles, ["---"] * len(titles), *(cells(*item) for item in LIBRARIES.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def surprises() -> str:
    notes = []
    for name, library in LIBRARIES.items():
        differs = [f"**Evaluation is another than the formula's.** {library.evaluation}"] * bool(library.evaluation)
        differs += [f"**A training step gives another output.** {library.training}"] * bool(library.training)
        notes.append(f"- **{library.title}** (`{name}`): {' '.join([library.surprise, *dict.fromkeys(differs)])}")
    return "\n".join(notes)


def parts() -> list[str]:
    """What the page is made of."""
    return [markdown(NUMBERS, numbers), markdown(NAMES, names), surprises()]


def short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def apart_table() -> str:
    """How far jbn is from each library."""
    lines = [("library", *Differences._fields), ["---"] * (1 + len(Differences._fields))]
    for name, library in LIBRARIES.items():
        if not library.read:
            lines.append([library.title, *map(short, compare(name))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(apart_table() if sys.argv[1:] == ["differences"] else "\n\n".join(parts()))
