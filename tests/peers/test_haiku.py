"""Parity with Haiku: decay = decay_rate, the biased variance runs, and statistics are debiased."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest


def haiku_steps(data, data_format, decay_rate):
    options = {"create_scale": True, "create_offset": True, "decay_rate": decay_rate, "data_format": data_format}
    layer = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: hk.BatchNorm(**options, name="norm")(x, is_training=train))
    )
    params, state = layer.init(None, data[0][0], True)
    shape = params["norm"]["scale"].shape
    params = {"norm": {"scale": jnp.reshape(parity.SCALE, shape), "offset": jnp.reshape(parity.BIAS, shape)}}

    @jax.jit
    def step(x, dy, params, state):
        y, pullback, after = jax.vjp(lambda x, params: layer.apply(params, state, x, True), x, params, has_aux=True)
        return y, pullback(dy), after, layer.apply(params, after, x, False)[0]

    for x, dy in data:
        y, (dx, dparams), state, evaluation = step(x, dy, params, state)
        averages = (state[f"norm/~/{name}_ema"]["average"] for name in ("mean", "var"))
        fields = map(np.ravel, (dparams["norm"]["scale"], dparams["norm"]["offset"], *averages))
        yield parity.Step(np.asarray(y), np.asarray(dx), *fields, np.asarray(evaluation))


@pytest.mark.parametrize(("data_format", "feature_axis"), [("channels_last", -1), ("channels_first", 1)])
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_training_and_evaluation(data_format, feature_axis, decay):
    data = parity.batches(parity.SHAPES[feature_axis])
    ours = parity.jbn_steps(data, debias=True, unbiased=False, epsilon=1e-5, decay=decay, feature_axis=feature_axis)
    # Haiku's variance is E[x^2] - E[x]^2, which loses digits where the mean is not 0.
    parity.assert_parity(list(haiku_steps(data, data_format, decay)), ours, 1e-4)
