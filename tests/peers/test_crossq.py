"""The CrossQ example: its critics learn a value that is known in closed form; all of it runs, where gymnasium is."""

import dataclasses
from functools import partial
from pathlib import Path

import crossq
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pendulum
import pytest

ROOT = Path(__file__).parents[2]
DISCOUNT, NOISE, BATCH, STEPS = 0.9, 0.3, 256, 2000


def exact(s, a):
    """Value of action `a` in state `s` [...]: reward -s^2, then 0.9 s + a and noise, and action -0.5 s ever after."""
    return -(s**2) - DISCOUNT * ((0.9 * s + a) ** 2 + NOISE**2 / (1 - DISCOUNT)) / (1 - DISCOUNT * 0.4**2)


def simulated(s, a):
    """The discounted reward of many runs, the first action given and then the policy."""
    state, total = jnp.broadcast_to(s, (2000, s.size)), 0.0
    for step in range(60):
        action = a if step == 0 else -0.5 * state
        total = total - DISCOUNT**step * state**2
        state = 0.9 * state + action + NOISE * jax.random.normal(jax.random.key(step), state.shape)
    return total.mean(0)


@partial(jax.jit, static_argnums=0)
def learned(config, key):
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def step(carry, index):
        critics, moving = carry
        s, a, noise = jax.random.normal(jax.random.fold_in(key, index), (3, BATCH, 1))
        after = 0.9 * s + a + NOISE * noise
        data = crossq.Transitions(s, a, -(s[:, 0] ** 2), jnp.full(BATCH, DISCOUNT), after)
        gradient = jax.grad(crossq.joint_loss, has_aux=True)
        gradients, critics = gradient(critics["params"], config, critics, data, -0.5 * after, 0.0)
        updates, moving = optimizer.update(gradients, moving)
        return (critics | {"params": optax.apply_updates(critics["params"], updates)}, moving), None

    critics = crossq.init(config, key, 1).critics
    return jax.lax.scan(step, (critics, optimizer.init(critics["params"])), jnp.arange(STEPS))[0][0]


@pytest.mark.parametrize("norm", ["renorm", "batch"])
def test_the_critics_learn_the_known_value(norm):
    s, a = (grid.ravel() for grid in jnp.meshgrid(jnp.linspace(-1.5, 1.5, 7), jnp.linspace(-1, 1, 7)))
    value = simulated(s, a)
    assert jnp.max(jnp.abs(value - exact(s, a))) < 0.05
    config = crossq.Config(norm=norm, width=64, warmup_steps=200)
    found, _ = crossq.values(config, learned(config, jax.random.key(0)), s[:, None], a[:, None], train=False)
    assert found.shape == (2, 49)
    for each in found:
        print(float(jnp.var(each - value) / jnp.var(value)), float(jnp.mean(each - value)))
        assert jnp.var(each - value) < 0.02 * jnp.var(value) and jnp.abs(jnp.mean(each - value)) < 0.4


def test_the_density_of_an_action_is_that_of_a_squashed_normal():
    """Its integral over the action is 1, by a grid."""
    config = crossq.Config(norm="none", width=8)
    agent = crossq.init(config, jax.random.key(0), 3)
    s = jnp.ones((4000, 3))
    a, density, _ = crossq.policy(config, agent.actor, s, jax.random.key(1))
    order = jnp.argsort(a[:, 0])
    a, density = a[order, 0], jnp.exp(density[order])
    assert abs(jnp.trapezoid(density, a) - 1) < 0.02  # but for what is left of the tails


def test_the_table_of_the_page_is_that_of_the_record(tmp_path):
    found = pendulum.claim.read(ROOT / "docs/pendulum.json")
    assert len(found) == 20 and {len(job["step"]) for job in found.values()} == {12}
    assert "\n".join(pendulum.tell(found)) in (ROOT / "docs/streams.md").read_text()
    pendulum.draw(found, tmp_path / "pendulum.png")
    assert (tmp_path / "pendulum.png").stat().st_size > 5000


@pytest.mark.parametrize("norm", ["renorm", "batch", "none"])
def test_all_of_it_runs(norm):
    pytest.importorskip("gymnasium")
    config = crossq.Config(norm=norm, width=16, batch=32, start=40, warmup_steps=20, steps=100, evaluate_every=50)
    config = dataclasses.replace(config, episodes=2)
    found = list(crossq.train(config))
    assert [step for step, _, _ in found] == [50, 100]
    assert all(-2000 < score < 0 for _, score, _ in found)
    agent = found[-1][2]
    assert int(agent.step) == 60
    if norm == "renorm":
        steps = agent.critics["batch_stats"]["BatchRenorm_0"]["steps"]
        assert steps.tolist() == [60, 60]  # in each of the two, once for the joint batch
        assert np.isfinite(np.asarray(agent.temperature))
