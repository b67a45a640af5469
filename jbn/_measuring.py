"""What a state holds in its weight while `recalibrate` measures: the moments so far, and what normalizes.

It stays a `State`, so that a network can read, clip, gate, map, shard and rebuild it as it does in training.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jbn._types import Moments, State


class Held(NamedTuple):
    """What a state holds."""

    moments: Moments
    given: State | None  # what normalizes; `None`: each batch itself


def holding(state: State, moments: Moments, given: State | None) -> State:
    """`state` with these in its weight, [*features, 1, 5 or 7]."""
    fields = moments if given is None else (*moments, given.mean, given.var)
    mean, var, *packed = (jnp.broadcast_to(field, moments.mean.shape) for field in (*state[:2], *fields))
    return State(mean, var, jnp.expand_dims(jnp.stack(packed, -1), -2))


def held_by(state) -> Held | None:
    """What `state` holds, and `None` for every other state."""
    if not isinstance(state, State) or np.ndim(state.weight) != np.ndim(state.mean) + 2:
        return None
    fields = jnp.unstack(jnp.squeeze(jnp.asarray(state.weight), -2), axis=-1)
    return Held(Moments(*fields[:5]), State(*fields[5:]) if len(fields) > 5 else None)
