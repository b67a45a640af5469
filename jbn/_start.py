"""How params, states and moments start."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jbn._core.running import empty
from jbn._door.fields import check_states
from jbn._door.numbers import check_features
from jbn._types import Params, State, is_state, statistics_dtype


def init(
    features: int | Sequence[int],
    *,
    scale: bool = True,
    bias: bool = True,
    debias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Params, State]:
    """Make the params and the state of one batch normalization.

    Args:
      features: size of the feature axis; for several feature axes a tuple of sizes, in the order in which the axes lie
        in `x`.
      scale: learn a scale (starts at 1). Without it, `params.scale` is `None`.
      bias: learn a bias (starts at 0). Without it, `params.bias` is `None`.
      debias: start with no evidence (weight 0), so that the first batch replaces the initial mean 0 and variance 1 and
        the running statistics are free of them from then on. With `False` they start with full weight (1) and decay
        away, as in Flax, Keras and PyTorch.
      dtype: of the params. Statistics are float64 where this is float64 and float32 otherwise.

    Returns:
      `Params` and `State` with fields of shape `[*features]`.

    Raises:
      ValueError: `features` is not a positive size or a tuple of them.
      TypeError: `features` holds something that is not an int, or `dtype` is not a floating-point type.

    Examples:
      >>> params, state = jbn.init(64)
      >>> params.scale.shape, state.var.shape, float(state.weight.max())
      ((64,), (64,), 0.0)
    """
    shape = check_features(features)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype is {jnp.dtype(dtype)}; params need a floating-point type, such as jnp.float32.")
    statistics = statistics_dtype(dtype)
    params = Params(jnp.ones(shape, dtype) if scale else None, jnp.zeros(shape, dtype) if bias else None)
    state = State(
        jnp.zeros(shape, statistics), jnp.ones(shape, statistics), jnp.full(shape, 0 if debias else 1, statistics)
    )
    return params, state


def empty_moments(states: Any) -> Any:
    """Empty `Moments`, count 0, in the place of every `State` of a pytree: where accumulation starts.

    `batch_norm` and `update` take them for the state, and merge into them what they measure: see `update`.

    Args:
      states: a `State`, or a pytree of them; what else is in there stays as it is.

    Returns:
      The same pytree with `Moments` of the shapes of the states, in float32 (float64 where the state is).

    Raises:
      TypeError: there is no `State` in `states`.

    Examples:
      >>> _, state = jbn.init(2)
      >>> total = jbn.empty_moments(state)
      >>> total = jbn.update(total, jbn.moments(jnp.array([[1.0, 10.0], [3.0, 30.0]])))
      >>> total = jbn.update(total, jbn.moments(jnp.array([[5.0, 50.0]])))
      >>> total.count.tolist(), total.mean.tolist()
      ([3.0, 3.0], [3.0, 30.0])
    """

    states = check_states("states", states)
    return jax.tree.map(lambda state: empty(state) if is_state(state) else state, states, is_leaf=is_state)
