"""The CrossQ example learns the value that is known in closed form, and stays short."""

from pathlib import Path

import crossq
import jax
import jax.numpy as jnp


def test_the_critic_learns_the_known_value():
    assert len(Path(crossq.__file__).read_text().splitlines()) <= 60
    s, a = (grid.ravel() for grid in jnp.meshgrid(jnp.linspace(-1.5, 1.5, 7), jnp.linspace(-1, 1, 7)))
    # by simulation: the discounted reward of many runs, the first action given and then the policy
    state, total = jnp.broadcast_to(s, (2000, s.size)), 0.0
    for step in range(60):
        action = a if step == 0 else -0.5 * state
        total = total - crossq.DISCOUNT**step * state**2
        state = 0.9 * state + action + crossq.NOISE * jax.random.normal(jax.random.key(step), state.shape)
    value = total.mean(0)
    assert jnp.max(jnp.abs(value - crossq.exact(s, a))) < 0.05
    found, _ = crossq.critic(*crossq.train(jax.random.key(0)), s, a, 0, train=False)
    assert jnp.var(found - value) < 0.02 * jnp.var(value) and jnp.abs(jnp.mean(found - value)) < 0.4
