"""The presets against the formulas of the libraries, which tests/peers/test_conversion.py asks themselves."""

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose

import jbn
from jbn import presets

X = np.random.default_rng(0).normal(1, 2, (6, 3)).astype("f4")
ALL = {name: getattr(presets, name) for name in ("TORCH", "FLAX", "KERAS", "HAIKU")}


@pytest.mark.parametrize("name", ALL)
def test_step_and_evaluation(name):
    given = {"TORCH": (0.1, 1e-5, 1), "FLAX": (0.01, 1e-5, 0), "KERAS": (0.01, 1e-3, 0), "HAIKU": (0.1, 1e-5, 0)}
    fresh, epsilon, ddof = given[name]
    mean, var = X.mean(0, dtype="f8"), X.var(0, dtype="f8")
    params, state = jbn.init(3, debias=False)
    y, after = jbn.batch_norm(X, params, state, train=True, **ALL[name])
    z, _ = jbn.batch_norm(X, params, after, train=False, **ALL[name])
    moved = fresh * mean, 1 - fresh + fresh * X.var(0, dtype="f8", ddof=ddof)
    close = partial(assert_allclose, rtol=1e-5, atol=1e-6)  # float32; a wrong epsilon or ddof is more than 1e-4
    close(y, (X - mean) / np.sqrt(var + epsilon))
    close(after.mean, moved[0])
    close(after.var, moved[1])
    close(z, (X - moved[0]) / np.sqrt(moved[1] + epsilon))


@pytest.mark.parametrize("name", ALL)
def test_they_cannot_be_changed(name):
    with pytest.raises(TypeError, match="assignment"):
        ALL[name]["decay"] = 0.5
    assert (ALL[name] | {"decay": 0.5})["decay"] == 0.5
    assert ALL[name]["decay"] > 0.5 and set(ALL[name]) == {"decay", "epsilon", "unbiased"}
