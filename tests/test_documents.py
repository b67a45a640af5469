"""The code in README and docs runs as it stands there, and does what the text around it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

ROOT = Path(__file__).parents[1]


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def assert_same(values, state, expected_values, expected_state):
    # float32, another order of summation; the single pass over x costs up to 4 bits
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), values, expected_values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, expected_state)


@pytest.fixture(scope="module")
def readme():
    """What the snippets of the README define, run one after the other."""
    found = {}
    for code in snippets("README.md"):
        exec(code, found)
    return found


def test_the_training_step_learns_and_is_short(readme):
    assert len(snippets("README.md")[0].splitlines()) <= 25
    assert readme["evaluated"] < 0.1 * jnp.var(readme["target"])


def test_on_eight_devices_the_result_is_that_of_one(readme):
    assert readme["mesh"].size == 8
    y, state = jbn.batch_norm(readme["x"], readme["params"]["norm"], readme["state"], train=True)
    assert_same(readme["y"], readme["new_state"], y, state)


def test_every_way_of_the_page_on_parallelism_gives_the_gradients_of_one_device():
    found, ways = {}, 0
    for code in snippets("docs/parallel.md"):
        exec(code, found)
        if "gradients" not in found:
            continue
        gradients, state = found.pop("gradients"), found.pop("new_state")
        if not ways:
            expected = gradients, state
        assert_same(gradients, state, *expected)
        ways += 1
    assert ways == 7
    (sharded,) = [code for code in snippets("docs/parallel.md") if "on_mesh" in code]
    exec(sharded, found | {"mesh": jax.make_mesh((8,), ("data",))}, explicit := {})
    assert_same(explicit["gradients"], explicit["new_state"], *expected)
    np.testing.assert_allclose(found["means"], found["x"].reshape(4, 16, 8).mean(1), rtol=1e-6)


def recipes():
    """Heading and code of every recipe; under the title stands what all of them start with."""
    title, *sections = (ROOT / "docs/recipes.md").read_text().split("\n## ")
    codes = {section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for section in sections}
    return re.findall(r"```python\n(.*?)```", title, re.DOTALL), codes


IMPORTS, RECIPES = recipes()


@pytest.fixture(scope="module")
def imported():
    found = {}
    (code,) = IMPORTS
    exec(code, found)
    return found


@pytest.mark.parametrize("codes", RECIPES.values(), ids=RECIPES)
def test_recipe(codes, imported):
    (code,) = codes
    assert "assert" in code
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in a user's program
        exec(code, dict(imported))
