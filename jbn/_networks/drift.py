"""How far running statistics are from those of given data: which layer makes evaluation differ from training."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbn._door.fields import check_states
from jbn._door.numbers import check_epsilon
from jbn._networks.survey import program, survey
from jbn._types import is_state, usable


class Drift(NamedTuple):
    """What stands in the place of a `State`: how far it is from the data, each feature by itself.

    Attributes:
      count: [*features], how many values were measured; where none was, the rest is 0, and the ratio 1.
      shift: [*features], in running standard deviations: above 0 where the data's mean is above the running one.
      ratio: [*features], standard deviation of the data to the running one.
      error: [*features], what evaluation is off from training, in standard deviations of the output there: the root
        mean square over all calls, each with its own statistics in training.
      between: [*features], the part of the error that lies between calls: what shift and ratio, which are those of all
        calls together, do not account for.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    shift: jax.Array
    ratio: jax.Array
    error: jax.Array
    between: jax.Array


def drift(
    apply: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    states: Any,
    batches: Iterable[Any],
    *,
    epsilon: float = 1e-5,
) -> Any:
    """How far the running statistics of each normalization of a network are from those of given batches.

    With s = sqrt(var + epsilon) of all batches together, s_c of one call and s_run of the running statistics,

        shift = (mean - mean_run) / s_run,  ratio = s / s_run
        error^2 = sum_c(count_c (var_c (1 / s_c - 1 / s_run)^2 + (mean_c - mean_run)^2 / s_run^2)) / count
        between^2 = error^2 - shift^2 - (ratio - 1)^2 var / s^2, or 0

    The error is the root mean square of what a feature's output in evaluation is off from that in training, in units
    of |scale|: 0.1 goes unnoticed, at 1 the difference is as large as the output. Every layer is measured as in
    training, each batch normalized by its own statistics, so that a layer shows its own fault and not that of the
    layers before it. What lies `between` calls `recalibrate` cannot mend: a layer that is shared by inputs of several
    kinds (levels of a pyramid, real and fake, domains by turns), a loader that is sorted, batches of a few. There
    training itself has to change: a state for each kind, mixed batches, larger ones or `batch_renorm`.

    Given the data of training, a drift is of the running statistics: too few steps, a decay too near to 1, params that
    moved faster than they did, batches that evaluation does not have. `recalibrate` mends it. Given the data of
    evaluation, and none with that of training, it is of the data: how it was prepared, or what it is.

    Args:
      apply: as in `recalibrate`.
      params: as in `recalibrate`.
      states: as in `recalibrate`; they are left as they are.
      batches: passed to `apply` one by one, once: any iterable, such as a list, an array (one batch a row) or a
        generator.
      epsilon: that of the network.

    Returns:
      A `Drift` in the place of every `State` of `states`; what else is in there stays as it is.

    Raises:
      TypeError, ValueError: as in `recalibrate`, or there are no batches.

    Source: what "precise" statistics mend, in Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.

    Examples:
      >>> params, state = jbn.init(2)
      >>> state = state._replace(mean=jnp.array([0.0, 5.0]), var=jnp.array([1.0, 4.0]), weight=jnp.ones(2))
      >>> apply = lambda params, state, x: jbn.batch_norm(x, params, state, train=True)
      >>> batch = jnp.array([[-1.0, 8.0], [0.0, 9.0], [1.0, 10.0]])
      >>> found = jbn.drift(apply, params, state, [batch])
      >>> found.shift.round(2).tolist(), found.ratio.round(2).tolist(), found.count.tolist()
      ([0.0, 2.0], [1.0, 0.5], [3.0, 3.0])
    """
    check_epsilon(epsilon, float)
    states = check_states("states", states)
    once = batches() if callable(batches) else batches
    measured = survey(program(apply), params, states, once, epsilon=epsilon)
    if measured is None:
        raise ValueError(f"batches is a {type(batches).__name__} in which there are none; expected one at least.")

    def apart(state, total):
        if not is_state(state):
            return state
        spread, running = (jnp.sqrt(of.var + epsilon) for of in (total.seen, state))
        shift, ratio = (total.seen.mean - state.mean) / running, spread / running
        narrower = (ratio - 1) ** 2 * total.seen.var / jnp.where(spread > 0, spread, 1) ** 2
        count = total.moments.count
        squared = total.error / jnp.where(count > 0, count, 1)
        of_all = jnp.where(count > 0, shift**2 + narrower, 0)
        fields = shift, ratio, jnp.sqrt(squared), jnp.sqrt(jnp.maximum(squared - of_all, 0))
        visible = (jnp.where(usable(state), field, jnp.nan) for field in fields)
        return Drift(count, *visible)

    return jax.tree.map(apart, states, measured, is_leaf=is_state)
