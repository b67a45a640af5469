"""How libraries mean batch norm: the table of docs/libraries.md, or how far jbn is from what each library made.

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

    rest = (held[key] for key in ("evaluated", "trained"))
    return Golden(held["x"], under("entries/"), under("next/"), *rest, json.loads(str(held["settings"])))


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
    """How far the entries written are from `like`, as the library means them; counts have to be the same."""
    library = LIBRARIES[name]
    like = one_layer(library, like, "like", "")
    ours = convert.to_library(params, state, name, decay=settings["decay"], shape=like[library.names[2]].shape)
    assert ours.keys() == like.keys(), (ours.keys(), like.keys())
    worst = 0.0
    for key, theirs in like.items():
        if not np.issubdtype(theirs.dtype, np.floating):
            assert key == library.counter or ours[key] == theirs, key
            continue
        if key == library.names[0] and library.scale in ("fixed", "relu"):  # what is stored without a meaning is lost
            theirs = np.ones_like(theirs) if library.scale == "fixed" else np.maximum(theirs, 0)
        worst = max(worst, apart(ours[key], theirs))
    return worst


def compare(name) -> Differences:
    golden, library, preset = load(name), LIBRARIES[name], dict(presets.of(name))
    options = {"epsilon": preset["epsilon"], "feature_axis": np.ravel(golden.settings["feature_axis"]).tolist()}
    params, state = converted(name, golden.entries, golden.settings)
    evaluation = jbn.normalize_running(golden.x[-1], params, state, **options)
    output, after = evaluation, state
    if library.momentum:  # else nothing moves
        output, after = jbn.batch_norm(golden.x[-1], params, state, train=True, **preset | options)
    return Differences(
        apart(evaluation, golden.evaluated),
        apart(output, golden.trained),
        written(name, params, after, golden.after, golden.settings),
        written(name, params, state, golden.entries, golden.settings),
    )


def cells(name: str, library: Library) -> list[str]:
    """A row of the page."""
    number = 1 - library.decay if library.momentum == "new" else library.decay
    seen = f"read: {library.read}" if library.read else f"`make goldens ARGS={name.replace(' ', '-')}`"
    names = ", ".join(f"`{each}`" for each in library.names)
    rest = ", ".join(f"`{each}`" for each in library.all_names[4:])
    shape = library.shape + (f", statistics {library.running}" if library.running else "")
    starts = {"full": f"0 and {library.start:g}", "first": "the first batch", "average": "debiased, counted"}
    return [
        f"`{name}`",
        f"{library.title} {library.version}",
        names + f"; {rest}" * bool(rest),
        ("n - 1" if library.unbiased else "n") if library.momentum else "-",
        f"{number:.6g} of the {library.momentum}" if library.momentum else "-",
        f"{library.epsilon:g}",
        starts.get(library.evidence, "0 and 1, debiased, counted") if library.momentum else "-",
        shape,
        seen,
    ]


TITLES = ("name here", "library", "names: scale, bias, mean, variance; others", "running variance divides by")
TITLES += ("momentum weighs", "epsilon", "averages start at", "shape", "seen by")


def table() -> str:
    """The table of the page, and what surprises."""
    lines = [TITLES, ["---"] * len(TITLES), *(cells(*item) for item in LIBRARIES.items())]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = []
    for name, library in LIBRARIES.items():
        differs = [f"Evaluation differs: {library.evaluation}"] * bool(library.evaluation)
        differs += [f"The output of a training step differs: {library.training}"] * bool(library.training)
        notes.append(f"- **{library.title}** (`{name}`): {' '.join([library.surprise, *differs])}")
    return f"{rows}\n\n## What surprises\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["differences"]:
        print(table(), end="")
        sys.exit()
    print(f"| library | {' | '.join(Differences._fields)} |")
    print(f"| --- |{' --- |' * len(Differences._fields)}")
    for key in LIBRARIES:
        if path_of(key).exists():
            print(f"| {key} | {' | '.join(f'{value:.1e}' for value in compare(key))} |")
