"""What a state holds in its weight while a network is measured: what was found so far, and what normalizes.

It stays a `State`, so that a network can read, clip, gate, map, shard and rebuild it as it does in training.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jbn._types import Moments, State


class Held(NamedTuple):
    """What a state holds: all [*features]."""

    seen: State  # what the network sees: mean and variance that were found so far, and what it has made of them
    moments: Moments  # of all calls so far
    calls: Any  # how many there were, of one batch, or the most of any
    error: Any  # the sum over them of count times the squared error of evaluation by `running`, see `drift`
    running: State  # mean and variance that each call is compared with or, without `epsilon`, normalized by
    epsilon: Any | None  # of the comparison; `None`: `running` normalizes

    @property
    def mean(self):
        return self.seen.mean

    @property
    def given(self) -> State | None:
        """What normalizes; `None`: each batch itself."""
        return self.running if self.epsilon is None else None


def holding(held: Held) -> State:
    """A state with this in its weight, [*features, 1, 9 or 10]."""
    fields = *held.seen[:2], *held.moments, held.calls, held.error, *held.running[:2]
    fields = fields if held.epsilon is None else (*fields, held.epsilon)
    mean, var, *packed = (jnp.broadcast_to(field, held.moments.mean.shape) for field in fields)
    return State(mean, var, jnp.expand_dims(jnp.stack([field.astype(mean.dtype) for field in packed], -1), -2))


def held_by(state) -> Held | None:
    """What `state` holds, and `None` for every other state."""
    if not isinstance(state, State) or np.ndim(state.weight) != np.ndim(state.mean) + 2:
        return None
    fields: list[Any] = list(jnp.unstack(jnp.squeeze(jnp.asarray(state.weight), -2), axis=-1))
    epsilon = fields[9] if len(fields) > 9 else None
    seen = State(state.mean, state.var)
    return Held(seen, Moments(*fields[:5]), fields[5], fields[6], State(*fields[7:9]), epsilon)
