"""Measure every normalization of a network over given batches, the network as it is written for training."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jbn._core.held import Held, held_by, holding
from jbn._core.running import empty
from jbn._types import State, is_state

NOTE = (
    "jbn was measuring what the states are given. If this is about a State: `mean` and `var` are as in training there, "
    "and `weight` is [*features, 1, 9 or 10] and has to be handed on as it comes; a `vmap` over the last axis, as in "
    "in_axes=-1, is not possible: stack states along their first."
)


def survey(run: Callable, params, states, batches: Iterable[Any], *, epsilon=None) -> Any | None:
    """`Held` in the places of `states`: what was measured, and what `apply` made of it.

    With `epsilon` layers are normalized by each batch's own statistics, and compared with `states`; without it by
    `states`. `None` where there are no batches. `run` is `program(apply)`.
    """
    if isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; expected a list of batches, or what gives them.")
    totals, some = nothing(states, epsilon), False
    for batch in batches:
        previous, some = totals, True
        try:
            totals = run(params, states, totals, batch)
        except Exception as error:
            if isinstance(batches, jax.Array | np.ndarray):
                error.add_note(
                    f"batches is an array {list(batches.shape)}, each row of which is a batch. If all of it is one, "
                    f"pass [batches]."
                )
            raise
        jax.block_until_ready(previous)  # or batches would pile up before the device
    return totals if some else None


def nothing(states, epsilon=None):
    """`Held` in the places of `states` before anything is measured."""

    def of(state):
        if not is_state(state):
            return state
        moments = empty(state)
        zero = moments.mean
        compared = None if epsilon is None else jnp.full_like(zero, epsilon)
        before = State(state.mean, state.var, zero)
        return Held(before, moments, zero, zero, before, compared)

    return jax.tree.map(of, states, is_leaf=is_state)


_programs: weakref.WeakKeyDictionary[Callable, Callable] = weakref.WeakKeyDictionary()


def program(apply) -> Callable:
    """The compiled measurement of one batch by `apply`: kept, for as long as that lives, where it is a function.

    As an argument of a `jit` of this module it would live for ever, and all that it holds. An object, and so a method
    of it, may be another by the next call: it is traced anew.
    """
    if not callable(apply):
        raise TypeError(f"apply is a {type(apply).__name__}; expected a function apply(params, states, batch).")
    function = apply
    while isinstance(function, partial):
        function = function.func
    if not isinstance(function, FunctionType | jax.stages.Wrapped):
        return jax.jit(partial(_measure, lambda: apply))
    if apply not in _programs:
        _programs[apply] = jax.jit(partial(_measure, weakref.ref(apply)))
    return _programs[apply]


def _measure(living, params, states, totals, batch):
    """`totals` and what `batch` adds to them."""

    def hold(state, total):
        return holding(total._replace(seen=state, calls=jnp.zeros_like(total.calls))) if is_state(state) else state

    given = jax.tree.map(hold, states, totals, is_leaf=is_state)
    try:
        result = living()(params, given, batch)
    except Exception as error:
        error.add_note(NOTE)
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        kind = "array" if isinstance(result, jax.Array) else type(result).__name__
        raise TypeError(f"apply gave back a {kind}; expected the pair (anything, new states).")
    if jax.tree.structure(result[1]) != jax.tree.structure(given):
        raise TypeError(
            f"apply gave back new states ({type(result[1]).__name__}) in another structure than that of the states it "
            f"was given ({type(states).__name__}); expected each new state in the place of the old one."
        )
    before, after = (filter(is_state, jax.tree.leaves(tree, is_leaf=is_state)) for tree in (given, result[1]))
    weights = [(old.weight, new.weight) for old, new in zip(before, after, strict=True)]
    for old, new in weights:
        if jnp.shape(new)[-2:] != jnp.shape(old)[-2:]:
            raise TypeError(
                f"apply gave back a State with a weight of shape {list(jnp.shape(new))} where it was given one of "
                f"{list(jnp.shape(old))}, which holds what was measured: hand weight on as jbn gives it, as in "
                f"new._replace(var=...)."
            )
    if all(new is old for old, new in weights):
        raise ValueError("apply measured nothing: apply the network with train=True, and give back its new states.")

    def taken(state, new, total):
        if not is_state(state):
            return state
        held = cast(Held, held_by(new))
        calls = jnp.maximum(total.calls, held.calls)
        seen = held.seen._replace(weight=total.seen.weight)
        return held._replace(seen=seen, calls=calls, running=total.running, epsilon=total.epsilon)

    return jax.tree.map(taken, states, result[1], totals, is_leaf=is_state)
