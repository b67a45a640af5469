"""Params and state of one layer's entries, as the row of its library says.

| evidence | what the averages are | weight |
| --- | --- | --- |
| full | as they stand | 1, or without their start by steps and decay |
| first | as they stand, from the first batch on | 1, or 0 where first_time |
| average | hidden / (1 - decay^counter) | 1 - decay^counter |
| hidden | what is divided by that, from mean 0 and variance 1 | 1 - decay^counter |
"""

import math

import jax.numpy as jnp
import numpy as np

from jbn._libraries.entries import assemble, check_decay, check_steps, pick
from jbn._libraries.find import fitting, one_layer
from jbn._libraries.library import Library
from jbn._libraries.rows import row
from jbn._libraries.scale import meant
from jbn._types import Params, State


def read(library: Library, entries, *, source="entries", hint="", steps=None, decay=None) -> tuple[Params, State]:
    """`hint` says what to pass in the place of entries that do not fit."""
    scale, bias, mean, var = library.names
    averages = tuple(name for name in library.needed if name.endswith("hidden"))
    counts = tuple(name for name in library.needed if name not in averages)
    ignored = tuple(filter(None, (library.counter, *library.ignored)))
    given, entries = entries, one_layer(library, entries, source, hint)
    if not hint and not {mean, var, *library.needed} <= entries.keys() <= {*library.all_names}:
        hint = advice(library, given)
    named = pick(source, entries, (mean, var, *averages), (scale, bias), hint, ignored, counts)
    named = {name: _without_ones(library, name, array) for name, array in named.items()}
    meaning = meant(library, named.pop(scale, None), named[mean])
    named |= {} if meaning is None else {scale: meaning}
    if library.evidence == "full":
        _check_number(library, decay)
        return assemble(named, library.names, steps, decay, library.start)
    if steps is not None:
        raise ValueError(f"steps is {steps}; {library.title} holds {', '.join(counts)}: leave it out.")
    if library.evidence == "first":
        if np.asarray(entries["first_time"]).any():  # the arrays were never written to
            return assemble(named | _fresh(named, mean, var), library.names, 0, 0.0)
        return assemble(named, library.names)
    decay = needed_decay(library, decay)
    counted = [check_steps(np.asarray(entries[name]), name) for name in counts]
    if len({*counted}) > 1:
        listed = " and ".join(f"{name} is {count}" for name, count in zip(counts, counted, strict=True))
        raise ValueError(f"{listed}; expected the same.")
    if library.evidence == "hidden":
        return assemble(named, library.names, counted[0], decay)
    weight = 1 - decay ** counted[0]
    for hidden, average in zip(averages, (mean, var), strict=True):
        _check_hidden(library, hidden, named.pop(hidden), named[average], weight, decay, counted[0])
    params, state = assemble(named if counted[0] else named | _fresh(named, mean, var), library.names)
    return params, state._replace(weight=jnp.full_like(state.weight, weight))


def advice(library: Library, entries) -> str:
    """What the library writes, and whose names were given."""
    says = f"{library.title} writes {', '.join(library.all_names)}."
    meant = [name for name in fitting(entries) if row(name) != library]
    names = f" The names fit {', '.join(map(repr, meant))}." if meant else ""
    return f"{says} {library.surprise}".strip() + names + " A whole network's are for jbn.convert.find."


def needed_decay(library: Library, decay) -> float:
    if decay is None:
        raise ValueError(
            f"decay is None; expected the decay of the layer, by which {library.title}'s counter says how much of the "
            f"averages is data: 1 - decay^counter. Its default is {library.decay:g}."
        )
    return check_decay(decay)


def _without_ones(library: Library, name, array):
    """`array` [*features] of one in the library's shape, in which reduced axes have size 1."""
    learned = name in library.names[:2]
    shape = library.shape if learned or not library.running else library.running
    parts = shape.strip("[]").split(", ")
    kept = array
    if "1" in parts:
        kept = np.reshape(array, tuple(size for size in array.shape if size != 1) or (1,))
    wanted = [part for part in parts if part not in ("1", "..")]
    if "*features" not in wanted and kept.ndim != len(wanted):
        raise ValueError(
            f"{name} has shape {list(array.shape)}; expected {shape}, as {library.title} writes it. Pass the entries "
            f"of one layer, without axes of size 1 that are not there in its files."
        )
    return kept


def _fresh(named, mean, var):
    return {mean: np.zeros_like(named[mean]), var: np.ones_like(named[var])}


def _check_number(library: Library, decay):
    """No momentum in the place of a decay: the library's own default, taken for the weight of the other value."""
    if decay is None or not library.momentum or not math.isclose(decay, 1 - library.decay, rel_tol=1e-9):
        return
    number = 1 - library.decay if library.momentum == "new" else library.decay
    raise ValueError(
        f"decay is {decay}; expected the weight of the old value. {library.title}'s default momentum, {number:.6g}, is "
        f"the weight of the {library.momentum} one: decay={library.decay:g}. If so little is kept, nothing is left of "
        f"the start after a few steps: leave steps and decay out."
    )


def _check_hidden(library: Library, name, hidden, average, weight, decay, count):
    hidden, average = hidden.astype(np.float64), average.astype(np.float64)
    if hidden.shape != average.shape:
        raise ValueError(
            f"{name} has shape {list(hidden.shape)} and average {list(average.shape)}; expected one shape."
        )
    # float32 rounds in every step; a decay of 0.9 for 0.99 is a factor of up to 10
    if count and np.any(np.abs(hidden - weight * average) > (1e-2 * weight + 1e-6) * np.abs(average)):
        found = np.nanmax(hidden[average != 0] / average[average != 0])
        raise ValueError(
            f"decay is {decay}, by which hidden / average is {weight:.4g} after {count} steps, and by {name} it is "
            f"{found:.4g}; expected the decay of the layer. {library.title}'s default is {library.decay:g}."
        )
