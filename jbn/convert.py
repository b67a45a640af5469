"""Params and states of other libraries' batch norms, from their arrays by name and back.

| library | from | back |
| --- | --- | --- |
| PyTorch | `from_torch`, a whole network `find_torch` | `to_torch` |
| Flax, linen and nnx | `from_flax` | `to_flax` |
| Keras | `from_keras` | `to_keras` |
| Haiku | `from_haiku` | `to_haiku` |
| Equinox | `from_equinox` | |

Arrays are copied. Params keep their dtype; statistics are float32, or float64 where the arrays are (and JAX is). The
settings decay, epsilon and unbiased are in no library's arrays: see `jbn.presets`.

PyTorch, Flax and Keras start at mean 0 and variance 1 and count them as data, which is weight 1 here. After `steps`
steps with one `decay` d, given both, what is left of them is taken out:

    weight = 1 - d^steps,  mean = running mean / weight,  var = (running var - d^steps) / weight

in float64, and it is the exactly debiased average from there on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn._door.fields import check_fields
from jbn._entries import as_entry, assemble, check_decay, check_steps, entries_of, listed, pick, steps_of
from jbn._types import Params, State

TORCH = ("weight", "bias", "running_mean", "running_var")  # scale, bias, mean, var
FLAX = ("scale", "bias", "mean", "var")
KERAS = ("gamma", "beta", "moving_mean", "moving_variance")


class Found(NamedTuple):
    """What `find_torch` found."""

    layers: dict[str, tuple[Params, State]]  # by the prefix of their names, such as "layer1.0.bn1"
    unused: tuple[str, ...]  # names of all that belongs to no batch norm


def from_torch(
    entries: Mapping[str, Any], *, steps: int | None = None, decay: float | None = None
) -> tuple[Params, State]:
    """Convert the `state_dict()` of a `torch.nn.BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`.

    Args:
      entries: running_mean and running_var `[features]`; weight and bias where there are any; num_batches_tracked,
        which is not used. Tensors or arrays, on any device, with or without gradient.
      steps: with `decay`, to take out the initial values; see the module. It is num_batches_tracked if that counted
        from the start. With momentum=None, a cumulative average, nothing of them is left.
      decay: one minus momentum.

    Returns:
      `Params`, with `None` for what is missing, and `State` with fields `[features]`.

    Raises:
      TypeError: `entries` is no mapping, or an entry is not a floating-point array.
      ValueError: a name is missing or unknown, shapes differ, or `steps` and `decay` do not fit.

    Examples:
      >>> entries = {"running_mean": jnp.array([1.5]), "running_var": jnp.array([3.25])}
      >>> params, state = from_torch(entries)
      >>> params.scale, state.mean.tolist(), state.var.tolist(), state.weight.tolist()
      (None, [1.5], [3.25], [1.0])
      >>> _, state = from_torch(entries, steps=2, decay=0.5)
      >>> state.mean.tolist(), state.var.tolist(), state.weight.tolist()
      ([2.0], [4.0], [0.75])
    """
    scale, bias, mean, var = TORCH
    hint = "Pass layer.state_dict(); a whole network's is for find_torch."
    if isinstance(entries, Mapping) and entries.get(mean) is None and entries.get(var) is None:
        hint += " With track_running_stats=False there are none: take them from jbn.init and jbn.recalibrate."
    named = pick("entries", entries, (mean, var), (scale, bias), hint, ignored=("num_batches_tracked",))
    return assemble(named, TORCH, steps, decay)


def to_torch(params: Params, state: State, *, steps: int = 0) -> dict[str, np.ndarray]:
    """The entries that the matching layer of PyTorch loads.

    They evaluate as `state` does, and PyTorch goes on from there with full evidence, whatever the weight.

        layer.load_state_dict({name: torch.from_numpy(value) for name, value in to_torch(params, state).items()})

    Args:
      params: fields of shape `[features]`. A scale or bias of `None` is left out, as with affine=False.
      state: fields of shape `[features]`.
      steps: num_batches_tracked, which matters to PyTorch only with momentum=None. It is not the number of steps behind
        `state`, unless given: `from_torch(..., steps=)` has to be told that of a layer that loaded these entries.

    Returns:
      weight, bias, running_mean, running_var, num_batches_tracked as NumPy arrays. bfloat16, which NumPy has not, is
      float32.

    Examples:
      >>> sorted(to_torch(*jbn.init(3, bias=False)))
      ['num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    entries = entries_of(params, state, TORCH)
    wide = {name: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array for name, array in entries.items()}
    return wide | {"num_batches_tracked": np.array(check_steps(steps), np.int64)}


def find_torch(state_dict: Mapping[str, Any], *, steps: int | None = None, decay: float | None = None) -> Found:
    """Convert every batch norm of a network's `state_dict()`: every prefix with a running_mean and a running_var.

    A layer norm, with weight and bias alone, is none of them. An instance norm that tracks statistics has the same
    names as a batch norm, and cannot be told from one by them.

    Args:
      state_dict: tensors or arrays by their full names.
      steps: as in `from_torch`, the same for all layers.
      decay: as in `from_torch`, the same for all layers.

    Returns:
      `Found`: `layers`, by prefix, in the order of `state_dict`, where "" is the prefix of a batch norm's own; and
      `unused`, the names of everything else.

    Raises:
      TypeError, ValueError: as `from_torch`, which also names the layer.

    Examples:
      >>> zeros, ones = jnp.zeros(2), jnp.ones(2)
      >>> state_dict = {"bn.running_mean": zeros, "bn.running_var": ones, "norm.weight": ones, "norm.bias": zeros}
      >>> found = find_torch(state_dict)
      >>> list(found.layers), found.unused
      (['bn'], ('norm.weight', 'norm.bias'))
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; expected arrays by name, as model.state_dict().")
    if nested := [name for name, value in state_dict.items() if isinstance(value, Mapping)]:
        raise TypeError(
            f"state_dict has mappings in {', '.join(map(repr, nested))}; expected arrays by name: of a checkpoint pass "
            f"checkpoint['state_dict'], or whatever holds them."
        )
    present = {name for name, value in state_dict.items() if value is not None}
    split = {name: name.rpartition(".") for name in state_dict}
    starts = [dot.join((prefix, "")) for prefix, dot, last in split.values() if last == "running_mean"]
    starts = [start for start in starts if {f"{start}running_mean", f"{start}running_var"} <= present]
    layers, used = {}, set()
    for start in starts:
        names = {name: f"{start}{name}" for name in (*TORCH, "num_batches_tracked") if f"{start}{name}" in state_dict}
        try:
            layers[start.removesuffix(".")] = from_torch(
                {name: state_dict[full] for name, full in names.items()}, steps=steps, decay=decay
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{start.removesuffix('.')!r}: {error}") from None
        used |= set(names.values())
    return Found(layers, tuple(name for name in state_dict if name not in used))


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
      batch_stats: mean and var `[*features]`, and the weight of jbn's own layers with debias. Of an nnx layer
        `nnx.state(layer, nnx.BatchStat)`.
      steps: with `decay`, to take out the initial values; see the module.
      decay: Flax's momentum.

    Returns:
      `Params`, with `None` for what is missing, and `State` with fields `[*features]`.

    Raises:
      TypeError, ValueError: as `from_torch`.

    Examples:
      >>> params, state = from_flax({"bias": jnp.array([0.5])}, {"mean": jnp.array([1.0]), "var": jnp.array([4.0])})
      >>> params.scale, params.bias.tolist(), state.var.tolist(), state.weight.tolist()
      (None, [0.5], [4.0], [1.0])
    """
    scale, bias, mean, var = FLAX
    hint = "Pass the collections of one layer, as variables['params']['BatchNorm_0']."
    named = pick("params", {} if params is None else params, (), (scale, bias), hint)
    named |= pick("batch_stats", batch_stats, (mean, var), ("weight",), hint)
    weight = named.pop("weight", None)
    converted, state = assemble(named, FLAX, steps, decay)
    return converted, state if weight is None else state._replace(weight=jnp.array(weight))


def to_flax(params: Params, state: State) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The collections params and batch_stats of one layer of Flax.

    They evaluate as `state` does, and Flax goes on from there with full evidence, whatever the weight. An nnx layer
    takes both at once: `nnx.update(layer, {**params, **batch_stats})`.

    Examples:
      >>> params, batch_stats = to_flax(*jbn.init(3, bias=False))
      >>> list(params), list(batch_stats)
      (['scale'], ['mean', 'var'])
    """
    entries = {name: jnp.array(array) for name, array in entries_of(params, state, FLAX).items()}
    learned = {name: entries[name] for name in FLAX[:2] if name in entries}
    return learned, {name: entries[name] for name in FLAX[2:]}


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

    Returns:
      `Params`, with `None` for what is missing, and `State` with fields `[features]`.

    Raises:
      TypeError: an item has no name, or is not a floating-point array.
      ValueError: as `from_torch`, or two names end alike, as those of two layers.

    Examples:
      >>> weights = {"bn1/gamma": jnp.ones(2), "bn1/moving_mean": jnp.zeros(2), "bn1/moving_variance": jnp.ones(2)}
      >>> params, state = from_keras(weights)
      >>> params.scale.tolist(), params.bias
      ([1.0, 1.0], None)
    """
    if isinstance(weights, Mapping):
        items = list(weights.items())
    elif isinstance(weights, Iterable):
        items = [(getattr(each, "path", None) or getattr(each, "name", None), each) for each in weights]
    else:
        raise TypeError(f"weights is a {type(weights).__name__}; expected layer.weights, or arrays by name.")
    named = {}
    for full, value in items:
        if not isinstance(full, str):
            raise TypeError(
                f"weights has an item of type {type(value).__name__} without a name; expected layer.weights, whose "
                f"variables have one, rather than layer.get_weights(), or arrays by name."
            )
        name = full.rpartition("/")[2].partition(":")[0]
        if name in named:
            given = ", ".join(repr(other) for other, _ in items)
            raise ValueError(f"weights has several entries named {name}: {given}. Pass the weights of one layer.")
        named[name] = value
    hint = "With renorm=True a layer has more than a batch norm." if "moving_stddev" in named else ""
    return assemble(pick("weights", named, KERAS[2:], KERAS[:2], hint), KERAS, steps, decay)


def to_keras(params: Params, state: State) -> dict[str, np.ndarray]:
    """The weights gamma, beta, moving_mean and moving_variance of one layer of Keras, by name.

    They evaluate as `state` does, and Keras goes on from there with full evidence, whatever the weight.

        weights = to_keras(params, state)
        layer.set_weights([weights[variable.name] for variable in layer.weights])

    Examples:
      >>> list(to_keras(*jbn.init(3, scale=False)))
      ['beta', 'moving_mean', 'moving_variance']
    """
    return entries_of(params, state, KERAS)


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

    Returns:
      `Params`, with `None` for what is missing, and `State` with fields `[*features]`.

    Raises:
      TypeError: something is no mapping, or an entry is not a floating-point array.
      ValueError: a name is missing or unknown, shapes or counters differ, or `decay` is not the one that made hidden.

    Examples:
      >>> ema = {"hidden": jnp.array([[0.2]]), "average": jnp.array([[2.0]]), "counter": 1}
      >>> params, state = from_haiku(None, ema, ema, decay=0.9)
      >>> state.mean.tolist(), state.weight.round(3).tolist()
      ([2.0], [0.10000000149011612])
    """
    hint = "Pass those of one layer, as state['batch_norm/~/mean_ema']."
    named = pick("params", {} if params is None else params, (), ("scale", "offset"), hint)
    if "offset" in named:
        named["bias"] = named.pop("offset")
    counters = []
    for field, ema in (("mean", mean_ema), ("var", var_ema)):
        given = pick(f"{field}_ema", ema, ("hidden", "average"), (), hint, ignored=("counter",))
        if ema.get("counter") is None:
            raise ValueError(f"{field}_ema has {listed(ema)}; expected also counter. {hint}")
        counters.append(check_steps(ema["counter"], f"{field}_ema.counter"))
        weight = 1 - check_decay(decay) ** counters[-1]
        hidden, average = (given[name].astype(np.float64) for name in ("hidden", "average"))
        if hidden.shape != average.shape:
            raise ValueError(
                f"{field}_ema.hidden has shape {list(hidden.shape)} and average {list(average.shape)}; expected one "
                f"shape."
            )
        # float32 rounds in every step; a decay of 0.9 for 0.99 is a factor of up to 10
        if counters[-1] and np.any(np.abs(hidden - weight * average) > (1e-2 * weight + 1e-6) * np.abs(average)):
            found = np.nanmax(hidden[average != 0] / average[average != 0])
            raise ValueError(
                f"decay is {decay}, by which hidden / average is {weight:.4g} after {counters[-1]} steps, and in "
                f"{field}_ema it is {found:.4g}; expected the layer's decay_rate."
            )
        named[field] = given["average"]
    if counters[0] != counters[1]:
        raise ValueError(f"mean_ema.counter is {counters[0]} and var_ema.counter is {counters[1]}; expected the same.")
    if not counters[0]:
        named |= {"mean": np.zeros_like(named["mean"]), "var": np.ones_like(named["var"])}
    kept = {name: tuple(size for size in array.shape if size != 1) or (1,) for name, array in named.items()}
    named = {name: np.reshape(array, kept[name]) for name, array in named.items()}
    params_, state = assemble(named, FLAX)
    return params_, state._replace(weight=jnp.full_like(state.weight, 1 - decay ** counters[0]))


def to_haiku(
    params: Params, state: State, *, decay: float, shape: Sequence[int] | None = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
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
      >>> params, state = jbn.init(2)
      >>> _, state = jbn.batch_norm(jnp.array([[1.0, 2.0], [3.0, 4.0]]), params, state, train=True, decay=0.5)
      >>> params, mean_ema, var_ema = to_haiku(params, state, decay=0.5)
      >>> int(mean_ema["counter"]), mean_ema["average"].tolist(), mean_ema["hidden"].tolist()
      (1, [[2.0, 3.0]], [[1.0, 1.5]])
    """
    entries, state = entries_of(params, state, FLAX), check_fields("state", state, State)
    weight = np.asarray(state.weight, np.float64)
    if weight.max() - weight.min() > 1e-6:
        raise ValueError(
            f"state.weight is from {weight.min():.6g} to {weight.max():.6g}; Haiku has one counter for all features. "
            f"Give them equal evidence first, as jbn.recalibrate does, or more steps of training."
        )
    counter = steps_of(float(weight.mean()), check_decay(decay))
    weight = 1 - decay**counter
    try:
        entries = {
            name: array.reshape((1, *array.shape) if shape is None else shape) for name, array in entries.items()
        }
    except ValueError:
        raise ValueError(
            f"shape is {list(shape or ())} and the features are {list(state.mean.shape)}; expected those sizes and 1."
        ) from None

    def ema(array):
        hidden = jnp.array((weight * array.astype(np.float64)).astype(array.dtype))
        return {"hidden": hidden, "average": jnp.array(array), "counter": jnp.array(counter, jnp.int32)}

    names = {"scale": "scale", "bias": "offset"}
    learned = {names[name]: jnp.array(entries[name]) for name in names if name in entries}
    return learned, ema(entries["mean"]), ema(entries["var"])


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
    batch = layer.mode == "batch"
    mean, var = state.get(layer.batch_state_index if batch else layer.ema_state_index)
    fields = zip(TORCH, (layer.weight, layer.bias, mean, var), strict=True)
    named = {name: as_entry(f"layer's {name}", field) for name, field in fields if field is not None}
    if batch:
        return assemble(named, TORCH, np.asarray(state.get(layer.batch_counter)), layer.momentum)
    if state.get(layer.ema_first_time_index):  # the arrays were never written to
        named |= {"running_mean": np.zeros_like(mean), "running_var": np.ones_like(var)}
        return assemble(named, TORCH, 0, layer.momentum)
    return assemble(named, TORCH)
