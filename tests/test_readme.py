"""The code in the README runs as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def names():
    """What the snippets define, run one after the other, and the length of each in lines."""
    found = {"lines": []}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        found["lines"].append(len(code.splitlines()))
        exec(code, found)
    return found


def test_the_training_step_learns_and_is_short(names):
    assert names["lines"][0] <= 25
    assert names["evaluated"] < 0.1 * jnp.var(names["target"])


def test_on_eight_devices_the_gradients_are_those_of_one(names):
    gradients, state = jax.grad(names["loss"], has_aux=True)(names["params"], names["state"], train=True)
    assert names["mesh"].size == 8
    # float32, another order of summation
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), names["gradients"], gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), names["new_state"], state)
