"""Replace running statistics by the exact ones of given data."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jbn._check import check_fields
from jbn._start import empty_moments
from jbn._types import Measuring, State, is_state
from jbn._update import update

States = TypeVar("States")
SETTLED = 1e-6  # standard deviations, or of the variance: some units in the last place of float32


def recalibrate(
    apply: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    states: States,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    passes: int | None = None,
    unbiased: bool = True,
) -> States:
    """Replace the running statistics of a network, its params fixed, by those of all given batches ("precise" ones).

    For each normalization, with sums over all batches b, each measured as in training:

        count = sum(count_b),  mean = sum(count_b mean_b) / count
        var = sum(count_b (var_b + (mean_b - mean)^2)) / count          within plus between

    The first pass over the batches normalizes each by its own statistics: this is the paper's algorithm, and exact for
    a layer that no other comes before. Every further pass normalizes by the statistics of the pass before, as
    evaluation will. After k passes those of the first k layers in sequence are exact: they do not depend on how the
    data is cut into batches, nor on the states passed in. It goes on until nothing changes, in as many passes as there
    are states at most (one with leading axes, as for a scan over layers, counts for as many), or in `passes`.

    Args:
      apply: `apply(params, states, batch)` gives back a pair, whose second item is the new states in the structure of
        those it was given. It applies the network with `train=True`, with `weights` and `axis_name` as in training; a
        layer that it applies with `train=False` keeps its state. Compiled once for each shape of a batch and, as it is
        hashed, for each function: pass the same one again rather than a new lambda.
      params: passed to `apply` as they are.
      states: a `State`, or a pytree of them; what else is in there goes in and comes back as it is.
      batches: passed to `apply` one by one, and gone through several times: a list, an array (one batch a row), or
        anything that starts anew when it is iterated again; or a function without arguments that returns such an
        iterable. A generator serves with `passes=1` only.
      passes: at most so many. 1 is the paper's algorithm; 2 or 3 are mostly enough for the accuracy of a network.
      unbiased: the running variance is var * count / max(count - 1, 1) with the count of all batches, as in `update`.
        Pass what the network passes to `batch_norm`.

    Returns:
      The states in their shapes and dtypes, with weight 1. Where nothing was measured, as with no batches or with all
      masked, a state is as it was. A batch with moments that are not finite is left out of that layer's statistics,
      as in `update`; what is masked is never computed with.

    Raises:
      TypeError: there is no `State` in `states`, `apply` does not give back such a pair, or `batches` can be gone
        through only once.
      ValueError: `passes` is below 1, `apply` measures nothing, or a later pass finds no batches.

    Notes:
      A state that is used several times in one call of `apply` is normalized by what it is measured from; the passes
      approach a fixed point there.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; passes after the first are ours.

    Example:
      >>> params, state = jbn.init(1)
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0], [5.0]])]
      >>> apply = lambda params, state, x: jbn.batch_norm(x, params, state, train=True)
      >>> state = jbn.recalibrate(apply, params, state, batches)
      >>> state.mean.tolist(), state.var.tolist(), state.weight.tolist()
      ([3.0], [2.5], [1.0])
    """
    if passes is not None and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise ValueError(f"passes is {passes!r}; expected an int of at least 1, or None for as many as are needed.")
    states = jax.tree.map(_as_arrays, states, is_leaf=is_state)
    found = [leaf for leaf in jax.tree.leaves(states, is_leaf=is_state) if is_state(leaf)]
    layers = sum(math.prod(jnp.shape(state.mean)[:-1]) for state in found)  # those stacked for a scan count one by one
    if not layers:
        raise TypeError(f"states is a {type(states).__name__} without a jbn.State in it; is the order right?")
    last = layers if passes is None else passes
    states = jax.tree.map(
        lambda leaf: check_fields("state", leaf, State) if is_state(leaf) else leaf, states, is_leaf=is_state
    )
    for number in range(1, last + 1):
        once = batches() if callable(batches) else batches
        if last > 1 and once is batches and isinstance(once, Iterator):
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be gone through once, and there may be {last} "
                f"passes; pass a list, a function that starts anew, such as lambda: loader(), or passes=1."
            )
        totals, some = empty_moments(states), False
        for batch in once:
            previous, some = totals, True
            totals = _measure(apply, number == 1, params, states, totals, batch)
            jax.block_until_ready(previous)  # or batches would pile up before the device
        if not some and number > 1:
            raise ValueError(f"pass {number} found no batches: what batches gives must start anew each time.")
        if not some:
            break
        states, settled = _replace(states, totals, unbiased)
        if number > 1 and settled:
            break
    return states


def _as_arrays(leaf):
    return check_fields("state", leaf, State) if is_state(leaf) else leaf


@partial(jax.jit, static_argnums=(0, 1))
def _measure(apply, by_batch, params, states, totals, batch):
    """`totals` and what `batch` adds to them."""

    def measuring(state, total):
        return Measuring(state, total, by_batch) if is_state(state) else state

    given = jax.tree.map(measuring, states, totals, is_leaf=is_state)
    result = apply(params, given, batch)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"apply gave back a {type(result).__name__}; expected the pair (anything, new states).")
    if jax.tree.structure(result[1]) != jax.tree.structure(given):
        raise TypeError(
            f"apply gave back new states ({type(result[1]).__name__}) in another structure than that of the states it "
            f"was given ({type(states).__name__}); expected each new state in the place of the old one."
        )
    added = jax.tree.map(
        lambda state, new: new.moments if is_state(state) else state, states, result[1], is_leaf=is_state
    )
    if all(new is old for new, old in zip(jax.tree.leaves(added), jax.tree.leaves(totals), strict=True)):
        raise ValueError("apply measured nothing: apply the network with train=True, and give back its new states.")
    return added


@partial(jax.jit, static_argnums=2)
def _replace(states, totals, unbiased):
    """The states of `totals`, and whether they are the old ones to rounding."""
    settled = []

    def replaced(state, total):
        if not is_state(state):
            return state
        new = update(state, total, decay=0.0, unbiased=unbiased)
        settled.append(jnp.all(jnp.abs(new.mean - state.mean) <= SETTLED * jnp.sqrt(new.var)))
        settled.append(jnp.all(jnp.abs(new.var - state.var) <= SETTLED * new.var))
        return new

    new = jax.tree.map(replaced, states, totals, is_leaf=is_state)
    return new, jnp.all(jnp.stack(settled))
