"""Replace running statistics by the exact ones of given data."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jbn._core.running import advance
from jbn._door.fields import check_states
from jbn._networks.survey import program, survey
from jbn._types import State, is_state

States = TypeVar("States")
TIED = 100  # passes, where one state is used several times in a call
SETTLED = 1e-6  # standard deviations, or of the variance: some units in the last place of float32


def recalibrate(
    apply: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    states: States,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    passes: int | None = None,
    unbiased: bool | None = None,
) -> States:
    """Replace the running statistics of a network, its params fixed, by those of all given batches ("precise" ones).

    For each normalization, with sums over all batches b, each measured as in training:

        count = sum(count_b),  mean = sum(count_b mean_b) / count
        var = sum(count_b (var_b + (mean_b - mean)^2)) / count          within plus between

    The first pass over the batches normalizes each by its own statistics: this is the paper's algorithm, and exact for
    a layer that no other comes before. Every further pass normalizes by the statistics of the pass before, as
    evaluation will. After k passes those of the first k layers in sequence are exact: they do not depend on how the
    data is cut into batches, nor on the states passed in. It goes on until nothing changes, in as many passes as there
    are states at most (one with leading axes, as for a scan over layers, counts for as many), or in `passes`. Where one
    state is used several times in a call, as in a network with tied layers, it goes on until that has settled, in 100
    passes at most, or in as many as there are states. All this goes for layers that are `batch_norm` or `batch_renorm`:
    `normalize_batch` sees no state, so that one composed of it and `update` is normalized by each batch in every pass.

    Args:
      apply: `apply(params, states, batch)` gives back a pair, whose second item is the new states in the structure of
        those it was given. It applies the network with `train=True`, with `weights` and `axis_name` as in training; a
        layer that it applies with `train=False` keeps its state. Compiled once for each shape of a batch, and for a
        function kept as long as that lives: pass the same one again rather than a new lambda. As under `jit`, what a
        function reads besides its arguments is what it was in the first call. Methods and other objects are traced anew
        in every call of `recalibrate`.
        The mean and variance it sees are those that normalize, and those it gets back what was found so far: it may
        log them, and what it makes of them, clipped say, is kept. What was found travels in `weight`, of shape
        `[*features, 1, 9 or 10]` here, which has to be handed on with them.
      params: passed to `apply` as they are.
      states: a `State`, or a pytree of them; what else is in there goes in and comes back as it is.
      batches: passed to `apply` one by one, and gone through several times: a list, an array (one batch a row), or
        anything that starts anew when it is iterated again; or a function without arguments that returns such an
        iterable. A generator serves with `passes=1` only.
      passes: at most so many. 1 is the paper's algorithm; 2 or 3 are mostly enough for the accuracy of a network.
      unbiased: the running variance is var * n / (n - 1) with n the number of values of all batches, as in `update`; by
        default where the network passes that to `batch_norm`.

    Returns:
      The states in their shapes and dtypes, with weight 1. Where nothing was measured, as with no batches or with all
      masked, a state is as it was. A batch with moments that are not finite is left out of that layer's statistics,
      as in `update`; what is masked is never computed with.

    Raises:
      TypeError: there is no `State` in `states`, `apply` does not give back such a pair, or `batches` can be gone
        through only once.
      ValueError: `passes` is below 1, `apply` measures nothing, or a later pass finds no batches.

    Warns:
      UserWarning: a state that is used several times in a call has not settled in 100 passes.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; passes after the first are ours.

    Examples:
      >>> params, state = jbn.init(1)
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0], [5.0]])]
      >>> apply = lambda params, state, x: jbn.batch_norm(x, params, state, train=True)
      >>> state = jbn.recalibrate(apply, params, state, batches)
      >>> state.mean.tolist(), state.var.tolist(), state.weight.tolist()
      ([3.0], [2.5], [1.0])
    """
    if passes is not None and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise ValueError(f"passes is {passes!r}; expected an int of at least 1, or None for as many as are needed.")
    states, run = check_states("states", states), program(apply)
    found = filter(is_state, jax.tree.leaves(states, is_leaf=is_state))
    layers = sum(math.prod(state.mean.shape[:-1]) for state in found)  # those stacked for a scan count one by one
    last, number, settled, unbounded = layers if passes is None else passes, 0, False, False
    while number < last and not settled:
        number += 1
        once = batches() if callable(batches) else batches
        if last > 1 and once is batches and isinstance(once, Iterator):
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be gone through once, and there may be {last} "
                f"passes; pass a list, a function that starts anew, such as lambda: loader(), or passes=1."
            )
        measured = survey(run, params, states, once, epsilon=1e-5 if number == 1 else None)
        if measured is None and number > 1:
            raise ValueError(f"pass {number} found no batches: what batches gives must start anew each time.")
        if measured is None:
            break
        states, same, tied = _replace(states, measured, unbiased)
        settled, unbounded = number > 1 and bool(same), passes is None and bool(tied)
        last = max(layers, TIED) if unbounded else last
    if unbounded and not settled:
        warnings.warn(
            f"a state that is used several times in one call of apply has not settled in {last} passes: what it is "
            f"measured from still moves it. Pass passes=, for as many as will do.",
            stacklevel=2,
        )
    return states


@partial(jax.jit, static_argnums=2)
def _replace(states, totals, unbiased):
    """The states that were found, whether they are the old ones to rounding, and whether one was used several times."""
    settled, tied = [], []

    def replaced(state, total):
        if not is_state(state):
            return state
        tied.append(jnp.any(total.calls > 1))
        new = advance(state, total.moments, decay=0.0, unbiased=unbiased is not False)
        new = new if unbiased is not None else State(total.seen.mean, total.seen.var, new.weight)
        settled.append(jnp.all(jnp.abs(new.mean - state.mean) <= SETTLED * jnp.sqrt(new.var)))
        settled.append(jnp.all(jnp.abs(new.var - state.var) <= SETTLED * new.var))
        return new

    new = jax.tree.map(replaced, states, totals, is_leaf=is_state)
    return new, jnp.all(jnp.stack(settled)), jnp.any(jnp.stack(tied))
