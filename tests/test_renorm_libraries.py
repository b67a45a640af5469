"""Batch renormalization over twenty steps beside what sbx, sb3-contrib and torchrl made of them, tests/golden/renorm.

A jump of the spread and a drift of the mean take r and d to their limits on the way.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jbn
from jbn._renorm import limits_at

GOLDEN = Path(__file__).parent / "golden/renorm"
PARAMS = jbn.Params(np.float32([0.5, -1, 2]), np.float32([0.1, 1, -3]))
RUNS = {
    "sbx": ("epsilon 0", "epsilon 1e-3"),
    "sb3-contrib": ("epsilon 1e-3",),
    "torchrl": ("late", "early", "smooth"),
}
UNBIASED = {"sbx": False, "sb3-contrib": True, "torchrl": True}  # the running variance
# Outputs up to 10, of variances that sbx takes as E[x^2] - E[x]^2: mean / std is 10 in the second feature's last steps.
CLOSE = {"rtol": 2e-5, "atol": 5e-5}


def made(library, run):
    """Batches [20, 8, 3], the settings, and what the library made of them: see tests/golden/make/golden.py."""
    with np.load(GOLDEN / f"{library}.npz") as file:
        parts = {part: file[f"{run}/{part}"] for part in ("y", "mean", "var", "evaluated")}
        return file["x"], json.loads(str(file[f"{run}/settings"])), parts


@partial(jax.jit, static_argnames="unbiased")
def ours(x, warmup_steps, epsilon, *, unbiased):
    """y, mean and var of each step, and the state behind them."""

    def step(carry, batch):
        steps, state = carry
        r_max, d_max = limits_at(steps, (3.0, 5.0), warmup_steps)
        options = {"r_max": r_max, "d_max": d_max, "epsilon": epsilon, "unbiased": unbiased}
        y, state = jbn.batch_renorm(batch, PARAMS, state, train=True, **options)
        return (steps + 1, state), {"y": y, "mean": state.mean, "var": state.var}

    (_, state), found = jax.lax.scan(step, (0, jbn.init(3, debias=False)[1]), x)
    return found | {"evaluated": jbn.normalize_running(x[-1], PARAMS, state, epsilon=epsilon)}


def by_hand(x, mean, var, correct, *, unbiased=False):
    """y [20, 8, 3] in float64; `correct(step, m, v, running mean, running var)` gives mean and slope of the map."""
    found = []
    for step, batch in enumerate(np.float64(x)):
        running = (mean[step - 1], var[step - 1]) if step else (np.zeros(3), np.ones(3))
        shift, slope = correct(step, batch.mean(0), batch.var(0, ddof=int(unbiased)), *map(np.float64, running))
        found.append(np.float64(PARAMS.scale) * (batch - shift) * slope + np.float64(PARAMS.bias))
    return np.array(found)


@pytest.mark.parametrize(("library", "run"), [("sbx", "epsilon 0"), ("torchrl", "late")])
def test_twenty_steps_are_the_librarys(library, run):
    x, settings, theirs = made(library, run)
    found = ours(x, settings["warmup_steps"], settings["epsilon"], unbiased=UNBIASED[library])
    jax.tree.map(partial(assert_allclose, **CLOSE), found, theirs)
    r, d = (
        x.std(1)[1:] / np.sqrt(theirs["var"][:-1]),
        (x.mean(1)[1:] - theirs["mean"][:-1]) / np.sqrt(theirs["var"][:-1]),
    )
    assert r.max() > 3 and d.max() > 3  # and there was something to correct


@pytest.mark.parametrize("library", RUNS)
def test_the_running_statistics_are_always_the_librarys(library):
    for run in RUNS[library]:
        x, settings, theirs = made(library, run)
        found = ours(x, settings["warmup_steps"], settings["epsilon"], unbiased=UNBIASED[library])
        for part in ("mean", "var", "evaluated"):
            assert_allclose(found[part], theirs[part], **CLOSE)


@pytest.mark.parametrize("library", ["sbx", "sb3-contrib"])
def test_epsilon_of_the_two_for_crossq_is_in_another_place(library):
    """Divided by sqrt(var / r^2 + epsilon), d times the root of var without it; sb3-contrib by n - 1."""
    x, settings, theirs = made(library, "epsilon 1e-3")
    epsilon, first = settings["epsilon"], settings["warmup_steps"] + (library == "sb3-contrib")

    def correct(step, mean, var, running_mean, running_var):
        spread = np.sqrt(running_var + epsilon)
        r, d = np.clip(np.sqrt(var + epsilon) / spread, 1 / 3, 3), np.clip((mean - running_mean) / spread, -5, 5)
        r, d = (r, d) if step >= first else (np.ones(3), np.zeros(3))
        return mean - d * np.sqrt(var) / r, 1 / np.sqrt(var / r**2 + epsilon)

    expected = by_hand(x, theirs["mean"], theirs["var"], correct, unbiased=library == "sb3-contrib")
    assert_allclose(theirs["y"], expected, **CLOSE)
    found = ours(x, first, epsilon, unbiased=UNBIASED[library])
    apart = np.abs(found["y"] - theirs["y"]).max((0, 1))
    if library == "sbx":
        assert_allclose(found["y"][:first], theirs["y"][:first], **CLOSE)
        assert apart[0] < 1e-2 < apart[2]  # epsilon is 1e-3, and the variance of the third feature 0.04


@pytest.mark.parametrize("run", ["early", "smooth"])
def test_the_correction_of_torchrl_grows_past_its_limits(run):
    """By the number of warm-ups that have gone by; `smooth` blends r and d themselves, where the paper moves limits."""
    x, settings, theirs = made("torchrl", run)
    warmup_steps, epsilon = settings["warmup_steps"], settings["epsilon"]

    def correct(step, mean, var, running_mean, running_var):
        spread, own = np.sqrt(running_var + epsilon), np.sqrt(var + epsilon)
        share = step / warmup_steps if run == "smooth" else step // warmup_steps
        r = 1 + (np.clip(own / spread, 1 / 3, 3) - 1) * share
        d = np.clip((mean - running_mean) / spread, -5, 5) * share
        return mean - d * own / r, r / own

    expected = by_hand(x, theirs["mean"], theirs["var"], correct)
    assert_allclose(theirs["y"], expected, **CLOSE)
    found = ours(x, warmup_steps, epsilon, unbiased=True)["y"]
    if run == "early":
        assert_allclose(found[:10], theirs["y"][:10], **CLOSE)
        assert np.abs(found[10:] - theirs["y"][10:]).max() > 1


def test_limits_of_a_layer():
    def at(step, limits=(3.0, 5.0), warmup_steps=7):
        return [float(limit) for limit in limits_at(jnp.int32(step), limits, warmup_steps)]

    assert at(6) == [1, 0] and at(7) == [3, 5] and at(10**6, (1.5, np.inf)) == [1.5, np.inf]
    assert at(0, warmup_steps=0) == [3, 5]
    assert at(25_000, jbn.renorm_limits) == [float(limit) for limit in jbn.renorm_limits(25_000)]
    for limits, message in [((0.5, 1.0), "r_max is 0.5"), ((2.0, -1.0), "d_max is -1.0")]:
        with pytest.raises(ValueError, match=message):
            at(0, limits)
