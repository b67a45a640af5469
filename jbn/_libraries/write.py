"""Entries of a library from params and state, as its row says."""

import numpy as np

from jbn._libraries.entries import check_steps, entries_of, steps_of
from jbn._libraries.library import Library
from jbn._libraries.read import needed_decay
from jbn._libraries.scale import stored


def write(library: Library, params, state, *, steps=0, decay=None, shape=None) -> dict[str, np.ndarray]:
    """`decay` is needed where the library counts steps; `shape` that of its arrays, where it depends on the layer."""
    named = entries_of(params, state, library.names)
    scale, _, mean, var = library.names
    kept = stored(library, named.pop(scale, None), named[mean])
    named = ({} if kept is None else {scale: kept}) | named
    weight = np.broadcast_to(np.asarray(state.weight, np.float64), named[mean].shape)
    named = {name: _with_ones(library, name, array, shape) for name, array in named.items()}
    if library.counter:
        named[library.counter] = np.array(check_steps(steps), np.int64)
    if library.evidence == "full":
        return named
    if library.evidence == "first":
        return named | {"first_time": np.array(not weight.any())}
    decay = needed_decay(library, decay)
    if weight.max() - weight.min() > 1e-6:
        raise ValueError(
            f"state.weight is from {weight.min():.6g} to {weight.max():.6g}; {library.title} has one counter for all "
            f"features. Give them equal evidence first, as jbn.recalibrate does, or more steps of training."
        )
    count = steps_of(float(weight.mean()), decay)
    left = decay**count
    hidden = {
        name: ((1 - left) * named[name].astype(np.float64)).astype(named[name].dtype) for name in library.names[2:]
    }
    if library.evidence == "hidden":
        hidden[var] = (hidden[var].astype(np.float64) + left).astype(hidden[var].dtype)
        return named | hidden | {"counter": np.array(count)}
    of_averages = dict(zip((mean, var), (name for name in library.needed if name.endswith("hidden")), strict=True))
    named |= {of_averages[name]: array for name, array in hidden.items()}
    return named | {name: np.array(count) for name in library.needed if name.endswith("counter")}


def _with_ones(library: Library, name, array, shape):
    """`array` [*features] in the library's shape, in which reduced axes have size 1."""
    own = library.shape if name in library.names[:2] or not library.running else library.running
    if shape is None:
        parts = own.strip("[]").split(", ")
        at = next(at for at, part in enumerate(parts) if part not in ("1", ".."))
        before, after = parts[:at].count("1"), parts[at:].count("1")
        shape = (1,) * before + array.shape + (1,) * after
    elif "1" not in own.strip("[]").split(", "):  # without axes that are reduced
        return array
    try:
        return array.reshape(shape)
    except ValueError:
        raise ValueError(
            f"shape is {list(shape)} and the features are {list(array.shape)}; expected those sizes and 1."
        ) from None
