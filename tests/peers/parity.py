"""Six training steps and an evaluation, jbn's to set beside a peer's."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

import jbn

FEATURES = 3
SHAPES = {-1: (4, 5, 6, FEATURES), 1: (4, FEATURES, 5, 6)}
SCALE, BIAS = np.array([0.5, -1.0, 2.0], np.float32), np.array([0.1, 1.0, -3.0], np.float32)


class Step(NamedTuple):
    output: np.ndarray
    input_gradient: np.ndarray
    scale_gradient: np.ndarray
    bias_gradient: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    evaluation: np.ndarray  # of the same x, by the running statistics after the step


def batches(shape, steps=6):
    """(x, dy) of every step; mean and spread move from step to step."""
    rng = np.random.default_rng(0)
    return [
        (rng.normal(step, 1 + step, shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32))
        for step in range(steps)
    ]


def jbn_steps(data, *, debias, epsilon, decay, **options):
    """A `Step` for every (x, dy) of `data`; `decay` may be a sequence, of one value a step."""
    evaluate_options = {name: options[name] for name in ("feature_axis", "weights") if name in options}
    params, state = jbn.Params(jnp.asarray(SCALE), jnp.asarray(BIAS)), jbn.init(FEATURES, debias=debias)[1]

    @jax.jit
    def step(x, dy, params, state, decay):
        train = partial(jbn.batch_norm, train=True, decay=decay, epsilon=epsilon, **options)
        y, pullback, state = jax.vjp(lambda x, params: train(x, params, state), x, params, has_aux=True)
        evaluation, _ = jbn.batch_norm(x, params, state, train=False, epsilon=epsilon, **evaluate_options)
        return y, pullback(dy), state, evaluation

    steps = []
    for (x, dy), each in zip(data, np.broadcast_to(decay, len(data)), strict=True):
        y, (dx, dparams), state, evaluation = step(x, dy, params, state, each)
        steps.append(Step(*map(np.asarray, (y, dx, *dparams, state.mean, state.var, evaluation))))
    return steps


def assert_parity(theirs, ours, tolerance=2e-5):
    """All fields of all steps agree; prints and returns the largest differences.

    Both sides round sums of 120 float32 values near 1 to 10 in their own order: some 1e-6 of the largest.
    """
    largest = {
        field: max(np.abs(getattr(a, field) - getattr(b, field)).max() for a, b in zip(theirs, ours, strict=True))
        for field in Step._fields
    }
    print({field: f"{value:.1e}" for field, value in largest.items()})
    for a, b in zip(theirs, ours, strict=True):
        for field in Step._fields:
            expected = getattr(a, field)
            scale = max(1.0, np.abs(expected).max())
            assert_allclose(getattr(b, field), expected, rtol=0, atol=tolerance * scale, err_msg=field)
    return largest
