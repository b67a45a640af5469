"""CrossQ (Bhatt et al. 2024) swings up a pendulum: soft actor-critic whose critics see two states in one batch.

    pip install -e '.[rl]'                      # in a checkout
    python examples/crossq.py                   # 1 minute on 2 CPU cores; --norm batch, --norm none

There is no target network. What the critics are normalized by has to be right for (s, a) and for (s', a'), and so is
measured of both. The policy acts, and is improved, by the running statistics.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbn.linen import BatchNorm, BatchRenorm

ACTIONS = 1  # the torque, of which -1 and 1 are the most there is


@dataclasses.dataclass(frozen=True)
class Config:
    norm: Literal["renorm", "batch", "none"] = "renorm"
    """What stands before each linear map."""
    joint: bool = True
    """(s, a) and (s', a') in one batch; else each is normalized by itself, as two calls of the critics would."""
    steps: int = 6_000
    """In the environment, with one update each behind the first `start`."""
    start: int = 1_000
    """Steps by random actions."""
    warmup_steps: int = 1_500
    """Updates of plain batch norm before the limits of the renormalization open; 100,000 in the paper's long runs."""
    width: int = 128
    batch: int = 256
    rate: float = 1e-3
    gamma: float = 0.99
    delay: int = 3
    """The policy moves in one of so many updates."""
    evaluate_every: int = 500
    episodes: int = 10
    """Of an evaluation."""


class Network(nn.Module):
    """Two hidden layers. Each linear map is behind a normalization."""

    norm: Callable[..., nn.Module] | None
    width: int
    out: int

    @nn.compact
    def __call__(self, x, train):
        for width in (self.width, self.width, None):
            x = self.norm(use_running_average=not train)(x) if self.norm else x
            x = nn.relu(nn.Dense(width)(x)) if width else nn.Dense(self.out)(x)
        return x


class Transitions(NamedTuple):
    s: Any  # [batch, observations]
    a: Any  # [batch, actions], in (-1, 1)
    reward: Any  # [batch]
    discount: Any  # [batch], 0 where the episode has come to its end
    after: Any  # [batch, observations]


class Agent(NamedTuple):
    actor: Any  # variables: params and, with a norm, batch_stats
    critics: Any  # variables of two, in the first axis
    temperature: jax.Array  # its logarithm
    moving: Any  # states of the optimizers, of the three
    step: jax.Array


def network(config: Config, out: int) -> Network:
    renorm = partial(BatchRenorm, warmup_steps=config.warmup_steps)
    return Network({"renorm": renorm, "batch": BatchNorm, "none": None}[config.norm], config.width, out)


def optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.rate, b1=0.5)  # as in the paper


def init(config: Config, key, observations: int) -> Agent:
    keys = jax.random.split(key, 3)
    x = jnp.zeros((1, observations + ACTIONS))
    actor = network(config, 2 * ACTIONS).init(keys[0], x[:, :observations], train=False)
    critics = jax.vmap(partial(network(config, 1).init, train=False), (0, None))(keys[1:], x)
    temperature = jnp.zeros(())
    moving = tuple(optimizer(config).init(each) for each in (actor["params"], critics["params"], temperature))
    return Agent(actor, critics, temperature, moving, jnp.zeros((), jnp.int32))


def policy(config: Config, actor, s, key=None, *, train=False):
    """Actions, with a key random ones, the logarithm of their density, and the variables after."""
    found, changed = network(config, 2 * ACTIONS).apply(actor, s, train=train, mutable=["batch_stats"])
    mean, spread = jnp.split(found, 2, -1)
    spread = jnp.clip(spread, -5, 2)
    noise = jnp.zeros_like(mean) if key is None else jax.random.normal(key, mean.shape)
    before = mean + jnp.exp(spread) * noise
    normal = -0.5 * noise**2 - spread - 0.5 * jnp.log(2 * jnp.pi)
    density = normal - 2 * (jnp.log(2) - before - nn.softplus(-2 * before))  # the latter is log(1 - tanh^2)
    return jnp.tanh(before), jnp.sum(density, -1), actor | changed


def values(config: Config, critics, s, a, *, train):
    """Of both critics, [2, batch], and their variables after."""
    apply = partial(network(config, 1).apply, train=train, mutable=["batch_stats"])
    found, changed = jax.vmap(apply, (0, None))(critics, jnp.concatenate([s, a], -1))
    return found[..., 0], critics | changed


def joint_loss(params, config: Config, critics, data: Transitions, a_after, bonus):
    """(s, a) and (s', a') go through the critics as one batch: that is CrossQ."""
    critics = critics | {"params": params}
    if config.joint:
        joint = jnp.concatenate([data.s, data.after]), jnp.concatenate([data.a, a_after])
        q, critics = values(config, critics, *joint, train=True)
        q, q_after = jnp.split(q, 2, -1)
    else:
        q, critics = values(config, critics, data.s, data.a, train=True)
        q_after, critics = values(config, critics, data.after, a_after, train=True)
    target = data.reward + data.discount * (jnp.min(q_after, 0) + bonus)
    return jnp.mean((q - jax.lax.stop_gradient(target)) ** 2), critics


def policy_loss(params, config: Config, actor, critics, temperature, s, key):
    a, density, actor = policy(config, actor | {"params": params}, s, key, train=True)
    q, _ = values(config, critics, s, a, train=False)
    return jnp.mean(jnp.exp(temperature) * density - jnp.min(q, 0)), (actor, density)


@partial(jax.jit, static_argnums=0)
def update(config: Config, agent: Agent, data: Transitions, key) -> Agent:
    actor, critics, temperature, moving, step = agent
    keys = jax.random.split(key)

    def moved(gradients, moving, params):
        updates, moving = optimizer(config).update(gradients, moving)
        return optax.apply_updates(params, updates), moving

    a_after, density, _ = policy(config, actor, data.after, keys[0])
    bonus = -jnp.exp(temperature) * density
    gradients, critics = jax.grad(joint_loss, has_aux=True)(critics["params"], config, critics, data, a_after, bonus)
    params, of_critics = moved(gradients, moving[1], critics["params"])
    critics = critics | {"params": params}

    def improve(actor, temperature, moving):
        gradient = jax.grad(policy_loss, has_aux=True)
        gradients, (actor, density) = gradient(actor["params"], config, actor, critics, temperature, data.s, keys[1])
        params, of_actor = moved(gradients, moving[0], actor["params"])
        target = -jnp.mean(density) + ACTIONS  # the entropy aimed at is minus the number of actions
        temperature, of_temperature = moved(target * jnp.exp(temperature), moving[1], temperature)
        return actor | {"params": params}, temperature, (of_actor, of_temperature)

    def stay(actor, temperature, moving):
        return actor, temperature, moving

    turn = step % config.delay == 0
    actor, temperature, (of_actor, of_temperature) = jax.lax.cond(
        turn, improve, stay, actor, temperature, (moving[0], moving[2])
    )
    return Agent(actor, critics, temperature, (of_actor, of_critics, of_temperature), step + 1)


@partial(jax.jit, static_argnums=0)
def act(config: Config, agent: Agent, s, key=None):
    return policy(config, agent.actor, s, key)[0]


def evaluate(config: Config, agent: Agent) -> float:
    """The mean return of some episodes without noise, always from the same starts."""
    import gymnasium

    environments = gymnasium.make_vec("Pendulum-v1", num_envs=config.episodes)
    s, _ = environments.reset(seed=1_000)
    total = np.zeros(config.episodes)
    for _ in range(200):
        s, reward, *_ = environments.step(2 * np.asarray(act(config, agent, s)))
        total += reward
    return float(total.mean())


def train(config: Config, seed: int = 0) -> Iterator[tuple[int, float, Agent]]:
    """The step, the return and the agent of every evaluation."""
    import gymnasium

    environment = gymnasium.make("Pendulum-v1")
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    agent = init(config, key, 3)
    held = Transitions(*(np.zeros((config.steps, *shape), np.float32) for shape in ((3,), (1,), (), (), (3,))))
    s, _ = environment.reset(seed=seed)
    for step in range(config.steps):
        of_step = jax.random.split(jax.random.fold_in(key, step))
        if step < config.start:
            a = random.uniform(-1, 1, 1).astype(np.float32)
        else:
            a = np.asarray(act(config, agent, s[None], of_step[0])[0])
        after, reward, terminated, truncated, _ = environment.step(2 * a)
        for array, value in zip(held, (s, a, reward, config.gamma * (not terminated), after), strict=True):
            array[step] = value
        s = environment.reset()[0] if terminated or truncated else after
        if step >= config.start:
            rows = random.integers(0, step + 1, config.batch)
            agent = update(config, agent, Transitions(*(array[rows] for array in held)), of_step[1])
        if (step + 1) % config.evaluate_every == 0:
            yield step + 1, evaluate(config, agent), agent


def main(config: Config, seed: int = 0) -> None:
    for step, score, _ in train(config, seed):
        print(f"{step:6,} steps: return {score:.0f}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
