"""Batch normalization as a layer of Flax's nnx, in the place of `flax.nnx.BatchNorm`: `jbn.nnx.BatchNorm`.

`jbn.nnx.BatchRenorm` is the same with batch renormalization.

`states` and `set_states` lead from a model to what `jbn.recalibrate`, `jbn.drift` and `jbn.merge_states` take, and
back. For a model that shares no module or variable between two places, which JAX takes as a pytree:

    def apply(model, states, batch):
        jbn.nnx.set_states(model, states)
        return model(batch), jbn.nnx.states(model)

    model.train()
    states = jbn.recalibrate(apply, model, jbn.nnx.states(model), batches)
    jbn.nnx.set_states(model, states)

For any other, pass `nnx.split(model)` for the params and begin `apply` with `model = nnx.merge(*params, copy=True)`.

`pip install 'jbn[flax]'` installs what this needs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jbn.nnx needs Flax: pip install 'jbn[flax]'") from error

from jbn._core.held import held_by
from jbn._libraries.flax import prepare, state_of, weight_of
from jbn._renorm import Limits, limits_at
from jbn._types import Params, State


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, computed by `jbn.batch_norm`.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias
        running' = momentum * running + (1 - momentum) * measured       for mean and for var, divided by count

    Constructor, defaults and names of attributes are Flax's: `scale` and `bias` (`nnx.Param`), `mean` and `var`
    (`nnx.BatchStat`). So `nnx.update(model, state)` takes the `nnx.state` of a model with Flax's layer, and the other
    way round: it evaluates the same and trains on. A GraphDef names classes: one that was split from a model with
    Flax's layer builds Flax's layer. Take the GraphDef from a model with this one, and the state from there.

    With `debias` the initial mean 0 and variance 1 have no part in the running statistics. One more `nnx.BatchStat`,
    `weight`, says how much evidence there is: 0 at first, see `jbn.State`. Statistics without one, as those of Flax's
    layer, have full evidence, and those with one keep it, whatever `debias`: `nnx.update` takes each into each. Take
    a new layer for them: one that has been trained has a weight, which statistics without one leave as it is.

    With `unbiased` the running variance is divided by count - 1 rather than by count, as PyTorch's is: see
    `jbn.batch_norm`.

    `activation`, a function of each element such as `nnx.relu`, comes behind the normalization, in fewer passes over a
    GPU's memory than by itself, see `jbn.batch_norm`.

    On purpose other than Flax:
      Where the mask is 0, x is never computed with, and the output is 0.
      The output has the dtype of x where `dtype` is not given, whatever that of the params. Where it is given, the
        wider of the two is computed in. Whole numbers are float32.
      Statistics are float32 or wider, also those that evaluation uses, and are cast to no `dtype`; `promote_dtype` and
        `use_fast_variance` do nothing.
      A feature with values that are not finite, none or a single one keeps its running statistics as they were, and one
        that is far from its running mean starts anew, see `jbn.batch_norm`. Training on one value per feature in all is
        an error.
      Several feature axes, `num_features` in all, can be trained too: [num_features] in the order in which they lie.

    Examples:
      >>> layer = jbn.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]))
      >>> y.round(3).tolist(), layer.mean[...].tolist()
      ([[-1.0], [1.0]], [1.0])
    """

    weight: nnx.BatchStat | None = None  # `nnx.update` gives one to a layer without `debias`

    def __init__(
        self,
        num_features: int,
        *,
        debias: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        unbiased: bool = False,
        rngs: nnx.Rngs,
        **options,
    ):
        """`options` are those of `flax.nnx.BatchNorm`."""
        super().__init__(num_features, rngs=rngs, **options)
        self.activation = activation
        self.unbiased = unbiased
        if debias:
            self.weight = nnx.BatchStat(jnp.zeros_like(self.mean[...]))

    def __call__(self, x, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalize `x` [...] by its own statistics, or by the running ones.

        Args:
          x: [...], floating-point, or whole numbers.
          use_running_average: in the place of that of the constructor, `train`, `eval` or `nnx.view`.
          mask: of a shape that broadcasts to that of `x` by NumPy's rules: where it is 0, there is nothing.

        Returns:
          An array of the shape of `x`.

        Raises:
          ValueError: `use_running_average` is `None` here and there.
          TypeError, ValueError, NameError, NotImplementedError: as `jbn.batch_norm`.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                "use_running_average is None in the constructor and in the call; expected a bool in one of them: call "
                "model.train() or model.eval(), or pass it, also by nnx.view."
            )
        call = prepare(self, x, mask, train=not evaluate)
        kept = self.mean[...].shape
        features = call.batch.features.shape
        features = features if math.prod(features) == math.prod(kept) else kept  # or jbn tells of the shapes

        def shaped(fields, old, new):  # what `recalibrate` holds in a weight comes behind the features
            return jax.tree.map(lambda field: jnp.reshape(field, new + field.shape[len(old) :]), fields)

        params = shaped(Params(_value(self.scale), _value(self.bias)), kept, features)
        y, state = call.normalize(self, params, shaped(_state(self), kept, features), self._limits(call.train))
        if call.train:
            _set(self, shaped(state, features, kept))
        return y

    def _limits(self, train: bool) -> tuple[Any, Any] | None:
        """How far a batch is renormalized, r_max and d_max, in this step; `None` where it is not."""
        return None


class BatchRenorm(BatchNorm):
    """`jbn.nnx.BatchNorm`, computed by `jbn.batch_renorm`: for small batches, and for data that moves.

    In training, with s = sqrt(var + epsilon), and r and d without gradient,

        r = clip(s / s_run, 1 / r_max, r_max),  d = clip((mean - mean_run) / s_run, -d_max, d_max)
        y = scale * ((x - mean) / s * r + d) + bias

    For the first `warmup_steps` steps r_max is 1 and d_max 0, which is batch norm; then they are `limits`. One more
    `nnx.BatchStat`, `steps`, int32 of shape [], counts the steps of training. `nnx.update` by the state of a
    `BatchNorm`, which has none, leaves it. All else is as in `BatchNorm`.

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1; the warm-up as in Bhatt et al. 2024, "CrossQ".

    Examples:
      >>> layer = jbn.nnx.BatchRenorm(1, momentum=0.5, warmup_steps=1, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y = layer(x)
      >>> y.round(3).tolist(), int(layer.steps[...])
      ([[-1.0], [1.0]], 1)
      >>> layer(x + 2).round(3).tolist()  # running mean 1, variance 1
      [[2.0], [4.0]]
    """

    def __init__(
        self, num_features: int, *, limits: Limits = (3.0, 5.0), warmup_steps: int = 100_000, rngs: nnx.Rngs, **options
    ):
        """`options` are those of `BatchNorm`.

        Args:
          num_features: as in `BatchNorm`.
          limits: r_max and d_max; or a function that is given the number of steps so far, and gives them, with a
            warm-up of its own, such as `jbn.renorm_limits`: `warmup_steps` then has no part.
          warmup_steps: 100,000, as in CrossQ.
          rngs: as in `BatchNorm`.
        """
        super().__init__(num_features, rngs=rngs, **options)
        self.limits = limits
        self.warmup_steps = warmup_steps
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _limits(self, train):
        if not train:
            return None
        steps = self.steps[...]
        self.steps[...] = steps + 1
        return limits_at(steps, self.limits, self.warmup_steps)


def states(model: nnx.Module) -> dict[str, State]:
    """The running statistics of a model, for `jbn.recalibrate`, `jbn.drift` and `jbn.merge_states`.

    Args:
      model: with any number of `jbn.nnx.BatchNorm` in it, or one itself.

    Returns:
      A `jbn.State` for each of them, of full evidence where it has no `weight`, by the path to it: "blocks/0/norm".

    Examples:
      >>> jbn.nnx.states(nnx.Sequential(jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))))["layers/0"].mean.tolist()
      [0.0]
    """
    return {path: _state(layer) for path, layer in _layers(model).items()}


def set_states(model: nnx.Module, states: dict[str, State]) -> None:
    """Set the running statistics of a model to `states`, in its own variables.

    Args:
      model: as in `states`.
      states: as `states` gives them. The weight is for the layers that have one; within the `apply` of
        `jbn.recalibrate` it carries what was measured, and every layer is given one.

    Raises:
      ValueError: `states` are not those of this model.

    Examples:
      >>> layer = jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jbn.nnx.set_states(layer, {"": jbn.State(jnp.array([2.0]), jnp.array([4.0]))})
      >>> layer.mean[...].tolist()
      [2.0]
    """
    layers = _layers(model)
    if set(layers) != set(states):
        raise ValueError(f"states is of {sorted(states)} and model has {sorted(layers)}; expected those of this model.")
    for path, layer in layers.items():
        if held_by(states[path]):
            layer.weight = nnx.BatchStat(jnp.asarray(states[path].weight))
        _set(layer, states[path])


def _layers(model) -> dict[str, BatchNorm]:
    found = ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, BatchNorm))
    return {"/".join(map(str, path)): layer for path, layer in found}


def _value(variable):
    return None if variable is None else variable[...]


def _state(layer) -> State:
    return state_of(layer.mean[...], layer.var[...], _value(layer.weight))


def _set(layer, state: State) -> None:
    layer.mean[...], layer.var[...] = state.mean, state.var
    if layer.weight is not None:
        layer.weight[...] = jnp.broadcast_to(weight_of(state), jnp.shape(layer.weight[...]))
