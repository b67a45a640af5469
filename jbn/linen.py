"""Batch normalization as a layer of Flax's linen, in the place of `flax.linen.BatchNorm`: `jbn.linen.BatchNorm`.

`jbn.linen.BatchRenorm` is the same with batch renormalization.

`states` and `batch_stats` lead from a network's variables to what `jbn.recalibrate`, `jbn.drift` and
`jbn.merge_states` take, and back:

    def apply(params, states, batch):
        variables = {"params": params, "batch_stats": jbn.linen.batch_stats(states)}
        y, changed = network.apply(variables, batch, train=True, mutable=["batch_stats"])
        return y, jbn.linen.states(changed["batch_stats"])

    states = jbn.recalibrate(apply, params, jbn.linen.states(running), batches)
    running = jbn.linen.batch_stats(states, like=running)

`pip install 'jbn[flax]'` installs what this needs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

try:
    import flax.linen as nn
except ImportError as error:
    raise ImportError("jbn.linen needs Flax: pip install 'jbn[flax]'") from error

from jbn._core.measure import moments_of
from jbn._core.merge import merged
from jbn._core.normalize import center_of
from jbn._core.running import empty
from jbn._libraries.flax import prepare, state_of, weight_of
from jbn._renorm import Limits, limits_at
from jbn._types import Params, State, statistics_dtype


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`, computed by `jbn.batch_norm`.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias
        running' = momentum * running + (1 - momentum) * measured       for mean and for var, divided by count

    Constructor, defaults, collections and names of variables are Flax's: 'params' (scale, bias) and 'batch_stats'
    (mean, var), so that a checkpoint of either layer loads into the other, evaluates the same and trains on.

    With `debias` the initial mean 0 and variance 1 have no part in the running statistics. One more variable of
    'batch_stats', 'weight', says how much evidence there is: 0 at first, see `jbn.State`. It is made with the others;
    statistics without one, as those of Flax's layer, have full evidence, also where they took the place of the initial
    ones and the weight stayed 0, and those with one keep it, whatever `debias`.

    With `unbiased` the running variance is divided by count - 1 rather than by count, as PyTorch's is: see
    `jbn.batch_norm`.

    `activation`, a function of each element such as `nn.relu`, comes behind the normalization, in fewer passes over a
    GPU's memory than by itself, see `jbn.batch_norm`.

    In training, where the collection 'moments' is mutable, the `jbn.Moments` of the batch are sown there, and merged
    with those that are there already: pass `mutable=["batch_stats", "moments"]`, and what came back of 'moments' with
    the variables of the next call. They are measured about the running mean, see `jbn.moments`.

    On purpose other than Flax:
      Where the mask is 0, x is never computed with, and the output is 0.
      The output has the dtype of x where `dtype` is not given, whatever that of the params. Where it is given, the
        wider of the two is computed in. Whole numbers are float32.
      Running statistics are float32 (float64 where `param_dtype` is), and each batch is measured in float32 or wider;
        `use_fast_variance` and `force_float32_reductions` do nothing.
      A feature with values that are not finite, none or a single one keeps its running statistics as they were, and one
        that is far from its running mean starts anew, see `jbn.batch_norm`. Training on one value per feature in all is
        an error.
      Initialization normalizes by the running statistics: one row is enough, and `axis_name` need not be bound.

    Examples:
      >>> layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.5)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, changed = layer.apply(variables, x, mutable=["batch_stats", "moments"])
      >>> y.round(3).tolist(), changed["batch_stats"]["mean"].tolist()
      ([[-1.0], [1.0]], [1.0])
      >>> changed["moments"]["moments"].mean.tolist()
      [2.0]
    """

    debias: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalize `x` [...] by its own statistics, or by the running ones.

        Args:
          x: [...], floating-point, or whole numbers.
          use_running_average: as in the constructor, where it is `None` then.
          mask: of a shape that broadcasts to that of `x` by NumPy's rules: where it is 0, there is nothing.

        Returns:
          An array of the shape of `x`.

        Raises:
          TypeError, ValueError, NameError, NotImplementedError: as `jbn.batch_norm`.
        """
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        train = not evaluate and not self.is_initializing()
        call = prepare(self, x, mask, train=train)
        features = call.batch.features.shape
        fresh = self.debias and not self.has_variable("batch_stats", "mean")
        starts = {"mean": jnp.zeros, "var": jnp.ones}
        if fresh or self.has_variable("batch_stats", "weight"):
            starts["weight"] = jnp.zeros
        dtype = statistics_dtype(self.param_dtype)
        running = {name: self.variable("batch_stats", name, of, features, dtype) for name, of in starts.items()}
        scale = self.param("scale", self.scale_init, features, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        old = state_of(**{name: variable.value for name, variable in running.items()})
        y, new = call.normalize(self, Params(scale, bias), old, self._limits(train))
        if train:
            for name, value in batch_stats(new, like=running).items():
                running[name].value = jnp.asarray(value)
            if self.is_mutable_collection("moments"):
                measured = moments_of(call.batch, center_of(call.batch, old))  # one center, and so measured once
                self.sow("moments", "moments", measured, reduce_fn=merged, init_fn=partial(empty, old))
        return y

    def _limits(self, train: bool) -> tuple[Any, Any] | None:
        """How far a batch is renormalized, r_max and d_max, in this step; `None` where it is not."""
        return None


class BatchRenorm(BatchNorm):
    """`jbn.linen.BatchNorm`, computed by `jbn.batch_renorm`: for small batches, and for data that moves.

    In training, with s = sqrt(var + epsilon), and r and d without gradient,

        r = clip(s / s_run, 1 / r_max, r_max),  d = clip((mean - mean_run) / s_run, -d_max, d_max)
        y = scale * ((x - mean) / s * r + d) + bias

    For the first `warmup_steps` steps r_max is 1 and d_max 0, which is batch norm; then they are `limits`. One more
    variable of 'batch_stats', 'steps', int32 of shape [], counts the steps of training. Statistics without it, as those
    of `BatchNorm`, start at 0; those with it are evaluated by `BatchNorm` too. All else is as in `BatchNorm`.

    Attributes:
      limits: r_max and d_max, numbers that may be traced; or a function that is given the number of steps so far, and
        gives them, with a warm-up of its own, such as `jbn.renorm_limits`: `warmup_steps` then has no part.
      warmup_steps: 100,000, as in CrossQ.

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1; the warm-up as in Bhatt et al. 2024, "CrossQ".

    Examples:
      >>> layer = jbn.linen.BatchRenorm(use_running_average=False, momentum=0.5, warmup_steps=1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, changed = layer.apply(variables, x, mutable=["batch_stats"])
      >>> y.round(3).tolist(), int(changed["batch_stats"]["steps"])
      ([[-1.0], [1.0]], 1)
      >>> y, _ = layer.apply(variables | changed, x + 2, mutable=["batch_stats"])  # running mean 1, variance 1
      >>> y.round(3).tolist()
      [[2.0], [4.0]]
    """

    limits: Limits = (3.0, 5.0)
    warmup_steps: int = 100_000

    def _limits(self, train):
        if not (train or self.is_initializing()):
            return None
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        limits = limits_at(steps.value, self.limits, self.warmup_steps)
        if train:
            steps.value += 1
        return limits


def states(batch_stats: Any) -> Any:
    """The running statistics of a network as `jbn.State`, for `jbn.recalibrate`, `jbn.drift` and `jbn.merge_states`.

    Args:
      batch_stats: the collection 'batch_stats', nested dicts.

    Returns:
      The same tree of dicts with a `jbn.State` for every dict of 'mean' and 'var', of full evidence where there is no
      'weight' too, and without 'steps'. Anything else stays as it is.

    Examples:
      >>> jbn.linen.states({"BatchNorm_0": {"mean": jnp.zeros(1), "var": jnp.ones(1)}})["BatchNorm_0"].weight.tolist()
      [1.0]
    """
    if not isinstance(batch_stats, Mapping):
        return batch_stats
    named = {"mean", "var"} <= set(batch_stats) <= {"mean", "var", "weight", "steps"}
    if named and not any(isinstance(value, Mapping) for value in batch_stats.values()):
        return state_of(**{name: value for name, value in batch_stats.items() if name != "steps"})
    return {name: states(value) for name, value in batch_stats.items()}


def batch_stats(states: Any, like: Any = None) -> Any:
    """The collection 'batch_stats' of `states`, as `states` makes them of it.

    Args:
      states: nested dicts with `jbn.State` in them.
      like: the collection that it takes the place of: there is a 'weight' where it has one, and its 'steps'. Without
        it there is a weight everywhere, as needed within the `apply` of `jbn.recalibrate`, where it carries what was
        measured.

    Returns:
      The same tree with a dict of 'mean', 'var', 'weight' and 'steps' for every `jbn.State`.

    Raises:
      ValueError: `like` has other names than `states`.

    Examples:
      >>> _, state = jbn.init(1)
      >>> sorted(jbn.linen.batch_stats({"norm": state})["norm"])
      ['mean', 'var', 'weight']
    """
    if isinstance(states, State):
        weighed = like is None or "weight" in like
        found = {"mean": states.mean, "var": states.var} | ({"weight": weight_of(states)} if weighed else {})
        return {**(like or {}), **found}
    if not isinstance(states, Mapping):
        return states
    if like is not None and (not isinstance(like, Mapping) or set(like) != set(states)):
        there = sorted(like) if isinstance(like, Mapping) else f"a {type(like).__name__}"
        raise ValueError(f"like has {there} where states has {sorted(states)}; expected the batch_stats they are of.")
    return {name: batch_stats(of, None if like is None else like[name]) for name, of in states.items()}
