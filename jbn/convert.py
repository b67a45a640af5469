"""Params and states of other libraries' batch norms, from their arrays by name and back.

`from_library`, `to_library` and, for a whole network, `find` know them all: docs/libraries.md has the table and
docs/files.md what reads files. What does not hold its arrays by flat names, or has had a function for long:

| library | from | back |
| --- | --- | --- |
| PyTorch | `from_torch`, a whole network `find_torch` | `to_torch` |
| Flax, linen and nnx | `from_flax` | `to_flax` |
| Keras | `from_keras` | `to_keras` |
| Haiku | `from_haiku` | `to_haiku` |
| Equinox | `from_equinox` | |

Arrays are copied. Params keep their dtype; statistics are float32, or float64 where the arrays are (and JAX is). The
settings decay, epsilon and unbiased are in no library's arrays: see `jbn.presets`.

Most libraries start at mean 0 and variance 1 and count them as data, which is weight 1 here. After `steps` steps with
one `decay` d, given both, what is left of them is taken out:

    weight = 1 - d^steps,  mean = running mean / weight,  var = (running var - d^steps) / weight

in float64, and it is the exactly debiased average from there on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jbn._libraries.containers import from_equinox, from_flax, from_haiku, from_keras, to_flax, to_haiku, to_keras
from jbn._libraries.find import layers
from jbn._libraries.read import read
from jbn._libraries.rows import FLAX, KERAS, TORCH, row
from jbn._libraries.write import write
from jbn._types import Params, State

__all__ = [
    "FLAX",
    "KERAS",
    "TORCH",
    "Found",
    "find",
    "find_torch",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_library",
    "from_torch",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_library",
    "to_torch",
]


class Found(NamedTuple):
    """What `find` found."""

    layers: dict[str, tuple[Params, State]]  # by the prefix of their names, such as "layer1.0.bn1"
    unused: tuple[str, ...]  # names of all that belongs to no batch norm


def from_library(
    entries: Mapping[str, Any],
    library: str,
    *,
    steps: int | None = None,
    decay: float | None = None,
    epsilon: float | None = None,
) -> tuple[Params, State]:
    """Convert what a library stores of one batch norm.

    Args:
      entries: arrays or tensors by the library's names, with or without the name of the layer before them, such as
        "bn1.weight" or "bn1/gamma:0".
      library: such as "torch", "paddle", "mxnet operator": a row of docs/libraries.md.
      steps: with `decay`, to take out the initial values; see the module.
      decay: weight of the old value, which in some libraries is one minus momentum. What counts its steps, Haiku,
        Sonnet and Equinox in mode batch, is read with it alone.
      epsilon: of the layer, where the library stores the scale with it ("nflows", "e3nn") and it is not the default.

    Returns:
      `Params`, with `None` for what is missing, and `State`: evaluation with the epsilon of `jbn.presets.of(library)`,
      or the layer's own, is the library's.

    Raises:
      TypeError: `entries` is no mapping, an entry not a floating-point array, or `library` not a name.
      ValueError: no such library; a name is missing or unknown; shapes differ or are not the library's; a variance is
        below 0; `steps` and `decay` do not fit.

    Examples:
      >>> entries = {"bn._mean": jnp.array([1.5]), "bn._variance": jnp.array([4.0]), "bn.weight": jnp.array([2.0])}
      >>> params, state = from_library(entries, "paddle")
      >>> params.scale.tolist(), params.bias, state.mean.tolist(), state.weight.tolist()
      ([2.0], None, [1.5], [1.0])
    """
    return read(row(library, epsilon), entries, steps=steps, decay=decay)


def to_library(
    params: Params,
    state: State,
    library: str,
    *,
    steps: int = 0,
    decay: float | None = None,
    epsilon: float | None = None,
    shape: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """The entries that one layer of a library loads, by its names.

    They evaluate as `state` does. Training goes on from there with full evidence, whatever the weight, but where the
    library counts steps: it gets the count whose evidence is nearest.

    Args:
      params: fields of shape `[*features]`. A scale or bias of `None` is left out, where the library can do without.
      state: fields of shape `[*features]`; with one weight for all features where the library counts steps.
      library: as in `from_library`.
      steps: what num_batches_tracked (PyTorch), N (Chainer) or n_batches (Trax) will be.
      decay: of the layer, where the library counts steps.
      epsilon: as in `from_library`.
      shape: of the library's arrays where that depends on the layer, as in Haiku and Sonnet, with size 1 for a reduced
        axis; by default as for x `[batch, *features]`.

    Returns:
      NumPy arrays. bfloat16, which NumPy has not, is float32.

    Raises:
      ValueError: no such library; it cannot hold these values, such as a scale below 0 in "nflows".

    Examples:
      >>> to_library(*jbn.init(2, bias=False), "paddle").keys()
      dict_keys(['weight', '_mean', '_variance'])
    """
    entries = write(row(library, epsilon), params, state, steps=steps, decay=decay, shape=shape)
    return {name: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array for name, array in entries.items()}


def find(
    entries: Mapping[str, Any],
    library: str,
    *,
    steps: int | None = None,
    decay: float | None = None,
    epsilon: float | None = None,
) -> Found:
    """Convert every batch norm of a network: every name of a layer with a running mean and a running variance.

    A layer norm, with scale and bias alone, is none of them. An instance norm that tracks statistics has the same names
    as a batch norm, and cannot be told from one by them.

    Args:
      entries: arrays or tensors by their full names, as in a file; a nested tree flattened with dots or slashes.
      library: as in `from_library`; whose files have names.
      steps, decay, epsilon: as in `from_library`, the same for all layers.

    Returns:
      `Found`: `layers`, by what stands before the library's names, in the order of `entries`, where "" is a batch
      norm's own; and `unused`, the names of everything else.

    Raises:
      TypeError, ValueError: as `from_library`, which also names the layer; there is none, and the names are those of
        another library.

    Examples:
      >>> zeros, ones = jnp.zeros(2), jnp.ones(2)
      >>> entries = {"bn.running_mean": zeros, "bn.running_var": ones, "norm.weight": ones, "norm.bias": zeros}
      >>> found = find(entries, "torch")
      >>> list(found.layers), found.unused
      (['bn'], ('norm.weight', 'norm.bias'))
    """
    return _find(entries, library, "entries", steps=steps, decay=decay, epsilon=epsilon)


def _find(entries, library, source, *, steps, decay, epsilon=None) -> Found:
    of_library, converted = row(library, epsilon), {}
    named, unused = layers(of_library, entries, source)
    for layer, names in named.items():
        given = {name: entries[full] for name, full in names.items()}
        try:
            converted[layer] = read(of_library, given, steps=steps, decay=decay)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{layer!r}: {error}") from None
    return Found(converted, unused)


def from_torch(
    entries: Mapping[str, Any], *, steps: int | None = None, decay: float | None = None
) -> tuple[Params, State]:
    """Convert the `state_dict()` of a `torch.nn.BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`: see `from_library`.

    `steps` is num_batches_tracked if that counted from the start. With momentum=None, a cumulative average, nothing is
    left of the initial values.

    Examples:
      >>> entries = {"running_mean": jnp.array([1.5]), "running_var": jnp.array([3.25])}
      >>> params, state = from_torch(entries)
      >>> params.scale, state.mean.tolist(), state.var.tolist(), state.weight.tolist()
      (None, [1.5], [3.25], [1.0])
      >>> _, state = from_torch(entries, steps=2, decay=0.5)
      >>> state.mean.tolist(), state.var.tolist(), state.weight.tolist()
      ([2.0], [4.0], [0.75])
    """
    hint = "Pass layer.state_dict(); a whole network's is for find_torch."
    present = [name for name, value in entries.items() if value is not None] if isinstance(entries, Mapping) else TORCH
    if not any(str(name).endswith(TORCH[2:]) for name in present):
        hint += " With track_running_stats=False there are none: take them from jbn.init and jbn.recalibrate."
    return read(row("torch"), entries, steps=steps, decay=decay, hint=hint)


def to_torch(params: Params, state: State, *, steps: int = 0) -> dict[str, np.ndarray]:
    """The entries that the matching layer of PyTorch loads: see `to_library`.

        layer.load_state_dict({name: torch.from_numpy(value) for name, value in to_torch(params, state).items()})

    `steps` is num_batches_tracked, which matters to PyTorch only with momentum=None. It is not the number of steps
    behind `state`, unless given: `from_torch(..., steps=)` has to be told that of a layer that loaded these entries.

    Examples:
      >>> sorted(to_torch(*jbn.init(3, bias=False)))
      ['num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    return to_library(params, state, "torch", steps=steps)


def find_torch(state_dict: Mapping[str, Any], *, steps: int | None = None, decay: float | None = None) -> Found:
    """Convert every batch norm of a network's `state_dict()`: `find(state_dict, "torch")`."""
    return _find(state_dict, "torch", "state_dict", steps=steps, decay=decay)
