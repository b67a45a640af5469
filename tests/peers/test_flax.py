"""Parity with Flax: decay = momentum, the biased variance runs, the state starts with full weight."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

import jbn

MASK = np.random.default_rng(1).uniform(size=(4, 5, 6)) < 0.7


def linen_steps(data, mask=None, **options):
    layer = nn.BatchNorm(use_running_average=None, **options)
    params = {"scale": jnp.asarray(parity.SCALE), "bias": jnp.asarray(parity.BIAS)}
    running = {"mean": jnp.zeros(parity.FEATURES), "var": jnp.ones(parity.FEATURES)}

    @jax.jit
    def step(x, dy, params, running):
        def train(x, params):
            variables = {"params": params, "batch_stats": running}
            return layer.apply(variables, x, use_running_average=False, mask=mask, mutable="batch_stats")

        y, pullback, after = jax.vjp(train, x, params, has_aux=True)
        evaluation = layer.apply({"params": params, **after}, x, use_running_average=True)
        return y, pullback(dy), after["batch_stats"], evaluation

    for x, dy in data:
        y, (dx, dparams), running, evaluation = step(x, dy, params, running)
        fields = (y, dx, dparams["scale"], dparams["bias"], running["mean"], running["var"], evaluation)
        yield parity.Step(*map(np.asarray, fields))


@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize("fast", [True, False])
def test_training_and_evaluation(feature_axis, fast):
    data = parity.batches(parity.SHAPES[feature_axis])
    got = linen_steps(data, momentum=0.9, epsilon=1e-3, axis=feature_axis, use_fast_variance=fast)
    ours = parity.jbn_steps(data, debias=False, unbiased=False, epsilon=1e-3, decay=0.9, feature_axis=feature_axis)
    # The fast variance loses digits where the mean is not 0.
    parity.assert_parity(list(got), ours, 1e-4 if fast else 2e-5)


def test_masked():
    """Flax normalizes masked positions too: they are compared after blanking."""
    data = [(x, dy * MASK[..., None]) for x, dy in parity.batches(parity.SHAPES[-1])]
    blank = partial(np.where, MASK[..., None])
    got = [
        step._replace(output=blank(step.output, 0), evaluation=blank(step.evaluation, 0))
        for step in linen_steps(data, MASK[..., None], momentum=0.99, epsilon=1e-5, use_fast_variance=False)
    ]
    ours = parity.jbn_steps(data, debias=False, unbiased=False, epsilon=1e-5, decay=0.99, weights=MASK)
    parity.assert_parity(got, ours)


def test_weights_that_differ_between_features():
    """A table with holes: Flax takes masks of the full shape too."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3, 2, (20, 4)).astype(np.float32), rng.uniform(size=(20, 4)) < 0.7
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
    y, after = layer.apply(layer.init(jax.random.key(0), x), x, mask=mask, mutable=["batch_stats"])
    params, state = jbn.init(4)
    ours, new = jbn.batch_norm(x, params, state, train=True, weights=mask, decay=0.0, unbiased=False)
    np.testing.assert_allclose(ours[mask], y[mask], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.mean, after["batch_stats"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(new.var, after["batch_stats"]["var"], rtol=1e-5)
