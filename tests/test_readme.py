"""The code in the README runs as it stands there."""

import re
from pathlib import Path

import jax.numpy as jnp

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_training_step_runs_learns_and_is_short():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 25
    names = {}
    exec(code, names)
    assert names["evaluated"] < 0.1 * jnp.var(names["target"])
