"""What does not come as flat names: collections of Flax, variables of Keras, states of Haiku and Equinox."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn._libraries.read import read
from jbn._libraries.rows import FLAX, row
from jbn._libraries.write import write
from jbn._types import Params, State

Entries = dict[str, jax.Array]


def _joined(**parts) -> dict[str, Any]:
    """The entries of several mappings, of which `None` is an empty one."""
    for name, part in parts.items():
        if not isinstance(part, Mapping | None):
            raise TypeError(f"{name} is a {type(part).__name__}; expected a mapping of names to arrays.")
    return {name: value for part in parts.values() for name, value in (part or {}).items()}


def from_flax(
    params: Mapping[str, Any] | None,
    batch_stats: Mapping[str, Any],
    *,
    steps: int | None = None,
    decay: float | None = None,
) -> tuple[Params, State]:
    """Convert the collections of one `flax.linen.BatchNorm`, or the states of one `flax.nnx.BatchNorm`.

    Args:
      params: scale and bias `[*features]`, either of which may be missing; of a linen layer without them `{}` or
        `None`. Of an nnx layer `nnx.state(layer, nnx.Param)`.
      batch_stats: mean and var `[*features]`, the weight of jbn's own layers with debias, and the steps of those with
        renormalization, which are left behind. Of an nnx layer `nnx.state(layer, nnx.BatchStat)`.
      steps: with `decay`, to take out the initial values; see the module.
      decay: Flax's momentum.

    Returns, Raises: as `from_library`.

    Examples:
      >>> from jbn.convert import from_flax
      >>> params, state = from_flax({"bias": jnp.array([0.5])}, {"mean": jnp.array([1.0]), "var": jnp.array([4.0])})
      >>> params.scale, params.bias.tolist(), state.var.tolist(), state.weight.tolist()
      (None, [0.5], [4.0], [1.0])
    """
    entries = _joined(params=params, batch_stats=batch_stats)
    weight, _ = entries.pop("weight", None), entries.pop("steps", None)
    hint = "Pass the collections of one layer, as variables['params']['BatchNorm_0']."
    converted, state = read(row("flax"), entries, steps=steps, decay=decay, hint=hint)
    return converted, state if weight is None else state._replace(weight=jnp.array(weight))


def to_flax(params: Params, state: State) -> tuple[Entries, Entries]:
    """The collections params and batch_stats of one layer of Flax.

    They evaluate as `state` does, and Flax goes on from there with full evidence, whatever the weight. An nnx layer
    takes both at once: `nnx.update(layer, {**params, **batch_stats})`.

    Examples:
      >>> from jbn.convert import to_flax
      >>> params, batch_stats = to_flax(*jbn.init(3, bias=False))
      >>> list(params), list(batch_stats)
      (['scale'], ['mean', 'var'])
    """
    entries = {name: jnp.array(array) for name, array in write(row("flax"), params, state).items()}
    learned = {name: entries.pop(name) for name in FLAX[:2] if name in entries}
    return learned, entries


def from_keras(
    weights: Mapping[str, Any] | Iterable[Any], *, steps: int | None = None, decay: float | None = None
) -> tuple[Params, State]:
    """Convert the weights of one `keras.layers.BatchNormalization`.

    Args:
      weights: the layer's `weights`, a list of variables, which have a path or a name; or arrays by name. They are
        known by the last part of the name: gamma, beta (either may be missing), moving_mean and moving_variance, as in
        "bn1/gamma" or "model/bn1/gamma:0". The list of arrays of `get_weights()` has no names and is refused.
      steps: with `decay`, to take out the initial values; see the module.
      decay: Keras's momentum.

    Returns, Raises: as `from_library`; TypeError also where an item has no name.

    Examples:
      >>> from jbn.convert import from_keras
      >>> weights = {"bn1/gamma": jnp.ones(2), "bn1/moving_mean": jnp.zeros(2), "bn1/moving_variance": jnp.ones(2)}
      >>> params, state = from_keras(weights)
      >>> params.scale.tolist(), params.bias
      ([1.0, 1.0], None)
    """
    if isinstance(weights, Mapping):
        items = list(weights.items())
    elif isinstance(weights, Iterable) and not isinstance(weights, str):
        items = [(getattr(each, "path", None) or getattr(each, "name", None), each) for each in weights]
    else:
        raise TypeError(f"weights is a {type(weights).__name__}; expected layer.weights, or arrays by name.")
    for name, value in items:
        if not isinstance(name, str):
            raise TypeError(
                f"weights has an item of type {type(value).__name__} without a name; expected layer.weights, whose "
                f"variables have one, rather than layer.get_weights(), or arrays by name."
            )
    renorm = any("moving_stddev" in str(name) for name, _ in items)
    hint = "With renorm=True a layer has more than a batch norm." if renorm else ""
    return read(row("keras"), dict(items), steps=steps, decay=decay, source="weights", hint=hint)


def to_keras(params: Params, state: State) -> dict[str, np.ndarray]:
    """The weights gamma, beta, moving_mean and moving_variance of one layer of Keras, by name.

    They evaluate as `state` does, and Keras goes on from there with full evidence, whatever the weight.

        weights = to_keras(params, state)
        layer.set_weights([weights[variable.name] for variable in layer.weights])

    Examples:
      >>> from jbn.convert import to_keras
      >>> list(to_keras(*jbn.init(3, scale=False)))
      ['beta', 'moving_mean', 'moving_variance']
    """
    return write(row("keras"), params, state)


def from_haiku(
    params: Mapping[str, Any] | None, mean_ema: Mapping[str, Any], var_ema: Mapping[str, Any], *, decay: float
) -> tuple[Params, State]:
    """Convert the params and the two averages of one `haiku.BatchNorm`.

        weight = 1 - decay^counter,  mean and var = average = hidden / weight

    Before the first step Haiku's averages are those of the batch it was initialized with, often of zeros with variance
    0, and count for nothing in the steps to come. They are left behind, for mean 0, variance 1 and weight 0.

    Args:
      params: scale and offset, either of which may be missing; of a layer without them `{}` or `None`.
      mean_ema: hidden, average and counter: state["batch_norm/~/mean_ema"]. Reduced axes, which have size 1 there, are
        dropped.
      var_ema: the same: state["batch_norm/~/var_ema"].
      decay: the layer's decay_rate.

    Returns, Raises: as `from_library`; ValueError also where counters differ, or `decay` is not the one that made
    hidden.

    Examples:
      >>> from jbn.convert import from_haiku
      >>> ema = {"hidden": jnp.array([[0.2]]), "average": jnp.array([[2.0]]), "counter": 1}
      >>> params, state = from_haiku(None, ema, ema, decay=0.9)
      >>> state.mean.tolist(), state.weight.round(3).tolist()
      ([2.0], [0.10000000149011612])
    """
    averages = _joined(
        **{
            name: ema and {f"{name}.{field}": value for field, value in ema.items()}
            if isinstance(ema, Mapping)
            else ema
            for name, ema in (("mean_ema", mean_ema), ("var_ema", var_ema))
        }
    )
    hint = "Pass those of one layer, as state['batch_norm/~/mean_ema']."
    return read(row("haiku"), _joined(params=params) | averages, decay=decay, hint=hint)


def to_haiku(
    params: Params, state: State, *, decay: float, shape: Sequence[int] | None = None
) -> tuple[Entries, Entries, Entries]:
    """The params and the two averages, mean_ema and var_ema, of one layer of Haiku.

    The counter is the whole number of steps whose evidence, 1 - decay^counter, is nearest to the weight: the very
    number where all of them were made with that `decay`.

    Args:
      params: fields of shape `[*features]`.
      state: fields of shape `[*features]`, with one weight for all features.
      decay: the layer's decay_rate.
      shape: of the layer's arrays, with size 1 for a reduced axis, such as (1, 1, 1, 64); by default (1, *features), as
        for x `[batch, *features]`.

    Returns:
      scale and offset, without those that are `None`; hidden, average and counter of the mean; and of the variance.

    Raises:
      ValueError: the weights of the features differ, `decay` is not in [0, 1), or `shape` does not fit.

    Examples:
      >>> from jbn.convert import to_haiku
      >>> params, state = jbn.init(2)
      >>> _, state = jbn.batch_norm(jnp.array([[1.0, 2.0], [3.0, 4.0]]), params, state, train=True, decay=0.5)
      >>> params, mean_ema, var_ema = to_haiku(params, state, decay=0.5)
      >>> int(mean_ema["counter"]), mean_ema["average"].tolist(), mean_ema["hidden"].tolist()
      (1, [[2.0, 3.0]], [[1.0, 1.5]])
    """
    parts: dict[str, Entries] = {"": {}, "mean_ema": {}, "var_ema": {}}
    for name, array in write(row("haiku"), params, state, decay=decay, shape=shape).items():
        part, _, field = name.rpartition(".")
        parts[part][field] = jnp.array(array, jnp.int32 if field == "counter" else array.dtype)
    return tuple(parts.values())  # pyright: ignore[reportReturnType]


def from_equinox(layer: Any, state: Any) -> tuple[Params, State]:
    """Convert an `equinox.nn.BatchNorm` and what the `equinox.nn.State` holds of it.

    In mode "ema" the first batch replaces the statistics: weight 1 from there on. In mode "batch" they start at 0 and
    1, and Equinox divides both by 1 - momentum^counter to evaluate, which leaves momentum^counter / (1 -
    momentum^counter) of the initial 1 in the variance. Here that is taken out. Before the first step of either mode:
    mean 0, variance 1, weight 0.

    Args:
      layer: weight and bias `[features]` or `None`, mode and momentum.
      state: looked up at the indices of `layer`.

    Returns:
      `Params`, with `None` for what is missing, and `State` with fields `[features]`.

    Raises:
      TypeError: `layer` is no such layer.

    Examples:
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(64, "batch", mode="batch")
        params, state = jbn.convert.from_equinox(layer, state)
    """
    if getattr(layer, "mode", None) not in ("ema", "batch"):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        own = " The State of a layer of jbn is state.get(layer.state_index)." if hasattr(layer, "state_index") else ""
        raise TypeError(f"layer is a {kind}; expected an equinox.nn.BatchNorm, in mode ema or batch.{own}")
    library = row(f"equinox {layer.mode}")
    batch = layer.mode == "batch"
    mean, var = state.get(layer.batch_state_index if batch else layer.ema_state_index)
    held = {"counter": layer.batch_counter} if batch else {"first_time": layer.ema_first_time_index}
    entries = dict(zip(library.names, (layer.weight, layer.bias, mean, var), strict=True))
    entries |= {name: state.get(index) for name, index in held.items()}
    return read(library, entries, source="layer", decay=layer.momentum if batch else None)
