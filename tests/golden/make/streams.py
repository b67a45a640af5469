# python: 3.11
# pip: brax==0.14.2 gymnasium==1.4.0 jax==0.10.2 flax==0.12.8 numpy==2.4.6
"""What gymnasium's wrappers and brax's running_statistics make of one stream, CartPole-v1 by random actions."""

import json
import platform
from importlib.metadata import version

import gymnasium
import jax.numpy as jnp
import numpy as np
from brax.training.acme import running_statistics
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward
from make.golden import FOLDER, save

STEPS, ENVIRONMENTS, GAMMA = 60, 4, 0.99


def play(environments):
    """Observations [steps + 1, ...], rewards, and which episodes have ended, by the same actions each time."""
    random = np.random.default_rng(0)
    first, _ = environments.reset(seed=0)
    played = [environments.step(random.integers(0, 2, ENVIRONMENTS))[:4] for _ in range(STEPS)]
    observed, reward, terminated, truncated = (np.array(each) for each in zip(*played, strict=True))
    return np.concatenate([first[None], observed]), reward, terminated, truncated


def make():
    return gymnasium.make_vec("CartPole-v1", num_envs=ENVIRONMENTS, vectorization_mode="sync")


x, reward, terminated, truncated = play(make())
assert terminated.any() and not truncated.any()
arrays = {"x": x, "reward": np.float32(reward), "terminated": terminated}
arrays["gymnasium/y"] = play(NormalizeObservation(make()))[0]
arrays["gymnasium/reward"] = np.float32(play(NormalizeReward(make(), gamma=GAMMA))[1])

begun = np.concatenate([np.ones((2, ENVIRONMENTS), bool), ~terminated[:-1]])  # not the first of a new episode
for name, weights in (("brax", None), ("brax masked", begun)):
    state = running_statistics.init_state(jnp.zeros(4))
    for step, each in enumerate(x):
        state = running_statistics.update(state, jnp.asarray(each), weights=None if weights is None else weights[step])
    arrays[f"{name}/mean"], arrays[f"{name}/std"] = np.array(state.mean), np.array(state.std)
    arrays[f"{name}/y"] = np.array(running_statistics.normalize(jnp.asarray(x[-1]), state, max_abs_value=1.0))

broken = running_statistics.update(state, jnp.asarray(x[0]).at[0, 0].set(jnp.nan))
broken = running_statistics.update(broken, jnp.asarray(x[1]))
assert np.isnan(broken.mean[0]) and np.isnan(broken.std[0])  # one NaN is for ever

packages = [f"{package}=={version(package)}" for package in ("brax", "gymnasium")]
arrays["settings"] = json.dumps({"packages": packages, "python": platform.python_version(), "gamma": GAMMA})
save(FOLDER.parent / "streams.npz", arrays)
